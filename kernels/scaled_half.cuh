// The operands of the fp16 tensor-core paths: channels-last fp16 copies, scaled by powers of two.
//
// fp16 keeps as many mantissa bits as TF32 (10). Where a tensor's largest finite magnitude is scaled to 2^m <= 2^15, every
// element within 2^(m + 14) of it rounds exactly as TF32 rounds it, to nearest, and a smaller one is off by at most 2^-(m + 25)
// of the maximum. NaN and Inf stay what they are. Products of two such numbers are exact in float32.
//
// Weights have one scale per row (destination channel), from its maximum, with m = 15. Activations have one scale per sample,
// so that they are read once: the maximum of a part of the sample is scaled to [2^8, 2^9), the copy finds the true maximum on
// its way, and a sample that turns out to hold something 2^6 times larger is copied again, its maximum scaled to [2^14, 2^15).
// The maxima live in device memory: nothing synchronises with the host.
#pragma once

#include "launch.cuh"

namespace scaled_half {

constexpr int kThreads = 256;
constexpr int kMaxShift = 120;             // keeps the scale and its inverse normal float32 numbers

__device__ __forceinline__ int clamp_shift(int shift) { return shift < kMaxShift ? shift : kMaxShift; }
__device__ __forceinline__ int exponent_of(unsigned magnitude_bits) { return int(magnitude_bits >> 23) - 127; }

// scale = 2^shift, from the bits of the largest finite magnitude
__device__ __forceinline__ int shift_of(unsigned max_bits) { return max_bits == 0 ? 0 : clamp_shift(14 - exponent_of(max_bits)); }

// The bits of the largest finite magnitude of a sample: of the part that was looked at first, and of all.
struct SampleMax { unsigned part, all; };

__device__ __forceinline__ int first_shift_of(SampleMax m) { return m.part == 0 ? 0 : clamp_shift(8 - exponent_of(m.part)); }
// Whether the first copy holds: nothing overflowed, and there was something to look at.
__device__ __forceinline__ bool first_copy_holds(SampleMax m) { return m.part != 0 ? exponent_of(m.all) + first_shift_of(m) <= 14 : m.all == 0; }
__device__ __forceinline__ int shift_of(SampleMax m) { return first_copy_holds(m) ? first_shift_of(m) : shift_of(m.all); }

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
    SampleMax* activation_max;                     // (N), starts at zero
    unsigned* weight_max;                          // (M_pad)
};

constexpr int kLookElements = 4096;                // of one block's look at a part of a sample
constexpr int kLookShare = 16;                     // a sixteenth of a sample is looked at, or all of a small one
constexpr int64_t kSmallSample = 1 << 16;
constexpr int kPositions = 128, kChannels = 64;    // of one block of the copy

HOST_DEVICE int64_t look_blocks(const Pack& p) {
    const int64_t elements = p.C * p.S;
    return ceil_div(elements > kSmallSample ? (elements / kLookShare > kSmallSample ? elements / kLookShare : kSmallSample) : elements, kLookElements);
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
    const int taps = p.taps, C = p.C, C_pad = p.C_pad, live = row < p.rows ? C * taps : 0;
    unsigned max = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < live; i += kThreads) max = umax(max, finite_magnitude(to_acc(w[i / taps * p.column_stride + i % taps])));
    max = block_max(max);
    const float scale = power_of_two(shift_of(max));
#pragma unroll 8
    for (int i = threadIdx.x; i < taps * C_pad; i += kThreads) {
        const int tap = i / C_pad, c = i % C_pad;
        const float v = row < p.rows && c < C ? to_acc(w[c * p.column_stride + (p.flip ? taps - 1 - tap : tap)]) : 0.0f;
        p.weight[(tap * p.M_pad + row) * C_pad + c] = __float2half_rn(v * scale);
    }
    if (threadIdx.x == 0) p.weight_max[row] = max;
}

// The weight's rows, and a look at parts of every sample, evenly spread.
template <typename T> __global__ void __launch_bounds__(kThreads) look_kernel(Pack p) {
    if (blockIdx.x < p.M_pad) return pack_weight_row<T>(p, blockIdx.x);
    const int64_t blocks = look_blocks(p), elements = p.C * p.S;
    const int64_t n = (blockIdx.x - p.M_pad) / blocks, block = (blockIdx.x - p.M_pad) % blocks;
    const int64_t last = elements > kLookElements ? elements - kLookElements : 0;
    const int64_t begin = blocks > 1 ? last * block / (blocks - 1) : 0;
    const T* part = static_cast<const T*>(p.x) + n * elements + begin;
    const int count = elements < kLookElements ? elements : kLookElements;
    unsigned max = 0;
#pragma unroll 16
    for (int i = threadIdx.x; i < count; i += kThreads) max = umax(max, finite_magnitude(to_acc(part[i])));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(&p.activation_max[n].part, max);
}

// kChannels x kPositions of one sample from (c0, s0) on, transposed through shared memory; returns the thread's maximum.
template <typename T> __device__ unsigned copy_tile(const Pack& p, int64_t n, int64_t c0, int64_t s0, float scale) {
    __shared__ __half2 tile[kPositions][kChannels / 2 + 1];    // (positions, channel pairs), padded: no bank conflicts
    const T* source = static_cast<const T*>(p.x) + n * p.C * p.S + s0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned max = 0;
#pragma unroll
    for (int half = 0; half < kPositions / 32; half++) {
        const int s = half * 32 + lane;
#pragma unroll
        for (int i = 0; i < kChannels / 2 / (kThreads / 32); i++) {
            const int pair = warp + i * (kThreads / 32);
            const int64_t c = c0 + 2 * pair;
            const bool inside = s0 + s < p.S;
            const float low = inside && c < p.C ? to_acc(source[c * p.S + s]) : 0.0f;
            const float high = inside && c + 1 < p.C ? to_acc(source[(c + 1) * p.S + s]) : 0.0f;
            max = umax(max, umax(finite_magnitude(low), finite_magnitude(high)));
            tile[s][pair] = __floats2half2_rn(low * scale, high * scale);
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
    return max;
}

HOST_DEVICE int64_t tiles_of_sample(const Pack& p) { return ceil_div(p.S, kPositions) * ceil_div(p.C_pad, kChannels); }

template <typename T> __device__ unsigned copy_tile(const Pack& p, int64_t n, int64_t tile, float scale) {
    const int64_t channel_blocks = ceil_div(p.C_pad, kChannels);
    return copy_tile<T>(p, n, tile % channel_blocks * kChannels, tile / channel_blocks * kPositions, scale);
}

template <typename T> __global__ void __launch_bounds__(kThreads) copy_kernel(Pack p) {
    const int64_t n = blockIdx.x / tiles_of_sample(p);
    const unsigned max = block_max(copy_tile<T>(p, n, blockIdx.x % tiles_of_sample(p), power_of_two(first_shift_of(p.activation_max[n]))));
    if (threadIdx.x == 0 && max > p.activation_max[n].all) atomicMax(&p.activation_max[n].all, max);
}

// Copies again the samples whose first copy does not hold: mostly none.
template <typename T> __global__ void __launch_bounds__(kThreads) copy_again_kernel(Pack p) {
    for (int64_t n = 0; n < p.N; n++) {
        if (first_copy_holds(p.activation_max[n])) continue;
        const float scale = power_of_two(shift_of(p.activation_max[n]));
        for (int64_t tile = blockIdx.x; tile < tiles_of_sample(p); tile += gridDim.x) {
            copy_tile<T>(p, n, tile, scale);
            __syncthreads();
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

template <typename T> int pack(const Pack& p, int multiprocessors, void* stream) {
    RETURN_IF_ERROR(launch(look_kernel<T>, p.M_pad + p.N * look_blocks(p), kThreads, stream, p));
    RETURN_IF_ERROR(launch(copy_kernel<T>, p.N * tiles_of_sample(p), kThreads, stream, p));
    return launch(copy_again_kernel<T>, multiprocessors * 2, kThreads, stream, p);
}

}  // namespace scaled_half
