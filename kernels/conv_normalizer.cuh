// GroupNorm in the convolution's kernel on Hopper: some blocks, on multiprocessors of their own, normalize the samples that are complete while the others
// multiply, which join them when there are no more tiles. Before there is anything to normalize, they take kFirstTiles tiles each. Products
// leave memory idle; what a multiprocessor can read, its weights take.
//
//   a storer whose tile is in memory: stored[n] += 1
//   the producers' warpgroup of a normalizing block, when all of a sample's are: the statistics of a group, ready[n] += 1
//   the other warps there, when all groups' are: pieces of channels
//
// Blocks that have no more tiles do both too. Whoever takes a tile, a group or a piece takes the next one that there is, and waits only for what others took before: so it
// does not matter which blocks run at the same time (tests/test_protocol.py).
#pragma once

#include "conv_statistics.cuh"
#include "pipeline_sm90.cuh"

namespace conv {

constexpr int kFirstTiles = 2;
constexpr int kPieceStages = 2, kPieces = 2, kMostPieceFloats = 4096;    // kPieces: neighbours, that a warp takes at a time before the last sample
constexpr double kMostSampleBytes = 24 << 20;    // with larger ones, passes of their own are faster
constexpr double kNormalizedBytes = 20;          // that a multiprocessor normalizes in a cycle, reading and writing as many

// Floats of a channel that a warp normalizes at a time: the stages are where boxes and weights were.
HOST_DEVICE int piece_floats(const Tiling& t) {
    const int most = (t.input_stages * t.input_bytes + t.weight_rings * t.weight_stages * t.weight_bytes) / (t.warpgroups * 4 * kPieceStages) / 512 * 128;
    return most < kMostPieceFloats ? most : kMostPieceFloats;
}
inline int64_t pieces_of(const Tiling& t, const group_norm::Shape& shape) { return shape.N * shape.C * ceil_div(shape.S, piece_floats(t)); }

// How many blocks are to normalize beside those that multiply; 0 where passes of their own are better, or necessary. r: relu(out).
inline int normalizing_blocks(const Problem& p, const group_norm::Shape& shape, int dtype, int y_dtype, int multiprocessors, const void* r, const void* y) {
    if (dtype != kFloat32 || y_dtype != kFloat32 || !group_norm::has_vectors<float, float>(shape, r, y)) return 0;
    const double sample = double(shape.C * shape.S) * sizeof(float), normalized = shape.N * sample / kNormalizedBytes / multiprocessors;    // bytes; cycles, if all multiprocessors did it
    if (shape.N < 4 || sample > kMostSampleBytes || p.t.k_parts > 1 || p.t.tiles < 4 * multiprocessors || pieces_of(p.t, shape) > 1 << 30) return 0;
    if (3 * normalized > p.t.cycles) return 0;    // memory is not idle enough
    return int(multiprocessors * normalized / (normalized + p.t.cycles) + 0.5);
}

__device__ __forceinline__ void wait_for_count(const unsigned* counter, unsigned count) {
    while (load_acquire(counter) < count) __nanosleep(100);
}

struct SharedStatistics {
    group_norm::Pair sums[4];    // of the warps
    int index;                   // of the group
};

// A warpgroup: takes groups, one after another, until there are no more. reports: of a sample.
__device__ __forceinline__ void find_statistics(const Parameters& a, unsigned reports, SharedStatistics& shared, int barrier) {
    wait_for_previous_kernel();
    const Normalization& norm = a.norm;
    const int thread = threadIdx.x % 128, groups = int(norm.shape.num_groups), all = int(norm.shape.N) * groups;
    while (true) {
        if (thread == 0) {
            shared.index = int(atomicAdd(a.workspace.groups, 1u));
            if (shared.index < all) wait_for_count(a.workspace.stored + shared.index / groups, reports);
        }
        named_barrier(barrier, 128);
        const int index = shared.index;
        if (index >= all) return;
        group_norm::Pair sums = sum_moments<128>(a.workspace.sets, norm.shape, index, thread, 0, 1);
        for (int step = 16; step > 0; step /= 2) sums.a += __shfl_xor_sync(~0u, sums.a, step), sums.b += __shfl_xor_sync(~0u, sums.b, step);
        if (thread % 32 == 0) shared.sums[thread / 32] = sums;
        named_barrier(barrier, 128);
        if (thread > 0) continue;
        for (int warp = 1; warp < 4; warp++) sums.a += shared.sums[warp].a, sums.b += shared.sums[warp].b;
        leave_statistics(norm.shape, norm.eps, sums, index, norm.mean, norm.rstd);
        add_release(a.workspace.ready + index / groups);
    }
}

// A warp: takes pieces of channels, one after another, until there are no more. The copy engine brings them to stages of shared memory, which are the warp's own. All
// warps of all blocks come to the last sample, each for one piece or two: there, none is taken before the warp has nothing else to do.
struct PieceNormalizer {
    const Parameters& a;
    float* stages;
    uint64_t* full;
    int floats;                             // of a piece
    unsigned pieces, all, last_sample;      // of a channel; of all; the first of the last sample
    unsigned newest = 0, left = 0, next;    // the last that was loaded; how many were taken with it and are not loaded; lane 0: the next ones, if they are taken ahead
    bool ahead = false;
    int ready = -1;                         // the last sample whose statistics are known

    __device__ __forceinline__ PieceNormalizer(const Parameters& a, uint8_t* stages, uint64_t* full)
        : a(a), stages(reinterpret_cast<float*>(stages)), full(full), floats(piece_floats(a.p.t)), pieces((int(a.norm.shape.S) + floats - 1) / floats), all(unsigned(a.norm.shape.N * a.norm.shape.C) * pieces),
          last_sample(all - unsigned(a.norm.shape.C) * pieces) {}
    __device__ __forceinline__ unsigned take(int count) const { return threadIdx.x % 32 == 0 ? atomicAdd(a.workspace.pieces, unsigned(count)) : 0; }
    struct Span { unsigned row; int first, count; };    // floats of a row, a sample's channel
    __device__ __forceinline__ Span span_of(unsigned piece) const {
        const unsigned row = piece / pieces;
        const int first = int(piece - row * pieces) * floats;
        return {row, first, min(floats, int(a.norm.shape.S) - first)};
    }
    __device__ __forceinline__ int64_t origin_of(const Span& span) const { return int64_t(span.row) * a.norm.shape.S + span.first; }

    // Takes a piece, unless there is one at hand, and loads it. False: there is none.
    __device__ __forceinline__ bool load(int stage) {
        if (left > 0) {
            newest++, left--;
        } else {
            left = ahead ? kPieces - 1 : 0;
            if (!ahead) next = take(1);
            newest = __shfl_sync(~0u, next, 0);
            ahead = newest < last_sample;
            if (ahead) next = take(kPieces);
        }
        if (newest >= all) return false;
        const Span span = span_of(newest);
        const int n = span.row / unsigned(a.norm.shape.C);
        if (threadIdx.x % 32 == 0) {
            if (n != ready) wait_for_count(a.workspace.ready + n, unsigned(a.norm.shape.num_groups)), fence_proxy_async_global();
            mbarrier_arrive_expect_tx(full + stage, span.count * 4);
            bulk_load(stages + stage * floats, static_cast<const float*>(a.out) + origin_of(span), span.count * 4, full + stage);
        }
        ready = n;
        __syncwarp();
        return true;
    }

    __device__ __forceinline__ void run() {
        const Normalization& norm = a.norm;
        unsigned loaded[kPieceStages], known = all;    // pieces, the next one first; the row whose constants are known
        int count = 0;
        group_norm::ChannelNorm<float> normalized;
        RingPosition to, at;
        while (true) {
            while (count < kPieceStages && newest < (count == 0 ? all : last_sample) && load(to.stage)) {
#pragma unroll
                for (int i = 0; i < kPieceStages; i++)
                    if (i == count) loaded[i] = newest;
                count++, to.advance(kPieceStages);
            }
            if (count == 0) return;
            const Span span = span_of(loaded[0]);
            if (span.row != known) {
                const int c = span.row % unsigned(norm.shape.C), group = span.row / unsigned(norm.shape.group_channels());
                normalized = {__ldcg(norm.mean + group), __ldcg(norm.rstd + group), norm.gamma ? norm.gamma[c] : 1.0f, norm.beta ? norm.beta[c] : 0.0f};
                known = span.row;
            }
            const float4* const values = reinterpret_cast<const float4*>(stages + at.stage * floats);
            float4* const out = reinterpret_cast<float4*>(norm.y + origin_of(span));
            mbarrier_wait(full + at.stage, at.phase);
#pragma unroll 4
            for (int i = threadIdx.x % 32; i < span.count / 4; i += 32) {
                const float4 v = values[i];
                __stcs(out + i, make_float4(normalized(v.x), normalized(v.y), normalized(v.z), normalized(v.w)));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i + 1 < kPieceStages; i++) loaded[i] = loaded[i + 1];
            count--, at.advance(kPieceStages);
        }
    }
};

}  // namespace conv
