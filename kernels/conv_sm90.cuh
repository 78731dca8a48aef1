// Convolution of stride 1 on Hopper's tensor cores, which is a transposed convolution of any stride (stencil.h), alone or with
// ReLU and GroupNorm behind it.
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh; TF32-equivalent), channels-last: GEMM_M = (channel, phase) of the
// output, GEMM_N = positions of one (n, d) plane of the grid, GEMM_K = (tap, source channel). tiling_sm90.h tells how it is cut.
//
// A block is 1 producer and 2 consumer warpgroups, one block per multiprocessor, taking tiles from a queue. A box of the source
// plane, halo included, is copied once for all taps (h, w); a tap is a shift of the wgmma descriptor's start address by whole
// rows of shared memory. One consumer is some taps ahead of the other, so that its epilogue overlaps the other's products. An
// epilogue stages the outputs in shared memory in the order of global memory; producer warps store them by bulk copies.
// Consumers that have different rows get their weights through a ring each, from a producer warp each, which also stores that
// one's outputs. Consumers that have the same rows share one ring: one producer warp loads, the other stores.
//
// Fused: the epilogue stores relu(out) and, per run and row, the mean and the sum of squared deviations; other warps of the
// producer's warpgroup normalize the samples that are complete while the tensor cores work on the next (normalizer_sm90.cuh).
#pragma once

#include "conv_epilogue.cuh"
#include "ptx_sm90.cuh"
#include "tiling_sm90.h"

namespace conv_sm90 {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 104, kConsumerRegisters = 200;
constexpr int kTileSlots = 3;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// A stage of the ring through which samples are normalized.
struct NormPiece {
    float high, low, scale, offset;        // y = ((r - high) - low) * scale + offset
    float* y;
    int bytes;                             // 0: no more
};

// What a stage of weights is for: rows of shared memory by which the tap is shifted in its box, and flags.
constexpr int kOpensBox = 1 << 29, kLastTap = 1 << 30, kTapRows = kOpensBox - 1;

struct SharedHead {
    uint64_t input_full[kMaxInputStages], input_empty[kMaxInputStages];
    uint64_t weight_full[kMaxStages], weight_empty[kMaxStages];    // one ring behind the other
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t norm_full[kMaxNormStages], norm_empty[kMaxNormStages];
    uint64_t buffer_free[2], staged[2];    // by the consumer that used it
    int taps[kMaxStages];                  // of the weights' stages
    int item_rows[kMaxItems];              // of a stage's items, where there are several
    Tile tiles[kTileSlots];
    NormPiece pieces[kMaxNormStages];
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the stages begin behind the head");

// The parts of shared memory.
struct SharedParts {
    SharedHead& head;
    uint8_t *input, *weights, *buffers, *tables, *norm;    // (input_stages, box_rows, pitch, chunk) fp16 and margins; (weight_rings, weight_stages, 64, chunk) fp16; ...
    __device__ SharedParts(uint8_t* base, const Tiling& t) : head(*reinterpret_cast<SharedHead*>(base)) {
        input = base + kHeadBytes;
        weights = input + t.input_stages * t.input_bytes;
        buffers = weights + t.weight_rings * t.weight_stages * t.weight_bytes;
        tables = buffers + t.buffers * t.buffer_bytes;
        norm = tables + 2 * t.table_bytes;
    }
    // Where a consumer stages.
    __device__ float* buffer(const Tiling& t, int consumer) const { return reinterpret_cast<float*>(buffers + (t.buffers == 2 ? consumer : 0) * t.buffer_bytes); }
};

#ifdef HAS_SM90A

// ------------------------------------------------------------------------------------------------------- Producer

// Whether bulk copies store the staged outputs.
__device__ __forceinline__ bool stores_bulk(const Parameters& a) { return a.dtype == kFloat32 && a.p.t.bulk; }

// One of two warps. The first takes tiles from the queue and loads the boxes. With two rings of weights, each loads those of one
// consumer and stores its outputs (run); with one, the first loads them (run) and the second stores everything (run_stores).
struct Producer {
    const Parameters& a;
    const SharedParts& shared;
    const CUtensorMap *x_map, *w_map, *out_map;
    int consumer;
    RingPosition slot, in, weight;
    const Tile* storing = nullptr;    // the tile whose outputs are to be stored, or are being read by their copies
    bool stored = false;
    int stored_before = -1;           // the sample of the copies before those
    uint32_t phases = 0;              // of the stagings, a bit for each consumer

    __device__ bool elected() const { return threadIdx.x % 32 == 0; }

    // Stores the outputs of the tile before: by bulk copies of what is 16-byte aligned.
    __device__ __forceinline__ void store() {
        if (storing == nullptr || stored) return;
        stored = true;
        mbarrier_wait(shared.head.staged + consumer, phases >> consumer & 1);
        phases ^= 1u << consumer;
        const float* buffer = shared.buffer(a.p.t, consumer);
        const Run& run = storing->run[consumer];
        if (a.p.t.tensor_store && a.dtype == kFloat32) {
            if (elected() && run.count > 0 && run.od0 >= 0 && run.od0 < a.p.s.axis[0].out)
                tma_store_4d(out_map, buffer, run.h0 * a.p.t.tile_w + run.q0, run.od0, run.channel0, storing->n);
            bulk_commit_group();
        } else if (stores_bulk(a)) {
            float* out = static_cast<float*>(a.out);
            for_each_piece(a.p, *storing, run, threadIdx.x % 32, regions_of(a.p, run), 32, [&](int64_t at, int region, int offset, int count) {
                const int staged = region * a.p.t.region_stride + offset;
                const int head = min(count, int(-at & 3)), body = (count - head) / 4 * 4;
                if (body > 0) bulk_store(out + at + head, buffer + staged + head, body * 4);
#pragma unroll 1
                for (int k = 0; k < head; k++) out[at + k] = buffer[staged + k];
#pragma unroll 1
                for (int k = head + body; k < count; k++) out[at + k] = buffer[staged + k];
            });
            bulk_commit_group();
        }
        if (a.fusion.num_groups > 0) {
            bulk_wait_group<1>();
            report_landed();
            stored_before = storing->n;
        }
    }

    // The copies have read the buffer.
    __device__ __forceinline__ void free_buffer() {
        if (storing == nullptr) return;
        bulk_wait_group_read<0>();
        mbarrier_arrive(shared.head.buffer_free + consumer);
        __syncwarp();
        if (elected()) mbarrier_arrive(shared.head.tile_empty + (storing - shared.head.tiles));
        storing = nullptr;
    }

    __device__ __forceinline__ void report_landed() {
        __syncwarp();
        if (stored_before >= 0 && elected()) red_release_gpu(a.workspace.runs_done + stored_before, 1);
    }

    __device__ __forceinline__ void report_last() {
        if (a.fusion.num_groups == 0) return;
        bulk_wait_group<0>();
        report_landed();
    }

    __device__ __forceinline__ void run_stores() {
        SharedHead& head = shared.head;
        while (true) {
            mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            for (consumer = 0; consumer < 2; consumer++) {
                storing = &tile, stored = false;
                store();
                free_buffer();
            }
            slot.advance(kTileSlots);
        }
        report_last();
    }

    __device__ __forceinline__ void run() {
        const Tiling& t = a.p.t;
        const bool stores = t.weight_rings == 2;
        const int ring = consumer * t.weight_stages;
        const StencilAxis& aw = a.p.s.axis[2];
        SharedHead& head = shared.head;
        const int box_bytes = t.box_bytes();
        unsigned next = consumer == 0 && elected() ? atomicAdd(a.workspace.tile_ticket, 1u) : 0;
        while (true) {
            Tile& tile = head.tiles[slot.stage];
            if (consumer == 0) {
                mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
                if (elected()) {
                    if (next < t.tiles) locate(a.p, next, tile);
                    else tile.n = -1;
                    mbarrier_arrive(head.tile_full + slot.stage);
                    if (next < t.tiles) next = atomicAdd(a.workspace.tile_ticket, 1u);
                }
                __syncwarp();
            } else {
                mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            }
            const bool last = tile.n < 0;
            const int w_start = aw.first + tile.w0 - aw.shift[aw.taps - 1], row = tile.run[consumer].row_tile * kRows;
            int taps = 0;
            Cursor at(a.p, tile);
            bool more = !last && at.next_box();
            while (more) {
                // The consumer stages the tile before, and then frees the next stage. The other one may need the buffer before it frees a box.
                if (consumer == 0) {
                    if (taps > 0) store(), free_buffer();
                    mbarrier_wait(head.input_empty + in.stage, in.phase ^ 1);
                    if (elected()) {
                        mbarrier_arrive_expect_tx(head.input_full + in.stage, box_bytes);
                        tma_load_5d(shared.input + in.stage * t.input_bytes, x_map, head.input_full + in.stage, tile.source_channel + at.c, w_start, at.source_row(), at.plane(), tile.n);
                    }
                    in.advance(t.input_stages);
                }
                BoxTaps tap(at);
                more = at.next_box();
                for (int flags = kOpensBox; tap.next(); flags = 0) {
                    if (taps == t.weight_stages) store();
                    if (taps == t.weight_stages + 2) free_buffer();
                    const int info = tap.rows | flags | (tap.last() && !more ? kLastTap : 0), column = tap.weight_column();
                    mbarrier_wait(head.weight_empty + ring + weight.stage, weight.phase ^ 1);
                    if (elected()) {
                        uint64_t* full = head.weight_full + ring + weight.stage;
                        uint8_t* stage = shared.weights + (ring + weight.stage) * t.weight_bytes;
                        head.taps[ring + weight.stage] = info;
                        mbarrier_arrive_expect_tx(full, t.weight_bytes);
                        tma_load_3d(stage, w_map, full, column, row, tap.tap);
                        if (t.items > 1 && t.products > 1) tma_load_3d(stage + t.weight_bytes / 2, w_map, full, column + t.chunk, row, tap.tap);
                    }
                    __syncwarp();
                    weight.advance(t.weight_stages);
                    taps++;
                }
            }
            store();
            free_buffer();
            if (last) break;
            if (stores) storing = &tile, stored = false;
            slot.advance(kTileSlots);
        }
        if (stores) report_last();
    }
};

// ------------------------------------------------------------------------------------------------------- Consumer

// One of the two rows that a lane has of each tile: row 16 * warp + lane / 4, and the one 8 further, in the next granule.
struct LaneRow {
    int channel, phase, packed_d;                // channel from the row tile's first on; phase among the packed ones, and of D
    int region;                                  // first float of its region
    int table;                                   // first entry of its phase in the table of staged places
    bool used;
    unsigned weight_max;                         // of the tile's channel
    float scale, bias;
    bool live;                                   // there is such an output plane and channel
};

// What a consumer warpgroup carries from tile to tile.
struct Consumer {
    const Parameters& a;
    const SharedParts& shared;
    int warpgroup;                 // 0 or 1
    RingPosition in, weight, slot;
    LaneRow rows[2];
    scaled_half::SampleMax activation_max;    // of the tile's sample
    float first_scale;
    int staged = 0;                // how often this one staged outputs
    int4 table_key = {-1, 0, 0, 0};    // what the table was made for
    bool first = true;

    __device__ __forceinline__ Consumer(const Parameters& a, const SharedParts& shared) : a(a), shared(shared), warpgroup(threadIdx.x / 128 - 1) {
        const Problem& p = a.p;
        const Tiling& t = p.t;
        const int phases_d = packed_phases(t, p.s, 0), phases_h = packed_phases(t, p.s, 1), phases_w = p.s.axis[2].phases;
        for (int half = 0; half < 2; half++) {
            LaneRow& row = rows[half];
            const int granule = threadIdx.x / 32 % 4 * 2 + half, octet = granule / t.rows.packed_phases;
            row.phase = granule % t.rows.packed_phases;
            row.used = octet < t.rows.octets;
            row.channel = octet * 8 + threadIdx.x % 32 / 4;
            row.packed_d = row.phase / phases_w / phases_h;
            row.region = row.used ? (row.channel * phases_d + row.packed_d) * t.region_stride : 0;
            row.table = row.phase % (phases_h * phases_w) * t.block_n;
        }
    }
    __device__ bool elected() const { return threadIdx.x % 32 == 0; }    // of a warp
    __device__ void sync() const { named_barrier(1 + warpgroup, 128); }
    __device__ float* buffer() const { return shared.buffer(a.p.t, warpgroup); }
    __device__ int* table() const { return reinterpret_cast<int*>(shared.tables + warpgroup * a.p.t.table_bytes); }

    // With one buffer the consumers take turns: the first waits for the second's release of the tile before, the second for the
    // first's release of this tile. With two, each waits for its own of the tile before.
    __device__ __forceinline__ void wait_for_buffer() {
        const int shared_buffer = a.p.t.buffers == 1, releaser = warpgroup ^ shared_buffer, release = shared_buffer && warpgroup == 1 ? staged : staged - 1;
        mbarrier_wait(shared.head.buffer_free + releaser, release & 1);
        staged++;
    }

    // Loads what the epilogue will need of global memory; prepare_rows makes use of it, many cycles later.
    __device__ __forceinline__ void load_constants(const Tile& tile) {
        activation_max = a.activation_max[tile.n];
        const Run& run = tile.run[warpgroup];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            LaneRow& row = rows[half];
            const int channel = run.channel0 + row.channel, od = run.od0 + row.packed_d;
            row.live = row.used && run.outer < outer_phases(a.p) && channel < a.p.C_out && od >= 0 && od < a.p.s.axis[0].out;
            row.weight_max = row.live ? a.weight_max[channel] : 0;
            row.bias = row.live && a.bias ? load_as_float(a.bias, a.dtype, channel) : 0.0f;
        }
    }
    __device__ __forceinline__ void prepare_rows() {
        first_scale = scaled_half::power_of_two(-scaled_half::shift_of(activation_max));
#pragma unroll
        for (int half = 0; half < 2; half++) rows[half].scale = scaled_half::power_of_two(-scaled_half::shift_of(rows[half].weight_max));
    }
};

// The sums of one tile: d (64 rows, kBlockN positions) of this warpgroup. kSteps: chunk / 16 where a stage has one item, known to the
// compiler, which keeps the wgmmas closer together; or 0: any chunk, any number of items.
template <int kBlockN, int kSteps>
__device__ __forceinline__ void multiply(Consumer& me, const Tile& tile, float (&d)[kBlockN / 2]) {
    const Tiling& t = me.a.p.t;
    SharedHead& head = me.shared.head;
    const int row_bytes = kSteps > 0 ? kSteps * 32 : t.chunk * 2;
    const uint64_t descriptor = wgmma_descriptor_base(row_bytes);
    const int b_row = tile.run[me.warpgroup].b_row, ring = t.weight_rings == 2 ? me.warpgroup * t.weight_stages : 0;
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
    int done_weight = -1, done_input = -1, open_input = -1;    // stages whose last reader is the wgmma group in flight
    int taps = 0;
    uint32_t box = 0;
    auto let_the_other_begin = [&] {
        if (me.first && me.warpgroup == 0) named_barrier_arrive(3, 256);
        me.first = false;
    };
    for (int info = tile.empty ? kLastTap : 0; !(info & kLastTap);) {
        mbarrier_wait(head.weight_full + ring + me.weight.stage, me.weight.phase);
        info = __shfl_sync(~0u, me.elected() ? head.taps[ring + me.weight.stage] : 0, 0);    // read by the lane that releases the stage
        if (info & kOpensBox) {
            if (open_input >= 0) {
                done_input = open_input;
                let_the_other_begin();
            }
            mbarrier_wait(head.input_full + me.in.stage, me.in.phase);
            box = shared_address(me.shared.input + me.in.stage * t.input_bytes) + b_row * row_bytes;
            open_input = me.in.stage;
            me.in.advance(t.input_stages);
        }
        uint32_t b = box + (info & kTapRows) * row_bytes, w = shared_address(me.shared.weights + (ring + me.weight.stage) * t.weight_bytes);
        wgmma_fence();
        if constexpr (kSteps > 0) {
#pragma unroll
            for (int step = 0; step < kSteps; step++) wgmma_m64k16_f16<0>(d, wgmma_descriptor(descriptor, w + step * 32), wgmma_descriptor(descriptor, b + step * 32));
        } else {
#pragma unroll 1
            for (int i = 0; i < t.items; i++) {
                if (t.items > 1) b = box + ((info & kTapRows) + head.item_rows[i]) * row_bytes;
#pragma unroll 1
                for (int at = 0; at < row_bytes; at += 32) wgmma_m64k16_f16<0>(d, wgmma_descriptor(descriptor, w + at), wgmma_descriptor(descriptor, b + at));
                w += kRows * row_bytes;
            }
        }
        wgmma_commit_group();
        ++taps;
        if (taps == t.lag) let_the_other_begin();
        wgmma_wait_group<1>();
        if (me.elected() && done_weight >= 0) mbarrier_arrive(head.weight_empty + ring + done_weight);
        if (me.elected() && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
        done_input = -1, done_weight = me.weight.stage;
        me.weight.advance(t.weight_stages);
    }
    me.load_constants(tile);
    wgmma_wait_group<0>();
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) keep_after(d[i]);    // or ptxas serializes the wgmmas
    if (me.elected() && done_weight >= 0) mbarrier_arrive(head.weight_empty + ring + done_weight);
    if (me.elected() && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
    if (me.elected() && open_input >= 0) mbarrier_arrive(head.input_empty + open_input);
    let_the_other_begin();
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// Where a lane's row is staged.
__device__ __forceinline__ float* staged_region(const Consumer& me, const Tile& tile, const LaneRow& row) {
    const Run& run = tile.run[me.warpgroup];
    return me.buffer() + row.region + (me.a.p.t.contiguous ? int(region_origin(me.a.p, tile, run, run.channel0 + row.channel, run.od0 + row.packed_d)) & 3 : 0);
}

// The moments of each row: sums of deviations from one of the lane's values, whose own squared deviation is part of the result,
// which bounds the cancellation. valid: bit j * 2 + e tells that position j * 8 + lane % 4 * 2 + e is an output.
template <int kBlockN>
__device__ __forceinline__ void leave_moments(const Consumer& me, const Tile& tile, const uint32_t (&valid)[2][(kBlockN + 127) / 128], const float (&v)[kBlockN / 2]) {
    const Parameters& a = me.a;
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[me.warpgroup];
    const int lane = threadIdx.x % 32;
    const int64_t part = index_of_run(p, tile, me.warpgroup);
    const int phases = p.s.phases();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const LaneRow& row = me.rows[half];
        float shift = 0.0f, sum = 0.0f, squares = 0.0f, count = 0.0f;
#pragma unroll
        for (int i = 0; i < (kBlockN + 127) / 128; i++) count += __popc(valid[half][i]);
        const bool filled = t.dense ? run.count >= kBlockN : !t.whole_rows;    // positions that are no output hold the first one's value
        if (filled) {
            shift = __shfl_sync(~0u, v[half * 2], lane & ~3);
        } else {
#pragma unroll
            for (int i = (kBlockN + 127) / 128 - 1; i >= 0; i--)
                if (valid[half][i]) {
                    const int bit = i * 32 + __ffs(valid[half][i]) - 1, q = bit / 2 * 8 + lane % 4 * 2 + bit % 2;
                    shift = staged_region(me, tile, row)[t.dense ? q : me.table()[row.table + q]];
                }
        }
        auto add = [&](float deviation) {
            sum += deviation;
            squares = fmaf(deviation, deviation, squares);
        };
        if (filled) {
#pragma unroll
            for (int i = 0; i < kBlockN / 4; i++) add(v[i / 2 * 4 + half * 2 + i % 2] - shift);
        } else {
#pragma unroll
            for (int i = 0; i < kBlockN / 4; i++) add(valid[half][i / 32] & 1u << i % 32 ? v[i / 2 * 4 + half * 2 + i % 2] - shift : 0.0f);
        }
        const float of_lane = count > 0 ? sum / count : 0.0f, total = quad_sum(count);    // the lanes' means and squares, combined
        squares -= sum * of_lane;
        const float all = quad_sum(count * (shift + of_lane)), mean = total > 0 ? all / total : 0.0f;
        const float off = shift + of_lane - mean;
        squares = quad_sum(fmaf(count * off, off, squares));
        if (lane % 4 == 0 && row.live) {
            const int phase = run.outer * t.rows.packed_phases + row.phase;
            a.workspace.moments[(part * phases + phase) * t.channels() + run.channel0 + row.channel] = make_float2(mean, squares);
            a.workspace.counts[part * phases + phase] = total;    // the same from every channel
        }
    }
}

// Scales back, adds the bias, applies ReLU, stages and stores, and leaves the moments where the fusion wants them.
template <int kBlockN>
__device__ __forceinline__ void finish(Consumer& me, const Tile& tile, float (&v)[kBlockN / 2]) {
    const Parameters& a = me.a;
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[me.warpgroup];
    const int lane = threadIdx.x % 32;
    const float lowest = a.apply_relu ? 0.0f : -INFINITY;
    me.prepare_rows();
    me.wait_for_buffer();
    if (!t.dense) {
        const int4 key = table_key(p, tile, run);
        if (key.x != me.table_key.x || key.y != me.table_key.y || key.z != me.table_key.z || key.w != me.table_key.w) {
            fill_table<kBlockN>(p, tile, run, [&] { return me.table(); });
            me.table_key = key;
        }
        me.sync();
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const LaneRow& row = me.rows[half];
        if (!row.live) continue;
        auto value = [&](int i) { return v[i] = value_of(v[i], me.first_scale, row.scale, row.bias, lowest); };
        float* region = staged_region(me, tile, row);
        if (t.dense) {    // position q is float q of its region
            float2* at = reinterpret_cast<float2*>(region + lane % 4 * 2);
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) at[j * 4] = make_float2(value(j * 4 + half * 2), value(j * 4 + half * 2 + 1));
        } else {
            const int* table = me.table() + row.table + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) {
                const int2 place = *reinterpret_cast<const int2*>(table + j * 8);
                const float low = value(j * 4 + half * 2), high = value(j * 4 + half * 2 + 1);
                if (place.x >= 0) region[place.x] = low;
                if (place.y >= 0) region[place.y] = high;
            }
        }
    }
    fence_proxy_async();
    if (!stores_bulk(a)) {
        me.sync();
        const float* buffer = me.buffer();
        for_each_piece(p, tile, run, threadIdx.x / 32 % 4, regions_of(p, run), 4, [&](int64_t at, int region, int offset, int count) {
            for (int k = lane; k < count; k += 32) store_as(a.out, a.dtype, at + k, buffer[region * t.region_stride + offset + k]);
        });
    }
    if (a.fusion.num_groups > 0) {
        uint32_t valid[2][(kBlockN + 127) / 128] = {};    // bit j * 2 + e: position j * 8 + lane % 4 * 2 + e is an output
        const bool fill = !t.whole_rows && !t.dense;      // the first position is one: its value takes the place of those that are none
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const LaneRow& row = me.rows[half];
            const float filling = __shfl_sync(~0u, v[half * 2], lane & ~3);
            if (!row.live) continue;
            if (t.dense) {
                const int live = run.count - lane % 4 * 2, bits = max(0, live) / 8 * 2 + min(max(0, live) % 8, 2);
#pragma unroll
                for (int i = 0; i < (kBlockN + 127) / 128; i++) valid[half][i] = bits >= i * 32 + 32 ? ~0u : bits <= i * 32 ? 0u : (1u << (bits - i * 32)) - 1;
            } else {
                const int* table = me.table() + row.table + lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < kBlockN / 8; j++) {
                    const int2 place = *reinterpret_cast<const int2*>(table + j * 8);
                    if (place.x < 0 && fill) v[j * 4 + half * 2] = filling;
                    if (place.y < 0 && fill) v[j * 4 + half * 2 + 1] = filling;
                    valid[half][j / 16] |= (place.x >= 0 ? 1u << j * 2 % 32 : 0u) | (place.y >= 0 ? 2u << j * 2 % 32 : 0u);
                }
            }
        }
        leave_moments<kBlockN>(me, tile, valid, v);
    }
    mbarrier_arrive(me.shared.head.staged + me.warpgroup);
}

template <int kBlockN>
__device__ __forceinline__ void consume(const Parameters& a, const SharedParts& shared) {
    Consumer me(a, shared);
    SharedHead& head = shared.head;
    float d[kBlockN / 2];
    while (true) {
        mbarrier_wait(head.tile_full + me.slot.stage, me.slot.phase);
        const Tile& tile = head.tiles[me.slot.stage];
        if (tile.n < 0) break;
        if (me.first && me.warpgroup == 1) named_barrier(3, 256);
        if (a.p.t.chunk == 64 && a.p.t.items == 1) multiply<kBlockN, 4>(me, tile, d);
        else multiply<kBlockN, 0>(me, tile, d);
        finish<kBlockN>(me, tile, d);
        mbarrier_arrive(head.tile_empty + me.slot.stage);
        me.slot.advance(kTileSlots);
    }
}

#endif  // HAS_SM90A

}  // namespace conv_sm90
