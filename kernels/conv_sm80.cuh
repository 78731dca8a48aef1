// Convolution of stride 1 by mma.sync, on any tensor core from sm_80 up: what conv_sm90.cuh does, cut by the same tiles and with
// the same operands, where there are no wgmma, TMA and warps that only load.
//
// A block is four warps, each with all 64 rows of a tile and a quarter of its positions, which balances what it reads of shared memory for
// both operands. Weights come by cp.async, some taps at a time, while those before them are multiplied; a box of the source comes with its
// first tap. A warp finds out what comes next, all load it. Two to four blocks share a multiprocessor, so that the tensor cores have
// products of one while another loads a box, waits, or stores its outputs.
//
// What counts is the number of instructions: few warps issue one every six cycles.
#pragma once

#include "conv_epilogue_sm80.cuh"
#include "swizzle.h"

namespace conv_sm80 {

struct Operands {
    Parameters a;
    const __half *x, *w;            // packed
    int x_pitch, w_pitch;           // elements of a position, of a row
};

// ------------------------------------------------------------------------------------------------------------ Walk

// A tap of a box, and its weights' first vector of 16 bytes.
struct Step { int rows, weights; };    // of shared memory, by which the tap is shifted in its box; and flags
constexpr int kOpensBox = 1 << 28, kEndsStage = 1 << 29, kNoMore = 1 << 30, kRowsOfStep = kOpensBox - 1;
struct Box { int plane, source_row, channel; };
constexpr int kStepBatch = 16, kStepSlots = 32;    // found out at a time; a stage is multiplied, one loaded, and the next one is known
static_assert(2 * kMaxTapsOfStage + kMaxTapsOfStage - 1 + kStepBatch <= kStepSlots && 2 * kStepBatch <= kStepSlots, "what is found out has room");

struct SharedHead {
    Tile tile;
    Epilogue epilogue;
    Cursor at;                         // of the walk over the tile's steps: in shared memory, since a warp walks and all need registers
    int tap;                           // the next one of the box
    Step steps[kStepSlots];
    Box boxes[kStepSlots];             // of the steps that open one
};
static_assert(sizeof(SharedHead) <= kSharedHeadBytes, "the tables begin behind the head");

// A warp: publishes a tile's steps from `begin` to `end`, to be called without gaps. A step is a tap of a box; a stage ends with the last tap of its box or where it is full.
__device__ __forceinline__ void publish_steps(const Operands& o, SharedHead& head, int begin, int end) {
    const Problem& p = o.a.p;
    const int lane = threadIdx.x % 32, taps_of_stage = p.t.weight_stages / 2;
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
            const unsigned i = tap + lane, slot = unsigned(begin + lane) % kStepSlots;
            const BoxTaps::Tap own = taps[i];
            const bool ends_stage = i + 1 == taps.count || (i + 1) % taps_of_stage == 0;
            head.steps[slot] = {own.rows | (i == 0 ? kOpensBox : 0) | (ends_stage ? kEndsStage : 0), int(((int64_t(own.tap) * p.t.M_pad + head.tile.run[0].row_tile * kRows) * o.w_pitch + own.column) / 8)};
            if (i == 0) head.boxes[slot] = {at.plane(), at.source_row(), at.c};
        }
        tap += count, begin += count;
    }
    __syncwarp();
    if (lane == 0) head.at = at, head.tap = tap;
}

// --------------------------------------------------------------------------------------------------------- Loading

// All threads: loads stages, one after another.
template <int kChunk> struct Loader {
    static constexpr int kRowBytes = kChunk * 2, kPieces = kRowBytes / 16, kAtOnce = kThreads / kPieces;    // rows that the block loads at a time
    static_assert(kAtOnce % 8 == 0, "those are swizzled alike");
    const Operands& o;
    const SharedHead& head;
    int* const places;              // of a box's rows in a plane of the source, in vectors of 16 bytes, or -1: each warp finds out those of the rows that it loads
    const uint32_t boxes_at, weights_at;    // the stages, in shared memory
    const uint32_t box_bytes, stage_bytes;  // of one of two; 0: there is one only
    const uint32_t place;           // of this thread's first piece in a stage
    const uint4* const weights;     // what this thread loads of each tap's
    int steps = 0;                  // that were loaded or are on their way
    int source_row = INT_MIN, source_plane = 0;    // that the places are of; the plane, where a box has several
    uint32_t box = 0, stage = 0;    // where the next ones go

    __device__ __forceinline__ Loader(const Operands& o, const SharedHead& head, int* places, uint32_t stages)
        : o(o), head(head), places(places), boxes_at(stages), weights_at(stages + o.a.p.t.input_stages * o.a.p.t.input_bytes), box_bytes(o.a.p.t.input_stages == 1 ? 0 : o.a.p.t.input_bytes),
          stage_bytes(o.a.p.t.weight_stages / 2 * (kRows * kRowBytes)), place(swizzled(threadIdx.x / kPieces, threadIdx.x % kPieces, kRowBytes)),
          weights(reinterpret_cast<const uint4*>(o.w + int64_t(threadIdx.x / kPieces) * o.w_pitch) + threadIdx.x % kPieces) {}

    __device__ __forceinline__ const Step& step() const { return head.steps[unsigned(steps) % kStepSlots]; }
    // The stage behind the one at `offset`.
    __device__ __forceinline__ uint32_t next_box(uint32_t offset) const { return box_bytes - offset; }
    __device__ __forceinline__ uint32_t next_stage(uint32_t offset) const { return stage_bytes - offset; }

    __device__ __forceinline__ void find_places() {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        constexpr int kOwn = kAtOnce / kColumnWarps;    // rows of a warp
        const int warp = threadIdx.x / 32, count = passes() * kOwn, w0 = aw.first + head.tile.w0 - aw.shift[aw.taps - 1];
        __syncwarp();
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < count; i += 32) {
            const int row = i / kOwn * kAtOnce + warp * kOwn + i % kOwn;
            int h = row;
            const int w = w0 + o.a.p.t.by_pitch.take(h), plane = o.a.p.t.planes > 1 ? h / o.a.p.t.box_rows : 0;
            h += source_row - plane * o.a.p.t.box_rows;
            const bool inside = unsigned(h) < unsigned(ah.sources) && unsigned(w) < unsigned(aw.sources) && row < loaded_rows(o.a.p.t, aw) && (o.a.p.t.planes == 1 || unsigned(source_plane + plane) < unsigned(ad.sources));
            places[row] = inside ? ((plane * ah.sources + h) * aw.sources + w) * (o.x_pitch / 8) : -1;
        }
        __syncwarp();
    }
    __device__ __forceinline__ int passes() const { return (loaded_rows(o.a.p.t, o.a.p.s.axis[2]) + kAtOnce - 1) / kAtOnce; }

    // The box of the stage whose first step is `first`. Behind a box there are the zeros that rows share.
    __device__ __forceinline__ void load_box(int first) {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        const Box from = head.boxes[unsigned(first) % kStepSlots];
        if (from.source_row != source_row || (o.a.p.t.planes > 1 && from.plane != source_plane)) source_row = from.source_row, source_plane = from.plane, find_places();
        const char* plane = reinterpret_cast<const char*>(o.x + (int64_t(head.tile.sample) * ad.sources + from.plane) * ah.sources * aw.sources * o.x_pitch + head.tile.source_channel + from.channel + threadIdx.x % kPieces * 8);
        const int* row = places + threadIdx.x / kPieces;
        uint32_t to = boxes_at + box + place;
#pragma unroll 1
        for (int left = passes(); left > 0; left -= 4, row += 4 * kAtOnce, to += 4 * kBytesAtOnce) {
            int at[4];    // loaded in advance: no load moves in front of a copy
#pragma unroll
            for (int i = 0; i < 4; i++) at[i] = i < left ? row[i * kAtOnce] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < left) cp_async_16(to + i * kBytesAtOnce, plane + int64_t(at[i]) * 16, at[i] >= 0);
        }
        box = next_box(box);
    }

    // The weights of the next stage.
    __device__ __forceinline__ void load_weights() {
        uint32_t to = weights_at + stage + place;
        const int stride = kAtOnce * o.w_pitch / 8;
        stage = next_stage(stage);
        Step loaded;
        do {
            loaded = step();
            const uint4* from = weights + loaded.weights;
#pragma unroll
            for (int i = 0; i < kRows; i += kAtOnce, from += stride, to += kBytesAtOnce) cp_async_16(to, from, true);
            steps++;
        } while (!(loaded.rows & kEndsStage));
    }
};

// -------------------------------------------------------------------------------------------------------- Products

// Products of steps `done` to `end`, whose weights are `weights` and what follows: 64 rows of them, kColumns positions from row `first_row` of the box on. `rows` are the first step's
// and then those of step `end`. Operands are loaded ahead of the products, 16 rows of weights, or 16 positions, at a time; in the end once more, in vain.
template <int kColumns, int kChunk>
__device__ __forceinline__ void multiply(const SharedHead& head, uint32_t weights, uint32_t box, int first_row, int& done, int end, int& rows, Sums<kColumns>& sums) {
    constexpr int kRowBytes = kChunk * 2, kSteps = kChunk / 16, kPairs = kColumns / 16;
    const int lane = threadIdx.x % 32;
    // A step of 16 channels is two pieces on, which only the swizzle's bits tell of; 16 rows on, the swizzle is the same.
    const auto place_of_row = [&](int row) { return box + swizzled(first_row + (row & kRowsOfStep) + lane / 16 * 8 + lane % 8, lane / 8 % 2, kRowBytes); };
    uint32_t a[2][4], b[2][kPairs][4], a_at = weights + swizzled(lane % 16, lane / 16, kRowBytes), b_at = place_of_row(rows);
#pragma unroll
    for (int j = 0; j < kPairs; j++) ldmatrix_x4(b[0][j], b_at + j * 16 * kRowBytes);
    ldmatrix_x4(a[0], a_at);
#pragma unroll 1
    for (; done < end; done++) {
        rows = head.steps[unsigned(done + 1) % kStepSlots].rows;
        const bool last = done + 1 == end;
        const uint32_t next_a = last ? a_at : a_at + kRows * kRowBytes, next_b = last ? b_at : place_of_row(rows);
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const uint32_t a_ahead = step + 1 < kSteps ? a_at ^ (step + 1) << 5 : next_a, b_ahead = step + 1 < kSteps ? b_at ^ (step + 1) << 5 : next_b;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                ldmatrix_x4(a[(m + 1) % 2], m < 3 ? (a_at ^ step << 5) + (m + 1) * 16 * kRowBytes : a_ahead);
                if (m < kPairs) ldmatrix_x4(b[(step + 1) % 2][m], b_ahead + m * 16 * kRowBytes);
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(sums.v[m][j], a[m % 2], b[step % 2][j / 2][j % 2 * 2], b[step % 2][j / 2][j % 2 * 2 + 1]);
            }
        }
        if (kSteps % 2 == 1) {
#pragma unroll
            for (int j = 0; j < kPairs; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) b[0][j][i] = b[1][j][i];
        }
        a_at = next_a, b_at = next_b;
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
    int* places = reinterpret_cast<int*>(base + kSharedHeadBytes + t.table_bytes);
    uint8_t* stages = base + stages_begin(t, p.s.axis[2]);
    constexpr int kColumns = kBlockN / kColumnWarps;
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) head.epilogue.table_key = make_int4(-1, 0, 0, 0);
    for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) locate(p, index, head.tile);
        __syncwarp();
        int published = 2 * kStepBatch;
        if (warp == 0) publish_steps(o, head, 0, published);
        __syncthreads();
        const bool same_table = prepare_finish<kColumns>(o.a, head.tile, head.epilogue, table);
        Sums<kColumns> sums = {};
        Loader<kChunk> loader(o, head, places, shared_address(stages));
        const int first_row = head.tile.run[0].b_row + warp * kColumns;    // of the box
        uint32_t box = 0, stage = 0;    // that are multiplied
        int rows = loader.step().rows;    // of the next one: read in advance
        bool more = !(rows & kNoMore);
        if (more) loader.load_box(0), loader.load_weights();
        else __syncthreads();    // as there is in each of the rounds below
        for (int done = 0; more;) {
            cp_async_wait_all();
            __syncthreads();
            const int next = loader.steps, first = loader.step().rows;
            more = !(first & kNoMore);
            const bool opens_box = more && first & kOpensBox, waits = opens_box && t.input_stages == 1;    // for this box's products
            if (more) loader.load_weights();
            if (opens_box && !waits) loader.load_box(next);
            if (published < loader.steps + kMaxTapsOfStage) {
                if (warp == published / kStepBatch % kColumnWarps) publish_steps(o, head, published, published + kStepBatch);    // warps take turns
                published += kStepBatch;
            }
            multiply<kColumns, kChunk>(head, loader.weights_at + stage, loader.boxes_at + box, first_row, done, next, rows, sums);
            stage = loader.next_stage(stage);
            if (opens_box) box = loader.next_box(box);
            if (waits) {
                __syncthreads();
                loader.load_box(next);
            }
        }
        finish<kColumns>(o.a, head.tile, head.epilogue, same_table, table, reinterpret_cast<float*>(stages), sums);
    }
}

}  // namespace conv_sm80
