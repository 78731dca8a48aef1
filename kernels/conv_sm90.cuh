// Convolution of stride 1 on Hopper's tensor cores, which is a transposed convolution of any stride (stencil.h), alone or with
// ReLU and GroupNorm behind it.
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh; TF32-equivalent), channels-last: GEMM_M = (channel, phase) of the
// output, GEMM_N = positions of one (n, d) plane of the grid, GEMM_K = (tap, source channel). tiling_sm90.h tells how it is cut.
//
// A block is a warpgroup whose warps have a task each (publisher, loaders, storers) and two or three consumer warpgroups, which compute;
// one block per multiprocessor, taking tiles from a queue. A box of the source plane, halo included, is copied once for all taps (h, w);
// a tap is a shift of the wgmma descriptor's start address by whole rows of shared memory. Of two consumers, one is some taps ahead of
// the other, so that its epilogue overlaps the other's products; three, of fewer sums each, where epilogues count for more (tiling_sm90.h).
// An epilogue stages the outputs in shared memory in the order of global memory; the storers send them off by bulk copies.
// Consumers that have different rows get their weights through a ring each, from a loader each; consumers that have the same rows share
// one ring, and boxes have the other loader. Where that ring has room for all weights of a row tile, they stay there, and one loader is
// enough: a block then has a queue of that row tile's own, and helps with the others when it is empty.
//
// Fused: the epilogue also leaves, per run and row, the mean and the sum of squared deviations of relu(out), of which
// conv_statistics.cuh makes the statistics, or blocks of this kernel that also normalize (conv_normalizer.cuh).
#pragma once

#include <type_traits>

#include "conv_normalizer.cuh"
#include "pipeline_sm90.cuh"
#include "tiling_sm90.h"

namespace conv_sm90 {

constexpr int kTileSlots = 4;
constexpr int kBeginBarrier = 1 + kMaxWarpgroups, kStagesFreeBarrier = kBeginBarrier + 1, kStatisticsBarrier = kBeginBarrier + 2;    // behind the consumers' own

// Threads of a block with so many consumers, and registers of a thread.
HOST_DEVICE constexpr int threads_of(int consumers) { return 128 + 128 * consumers; }
HOST_DEVICE constexpr int producer_registers(int consumers) { return consumers == 2 ? 104 : 96; }
HOST_DEVICE constexpr int consumer_registers(int consumers) { return consumers == 2 ? 200 : 136; }
static_assert(128 * producer_registers(2) + 2 * 128 * consumer_registers(2) <= 65536 && 128 * producer_registers(3) + 3 * 128 * consumer_registers(3) <= 65536, "the register file of a multiprocessor");

// What a stage of weights is for: rows of shared memory by which the tap is shifted in its box, and flags.
constexpr int kOpensBox = 1 << 29, kLastTap = 1 << 30, kTapRows = kOpensBox - 1;

struct SharedHead {
    uint64_t input_full[kMaxInputStages], input_empty[kMaxInputStages];
    uint64_t weight_full[kMaxStages], weight_empty[kMaxStages];    // one ring behind the other
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t buffer_free[kMaxWarpgroups], staged[2][kMaxWarpgroups];    // by the consumer that used it; by the tile's parity too, as storers take turns
    uint64_t piece_full[4 * kMaxWarpgroups][kPieceStages];    // of the consumers' warps, when they normalize
    int taps[kMaxStages];                  // of the weights' stages
    int item_rows[kMaxItems + 1];          // of a stage's items, where there are several
    Tile tiles[kTileSlots];
    SharedStatistics statistics;
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the stages begin behind the head");

// The parts of shared memory.
struct SharedParts {
    SharedHead& head;
    uint8_t *input, *weights, *buffers, *tables;    // (input_stages, planes, box_rows, pitch, chunk) fp16 and margins; (weight_rings, weight_stages, 64, chunk) fp16; ...
    __device__ SharedParts(uint8_t* base, const Tiling& t) : head(*reinterpret_cast<SharedHead*>(base)) {
        input = base + kHeadBytes;
        weights = input + t.input_stages * t.input_bytes;
        buffers = weights + t.weight_rings * t.weight_stages * t.weight_bytes;
        tables = buffers + t.buffers * t.buffer_bytes;
    }
    // Where a consumer stages.
    __device__ float* buffer(const Tiling& t, int consumer) const { return reinterpret_cast<float*>(buffers + (t.buffers > 1 ? consumer : 0) * t.buffer_bytes); }
};

#ifdef HAS_SM90A

// ------------------------------------------------------------------------------------------------------ Producers

// A warp, which may be a storer too: takes tiles from the queues and tells everyone. A block's first tile is that of its own number, unless blocks
// wait for each other (conv_normalizer.cuh): then none is kept for a block that may not run yet.
struct Publisher {
    const Parameters& a;
    SharedHead& head;
    int queue, left;                        // where it takes tiles; queues that were not empty yet
    int most;                               // tiles that it takes
    int next;                               // tile, or -1: no more
    bool waited = false;                    // for the kernel before this one: others than the first tile are not taken earlier
    RingPosition slot;                      // to fill next

    __device__ __forceinline__ Publisher(const Parameters& a, SharedHead& head) : a(a), head(head), queue(blockIdx.x % a.p.t.queues), left(a.p.t.queues), most(blockIdx.x < gridDim.x - a.norm.blocks ? a.p.t.tiles : kFirstTiles), next(blockIdx.x) {}

    __device__ __forceinline__ void take() {
        if (!waited) wait_for_previous_kernel();
        waited = true;
        const int queues = a.p.t.queues;
        if (most-- == 0) left = 0;
        for (next = -1; next < 0 && left > 0;) {
            const unsigned first = a.norm.blocks > 0 ? 0 : (gridDim.x - queue + queues - 1) / queues;    // these are the blocks'
            const unsigned ticket = __shfl_sync(~0u, threadIdx.x % 32 == 0 ? atomicAdd(a.workspace.tile_tickets + queue, 1u) + first : 0, 0);
            if (ticket * queues + queue < a.p.t.tiles) next = ticket * queues + queue;
            else queue = queue + 1 < queues ? queue + 1 : 0, left--;
        }
    }

    // False: there was no more, which everyone knows now.
    __device__ __forceinline__ bool publish() {
        if (a.norm.blocks > 0 && !waited) take();
        Tile& tile = head.tiles[slot.stage];
        const bool more = next >= 0;
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        const int lane = threadIdx.x % 32;
        if (lane < a.p.t.warpgroups) {
            Place place = {-1};
            if (more) place = place_of(a.p, next), tile.run[lane] = run_of(a.p, place, lane);
            if (lane == 0) static_cast<Place&>(tile) = place;
            mbarrier_arrive(head.tile_full + slot.stage);
        }
        __syncwarp();
        slot.advance(kTileSlots);
        if (more) take();
        return more;
    }
};

// A warp: loads a ring's weights, boxes, or both. Each lane knows one of the steps that come next, a tap and its box.
// Tiles with the same live taps have the same steps; where there are no more than lanes, they are looked up once.
struct Loader {
    const Parameters& a;
    const SharedParts& shared;
    const CUtensorMap *x_map, *w_map;
    int ring;
    bool loads_boxes, loads_weights;
    RingPosition slot, in, weight;
    int kept = -1, kept_row = -1;      // which weights lane i's stage i of the ring has, of this row
    struct Step {
        int rows, weights;             // rows with kOpensBox; which weights: tap << 20 | column / 16
        int plane, row, channel;       // of the box, from the tile's on
    } step = {};
    int steps = 0, steps_live = -1;    // known ones; of tiles with these live taps they are all

    // Takes the steps of the box at the cursor, from `tap` on, that there are lanes for. more: whether there are others, then.
    __device__ __forceinline__ void take_steps(const Tile& tile, Cursor& at, int& tap, bool& more) {
        const BoxTaps taps(at);
        const int lane = threadIdx.x % 32, own = tap + lane - steps, taken = min(taps.count - tap, 32 - steps);
        if (lane >= steps && lane < steps + taken) {
            const BoxTaps::Tap t = taps[own];
            step = {t.rows | (own == 0 ? kOpensBox : 0), t.tap << 20 | t.column / 16, at.plane() - tile.d, at.source_row() - tile.h0, at.c};
        }
        steps += taken, tap += taken;
        if (tap == taps.count) more = at.next_box(), tap = 0;
    }

    // Lane `i` loads its step's box.
    __device__ __forceinline__ void load_box(const Tile& tile, int i) {
        const StencilAxis& aw = a.p.s.axis[2];
        SharedHead& head = shared.head;
        mbarrier_wait(head.input_empty + in.stage, in.phase ^ 1);
        if (threadIdx.x % 32 == i) {
            mbarrier_arrive_expect_tx(head.input_full + in.stage, a.p.t.box_bytes());
            tma_load_5d(shared.input + in.stage * a.p.t.input_bytes, x_map, head.input_full + in.stage, tile.source_channel + step.channel, aw.first + tile.w0 - aw.shift[aw.taps - 1],
                        tile.h0 + step.row, tile.d + step.plane, tile.sample);
        }
        __syncwarp();
        in.advance(a.p.t.input_stages);
    }

    // Lane `i` loads its step's weights, unless the stage has them already. row: of the packed ones.
    __device__ __forceinline__ void load_weights(int i, int row, bool last) {
        const Tiling& t = a.p.t;
        SharedHead& head = shared.head;
        const int lane = threadIdx.x % 32, at = ring * t.weight_stages + weight.stage;
        mbarrier_wait(head.weight_empty + at, weight.phase ^ 1);
        const int is_kept = __shfl_sync(~0u, kept, weight.stage), wanted = __shfl_sync(~0u, step.weights, i);
        if (lane == weight.stage) kept = wanted;
        if (lane == i) head.taps[at] = step.rows | (last ? kLastTap : 0);
        if (lane == i && is_kept == wanted) {
            mbarrier_arrive(head.weight_full + at);
        } else if (lane == i) {
            const int tap = wanted >> 20, column = (wanted & 0xfffff) * 16;
            uint8_t* stage = shared.weights + at * t.weight_bytes;
            mbarrier_arrive_expect_tx(head.weight_full + at, t.weight_bytes);
            tma_load_3d(stage, w_map, head.weight_full + at, column, row, tap);
            if (t.items > 1 && t.products > 1) tma_load_3d(stage + t.weight_bytes / 2, w_map, head.weight_full + at, column + t.chunk, row, tap);
        }
        __syncwarp();
        weight.advance(t.weight_stages);
    }

    __device__ __forceinline__ void run() {
        SharedHead& head = shared.head;
        mbarrier_wait(head.tile_full, 0);    // the first tile
        wait_for_previous_kernel();
        while (true) {
            mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            const int row = tile.run[ring].row_tile * kRows;
            if (row != kept_row) kept = -1, kept_row = row;
            Cursor at(a.p, tile);
            int tap = 0;
            bool more = false, all = true;    // whether the lanes know all steps
            if (at.tile_live != steps_live) {
                steps_live = at.tile_live, steps = 0;
                more = at.next_box();
            }
            for (int i = 0;; i++) {
                if (i == steps) {    // take others as late as can be: the first loads do not wait for all of them
                    if (!more) break;
                    if (steps == 32) i = steps = 0, all = false;
                    take_steps(tile, at, tap, more);
                }
                if (loads_boxes && __shfl_sync(~0u, step.rows, i) & kOpensBox) load_box(tile, i);
                if (loads_weights) load_weights(i, row, i == steps - 1 && !more);
            }
            if (!all) steps_live = -1;
            mbarrier_arrive(head.tile_empty + slot.stage);
            slot.advance(kTileSlots);
        }
    }
};

// Whether bulk copies store the staged outputs.
__device__ __forceinline__ bool stores_bulk(const Parameters& a) { return a.dtype == kFloat32 && a.p.t.bulk; }

// A warp: stores what consumers have staged, by bulk copies of what is 16-byte aligned.
struct Storer {
    const Parameters& a;
    const SharedParts& shared;
    const CUtensorMap* out_map;
    int warp;    // of two, which take turns

    __device__ __forceinline__ void store(const Tile& tile, const Run& run, const float* buffer) const {
        const Tiling& t = a.p.t;
        if (t.tensor_store && a.dtype == kFloat32) {
            if (threadIdx.x % 32 == 0 && run.live & 1)
                tma_store_4d(out_map, buffer, run.h0 * t.tile_w + run.q0, run.od0, run.channel0, tile.n);
        } else if (stores_bulk(a)) {
            float* out = static_cast<float*>(a.out);
            for_each_piece(a.p, tile, run, threadIdx.x % 32, regions_of(a.p, run), 32, [&](int64_t at, int region, int offset, int count) {
                const int staged = region * t.region_stride + offset;
                const int head = min(count, int(-at & 3)), body = (count - head) / 4 * 4;
                if (body > 0) bulk_store(out + at + head, buffer + staged + head, body * 4);
#pragma unroll 1
                for (int k = 0; k < head; k++) out[at + k] = buffer[staged + k];
#pragma unroll 1
                for (int k = head + body; k < count; k++) out[at + k] = buffer[staged + k];
            });
        }
        bulk_commit_group();
    }

    // Tells that what it stored of a sample's tile is in memory. Both storers do for every tile.
    static __device__ __forceinline__ unsigned reports_of_sample(const Problem& p) { return 2 * unsigned(p.t.tiles / int(p.N)); }
    __device__ __forceinline__ void report(int n) const {
        bulk_wait_group<0>();
        __syncwarp();
        if (threadIdx.x % 32 == 0) add_release(a.workspace.stored + n);
    }

    // publishes: two tiles ahead, when consumers begin one; in one place, since its code is long. reports: every tile, when the next one begins and its copies have
    // ended or will have soon.
    __device__ __forceinline__ void run(Publisher& publisher, bool publishes, bool reports) const {
        SharedHead& head = shared.head;
        const int consumers = a.p.t.warpgroups;
        bool more = publishes;
        int consumer = warp, before = -1;    // before: the sample of the tile before this one, to be reported
        RingPosition slot;
#pragma unroll 1
        for (int tiles = -2;; tiles++) {
            if (tiles >= 0) mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            if (more) more = publisher.publish();
            if (tiles < 0) continue;
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            if (before >= 0) report(before);
            if (reports) before = tile.n;
            for (; consumer < consumers; consumer += 2) {
                mbarrier_wait(head.staged[tiles % 2] + consumer, tiles / 2 % 2);
                store(tile, tile.run[consumer], shared.buffer(a.p.t, consumer));
                bulk_wait_group_read<0>();
                mbarrier_arrive(head.buffer_free + consumer);
            }
            consumer -= consumers;
            mbarrier_arrive(head.tile_empty + slot.stage);
            slot.advance(kTileSlots);
        }
        bulk_wait_group<0>();
        if (before >= 0) report(before);
    }
};

// ------------------------------------------------------------------------------------------------------- Consumer

// One of the two rows that a lane has of each tile: row 16 * warp + lane / 4, and the one 8 further, in the next granule.
struct LaneRow {
    int channel, phase, packed_d;                // channel from the row tile's first on; phase among the packed ones, and of D
    int alignment, paired_place;                 // of its region and its phase of H, to be added to the run's
    int region;                                  // first float of its region
    int table;                                   // first entry of its phase in the table of staged places
    bool used, exists;                           // by a channel; by one that there is
    unsigned weight_max;                         // of the tile's channel
    float bias;
    float scale, more;                           // back to what the sums stand for: scale, unless that would not be a normal number
    bool live;                                   // there is such an output plane (one of several), channel and run
};

// Whether consumers have registers to keep the epilogue's constants from tile to tile.
template <int kBlockN> constexpr bool kKeepsConstants = kBlockN <= 136;

// What a consumer warpgroup carries from tile to tile.
struct Consumer {
    const Parameters& a;
    const SharedParts& shared;
    int warpgroup;                 // from 0 on
    RingPosition in, weight, slot;
    LaneRow rows[2];
    int channel0 = -1, n = -1;     // what the constants were loaded for
    scaled_half::SampleMax activation_max;    // of the tile's sample
    int staged = 0;                // how often this one staged outputs
    int4 table_key = {-1, 0, 0, 0};    // what the table was made for
    bool first = true;

    __device__ __forceinline__ Consumer(const Parameters& a, const SharedParts& shared) : a(a), shared(shared), warpgroup(threadIdx.x / 128 - 1) {
        const Problem& p = a.p;
        const Tiling& t = p.t;
        const int phases_h = packed_phases(t, p.s, 1), phases_w = p.s.axis[2].phases;
        for (int half = 0; half < 2; half++) {
            LaneRow& row = rows[half];
            const int granule = threadIdx.x / 32 % 4 * 2 + half, octet = granule / t.rows.packed_phases;
            row.phase = granule - octet * t.rows.packed_phases;
            row.used = octet < t.rows.octets;
            row.channel = octet * 8 + threadIdx.x % 32 / 4;
            const int phase_dh = divide_by_phases(row.phase, phases_w);
            row.packed_d = divide_by_phases(phase_dh, phases_h);
            row.region = row.used ? (row.channel * region_planes(t, p.s) + row.packed_d) * t.region_stride : 0;
            row.alignment = alignment_of_region(p, row.channel, row.packed_d), row.paired_place = (phase_dh - row.packed_d * phases_h) * staged_row(p);
            row.table = (row.phase - row.packed_d * phases_h * phases_w) * t.block_n;
        }
    }
    __device__ bool elected() const { return threadIdx.x % 32 == 0; }    // of a warp
    __device__ void sync() const { named_barrier(1 + warpgroup, 128); }
    __device__ float* buffer() const { return shared.buffer(a.p.t, warpgroup); }
    __device__ int* table() const { return reinterpret_cast<int*>(shared.tables + warpgroup * a.p.t.table_bytes); }

    // Consumers that share a buffer take turns: the first waits for the second's release of the tile before, the second for the first's
    // release of this tile. One that has its own waits for its release of the tile before.
    __device__ __forceinline__ void wait_for_buffer() {
        const int shared_buffer = a.p.t.buffers == 1, releaser = warpgroup ^ shared_buffer, release = shared_buffer && warpgroup == 1 ? staged : staged - 1;
        mbarrier_wait(shared.head.buffer_free + releaser, release & 1);
        staged++;
    }

    // Loads what the epilogue will need of global memory; prepare_rows makes use of it, many cycles later.
    // kKeeps: they are there for the next tile too, if it is of the same channels and sample.
    template <bool kKeeps> __device__ __forceinline__ void load_constants(const Tile& tile) {
        const Run& run = tile.run[warpgroup];
        if (!kKeeps || run.channel0 != channel0 || tile.n != n) {
            channel0 = run.channel0, n = tile.n;
            activation_max = a.activation_max[tile.sample];
#pragma unroll
            for (LaneRow& row : rows) {
                const int channel = channel0 + row.channel;
                row.exists = row.used && channel < a.p.C_out;
                row.weight_max = row.exists ? a.weight_max[channel] : 0;
                row.bias = row.exists && a.bias ? load_as_float(a.bias, a.dtype, channel) : 0.0f;
            }
            if (kKeeps) prepare_rows();
        }
#pragma unroll
        for (LaneRow& row : rows) row.live = row.exists && has_outputs(a.p.t, run, row.packed_d);
    }
    __device__ __forceinline__ void prepare_rows() {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const auto [scale, more] = scaled_half::scale_in_parts(-scaled_half::shift_of(activation_max) - scaled_half::shift_of(rows[half].weight_max));
            rows[half].scale = scale, rows[half].more = more;
        }
    }
};

// The sums of one tile: d (64 rows, kBlockN positions) of this warpgroup. kSteps: chunk / 16; kItems: whether a stage may have several.
//
// A warp can have hardly more than one wgmma waiting behind the one that is carried out. So the next tap is looked up between those
// of this one, or the tensor cores would be idle meanwhile.
template <int kBlockN, int kSteps, bool kItems>
__device__ __forceinline__ void multiply(Consumer& me, const Tile& tile, float (&d)[kBlockN / 2]) {
    constexpr int row_vectors = kSteps * 2;    // of 16 bytes, as all addresses of operands here
    const Tiling& t = me.a.p.t;
    SharedHead& head = me.shared.head;
    const uint64_t descriptor = wgmma_descriptor_base(row_vectors * 16);
    const int b_row = tile.run[me.warpgroup].b_row, ring = t.weight_rings == 2 ? me.warpgroup * t.weight_stages : 0;
    auto let_the_other_begin = [&] {
        if (me.first && me.warpgroup == 0) named_barrier_arrive(kBeginBarrier, 256);
        me.first = false;
    };
    me.load_constants<kKeepsConstants<kBlockN>>(tile);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) make_undefined(d[i]);
    int info = kLastTap, weight_stage = -1, input_stage = -1;    // of a tap
    uint32_t box = 0, b = 0, w = 0;
    auto take_tap = [&] {
        weight_stage = me.weight.stage;
        mbarrier_wait(head.weight_full + ring + weight_stage, me.weight.phase);
        info = __shfl_sync(~0u, me.elected() ? head.taps[ring + weight_stage] : 0, 0);    // read by the lane that releases the stage
        me.weight.advance(t.weight_stages);
        if (info & kOpensBox) {
            input_stage = me.in.stage;
            mbarrier_wait(head.input_full + input_stage, me.in.phase);
            box = shared_vector(me.shared.input + input_stage * t.input_bytes) + b_row * row_vectors;
            me.in.advance(t.input_stages);
        }
        b = box + (info & kTapRows) * row_vectors, w = shared_vector(me.shared.weights + (ring + weight_stage) * t.weight_bytes);
    };
    auto multiply_steps = [&](uint32_t w, uint32_t b, int first, int end, auto anew) {
        wgmma_fence();
#pragma unroll
        for (int step = first; step < end; step++) {
            const uint64_t a_step = wgmma_descriptor(descriptor, w + step * 2), b_step = wgmma_descriptor(descriptor, b + step * 2);
            if (decltype(anew)::value && step == 0) wgmma_m64k16_f16<0, 0>(d, a_step, b_step);
            else wgmma_m64k16_f16<0>(d, a_step, b_step);
        }
        wgmma_commit_group();
    };
    int done_weight = -1, done_input = -1;    // stages whose last reader is in flight
    auto release = [&] {
        if (me.elected() && done_weight >= 0) mbarrier_arrive(head.weight_empty + ring + done_weight);
        if (me.elected() && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
    };
    auto begin_tap = [&](auto anew) {
        if constexpr (kItems) multiply_steps(w, b, 0, kSteps, anew);    // the first item is not shifted
        else multiply_steps(w, b, 0, kSteps / 2, anew);
        wgmma_wait_group<1>();    // the tap before is done
        release();
        done_weight = weight_stage, done_input = -1;
    };
    auto end_tap = [&](uint32_t w, uint32_t b) {
        if constexpr (kItems) {
            int rows = head.item_rows[1];
#pragma unroll 1
            for (int i = 1; i < t.items; i++) {
                const uint32_t b_item = b + rows * row_vectors;
                rows = head.item_rows[i + 1];
                multiply_steps(w + i * kRows * row_vectors, b_item, 0, kSteps, std::false_type());
            }
        } else {
            multiply_steps(w, b, kSteps / 2, kSteps, std::false_type());
        }
    };
    if (!tile.empty) {
        take_tap();
        begin_tap(std::true_type());
        for (int taps = 1; !(info & kLastTap); taps++) {
            const uint32_t this_w = w, this_b = b;
            const int this_input = input_stage;
            take_tap();
            if (info & kOpensBox) done_input = this_input;
            if (taps == t.lag || done_input >= 0) let_the_other_begin();
            end_tap(this_w, this_b);
            begin_tap(std::false_type());
        }
        end_tap(w, b);
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) keep_after(d[i]);    // or ptxas serializes the wgmmas
    } else {
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) make_zero(d[i]);
    }
    done_input = input_stage;
    release();
    let_the_other_begin();
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// Where a lane's row is staged.
__device__ __forceinline__ float* staged_region(const Consumer& me, const Tile& tile, const LaneRow& row) {
    const Run& run = tile.run[me.warpgroup];
    return me.buffer() + row.region + ((run.alignment + row.alignment) & (me.a.p.t.staging_unit - 1));
}

// Leaves the moments of a row, which a quad has.
__device__ __forceinline__ void leave_moments(const Consumer& me, const Tile& tile, const LaneRow& row, const Moments& m) {
    const Parameters& a = me.a;
    const Tiling& t = a.p.t;
    const Run& run = tile.run[me.warpgroup];
    float total;
    const float2 moments = m.of_quad(total);
    if (threadIdx.x % 4 == 0 && row.live) {
        const int64_t set = index_of_run(a.p, tile, me.warpgroup) * a.p.s.phases() + run.outer * t.rows.packed_phases + row.phase;
        a.workspace.sets.moments[set * t.channels() + run.channel0 + row.channel] = moments;
        a.workspace.sets.counts[set] = total;    // the same from every channel
    }
}

// Stages a tile's values, scaled back and with the bias; kRelu: with ReLU too, and leaves each row's moments where they are wanted.
template <int kBlockN, bool kRelu> struct Stager {
    const Consumer& me;
    const Tile& tile;
    const Run& run;
    float (&v)[kBlockN / 2];

    __device__ __forceinline__ void count(float value, Moments& moments, bool own = true) const {
        if (kRelu && own) moments.add(value), moments.count++;
    }
    __device__ __forceinline__ void put(float* at, float value, Moments& moments) const {
        *at = value;
        count(value, moments);
    }
    __device__ __forceinline__ void leave(const LaneRow& row, const Moments& moments) const {
        if (kRelu && me.a.workspace.sets.moments) leave_moments(me, tile, row, moments);
    }

    // A paired run: a lane's two rows are the same channel's, so it has four neighbours at a time.
    __device__ __forceinline__ void stage_pairs() const {
        const Tiling& t = me.a.p.t;
        const int lane = threadIdx.x % 32;
        Moments low, high;
        if (kRelu) low.shift = __shfl_sync(~0u, v[1], lane & ~3), high.shift = __shfl_sync(~0u, v[3], lane & ~3);    // column 1
        if (me.rows[0].live) {
            float* const region = staged_region(me, tile, me.rows[0]) + run.paired_place + me.rows[0].paired_place + lane % 4 * 4;
            const bool first_missing = lane % 4 == 0 && tile.w0 * 2 < me.a.p.s.axis[2].crop;    // column 0 has no phase 0
            const int count = run.count;    // a copy, or every store to shared memory could have changed it
            const auto put_block = [&](float* at, int j, bool begins_row) {
                if (!begins_row || !first_missing) put(at, v[j * 4], low);
                put(at + 1, v[j * 4 + 2], high), put(at + 2, v[j * 4 + 1], low), put(at + 3, v[j * 4 + 3], high);
            };
            const auto stage_rows = [&](auto vectors) {
                const int reciprocal = t.by_tile_w.divide(1 << 19) + 1, skipped = paired_row(me.a.p) - 2 * t.tile_w;    // 2^16 / blocks of 8 positions in a row
                const auto row_of = [&](int j) { return j * reciprocal >> 16; };
#pragma unroll
                for (int j = 0; j < kBlockN / 8; j++) {
                    if (j * 8 >= count) continue;
                    float* const at = region + j * 16 + row_of(j) * skipped;
                    if (decltype(vectors)::value) {
                        *reinterpret_cast<float4*>(at) = make_float4(v[j * 4], v[j * 4 + 2], v[j * 4 + 1], v[j * 4 + 3]);
                        if (kRelu) low.add(v[j * 4]), low.add(v[j * 4 + 1]), high.add(v[j * 4 + 2]), high.add(v[j * 4 + 3]), low.count += 2, high.count += 2;
                    } else {
                        put_block(at, j, j == 0 || row_of(j) != row_of(j - 1));
                    }
                }
            };
            if (t.vectors) {
                stage_rows(std::true_type());
            } else if (run.rows > 1) {
                stage_rows(std::false_type());
            } else {
#pragma unroll
                for (int j = 0; j < kBlockN / 8; j++)
                    if (j * 8 < count) put_block(region + j * 16, j, j == 0);
            }
            if (t.whole_sectors && run.oh_end < me.a.p.s.axis[1].out && me.rows[0].paired_place == 0) {    // outputs of the next row, of the last positions
                float* const next = staged_region(me, tile, me.rows[0]) + contiguous_count(me.a.p, run);
                const int first = (kBlockN - 8 + lane % 4 * 2 - run.rows * t.pitch) * 2 - me.a.p.s.axis[2].crop;
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (unsigned(first + i) < kSector - 1) next[first + i] = v[kBlockN / 2 - 4 + i % 2 * 2 + i / 2];
            }
        }
        leave(me.rows[0], low), leave(me.rows[1], high);
    }

    // The value of the first output of a row, in the lanes that have it.
    __device__ __forceinline__ float first_value(int half) const {
        const Tiling& t = me.a.p.t;
        if (t.dense || me.table()[me.rows[half].table] >= 0) return __shfl_sync(~0u, v[half * 2], threadIdx.x % 32 & ~3);
        const int q = first_output(t, me.table() + me.rows[half].table), index = q / 8 * 4 + half * 2 + q % 2;
        float first = v[half * 2];
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const float low = v[j * 4 + half * 2], high = v[j * 4 + half * 2 + 1];
            first = index == j * 4 + half * 2 ? low : index == j * 4 + half * 2 + 1 ? high : first;
        }
        return __shfl_sync(~0u, first, (threadIdx.x % 32 & ~3) + q % 8 / 2);
    }

    // Rows of the lane from the first-th on, which have the same places, and all of which are live where there are several.
    template <int kCount> __device__ __forceinline__ void stage_rows(int first, const float (&shifts)[2]) const {
        const Tiling& t = me.a.p.t;
        const int lane = threadIdx.x % 32;
        const int* table = me.table() + me.rows[first].table + lane % 4 * 2;
        const unsigned own = kBlockN <= kMostPaired && t.whole_sectors ? contiguous_count(me.a.p, run) : 1u << 31;    // the places behind them are the next run's
        Moments moments[kCount];
        float* regions[kCount];
#pragma unroll
        for (int r = 0; r < kCount; r++) moments[r].shift = shifts[first + r], regions[r] = staged_region(me, tile, me.rows[first + r]);
        if (me.rows[first].live && t.dense) {    // position q is float q of its region
            const int outputs = run.count - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) {
#pragma unroll
                for (int r = 0; r < kCount; r++) {
                    const float2 pair = make_float2(v[j * 4 + (first + r) * 2], v[j * 4 + (first + r) * 2 + 1]);
                    reinterpret_cast<float2*>(regions[r] + lane % 4 * 2)[j * 4] = pair;
                    if (kRelu && j * 8 < outputs) moments[r].add(pair.x), moments[r].add(pair.y);    // runs are even
                }
            }
#pragma unroll
            for (Moments& m : moments) m.count = max(0, min((outputs + 7) / 8, kBlockN / 8)) * 2;
        } else if (me.rows[first].live) {
            constexpr int kPlaces = 4;    // pairs of them that are read at a time: no load moves in front of a store to shared memory
            uint32_t addresses[kCount];    // so that a place takes one instruction
#pragma unroll
            for (int r = 0; r < kCount; r++) addresses[r] = shared_address(regions[r]);
#pragma unroll
            for (int begin = 0; begin < kBlockN / 8; begin += kPlaces) {
                int2 places[kPlaces];
#pragma unroll
                for (int i = 0; i < kPlaces && begin + i < kBlockN / 8; i++) places[i] = *reinterpret_cast<const int2*>(table + (begin + i) * 8);
#pragma unroll
                for (int i = 0; i < kPlaces && begin + i < kBlockN / 8; i++) {
                    const int2 place = places[i];
#pragma unroll
                    for (int r = 0; r < kCount; r++) {
                        const float low = v[(begin + i) * 4 + (first + r) * 2], high = v[(begin + i) * 4 + (first + r) * 2 + 1];
                        if (place.x >= 0) shared_store(addresses[r] + place.x * 4, low), count(low, moments[r], kBlockN > kMostPaired || unsigned(place.x) < own);
                        if (place.y >= 0) shared_store(addresses[r] + place.y * 4, high), count(high, moments[r], kBlockN > kMostPaired || unsigned(place.y) < own);
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kCount; r++) leave(me.rows[first + r], moments[r]);
    }

    __device__ __forceinline__ void stage() const {
        if (__any_sync(~0u, me.rows[0].more != 1 || me.rows[1].more != 1)) {
#pragma unroll
            for (int i = 0; i < kBlockN / 2; i++) v[i] *= me.rows[i / 2 % 2].more;
        }
        // In place: a store to shared memory reads its register late, and whoever wants to write another value there waits.
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) {
            v[i] = fmaf(v[i], me.rows[i / 2 % 2].scale, me.rows[i / 2 % 2].bias);
            if (kRelu) v[i] = max_nan(v[i], 0.0f);
        }
        if (kBlockN <= kMostPaired && run.paired) return stage_pairs();
        const float shifts[2] = {kRelu ? first_value(0) : 0.0f, kRelu ? first_value(1) : 0.0f};
        if (__all_sync(~0u, me.rows[0].live && me.rows[1].live && me.rows[0].table == me.rows[1].table)) return stage_rows<2>(0, shifts);
        stage_rows<1>(0, shifts);
        stage_rows<1>(1, shifts);
    }
};

// A warp: stores a piece of staged outputs, four at a time where they are staged as they are aligned in memory.
__device__ __forceinline__ void store_piece(const Parameters& a, int64_t at, const float* from, int count) {
    const int lane = threadIdx.x % 32, head = a.p.t.bulk ? min(count, int(-at & 3)) : count, body = (count - head) / 4, tail = head + body * 4;
#pragma unroll 1
    for (int k = lane; k < head; k += 32) store_as(a.out, a.dtype, at + k, from[k]);
    if (lane < count - tail) store_as(a.out, a.dtype, at + tail + lane, from[tail + lane]);
#pragma unroll 2
    for (int k = lane; k < body; k += 32) store_as(a.out, a.dtype, (at + head) / 4 + k, reinterpret_cast<const float4*>(from + head)[k]);
}

// What a consumer does behind a tile's products.
template <int kBlockN, bool kRelu>
__device__ __forceinline__ void finish(Consumer& me, const Tile& tile, float (&v)[kBlockN / 2]) {
    const Parameters& a = me.a;
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[me.warpgroup];
    if (!kKeepsConstants<kBlockN>) me.prepare_rows();
    me.wait_for_buffer();
    if (!t.dense && !run.paired) {
        const int4 key = table_key(p, tile, run);
        if (!same_key(key, me.table_key)) {
            fill_table<kBlockN>(p, tile, run, [&] { return me.table(); });
            me.table_key = key;
        }
        me.sync();
    }
    Stager<kBlockN, kRelu>{me, tile, run, v}.stage();
    fence_proxy_async();
    if (!stores_bulk(a)) {
        me.sync();
        const float* buffer = me.buffer();
        for_each_piece(p, tile, run, threadIdx.x / 32 % 4, regions_of(p, run), 4, [&](int64_t at, int region, int offset, int count) {
            store_piece(a, at, buffer + region * t.region_stride + offset, count);
        });
    }
    mbarrier_arrive(me.shared.head.staged[1 - me.staged % 2] + me.warpgroup);    // counted already
}

template <int kBlockN, bool kRelu>
__device__ __forceinline__ void consume(const Parameters& a, const SharedParts& shared) {
    Consumer me(a, shared);
    SharedHead& head = shared.head;
    float d[kBlockN / 2] = {};
    while (true) {
        mbarrier_wait(head.tile_full + me.slot.stage, me.slot.phase);
        const Tile& tile = head.tiles[me.slot.stage];
        if (tile.n < 0) break;
        if (me.first && me.warpgroup == 1) named_barrier(kBeginBarrier, 256);
        if (is_built(kBlockN, 16, true) && a.p.t.chunk == 16) multiply<kBlockN, 1, true>(me, tile, d);
        else if (is_built(kBlockN, 32, true) && a.p.t.chunk == 32) multiply<kBlockN, 2, true>(me, tile, d);
        else if (is_built(kBlockN, 64, true) && a.p.t.items > 1) multiply<kBlockN, 4, true>(me, tile, d);
        else if (is_built(kBlockN, 64, false)) multiply<kBlockN, 4, false>(me, tile, d);
        finish<kBlockN, kRelu>(me, tile, d);
        mbarrier_arrive(head.tile_empty + me.slot.stage);
        me.slot.advance(kTileSlots);
    }
}

#endif  // HAS_SM90A

}  // namespace conv_sm90
