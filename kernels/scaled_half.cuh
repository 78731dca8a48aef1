// The operands of the fp16 tensor-core paths: channels-last fp16 copies, scaled by powers of two.
//
// fp16 keeps as many mantissa bits as TF32 (10). Where a tensor's largest finite magnitude is scaled to 2^m <= 2^15, every
// element within 2^(m + 14) of it rounds exactly as TF32 rounds it, to nearest, and a smaller one is off by at most 2^-(m + 25)
// of the maximum. NaN and Inf stay what they are. Products of two such numbers are exact in float32.
//
// Weights have one scale per destination channel, from its maximum, with m = 15. Activations have one scale per sample,
// so that they are read once: the maximum of a part of the sample is scaled to [2^8, 2^9), the copy finds the true maximum on
// its way, and a sample that turns out to hold something 2^6 times larger is copied again, its maximum scaled to [2^14, 2^15).
// The maxima live in device memory: nothing synchronises with the host.
#pragma once

#include "launch.cuh"
#include "stencil.h"

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
struct Activation {
    int64_t N, C, S, C_pad;
    const void* x;
    bool vectors;                                  // S and the address are multiples of four elements
    __half* copy;
    SampleMax* max;                                // (N), starts at zero
};

// w -> copy (taps, M_pad, C_pad) fp16: the weight of each row, a (channel, phase), at each tap (d, h, w) of the stencil; zero
// where there is none. Rows that belong to no channel stay as they are.
struct Weight {
    Stencil stencil;
    RowMap rows;
    int64_t channels, C, M_pad, C_pad;             // destination channels, source channels
    int64_t row_stride, column_stride;             // of w, in elements, by destination and source channel; kernel elements are contiguous
    const void* w;
    __half* copy;
    unsigned* max;                                 // (channels)
};

constexpr int kLookElements = 4096;                // of one block's look at a part of a sample
constexpr int kLookShare = 16;                     // a sixteenth of a sample is looked at, or all of a small one
constexpr int64_t kSmallSample = 1 << 16;
constexpr int kPositions = 128, kChannels = 64;    // of one block of the copy

HOST_DEVICE int64_t look_blocks(const Activation& a) {
    const int64_t elements = a.C * a.S;
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

// One destination channel: a warp reads the kernel of one source channel after another, then writes the rows of one tap after another.
template <typename T> __device__ void pack_channel(const Weight& p, int channel) {
    const T* w = static_cast<const T*>(p.w) + channel * p.row_stride;
    const StencilAxis &ad = p.stencil.axis[0], &ah = p.stencil.axis[1], &aw = p.stencil.axis[2];
    const int volume = ad.kernel * ah.kernel * aw.kernel, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned max = 0;
    for (int k = lane; k < volume; k += 32)
#pragma unroll 8
        for (int c = warp; c < p.C; c += kThreads / 32) max = umax(max, finite_magnitude(to_acc(w[c * p.column_stride + k])));
    max = block_max(max);
    if (threadIdx.x == 0) p.max[channel] = max;
    const float scale = power_of_two(shift_of(max));
    const int taps = ad.taps * ah.taps * aw.taps, phases = ad.phases * ah.phases * aw.phases;
    for (int i = warp; i < taps * phases; i += kThreads / 32) {
        const int tap = i % taps, phase = i / taps;
        const int k = kernel_index(p.stencil, tap, phase);
        __half* row = p.copy + (tap * p.M_pad + p.rows.row(channel, phase)) * p.C_pad;
#pragma unroll 4
        for (int c = lane; c < p.C_pad; c += 32) row[c] = __float2half_rn(k >= 0 && c < p.C ? to_acc(w[c * p.column_stride + k]) * scale : 0.0f);
    }
}

// The weight, and a look at parts of every sample, evenly spread.
template <typename T> __global__ void __launch_bounds__(kThreads) look_kernel(Activation a, Weight p) {
    if (blockIdx.x < p.channels) return pack_channel<T>(p, blockIdx.x);
    const int64_t blocks = look_blocks(a), elements = a.C * a.S;
    const int64_t n = (blockIdx.x - p.channels) / blocks, block = (blockIdx.x - p.channels) % blocks;
    const int64_t last = elements > kLookElements ? elements - kLookElements : 0;
    const int64_t begin = blocks > 1 ? last * block / (blocks - 1) : 0;
    const T* part = static_cast<const T*>(a.x) + n * elements + begin;
    const int count = elements < kLookElements ? elements : kLookElements;
    unsigned max = 0;
#pragma unroll 16
    for (int i = threadIdx.x; i < count; i += kThreads) max = umax(max, finite_magnitude(to_acc(part[i])));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(&a.max[n].part, max);
}

template <typename T> struct alignas(4 * sizeof(T)) Four { T v[4]; };

// kChannels x kPositions of one sample from (c0, s0) on, transposed through shared memory; returns the thread's maximum.
template <typename T> __device__ unsigned copy_tile(const Activation& a, int64_t n, int64_t c0, int64_t s0, float scale) {
    // (positions, channel pairs); pair p of position s is at p + s / 4 + s % 4 (mod 32), which keeps threads off each other's banks.
    __shared__ __half2 tile[kPositions][kChannels / 2];
    const T* source = static_cast<const T*>(a.x) + n * a.C * a.S + s0;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarps = kThreads / 32, kPairs = kChannels / 2 / kWarps;
    Four<T> values[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t c = c0 + (warp + i * kWarps) * 2 + half;
            if (a.vectors) {
                if (c < a.C && s0 + lane * 4 < a.S) values[i][half] = *reinterpret_cast<const Four<T>*>(source + c * a.S + lane * 4);
                else values[i][half] = {};
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) values[i][half].v[e] = c < a.C && s0 + lane + e * 32 < a.S ? source[c * a.S + lane + e * 32] : from_acc<T>(0.0f);
            }
        }
    unsigned max = 0;
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float low = to_acc(values[i][0].v[e]), high = to_acc(values[i][1].v[e]);
            const int s = a.vectors ? lane * 4 + e : lane + e * 32;
            max = umax(max, umax(finite_magnitude(low), finite_magnitude(high)));
            tile[s][(warp + i * kWarps + s / 4 + s % 4) % 32] = __floats2half2_rn(low * scale, high * scale);
        }
    __syncthreads();
    constexpr int kVectors = kChannels / 8;                    // of 16 bytes per position
#pragma unroll
    for (int i = threadIdx.x; i < kPositions * kVectors; i += kThreads) {
        const int s = i / kVectors, v = i % kVectors;
        if (s0 + s >= a.S || c0 + v * 8 >= a.C_pad) continue;
        __half2 four[4];
#pragma unroll
        for (int k = 0; k < 4; k++) four[k] = tile[s][(v * 4 + k + s / 4 + s % 4) % 32];
        *reinterpret_cast<uint4*>(a.copy + (n * a.S + s0 + s) * a.C_pad + c0 + v * 8) = *reinterpret_cast<const uint4*>(four);
    }
    return max;
}

HOST_DEVICE int64_t tiles_of_sample(const Activation& a) { return ceil_div(a.S, kPositions) * ceil_div(a.C_pad, kChannels); }

template <typename T> __device__ unsigned copy_tile(const Activation& a, int64_t n, int64_t tile, float scale) {
    const int64_t channel_blocks = ceil_div(a.C_pad, kChannels);
    return copy_tile<T>(a, n, tile % channel_blocks * kChannels, tile / channel_blocks * kPositions, scale);
}

template <typename T> __global__ void __launch_bounds__(kThreads) copy_kernel(Activation a) {
    const int64_t n = blockIdx.x / tiles_of_sample(a);
    const unsigned max = block_max(copy_tile<T>(a, n, blockIdx.x % tiles_of_sample(a), power_of_two(first_shift_of(a.max[n]))));
    if (threadIdx.x == 0 && max > a.max[n].all) atomicMax(&a.max[n].all, max);
}

// Copies again the samples whose first copy does not hold: mostly none.
template <typename T> __global__ void __launch_bounds__(kThreads) copy_again_kernel(Activation a) {
    for (int64_t n = 0; n < a.N; n++) {
        if (first_copy_holds(a.max[n])) continue;
        const float scale = power_of_two(shift_of(a.max[n]));
        for (int64_t tile = blockIdx.x; tile < tiles_of_sample(a); tile += gridDim.x) {
            copy_tile<T>(a, n, tile, scale);
            __syncthreads();
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

template <typename T> int pack(Activation a, const Weight& p, int multiprocessors, void* stream) {
    a.vectors = a.S % 4 == 0 && reinterpret_cast<uintptr_t>(a.x) % sizeof(Four<T>) == 0;
    RETURN_IF_ERROR(launch(look_kernel<T>, p.channels + a.N * look_blocks(a), kThreads, stream, a, p));
    RETURN_IF_ERROR(launch(copy_kernel<T>, a.N * tiles_of_sample(a), kThreads, stream, a));
    return launch(copy_again_kernel<T>, multiprocessors * 2, kThreads, stream, a);
}

}  // namespace scaled_half
