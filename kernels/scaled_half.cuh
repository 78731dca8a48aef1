// The operands of the fp16 tensor-core paths: channels-last fp16 copies, scaled by powers of two.
//
// fp16 keeps as many mantissa bits as TF32 (10). A tensor's largest finite magnitude is scaled to [2^14, 2^15), so every
// element within 28 binades of it rounds exactly as TF32 rounds it, to nearest, and a smaller one is off by at most 2^-39 of
// the maximum. NaN and Inf stay what they are. Products of two such numbers are exact in float32.
// Activations have one scale per sample, weights one per row (destination channel). The scale lives in device memory as the
// bits of the maximum: nothing synchronises with the host.
#pragma once

#include "launch.cuh"

namespace scaled_half {

constexpr int kThreads = 256;
constexpr int kMaxShift = 120;             // keeps the scale and its inverse normal float32 numbers

// scale = 2^shift, from the bits of the largest finite magnitude
__device__ __forceinline__ int shift_of(unsigned max_bits) {
    const int shift = 14 - (int(max_bits >> 23) - 127);
    return max_bits == 0 ? 0 : shift < kMaxShift ? shift : kMaxShift;
}
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ unsigned finite_magnitude(float v) {
    const unsigned bits = __float_as_uint(v) & 0x7fffffff;
    return bits < 0x7f800000 ? bits : 0;
}

// ---------------------------------------------------------------------------------------------------- Parameters

// x (N, C, S) of the input's dtype -> activation (N, S, C_pad) fp16, zeros in the added channels.
// w (rows x columns channels, taps) -> weight (taps, M_pad, C_pad) fp16, zeros in the added rows and columns.
struct Pack {
    int64_t N, C, S, C_pad;
    int64_t rows, M_pad, taps;                     // rows: destination channels; its columns are the C source channels
    int64_t row_stride, column_stride;             // of w, in elements; taps are contiguous
    bool flip;                                     // take tap taps - 1 - k in place of k
    const void *x, *w;
    __half *activation, *weight;
    unsigned *activation_max, *weight_max;         // (N), (M_pad): bits of the largest finite magnitudes; activation_max starts at 0
    unsigned *ticket, *done;                       // start at 0; done (rounds)
    int64_t round_samples;                         // samples whose data stays in L2 between the two readings
};

constexpr int64_t kMaxElements = 16384;            // of one item of the search for the maximum
constexpr int kPositions = 64, kChannels = 64;     // of one tile of the copy
constexpr int kTiles = 4;                          // of one item of the copy, along the positions
constexpr int64_t kRoundBytes = 9 << 20;
constexpr int kLookahead = 3;                      // rounds by which the search runs ahead: further than the items in flight, within L2

HOST_DEVICE int64_t round_samples(int64_t N, int64_t sample_bytes) {
    const int64_t samples = kRoundBytes / (sample_bytes > 0 ? sample_bytes : 1);
    return samples < 1 ? 1 : samples < N ? samples : N;
}

// -------------------------------------------------------------------------------------------------------- Kernel

// The maximum over the block, in every thread.
__device__ __forceinline__ unsigned block_max(unsigned v) {
    __shared__ unsigned warps[kThreads / 32];
    v = __reduce_max_sync(~0u, v);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
    __syncthreads();
    unsigned max = 0;
    for (int i = 0; i < kThreads / 32; i++) max = warps[i] > max ? warps[i] : max;
    return max;
}

// One destination channel of the weight.
template <typename T> __device__ void pack_weight_row(const Pack& p, int64_t row) {
    const T* w = static_cast<const T*>(p.w) + row * p.row_stride;
    const int64_t count = p.taps * p.C_pad;
    unsigned max = 0;
    if (row < p.rows)
        for (int64_t i = threadIdx.x; i < p.C * p.taps; i += kThreads) max = umax(max, finite_magnitude(to_acc(w[i / p.taps * p.column_stride + i % p.taps])));
    max = block_max(max);
    const float scale = power_of_two(shift_of(max));
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        const int64_t tap = i / p.C_pad, c = i % p.C_pad;
        const bool inside = row < p.rows && c < p.C;
        const int64_t source = c * p.column_stride + (p.flip ? p.taps - 1 - tap : tap);
        p.weight[(tap * p.M_pad + row) * p.C_pad + c] = __float2half_rn(inside ? to_acc(w[source]) * scale : 0.0f);
    }
    if (threadIdx.x == 0) p.weight_max[row] = max;
}

// The maximum of kMaxElements elements of one sample.
template <typename T> __device__ void find_max(const Pack& p, int64_t n, int64_t item) {
    const T* sample = static_cast<const T*>(p.x) + n * p.C * p.S;
    const int64_t begin = item * kMaxElements, left = p.C * p.S - begin;
    const int count = left < kMaxElements ? left : kMaxElements;
    unsigned max = 0;
#pragma unroll 16
    for (int i = threadIdx.x; i < count; i += kThreads) max = umax(max, finite_magnitude(to_acc(sample[begin + i])));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(p.activation_max + n, max);
}

// kChannels x kPositions of one sample from (c0, s0) on, transposed through shared memory.
template <typename T> __device__ void copy_tile(const Pack& p, int64_t n, int64_t c0, int64_t s0, float scale) {
    __shared__ __half2 tile[kPositions][kChannels / 2 + 1];    // (positions, channel pairs), padded: no bank conflicts
    const T* source = static_cast<const T*>(p.x) + n * p.C * p.S + s0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int half = 0; half < kPositions / 32; half++) {
        const int s = half * 32 + lane;
#pragma unroll
        for (int pair = warp; pair < kChannels / 2; pair += kThreads / 32) {
            const int64_t c = c0 + 2 * pair;
            const bool inside = s0 + s < p.S;
            const float low = inside && c < p.C ? to_acc(source[c * p.S + s]) * scale : 0.0f;
            const float high = inside && c + 1 < p.C ? to_acc(source[(c + 1) * p.S + s]) * scale : 0.0f;
            tile[s][pair] = __floats2half2_rn(low, high);
        }
    }
    __syncthreads();
    constexpr int kVectors = kChannels / 8;                    // of 16 bytes per position
    for (int i = threadIdx.x; i < kPositions * kVectors; i += kThreads) {
        const int s = i / kVectors, v = i % kVectors;
        if (s0 + s >= p.S || c0 + v * 8 >= p.C_pad) continue;
        uint4 value;
        value.x = *reinterpret_cast<const unsigned*>(&tile[s][v * 4]);
        value.y = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 1]);
        value.z = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 2]);
        value.w = *reinterpret_cast<const unsigned*>(&tile[s][v * 4 + 3]);
        *reinterpret_cast<uint4*>(p.activation + (n * p.S + s0 + s) * p.C_pad + c0 + v * 8) = value;
    }
    __syncthreads();
}

// The first M_pad blocks pack the weight. The others take items from one queue: for rounds of samples that fit into L2, the
// search for the maximum, and kLookahead rounds later the copy. An item waits only for items that were taken before it by
// blocks that are running, so the queue cannot stall, however few blocks are resident.
template <typename T> __global__ void __launch_bounds__(kThreads, 5) pack_kernel(Pack p) {
    if (blockIdx.x < p.M_pad) return pack_weight_row<T>(p, blockIdx.x);
    __shared__ unsigned shared_item;
    const int64_t channel_blocks = ceil_div(p.C_pad, kChannels);
    const int64_t max_items = ceil_div(p.C * p.S, kMaxElements), copy_items = ceil_div(p.S, kTiles * kPositions) * channel_blocks;
    const int64_t round_max = p.round_samples * max_items, round_copy = p.round_samples * copy_items;
    const int64_t rounds = ceil_div(p.N, p.round_samples);
    unsigned next = threadIdx.x == 0 ? atomicAdd(p.ticket, 1u) : 0;
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) shared_item = next, next = atomicAdd(p.ticket, 1u);
        __syncthreads();
        // The queue: kLookahead rounds of searches, then for each round r its copies and the searches of round r + kLookahead.
        int64_t item = shared_item, round;
        bool copy = false;
        if (item < kLookahead * round_max) {
            round = item / round_max;
            item %= round_max;
        } else {
            item -= kLookahead * round_max;
            round = item / (round_max + round_copy);
            item %= round_max + round_copy;
            copy = item < round_copy;
            if (!copy) item -= round_copy, round += kLookahead;
        }
        if (copy && round >= rounds) return;
        const int64_t n = round * p.round_samples + item / (copy ? copy_items : max_items);
        if (n >= p.N) continue;
        if (!copy) {
            find_max<T>(p, n, item % max_items);
            __threadfence();
            if (threadIdx.x == 0) atomicAdd(p.done + round, 1u);
            continue;
        }
        const int64_t samples = p.N - round * p.round_samples < p.round_samples ? p.N - round * p.round_samples : p.round_samples;
        if (threadIdx.x == 0)
            while (*static_cast<volatile unsigned*>(p.done + round) < samples * max_items) __nanosleep(200);
        __syncthreads();
        __threadfence();
        const float scale = power_of_two(shift_of(__ldcg(p.activation_max + n)));
        const int64_t c0 = item % channel_blocks * kChannels, s0 = item % copy_items / channel_blocks * kTiles * kPositions;
        for (int tile = 0; tile < kTiles && s0 + tile * kPositions < p.S; tile++) copy_tile<T>(p, n, c0, s0 + tile * kPositions, scale);
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

// Bytes of the counters behind activation_max, ticket and done, which must be zero before the launch.
inline int64_t counters(const Pack& p) { return p.N + 1 + ceil_div(p.N, p.round_samples); }

template <typename T> int pack(const Pack& p, int multiprocessors, void* stream) {
    const int64_t items = p.N * (ceil_div(p.C * p.S, kMaxElements) + ceil_div(p.S, kTiles * kPositions) * ceil_div(p.C_pad, kChannels));
    const int64_t resident = multiprocessors * 5;
    return launch(pack_kernel<T>, p.M_pad + (items < resident ? items : resident), kThreads, stream, p);
}

}  // namespace scaled_half
