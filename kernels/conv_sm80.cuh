// Convolution of stride 1 by mma.sync, on any tensor core from sm_80 up: what conv_sm90.cuh does, cut by the same tiles and with
// the same operands, where there are no wgmma, TMA and warps that only load.
//
// A block is four warps, each with all 64 rows of a tile and a quarter of its positions. Boxes of the source come by cp.async; weights lie in memory as the
// lanes hold them (swizzle.h) and come straight from the L1 cache, which the four warps share, so that between two boxes no warp waits for another. A warp
// finds out what comes next, all load it. Two to four blocks share a multiprocessor, so that the tensor cores have products of one while another loads a box, waits, or stores its outputs.
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

// What is multiplied between two barriers: taps of a box.
struct Stage {
    int count;                         // of taps; 0: there are no more stages
    bool opens_box;
    int plane, source_row, channel;    // of the box
    int2 taps[kMostTapsOfStage + 1];   // rows of shared memory by which one is shifted in its box; its weights' first vector of 16 bytes
};

struct SharedHead {
    Tile tile;
    Epilogue epilogue;
    Cursor at;                         // of the walk over the tile's boxes: in shared memory, since a warp walks and all need registers
    int tap;                           // the next one of the box
    int2 placed[kColumnWarps];         // the box whose places each warp found out: its first row, and its plane where it has several
    Stage stages[kStageSlots];
    __device__ __forceinline__ Stage& stage(int index) { return stages[unsigned(index) % kStageSlots]; }
};
static_assert(sizeof(SharedHead) <= kSharedHeadBytes, "the tables begin behind the head");

// A warp: finds out a tile's stage, the one behind the one before.
__device__ __forceinline__ void find_stage(const Operands& o, SharedHead& head, int index) {
    const Problem& p = o.a.p;
    const int lane = threadIdx.x % 32;
    Stage& stage = head.stage(index);
    Cursor at = index == 0 ? Cursor(p, head.tile) : head.at;
    at.p = &p;
    int tap = index == 0 ? 0 : head.tap;
    if (index == 0 || tap == BoxTaps(at).count) {
        if (head.tile.empty || !at.next_box()) {
            if (lane == 0) stage.count = 0;
            return;
        }
        tap = 0;
    }
    const BoxTaps taps(at);
    const int count = min(kMostTapsOfStage, taps.count - tap);
    if (lane < count) {
        const BoxTaps::Tap own = taps[tap + lane];
        stage.taps[lane] = make_int2(own.rows, ((own.tap * p.t.row_tiles + head.tile.run[0].row_tile) * (o.w_pitch / 16) + own.column / 16) * (4 * 32));
    }
    __syncwarp();
    if (lane != 0) return;
    stage.count = count, stage.opens_box = tap == 0, stage.plane = at.plane(), stage.source_row = at.source_row(), stage.channel = at.c;
    head.at = at, head.tap = tap + count;
}

// --------------------------------------------------------------------------------------------------------- Loading

// All threads: loads boxes.
template <int kChunk> struct Loader {
    static constexpr int kRowBytes = kChunk * 2, kPieces = kRowBytes / 16, kAtOnce = kThreads / kPieces;    // rows that the block loads at a time
    static_assert(kAtOnce % 8 == 0, "those are swizzled alike");
    const Operands& o;
    SharedHead& head;
    int* const places;              // of a box's rows in a plane of the source, in vectors of 16 bytes, or -1: each warp finds out those of the rows that it loads

    // A warp: finds out the places, unless they are those of the box before.
    __device__ __forceinline__ void find_places(const Stage& from) {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        constexpr int kOwn = kAtOnce / kColumnWarps;    // rows of a warp
        const int warp = threadIdx.x / 32, count = passes() * kOwn, w0 = aw.first + head.tile.w0 - aw.shift[aw.taps - 1];
        const int2 key = make_int2(from.source_row, o.a.p.t.planes > 1 ? from.plane : 0), last = head.placed[warp];
        if (key.x == last.x && key.y == last.y) return;
        __syncwarp();
        if (threadIdx.x % 32 == 0) head.placed[warp] = key;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < count; i += 32) {
            const int row = i / kOwn * kAtOnce + warp * kOwn + i % kOwn;
            int h = row;
            const int w = w0 + o.a.p.t.by_pitch.take(h), plane = o.a.p.t.planes > 1 ? h / o.a.p.t.box_rows : 0;
            h += from.source_row - plane * o.a.p.t.box_rows;
            const bool inside = unsigned(h) < unsigned(ah.sources) && unsigned(w) < unsigned(aw.sources) && row < loaded_rows(o.a.p.t, aw) && (o.a.p.t.planes == 1 || unsigned(from.plane + plane) < unsigned(ad.sources));
            places[row] = inside ? ((plane * ah.sources + h) * aw.sources + w) * (o.x_pitch / 8) : -1;
        }
        __syncwarp();
    }
    __device__ __forceinline__ int passes() const { return (loaded_rows(o.a.p.t, o.a.p.s.axis[2]) + kAtOnce - 1) / kAtOnce; }

    // The box of a stage. Behind a box there are the zeros that rows share.
    __device__ __forceinline__ void load_box(const Stage& from, uint32_t box) {
        const StencilAxis &ad = o.a.p.s.axis[0], &ah = o.a.p.s.axis[1], &aw = o.a.p.s.axis[2];
        find_places(from);
        const char* plane = reinterpret_cast<const char*>(o.x + (int64_t(head.tile.sample) * ad.sources + from.plane) * ah.sources * aw.sources * o.x_pitch + head.tile.source_channel + from.channel + threadIdx.x % kPieces * 8);
        const int* row = places + threadIdx.x / kPieces;
        uint32_t to = box + swizzled(threadIdx.x / kPieces, threadIdx.x % kPieces, kRowBytes);
#pragma unroll 1
        for (int left = passes(); left > 0; left -= 4, row += 4 * kAtOnce, to += 4 * kBytesAtOnce) {
            int at[4];    // loaded in advance: no load moves in front of a copy
#pragma unroll
            for (int i = 0; i < 4; i++) at[i] = i < left ? row[i * kAtOnce] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < left) cp_async_16(to + i * kBytesAtOnce, plane + int64_t(at[i]) * 16, at[i] >= 0);
        }
    }
};

// -------------------------------------------------------------------------------------------------------- Products

// Fragments of 16 rows of weights that are on their way while one is multiplied, as many as there are registers for.
HOST_DEVICE constexpr int ahead_of(int columns) { return columns == 32 ? 1 : 3; }

template <int kAhead> struct Fragments { uint32_t v[kAhead + 1][4]; };    // fragment i is number i % (kAhead + 1)

__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const uint4* from) {
    const uint4 v = *from;
    fragment[0] = v.x, fragment[1] = v.y, fragment[2] = v.z, fragment[3] = v.w;
}

// Products of a stage: 64 rows of weights, kColumns positions from row `first_row` of the box on. weights: the lane's own; a: the first tap's first fragments,
// and then those at `after`. Positions are loaded ahead of the products, 16 channels at a time; in the end once more, in vain.
template <int kColumns, int kChunk, int kAhead>
__device__ __forceinline__ void multiply(const Stage& stage, const uint4* weights, int after, uint32_t box, int first_row, Fragments<kAhead>& a, Sums<kColumns>& sums) {
    constexpr int kRowBytes = kChunk * 2, kSteps = kChunk / 16, kPairs = kColumns / 16, kFragments = kSteps * 4;
    static_assert(kFragments % (kAhead + 1) == 0, "taps begin with fragment 0");
    const int lane = threadIdx.x % 32, count = stage.count;
    // A step of 16 channels is two pieces on, which only the swizzle's bits tell of; 16 rows on, the swizzle is the same.
    const auto place_of_row = [&](int row) { return box + swizzled(first_row + row + lane / 16 * 8 + lane % 8, lane / 8 % 2, kRowBytes); };
    uint32_t b[2][kPairs][4], b_at = place_of_row(stage.taps[0].x);
    const uint4* a_at = weights + stage.taps[0].y;
#pragma unroll
    for (int j = 0; j < kPairs; j++) ldmatrix_x4(b[0][j], b_at + j * 16 * kRowBytes);
#pragma unroll 1
    for (int tap = 1; tap <= count; tap++) {
        const int2 next = stage.taps[tap];    // behind the last one, any
        const uint4* const next_a = weights + (tap < count ? next.y : after);
        const uint32_t next_b = tap < count ? place_of_row(next.x) : b_at;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const uint32_t b_ahead = step + 1 < kSteps ? b_at ^ (step + 1) << 5 : next_b;
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const int fragment = step * 4 + m, ahead = fragment + kAhead;
                load_fragment(a.v[ahead % (kAhead + 1)], ahead < kFragments ? a_at + ahead * 32 : next_a + (ahead - kFragments) * 32);
                if (m < kPairs) ldmatrix_x4(b[(step + 1) % 2][m], b_ahead + m * 16 * kRowBytes);
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(sums.v[m][j], a.v[fragment % (kAhead + 1)], b[step % 2][j / 2][j % 2 * 2], b[step % 2][j / 2][j % 2 * 2 + 1]);
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
    const uint32_t boxes = shared_address(base + stages_begin(t, p.s.axis[2]));
    constexpr int kColumns = kBlockN / kColumnWarps, kAhead = ahead_of(kColumns);
    const int warp = threadIdx.x / 32;
    const uint4* const weights = reinterpret_cast<const uint4*>(o.w) + threadIdx.x % 32;
    if (threadIdx.x == 0) head.epilogue.table_key = make_int4(-1, 0, 0, 0);
    for (int index = blockIdx.x; index < t.tiles; index += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) locate(p, index, head.tile);
        if (threadIdx.x < kColumnWarps) head.placed[threadIdx.x] = make_int2(INT_MIN, 0);
        __syncwarp();
        if (warp == 0) find_stage(o, head, 0);
        __syncthreads();
        Sums<kColumns> sums = {};
        Fragments<kAhead> first;       // of the next stage
        Loader<kChunk> loader = {o, head, places};
        bool more = head.stage(0).count > 0;
        if (more) {
            loader.load_box(head.stage(0), boxes);
#pragma unroll
            for (int i = 0; i < kAhead; i++) load_fragment(first.v[i], weights + head.stage(0).taps[0].y + i * 32);
            if (warp == 1) find_stage(o, head, 1);
        }
        const bool same_table = prepare_finish<kColumns>(o.a, head.tile, head.epilogue, table);
        if (!more) __syncthreads();    // as there is in each of the rounds below
        uint32_t box = boxes;          // that is multiplied
        for (int i = 0; more; i++) {
            cp_async_wait_all();
            __syncthreads();           // stage i is there, stage i + 1 found out, and stage i - 1 multiplied
            const Stage &stage = head.stage(i), &next = head.stage(i + 1);
            more = next.count > 0;
            const bool opens_box = more && next.opens_box, waits = opens_box && t.input_stages == 1;    // for this box's products
            const uint32_t next_box = !opens_box || waits ? box : 2 * boxes + t.input_bytes - box;
            if (opens_box && !waits) loader.load_box(next, next_box);
            if (more && warp == (i + 2) % kColumnWarps) find_stage(o, head, i + 2);    // warps take turns
            multiply<kColumns, kChunk>(stage, weights, more ? next.taps[0].y : stage.taps[0].y, box, head.tile.run[0].b_row + warp * kColumns, first, sums);
            box = next_box;
            if (waits) {
                __syncthreads();
                loader.load_box(next, box);
            }
        }
        finish<kColumns>(o.a, head.tile, head.epilogue, same_table, table, reinterpret_cast<float*>(base + stages_begin(t, p.s.axis[2])), sums);
    }
}

}  // namespace conv_sm80
