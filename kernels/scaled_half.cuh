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

// x (N, C, D, H, W) of the tensor's dtype -> copy (N, positions d, h, w, phases, phase_channels) fp16. Element u - crop of an axis,
// u = position * phases + phase, where that is in [0, size); zero elsewhere, and in the added channels.
struct Activation {
    struct Axis { int positions, phases, crop, size; };
    int64_t N, C, phase_channels;
    Axis axis[3];                                  // D, H, W
    const void* x;
    __half* copy;
    SampleMax* max;                                // (N), starts at zero
    bool vectors;                                  // rows and the address are multiples of four elements
    HOST_DEVICE int64_t sample() const { return C * axis[0].size * axis[1].size * axis[2].size; }
    HOST_DEVICE int64_t positions() const { return int64_t(axis[0].positions) * axis[1].positions * axis[2].positions; }
    HOST_DEVICE int phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
    HOST_DEVICE int64_t copied() const { return N * positions() * phases() * phase_channels; }
};

// The source of a stencil. Without phases, a sample is one long row.
inline Activation make_activation(const Stencil& s, int64_t N, int64_t C, int64_t phase_channels) {
    Activation a = {N, C, phase_channels, {}, nullptr, nullptr, nullptr, false};
    for (int i = 0; i < 3; i++) a.axis[i] = {s.axis[i].sources, s.axis[i].source_phases, s.axis[i].source_crop, s.axis[i].source_out};
    const int64_t volume = a.positions();
    if (a.phases() == 1 && volume < 1 << 30) a.axis[0] = a.axis[1] = {1, 1, 0, 1}, a.axis[2] = {int(volume), 1, 0, int(volume)};
    return a;
}

// w -> copy (taps, M_pad, source phases, phase_channels) fp16: the weight of each row, a (channel, phase) of the destination, at
// each tap (d, h, w) of the stencil; zero where there is none. Rows that belong to no channel stay as they are.
struct Weight {
    Stencil stencil;
    RowMap rows;
    int64_t channels, C, M_pad, phase_channels;    // destination channels, source channels
    int64_t row_stride, column_stride;             // of w, in elements, by destination and source channel; kernel elements are contiguous
    const void* w;
    __half* copy;
    unsigned* max;                                 // (channels)
    HOST_DEVICE int64_t copied() const { return stencil.taps() * M_pad * stencil.source_phases() * phase_channels; }
};

constexpr int kLookElements = 4096;                // of one block's look at a part of a sample
constexpr int kLookShare = 16;                     // a sixteenth of a sample is looked at, or all of a small one
constexpr int64_t kSmallSample = 1 << 16;
constexpr int kPositions = 128, kChannels = 64;    // of one block of the copy

HOST_DEVICE int64_t look_blocks(const Activation& a) {
    const int64_t elements = a.sample();
    return ceil_div(elements > kSmallSample ? (elements / kLookShare > kSmallSample ? elements / kLookShare : kSmallSample) : elements, kLookElements);
}

// Blocks of the look at each destination channel of the weight.
HOST_DEVICE int weight_splits(const Weight& p) {
    const int64_t rows = int64_t(p.stencil.taps()) * p.stencil.phases() * p.stencil.source_phases(), splits = ceil_div(rows, kThreads / 32);
    return int(splits < 16 ? splits : 16);
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

// One destination channel, or one of several parts of its rows: a warp reads the kernel of one source channel after another, then
// writes the rows of one tap after another.
template <typename T> __device__ void pack_channel(const Weight& p, int channel, int split, int splits) {
    const T* w = static_cast<const T*>(p.w) + channel * p.row_stride;
    const StencilAxis &ad = p.stencil.axis[0], &ah = p.stencil.axis[1], &aw = p.stencil.axis[2];
    const int volume = ad.kernel * ah.kernel * aw.kernel, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned max = 0;
    for (int k = lane; k < volume; k += 32)
#pragma unroll 8
        for (int c = warp; c < p.C; c += kThreads / 32) max = umax(max, finite_magnitude(to_acc(w[c * p.column_stride + k])));
    max = block_max(max);
    if (threadIdx.x == 0 && split == 0) p.max[channel] = max;
    const float scale = power_of_two(shift_of(max));
    const int taps = p.stencil.taps(), phases = p.stencil.phases(), source_phases = p.stencil.source_phases();    // one of them is 1
    for (int i = split * (kThreads / 32) + warp; i < taps * phases * source_phases; i += splits * (kThreads / 32)) {
        const int tap = i % taps, phase = i / taps, k = kernel_index(p.stencil, tap, phase);
        __half* row = p.copy + ((tap * p.M_pad + p.rows.row(channel, phase / source_phases)) * source_phases + phase % source_phases) * p.phase_channels;
#pragma unroll 4
        for (int c = lane; c < p.phase_channels; c += 32) row[c] = __float2half_rn(k >= 0 && c < p.C ? to_acc(w[c * p.column_stride + k]) * scale : 0.0f);
    }
}

// The weight, and a look at parts of every sample, evenly spread.
template <typename T> __global__ void __launch_bounds__(kThreads) look_kernel(Activation a, Weight p) {
    const int splits = weight_splits(p), weight_blocks = p.channels * splits;
    if (blockIdx.x < weight_blocks) return pack_channel<T>(p, blockIdx.x / splits, blockIdx.x % splits, splits);
    const int64_t blocks = look_blocks(a), elements = a.sample();
    const int64_t n = (blockIdx.x - weight_blocks) / blocks, block = (blockIdx.x - weight_blocks) % blocks;
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

HOST_DEVICE int64_t row_tiles(const Activation& a) { return ceil_div(int64_t(a.axis[2].positions) * a.axis[2].phases, kPositions); }
HOST_DEVICE int64_t tiles_of_sample(const Activation& a) {
    return int64_t(a.axis[0].positions) * a.axis[0].phases * a.axis[1].positions * a.axis[1].phases * row_tiles(a) * ceil_div(a.phase_channels, kChannels);
}

// Tile `index` of a sample: kChannels x kPositions of one row, transposed through shared memory; returns the thread's maximum.
template <typename T> __device__ unsigned copy_tile(const Activation& a, int64_t n, int64_t index, float scale) {
    const auto &ad = a.axis[0], &ah = a.axis[1], &aw = a.axis[2];
    auto take = [&index](int64_t count) { const int64_t digit = index % count; index /= count; return int(digit); };
    const int c0 = take(ceil_div(a.phase_channels, kChannels)) * kChannels;
    const int u0 = take(row_tiles(a)) * kPositions;
    const int phase_h = take(ah.phases), phase_d = take(ad.phases), h = take(ah.positions), d = int(index);
    const int source_d = d * ad.phases + phase_d - ad.crop, source_h = h * ah.phases + phase_h - ah.crop;
    const bool inside = source_d >= 0 && source_d < ad.size && source_h >= 0 && source_h < ah.size;
    const int64_t volume = int64_t(ad.size) * ah.size * aw.size;
    // Element s of the row is at source[channel * volume + s].
    const T* source = static_cast<const T*>(a.x) + n * a.C * volume + (int64_t(source_d) * ah.size + source_h) * aw.size;
    const int begin = u0 - aw.crop, end = inside ? aw.size : 0;

    // (positions, channel pairs); pair p of position s is at p + s / 4 + s % 4 (mod 32), which keeps threads off each other's banks.
    __shared__ __half2 tile[kPositions][kChannels / 2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kWarps = kThreads / 32, kPairs = kChannels / 2 / kWarps;
    Four<T> values[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int64_t c = c0 + (warp + i * kWarps) * 2 + half;
            if (a.vectors) {
                if (c < a.C && begin + lane * 4 < end) values[i][half] = *reinterpret_cast<const Four<T>*>(source + c * volume + begin + lane * 4);
                else values[i][half] = {};
            } else {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int s = begin + lane + e * 32;
                    values[i][half].v[e] = c < a.C && s >= 0 && s < end ? source[c * volume + s] : from_acc<T>(0.0f);
                }
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
    __half* row = a.copy + ((n * ad.positions + d) * ah.positions + h) * aw.positions * a.phases() * a.phase_channels;
#pragma unroll
    for (int i = threadIdx.x; i < kPositions * kVectors; i += kThreads) {
        const int s = i / kVectors, v = i % kVectors, u = u0 + s;
        if (u >= aw.positions * aw.phases || c0 + v * 8 >= a.phase_channels) continue;
        __half2 four[4];
#pragma unroll
        for (int k = 0; k < 4; k++) four[k] = tile[s][(v * 4 + k + s / 4 + s % 4) % 32];
        const int64_t place = int64_t(u / aw.phases) * a.phases() + (phase_d * ah.phases + phase_h) * aw.phases + u % aw.phases;
        *reinterpret_cast<uint4*>(row + place * a.phase_channels + c0 + v * 8) = *reinterpret_cast<const uint4*>(four);
    }
    return max;
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
    a.vectors = a.axis[2].size % 4 == 0 && a.axis[2].crop == 0 && reinterpret_cast<uintptr_t>(a.x) % sizeof(Four<T>) == 0;
    RETURN_IF_ERROR(launch(look_kernel<T>, p.channels * weight_splits(p) + a.N * look_blocks(a), kThreads, stream, a, p));
    RETURN_IF_ERROR(launch(copy_kernel<T>, a.N * tiles_of_sample(a), kThreads, stream, a));
    return launch(copy_again_kernel<T>, multiprocessors * 2, kThreads, stream, a);
}

// Copies an activation, and a weight unless it has no channels.
inline int pack(const Activation& a, const Weight& p, int dtype, int multiprocessors, void* stream) {
    switch (dtype) {
        case kFloat32: return pack<float>(a, p, multiprocessors, stream);
        case kFloat16: return pack<__half>(a, p, multiprocessors, stream);
        case kBFloat16: return pack<__nv_bfloat16>(a, p, multiprocessors, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace scaled_half
