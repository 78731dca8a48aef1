// Convolution of stride 1 by mma.sync, on any tensor core from sm_80 up: what conv_sm90.cuh does, cut by the same tiles and with
// the same operands, where there are no wgmma, TMA and warps that only load.
//
// A block is four warps, each with all 64 rows of a tile and a quarter of its positions, which balances what it reads of shared memory for
// both operands. Weights come by cp.async through a ring of stages, one for each tap and chunk of GEMM_K; a box of the source comes with its
// first tap. One warp finds out what comes next, many steps ahead; all load it; there is a barrier a step. Two to four blocks share a
// multiprocessor, so that the tensor cores have products of one while another loads a box, waits, or stores its outputs.
//
// The epilogue stages the outputs where the stages were, half a row tile at a time, and whole warps store rows of memory.
// Fused: it leaves the moments of relu(out), a second kernel makes statistics of them.
#pragma once

#include "conv_epilogue.cuh"
#include "tiling_sm80.h"

namespace conv_sm80 {

constexpr int kThreads = 128;

struct Operands {
    Parameters a;
    const __half *x, *w;            // packed
    int x_pitch, w_pitch;           // elements of a position, of a row
};

struct RowConstants { float scale, bias; };

// What is loaded at a time: the weights of a tap and a chunk of GEMM_K, and a box where it is the first tap of one.
struct Step {
    int rows;                       // of shared memory, by which the tap is shifted in its box; and flags
    int weights;                    // the first vector of 16 bytes of its weights
    int plane, source_row, channel; // of the box
};
constexpr int kOpensBox = 1 << 29, kNoMore = 1 << 30, kRowsOfStep = kOpensBox - 1;
constexpr int kStepBatch = 8, kStepSlots = 2 * kStepBatch;    // found out at a time, those behind the ones that are being read
static_assert(kStepBatch > kMaxWeightStages, "loads are fewer steps ahead");

struct SharedHead {
    Tile tile;
    RowConstants rows[kRows];
    int4 table_key;                 // what the table was made for
    Cursor at;                      // of the walk over the tile's steps: in shared memory, since one warp walks and all need registers
    int tap;                        // the next one of the box
    Step steps[kStepSlots];
};
static_assert(sizeof(SharedHead) <= kSharedHeadBytes, "the tables begin behind the head");

// ------------------------------------------------------------------------------------------------------------ Walk

// A warp: a tile's steps from `begin` to `end`, to be called without gaps.
__device__ __forceinline__ void publish_steps(const Operands& o, SharedHead& head, int begin, int end) {
    const Problem& p = o.a.p;
    const int lane = threadIdx.x % 32;
    Cursor at = begin == 0 ? Cursor(p, head.tile) : head.at;
    at.p = &p;
    int tap = begin == 0 ? 0 : head.tap;
    bool in_box = begin > 0;
#pragma unroll 1
    while (begin < end) {
        if (!in_box || tap == BoxTaps(at).count) {
            if (head.tile.empty || !at.next_box()) {
                if (lane == 0) head.steps[unsigned(begin) % kStepSlots].rows = kNoMore;
                break;
            }
            tap = 0, in_box = true;
        }
        const BoxTaps taps(at);
        const int count = min(end - begin, taps.count - tap);
        if (lane < count) {
            const BoxTaps::Tap own = taps[tap + lane];
            head.steps[unsigned(begin + lane) % kStepSlots] = {own.rows | (tap + lane == 0 ? kOpensBox : 0), int(((int64_t(own.tap) * p.t.M_pad + head.tile.run[0].row_tile * kRows) * o.w_pitch + own.column) / 8), at.plane(), at.source_row(), at.c};
        }
        tap += count, begin += count;
    }
    __syncwarp();
    if (lane == 0) head.at = at, head.tap = tap;
}

// The next stage of a ring.
__device__ __forceinline__ int next_of(int slot, int stages) { return slot + 1 == stages ? 0 : slot + 1; }

// --------------------------------------------------------------------------------------------------------- Loading

// All threads: loads what the steps need.
template <int kChunk> struct Loader {
    static constexpr int kRowBytes = kChunk * 2, kPieces = kRowBytes / 16, kAtOnce = kThreads / kPieces;    // rows that the block loads at a time
    const Operands& o;
    const SharedHead& head;
    uint32_t boxes_at, weights_at;  // the stages, in shared memory
    const uint4* weights;           // what this thread loads of each tap's
    int issued = 0;                 // steps so far
    int boxes = 0;                  // whose stages are in use, or were until now
    int box_slot = 0, slot = 0;     // the stages of the next ones

    __device__ __forceinline__ Loader(const Operands& o, const SharedHead& head, uint32_t stages)
        : o(o), head(head), boxes_at(stages), weights_at(stages + o.a.p.t.input_stages * o.a.p.t.input_bytes),
          weights(reinterpret_cast<const uint4*>(o.w + int64_t(threadIdx.x / kPieces) * o.w_pitch) + threadIdx.x % kPieces) {}

    __device__ __forceinline__ uint32_t input_stage(int slot) const { return boxes_at + slot * o.a.p.t.input_bytes; }
    __device__ __forceinline__ uint32_t weight_stage(int slot) const { return weights_at + slot * (kRows * kRowBytes); }

    // Behind the box there are the zeros that rows share.
    __device__ __forceinline__ void load_box(const Step& step) const {
        const Problem& p = o.a.p;
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int w0 = aw.first + head.tile.w0 - aw.shift[aw.taps - 1], piece = threadIdx.x % kPieces, step_h = kAtOnce / p.t.pitch, step_w = kAtOnce % p.t.pitch;
        const __half* plane = o.x + (int64_t(head.tile.sample) * ad.sources + step.plane) * ah.sources * aw.sources * o.x_pitch + head.tile.source_channel + step.channel + piece * 8;
        const uint32_t to = input_stage(box_slot);
        int row = threadIdx.x / kPieces, h = step.source_row + row / p.t.pitch, column = row % p.t.pitch;
        const int rows = p.t.box_rows * p.t.pitch + aw.shift[aw.taps - 1];
#pragma unroll 1
        for (; row < rows; row += kAtOnce) {
            const int w = w0 + column;
            const bool inside = unsigned(h) < unsigned(ah.sources) && unsigned(w) < unsigned(aw.sources);
            cp_async_16(to + swizzled(row, piece, kRowBytes), inside ? plane + (int64_t(h) * aw.sources + w) * o.x_pitch : o.x, inside);
            h += step_h, column += step_w;
            if (column >= p.t.pitch) column -= p.t.pitch, h++;
        }
    }

    __device__ __forceinline__ void load_weights(const Step& step) const {
        const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, stride = kAtOnce * o.w_pitch / 8;
        const uint4* from = weights + step.weights;
        const uint32_t to = weight_stage(slot) + swizzled(row, piece, kRowBytes);    // kAtOnce rows on, the swizzle is the same
#pragma unroll
        for (int i = 0; i < (kRows + kAtOnce - 1) / kAtOnce; i++, from += stride)
            if (kAtOnce <= kRows || row < kRows) cp_async_16(to + i * kAtOnce * kRowBytes, from, true);
    }

    // Loads for the next steps until the ring is full, or until a box is needed whose stage is in use. done: steps that nobody reads any more.
    __device__ __forceinline__ void advance(int done, int most_boxes) {
        const Tiling& t = o.a.p.t;
#pragma unroll 1
        while (issued < done + t.weight_stages) {
            const Step& step = head.steps[unsigned(issued) % kStepSlots];
            const bool opens_box = step.rows & kOpensBox;
            if (step.rows & kNoMore || (opens_box && boxes >= most_boxes)) break;
            if (opens_box) {
                load_box(step);
                boxes++, box_slot = next_of(box_slot, t.input_stages);
            }
            load_weights(step);
            cp_async_commit_group();
            issued++, slot = next_of(slot, t.weight_stages);
        }
    }

    // Waits for this thread's copies of a step, of all that were issued where those are not as many as they mostly are.
    __device__ __forceinline__ void wait_for(int step) const {
        const int later = issued - 1 - step;
        if (later == 2) cp_async_wait_group<2>();
        else if (later == 1) cp_async_wait_group<1>();
        else cp_async_wait_group<0>();
    }
};

// -------------------------------------------------------------------------------------------------------- Products

// Element (granule, j, e) of a lane: row granule * 8 + lane / 4 of the row tile, position j * 8 + lane % 4 * 2 + e of the warp's.
template <int kColumns> struct Sums {
    float v[4][kColumns / 8][4];
    __device__ __forceinline__ float& at(int granule, int j, int e) { return v[granule / 2][j][granule % 2 * 2 + e]; }
};

// One tap's products: 64 rows of weights at `weights`, kColumns positions from row `row` of the box on.
template <int kColumns, int kChunk>
__device__ __forceinline__ void multiply(uint32_t weights, uint32_t box, int row, Sums<kColumns>& sums) {
    constexpr int kRowBytes = kChunk * 2, kSteps = kChunk / 16;
    const int lane = threadIdx.x % 32;
    const uint32_t first_a = weights + swizzled(lane % 16, lane / 16, kRowBytes), first_b = box + swizzled(row + lane / 16 * 8 + lane % 8, lane / 8 % 2, kRowBytes);
    // A step is two pieces on, which only the swizzle's bits tell of; 16 rows on, the swizzle is the same.
    const auto from_a = [&](int step) { return first_a ^ step << 5; };
    const auto from_b = [&](int step) { return first_b ^ step << 5; };
    if constexpr (blocks_of(kColumns * kColumnWarps) == 2) {    // few warps, many registers: operands are loaded a step in advance
        uint32_t a[2][4][4], b[2][kColumns / 16][4];
        auto load = [&](int step) {
#pragma unroll
            for (int j = 0; j < kColumns / 16; j++) ldmatrix_x4(b[step % 2][j], from_b(step) + j * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < 4; m++) ldmatrix_x4(a[step % 2][m], from_a(step) + m * 16 * kRowBytes);
        };
        load(0);
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            if (step + 1 < kSteps) load(step + 1);
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(sums.v[m][j], a[step % 2][m], b[step % 2][j / 2][j % 2 * 2], b[step % 2][j / 2][j % 2 * 2 + 1]);
        }
    } else {
#pragma unroll 2
        for (int step = 0; step < kSteps; step++) {
            uint32_t b[kColumns / 16][4];
#pragma unroll
            for (int j = 0; j < kColumns / 16; j++) ldmatrix_x4(b[j], from_b(step) + j * 16 * kRowBytes);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                uint32_t a[4];
                ldmatrix_x4(a, from_a(step) + m * 16 * kRowBytes);
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(sums.v[m][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------- Epilogue

// A product scaled back, with its bias, and ReLU where `lowest` is zero.
__device__ __forceinline__ float value_of(float product, float first_scale, float scale, float bias, float lowest) { return max_nan(fmaf(product * first_scale, scale, bias), lowest); }

// What a row of a row tile is. Its phases' numbers are powers of two (choose_tiling).
struct LaneRow { int channel, phase, phase_hw, packed_d, region; bool live; };

__device__ __forceinline__ LaneRow lane_row(const Problem& p, const Run& run, int row) {
    const Tiling& t = p.t;
    const int log_d = __ffs(packed_phases(t, p.s, 0)) - 1, log_phases = __ffs(t.rows.packed_phases) - 1, log_hw = log_phases - log_d, granule = row / 8;
    LaneRow r;
    r.phase = granule & (t.rows.packed_phases - 1), r.packed_d = r.phase >> log_hw;
    r.channel = (granule >> log_phases) * 8 + row % 8, r.region = (r.channel << log_d) + r.packed_d;
    r.phase_hw = r.phase & ((1 << log_hw) - 1);
    r.live = run.channel0 + r.channel < p.C_out && (run.live >> r.packed_d & 1);
    return r;
}

// The regions of the first and the second half of a row tile's granules. Where the halves are phases of D, they take turns.
__device__ __forceinline__ bool halves_are_phases(const Problem& p) { return p.t.rows.octets == 1 && packed_phases(p.t, p.s, 0) == 2; }
__device__ __forceinline__ int slot_of(const Problem& p, int region) { return halves_are_phases(p) ? region / 2 : region & (p.t.rows.octets * 4 * packed_phases(p.t, p.s, 0) - 1); }

// Which of a warp's positions are outputs: 16 bits for each packed phase (h, w), bit j * 2 + e tells of position j * 8 + lane % 4 * 2 + e.
template <int kColumns> __device__ __forceinline__ uint64_t valid_positions(const Tiling& t, int phases_hw, const int* table) {
    uint64_t valid = 0;
#pragma unroll 1
    for (int phase = phases_hw - 1; phase >= 0; phase--) {
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            const int2 place = *reinterpret_cast<const int2*>(table + phase * t.block_n + j * 8);
            bits |= (place.x >= 0 ? 1u << j * 2 : 0u) | (place.y >= 0 ? 2u << j * 2 : 0u);
        }
        valid = valid << 16 | bits;
    }
    return valid;
}

// The moments of a lane's rows, by its quad, and of the warp's positions: in two passes over registers.
template <int kColumns>
__device__ __forceinline__ void leave_moments(const Parameters& a, int64_t part, const Run& run, uint64_t valid, Sums<kColumns>& sums) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int granule = 0; granule < 8; granule++) {
        const LaneRow row = lane_row(p, run, granule * 8 + lane / 4);
        const uint32_t bits = uint32_t(valid >> row.phase_hw * 16) & 0xffff;
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) sum += bits & 1u << i ? sums.at(granule, i / 2, i % 2) : 0.0f;
        const float count = quad_sum(float(__popc(bits))), total = quad_sum(sum), mean = count > 0 ? total / count : 0.0f;
#pragma unroll
        for (int i = 0; i < kColumns / 4; i++) {
            const float deviation = bits & 1u << i ? sums.at(granule, i / 2, i % 2) - mean : 0.0f;
            squares = fmaf(deviation, deviation, squares);
        }
        squares = quad_sum(squares);
        if (lane % 4 == 0 && row.live) {
            const int64_t set = part * p.s.phases() + run.outer * t.rows.packed_phases + row.phase;
            a.workspace.moments[set * t.channels() + run.channel0 + row.channel] = make_float2(mean, squares);
            a.workspace.counts[set] = count;    // the same from every channel
        }
    }
}

// Scales back, adds the bias, applies ReLU and stages half of a lane's rows.
template <int kColumns, int kHalf>
__device__ __forceinline__ void stage(const Parameters& a, const Tile& tile, const Run& run, const RowConstants* rows, const int* table, float* buffer, float first_scale, Sums<kColumns>& sums) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const float lowest = a.apply_relu ? 0.0f : -INFINITY;
#pragma unroll
    for (int granule = kHalf * 4; granule < kHalf * 4 + 4; granule++) {
        const int index = granule * 8 + threadIdx.x % 32 / 4;
        const LaneRow row = lane_row(p, run, index);
        const RowConstants constants = rows[index];
        float* region = buffer + slot_of(p, row.region) * t.region_stride + ((run.alignment + alignment_of_region(p, row.channel, row.packed_d)) & (t.staging_unit - 1));
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            const int2 place = *reinterpret_cast<const int2*>(table + row.phase_hw * t.block_n + j * 8);
            float &low = sums.at(granule, j, 0), &high = sums.at(granule, j, 1);
            low = value_of(low, first_scale, constants.scale, constants.bias, lowest);
            high = value_of(high, first_scale, constants.scale, constants.bias, lowest);
            if (row.live && place.x >= 0) region[place.x] = low;
            if (row.live && place.y >= 0) region[place.y] = high;
        }
    }
}

// Stages and stores a tile's outputs, and leaves the moments where they are wanted.
template <int kColumns>
__device__ __forceinline__ void finish(const Parameters& a, SharedHead& head, int* table, float* buffer, Sums<kColumns>& sums) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Tile& tile = head.tile;
    const int warp = threadIdx.x / 32;
    const Run& run = tile.run[0];
    const float first_scale = scaled_half::power_of_two(-scaled_half::shift_of(a.activation_max[tile.sample]));
    const int phases_hw = packed_phases(t, p.s, 1) * p.s.axis[2].phases, regions = regions_of(p, run);
    if (threadIdx.x < kRows) {
        const LaneRow row = lane_row(p, run, threadIdx.x);
        const int channel = run.channel0 + row.channel;
        head.rows[threadIdx.x] = {row.live ? scaled_half::power_of_two(-scaled_half::shift_of(a.weight_max[channel])) : 0.0f, row.live && a.bias ? load_as_float(a.bias, a.dtype, channel) : 0.0f};
    }
    const int4 key = table_key(p, tile, run);
    if (!same_key(key, head.table_key)) fill_table<kColumns * kColumnWarps>(p, tile, run, [&] { return table; });
    __syncthreads();
    if (threadIdx.x == 0) head.table_key = key;
    const int* lane_table = table + warp * kColumns + threadIdx.x % 4 * 2;
    const bool turns = halves_are_phases(p);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        if (half == 0) stage<kColumns, 0>(a, tile, run, head.rows, lane_table, buffer, first_scale, sums);
        else stage<kColumns, 1>(a, tile, run, head.rows, lane_table, buffer, first_scale, sums);
        __syncthreads();
        const int first = turns ? half + 2 * warp : half * regions / 2 + warp, end = turns ? regions : (half + 1) * regions / 2;
        for_each_piece(p, tile, run, first, end, turns ? 8 : 4, [&](int64_t at, int region, int offset, int count) {
            store_piece(a, at, buffer + slot_of(p, region) * t.region_stride + offset, count);
        });
        __syncthreads();
    }
    if (a.workspace.moments) {
        leave_moments<kColumns>(a, index_of_run(p, tile, 0) * kColumnWarps + warp, run, valid_positions<kColumns>(t, phases_hw, lane_table), sums);
    }
}

// ---------------------------------------------------------------------------------------------------------- Kernel

template <int kBlockN, int kChunk>
__global__ void __launch_bounds__(kThreads, blocks_of(kBlockN)) conv_kernel(const __grid_constant__ Operands o) {
    wait_for_previous_kernel();
    extern __shared__ __align__(1024) uint8_t base[];
    const Problem& p = o.a.p;
    const Tiling& t = p.t;
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    int* table = reinterpret_cast<int*>(base + kSharedHeadBytes);
    uint8_t* stages = base + kSharedHeadBytes + t.table_bytes;
    constexpr int kColumns = kBlockN / kColumnWarps;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) head.table_key = make_int4(-1, 0, 0, 0);
    for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) locate(p, index, head.tile);
        __syncwarp();
        if (warp == 0) publish_steps(o, head, 0, kStepSlots);
        Sums<kColumns> sums = {};
        Loader<kChunk> loader(o, head, shared_address(stages));
        int slot = 0, box_slot = -1, b_row = 0;    // the stages of this step and of its box; the warp's first position in it
        for (int done = 0;;) {
            const bool ready = done < loader.issued;    // else nothing is under way: at the beginning, in the end, and where a box had to wait for its stage
            if (ready) loader.wait_for(done);
            __syncthreads();
            if (done == 0) b_row = head.tile.run[0].b_row + warp * kColumns;
            const int step = ready ? head.steps[unsigned(done) % kStepSlots].rows : 0;
            const bool opened = box_slot >= 0;
            if (step & kOpensBox) loader.boxes -= opened, box_slot = next_of(box_slot, t.input_stages);
            loader.advance(done, t.input_stages + (!ready && opened));
            if (!ready) {
                if (done == loader.issued) break;
                continue;
            }
            if (warp == 0 && done > 0 && done % kStepBatch == 0) publish_steps(o, head, done + kStepBatch, done + kStepSlots);
            multiply<kColumns, kChunk>(loader.weight_stage(slot), loader.input_stage(box_slot), b_row + (step & kRowsOfStep), sums);
            done++, slot = next_of(slot, t.weight_stages);
        }
        finish<kColumns>(o.a, head, table, reinterpret_cast<float*>(stages), sums);
    }
}

}  // namespace conv_sm80
