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

#include "group_norm_backward.cuh"
#include "stencil.h"
#include "swizzle.h"

namespace scaled_half {

constexpr int kThreads = 256;
constexpr int kLookElements = 4096;        // that one block looks at
constexpr int kLookColumns = 4 * kThreads, kLookRows = 8;    // of a weight, likewise, where the destination's kernels are neighbours
constexpr int kWeightColumns = 64, kWeightChannels = 64;    // elements of destination channels' kernels, and source channels, that one block copies
constexpr int kMaxShift = 120;             // keeps the scale and its inverse normal float32 numbers

__device__ __forceinline__ int clamp_shift(int shift) { return shift < kMaxShift ? shift : kMaxShift; }
__device__ __forceinline__ int exponent_of(unsigned magnitude_bits) { return int(magnitude_bits >> 23) - 127; }

// scale = 2^shift, from the bits of the largest finite magnitude
__device__ __forceinline__ int shift_of(unsigned max_bits) { return max_bits == 0 ? 0 : clamp_shift(14 - exponent_of(max_bits)); }

// The bits of the largest finite magnitude of a sample, of the part that was looked at first and of all; and whether it has
// values that are not finite.
struct SampleMax { unsigned part, all, non_finite; };

__device__ __forceinline__ int first_shift_of(SampleMax m) { return m.part == 0 ? 0 : clamp_shift(8 - exponent_of(m.part)); }
// Whether the first copy holds: nothing overflowed, and there was something to look at.
__device__ __forceinline__ bool first_copy_holds(SampleMax m) { return m.part != 0 ? exponent_of(m.all) + first_shift_of(m) <= 14 : m.all == 0; }
__device__ __forceinline__ int shift_of(SampleMax m) { return first_copy_holds(m) ? first_shift_of(m) : shift_of(m.all); }

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Two scaled values as high and low halves: value = high + low with 22 bits.
struct SplitPair { __half2 high, low; };
__device__ __forceinline__ SplitPair split(float x, float y) {
    const __half2 high = __floats2half2_rn(x, y);
    return {high, __floats2half2_rn(x - __low2float(high), y - __high2float(high))};
}

// 2^exponent = scale * more, where more is 1 unless that is not a normal number; for exponents of two shifts.
struct ScaleInParts { float scale, more; };
__device__ __forceinline__ ScaleInParts scale_in_parts(int exponent) {
    const int normal = max(-126, min(127, exponent));
    return {power_of_two(normal), power_of_two(max(-126, exponent - normal))};
}

constexpr unsigned kInfinity = 0x7f800000;    // the bits of an infinite magnitude; those of a NaN are more
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffff; }
__device__ __forceinline__ unsigned finite_magnitude(float v) { return magnitude(v) < kInfinity ? magnitude(v) : 0; }
struct Extremes { unsigned finite, any; };    // the largest magnitudes, of the finite values and of all
__device__ __forceinline__ void find_extremes(Extremes& e, float v) { e.finite = umax(e.finite, finite_magnitude(v)), e.any = umax(e.any, magnitude(v)); }

// ---------------------------------------------------------------------------------------------------- Parameters

// float32 only: where r is not null, an activation's x is the gradient of group_norm(relu(z)), and what is copied is the gradient of z.
struct NormGradient {
    const void* r;                                 // relu(z), of x's shape and dtype
    group_norm::Shape shape;
    const double *mean, *rstd;                     // (N, num_groups)
    const float* gamma;                            // (C), or null
    const group_norm::Pair* group_means;           // (N, num_groups)
    __device__ __forceinline__ group_norm::ChannelGradient<float> channel(int64_t n, int64_t c) const {
        const int64_t group = n * shape.num_groups + c / int(shape.group_channels());
        return {mean[group], rstd[group], gamma ? gamma[c] : 1.0f, group_means[group]};
    }
};

// x (N, C, D, H, W) of the tensor's dtype -> copy (N, positions d, h, w, phases, phase_channels) fp16. Element u - crop of an axis,
// u = position * phases + phase, where that is in [0, size); zero elsewhere, and in the added channels. x = high + low. Several groups: phase_channels
// is 2 * C, for each group of `split` channels their high halves and then their low ones. One group: `third` channels [low, high, high].
struct Activation {
    struct Axis { int positions, phases, crop, size; };
    int64_t N, C, phase_channels;
    int split, third;                              // channels of a group, of a third; or 0
    Axis axis[3];                                  // D, H, W
    const void* x;
    __half* copy;
    __half* unsplit;                               // where it is split, the copy that the gradients read, if they want one: (N, positions, unsplit_channels)
    int64_t unsplit_channels;
    SampleMax* max;                                // (N), starts at zero
    bool vectors;                                  // rows and the address are multiples of four elements
    NormGradient norm;
    HOST_DEVICE int64_t sample() const { return C * axis[0].size * axis[1].size * axis[2].size; }
    HOST_DEVICE int64_t positions() const { return int64_t(axis[0].positions) * axis[1].positions * axis[2].positions; }
    HOST_DEVICE int phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
    HOST_DEVICE int channels() const { return int(split ? C : phase_channels - 2 * third); }    // before the split, those added to the last third included
    HOST_DEVICE int64_t copied() const { return N * positions() * phases() * phase_channels; }
};

// The source of a stencil; each of its channels has less than 2^31 elements, phases included.
inline Activation make_activation(const Stencil& s, int64_t N, int64_t C, int64_t phase_channels, int split, int third) {
    Activation a = {N, C, phase_channels, split, third, {}, nullptr, nullptr, nullptr, 0, nullptr, false, {}};
    for (int i = 0; i < 3; i++) a.axis[i] = {s.axis[i].sources, s.axis[i].source_phases, s.axis[i].source_crop, s.axis[i].source_out};
    return a;
}

// w -> copy (taps, M_pad, source phases, phase_channels) fp16: the weight of each row, a (channel, phase) of the destination, at
// each tap (d, h, w) of the stencil; zero where there is none. Rows that belong to no channel stay as they are. Split: phase_channels
// is 4 * split, of the channel's own group [high, high, low, 0]. Thirds: [high, low, high]. Fragments: instead, 64 rows of 16 columns (a source phase's channel) after another.
struct Weight {
    Stencil stencil;
    RowMap rows;
    int64_t channels, C, M_pad, phase_channels;    // destination channels, source channels
    int split, third;                              // source channels of a group, of a third; or 0
    int64_t groups, group_C_out;                   // of the layer
    bool forward;                                  // the destination is the layer's output
    bool fragments;
    const void* w;                                 // (C_in, C_out / groups, kernel)
    __half* copy;
    unsigned* max;                                 // (channels), starts at zero
    // What w has for a destination channel: kernels of `count` source channels from `first` on, those of its group, at `begin` + stride * i.
    struct Kernels { int first, count; int64_t begin; int stride; };
    HOST_DEVICE Kernels kernels_of(int destination) const {
        if (groups == 1) return {0, int(C), destination * (forward ? kernel_volume(stencil) : row_elements()), forward ? int(channels) * kernel_volume(stencil) : kernel_volume(stencil)};
        const int volume = kernel_volume(stencil), in = int((forward ? C : channels) / groups), out = int(group_C_out), group = destination / (forward ? out : in);
        if (forward) return {group * in, in, (int64_t(group) * in * out + destination % out) * volume, out * volume};
        return {group * out, out, int64_t(destination) * out * volume, volume};
    }
    HOST_DEVICE int64_t copied() const { return stencil.taps() * M_pad * stencil.source_phases() * phase_channels; }
    // Where the copy of a row of all taps begins, of a source phase; and where its columns are behind that.
    HOST_DEVICE int64_t begin_of_row(int row, int phase) const {
        const int64_t pitch = stencil.source_phases() * phase_channels, begin = phase * phase_channels;
        return fragments ? (row / 64 * pitch + begin) * 64 + fragment_place_of_row(row % 64) : row * pitch + begin;
    }
    HOST_DEVICE int64_t place_of_column(int column) const { return fragments ? column / 16 * (64 * 16) + fragment_place_of_column(column % 16) : column; }
    // Rows of neighbouring elements that memory has, and blocks that look at parts of them: (rows of a group, its columns, group) or (row, columns).
    HOST_DEVICE int64_t row_elements() const { return group_C_out * kernel_volume(stencil); }
    HOST_DEVICE int64_t look_blocks() const {    // none where a weight for dx has no channels: not wanted
        if (forward) return ceil_div(row_elements(), kLookColumns) * ceil_div(C / groups, kLookRows) * groups;
        return channels * ceil_div(row_elements(), kLookElements);
    }
};

constexpr int kLookShare = 32;                     // so much of a sample is looked at: all of a small one, kLargeLook elements of a large one
constexpr int64_t kSmallSample = 1 << 18, kLargeLook = 1 << 19;
constexpr int kTileElements = 8192;                // of one block of the copy: 32 or 64 channels
HOST_DEVICE int tile_channels(const Activation& a) { return a.channels() <= 32 || a.split || a.third ? 32 : 64; }
HOST_DEVICE int tile_positions(const Activation& a) { return kTileElements / tile_channels(a); }

HOST_DEVICE int64_t look_blocks(const Activation& a) {
    const int64_t elements = a.sample();
    const int64_t share = elements / kLookShare < kLargeLook ? elements / kLookShare : kLargeLook;
    return ceil_div(elements > kSmallSample ? share : elements, kLookElements);
}
HOST_DEVICE bool looks_at_all(const Activation& a) { return look_blocks(a) * kLookElements >= a.sample(); }

// Blocks of the copies, each kTileElements at most: of a sample, and of the weight.
HOST_DEVICE int64_t elements_of_channel(const Activation& a) { return a.positions() * a.phases(); }
HOST_DEVICE int64_t tiles_of_sample(const Activation& a) { return ceil_div(elements_of_channel(a), tile_positions(a)) * ceil_div(a.channels(), tile_channels(a)); }
HOST_DEVICE int64_t tiles_of_weight(const Weight& p) { return p.split ? p.channels : ceil_div(p.channels * kernel_volume(p.stencil), kWeightColumns) * ceil_div(p.phase_channels - 2 * p.third, kWeightChannels); }

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

// The maxima of the destination channels in a part of the weight. Forward, a row has a source channel's kernels of all of them, so a thread keeps to its columns and
// goes from row to row; for dx it has one destination channel's.
template <typename T> __device__ void look_at_weight(const Weight& p, int block) {
    const int volume = kernel_volume(p.stencil), elements = int(p.row_elements());
    if (!p.forward) {
        const int parts = int(ceil_div(elements, kLookElements)), channel = block / parts, begin = block % parts * kLookElements, end = min(begin + kLookElements, elements);
        const T* row = static_cast<const T*>(p.w) + int64_t(channel) * elements;
        unsigned max = 0;
#pragma unroll 8
        for (int i = begin + threadIdx.x; i < end; i += kThreads) max = umax(max, finite_magnitude(to_acc(row[i])));
        max = block_max(max);
        if (threadIdx.x == 0) atomicMax(p.max + channel, max);
        return;
    }
    __shared__ unsigned maxima[kLookColumns + 1];
    const int tiles = int(ceil_div(elements, kLookColumns)), group_rows = int(p.C / p.groups), parts = int(ceil_div(group_rows, kLookRows));
    const int begin = block % tiles * kLookColumns, first_row = block / tiles % parts * kLookRows, group = block / tiles / parts, rows = min(kLookRows, group_rows - first_row);
    const int first_channel = begin / volume, count = (min(begin + kLookColumns, elements) - 1) / volume - first_channel + 1;
    const T* row = static_cast<const T*>(p.w) + (int64_t(group) * group_rows + first_row) * elements;
    for (int i = threadIdx.x; i < count; i += kThreads) maxima[i] = 0;
    __syncthreads();
    constexpr int kColumns = kLookColumns / kThreads;
    float values[kLookRows][kColumns];
#pragma unroll
    for (int r = 0; r < kLookRows; r++)
#pragma unroll
        for (int i = 0; i < kColumns; i++) values[r][i] = to_acc(row[min(r, rows - 1) * int64_t(elements) + min(begin + i * kThreads + int(threadIdx.x), elements - 1)]);
    unsigned max[kColumns] = {};
#pragma unroll
    for (int r = 0; r < kLookRows; r++)
#pragma unroll
        for (int i = 0; i < kColumns; i++) max[i] = umax(max[i], finite_magnitude(values[r][i]));
#pragma unroll
    for (int i = 0; i < kColumns; i++) {
        const int column = begin + i * kThreads + threadIdx.x;
        if (column < elements) atomicMax(maxima + column / volume - first_channel, max[i]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) atomicMax(p.max + group * int(p.group_C_out) + first_channel + i, maxima[i]);
}

// kWeightColumns columns, each an element of a destination channel's kernel, of kWeightChannels source channels, transposed through shared memory; and, beside a
// channel's first element, the rows that no element belongs to. kThirds: once for the first and the last third, once for the second.
template <typename T, bool kThirds> __device__ void copy_weight_tile(const Weight& p, int tile) {
    __shared__ __half values[kWeightColumns][kWeightChannels + 2];    // the rows begin in different banks
    __shared__ int64_t rows[kWeightColumns];    // where they begin
    const int volume = kernel_volume(p.stencil), columns = int(p.channels) * volume, column_tiles = int(ceil_div(columns, kWeightColumns));
    const int first = tile % column_tiles * kWeightColumns, c0 = tile / column_tiles * kWeightChannels, own = threadIdx.x % kWeightColumns, own_c = threadIdx.x / kWeightColumns;
    const int source_phases = p.stencil.source_phases();
    const auto row_of = [&](int channel, int tap, int phase) { return p.begin_of_row(tap * int(p.M_pad) + p.rows.row(channel, phase / source_phases), phase % source_phases); };    // one of the two is 1
    const int column = min(first + own, columns - 1), channel = column / volume, k = column - channel * volume;
    const Weight::Kernels kernels = p.kernels_of(channel);
    const T* w = static_cast<const T*>(p.w) + kernels.begin + k;
    constexpr int kSteps = kThreads / kWeightColumns, kEach = kWeightChannels / kSteps;
    float v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        const int c = c0 + own_c + i * kSteps - kernels.first;
        v[i] = unsigned(c) < unsigned(kernels.count) ? to_acc(w[int64_t(c) * kernels.stride]) : 0.0f;
    }
    const float scale = power_of_two(shift_of(p.max[channel]));
#pragma unroll
    for (int i = 0; i < kEach; i++) values[own][own_c + i * kSteps] = __float2half_rn(v[i] * scale);
    if (own_c == 0) {
        const TapPhase place = place_of_kernel(p.stencil, k);
        rows[own] = row_of(channel, place.tap, place.phase);
    }
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = c0 + lane * 2;
    const auto write = [&](int64_t row, bool low, bool high, __half2 v) {
        const auto write_to = [&](int third) {
            if (c + third * p.third < (third < 2 && kThirds ? (third + 1) * p.third : p.phase_channels)) *reinterpret_cast<__half2*>(p.copy + row + p.place_of_column(c + third * p.third)) = v;
        };
        if (high) write_to(0);
        if (kThirds && low) write_to(1);
        if (kThirds && high) write_to(2);
    };
    const auto write_values = [&](bool low) {
        for (int i = warp; i < kWeightColumns && first + i < columns; i += kThreads / 32) write(rows[i], low, !low, *reinterpret_cast<const __half2*>(&values[i][lane * 2]));
    };
    write_values(false);
    if (kThirds) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            __half& value = values[own][own_c + i * kSteps];
            value = __float2half_rn(v[i] * scale - __half2float(value));
        }
        __syncthreads();
        write_values(true);
    }
    const int all = p.stencil.taps() * p.stencil.phases() * source_phases;
    if (all == volume) return;
    for (int i = warp * 32 + lane; i - lane < all; i += kThreads) {    // each lane knows a tap and a phase
        const int tap = i % p.stencil.taps(), phase = i / p.stencil.taps();
        const unsigned without = __ballot_sync(~0u, i < all && kernel_index(p.stencil, tap, phase) < 0);
        for (int m = int(ceil_div(first, volume)); m * volume < min(first + kWeightColumns, columns); m++) {
            const int64_t row = row_of(m, tap, phase);
            for (unsigned left = without; left; left &= left - 1) write(__shfl_sync(~0u, row, __ffs(left) - 1), true, true, __half2half2(__float2half_rn(0.0f)));
        }
    }
}

// One destination channel, split.
template <typename T> __device__ void copy_split_weight(const Weight& p, int channel) {
    const float scale = power_of_two(shift_of(p.max[channel]));
    const Weight::Kernels kernels = p.kernels_of(channel);
    const T* w = static_cast<const T*>(p.w) + kernels.begin;
    const int taps = p.stencil.taps(), columns = 4 * p.split;
    for (int i = threadIdx.x; i < taps * p.stencil.phases() * columns; i += kThreads) {
        const int column = i % columns, tap = i / columns % taps, phase = i / columns / taps, part = column / p.split;
        const int k = kernel_index(p.stencil, tap, phase);
        const float v = k >= 0 && part < 3 ? to_acc(w[column % p.split * kernels.stride + k]) * scale : 0.0f;
        const __half high = __float2half_rn(v);
        p.copy[p.begin_of_row(tap * int(p.M_pad) + p.rows.row(channel, phase), 0) + p.place_of_column(column)] = part < 2 ? high : __float2half_rn(v - __half2float(high));
    }
}

// The maxima of the weight's channels, and of parts of every sample, evenly spread.
template <typename T, bool kNorm> __global__ void __launch_bounds__(kThreads) look_kernel(Activation a, Weight p) {
    wait_for_previous_kernel();
    const int64_t weight_blocks = p.look_blocks(), blocks = look_blocks(a), elements = a.sample();
    if (blockIdx.x < weight_blocks) return look_at_weight<T>(p, blockIdx.x);
    const int64_t n = (blockIdx.x - weight_blocks) / blocks, block = (blockIdx.x - weight_blocks) % blocks;
    const int64_t last = elements > kLookElements ? elements - kLookElements : 0;
    const int64_t begin = blocks > 1 ? last * block / (blocks - 1) : 0;
    const T* part = static_cast<const T*>(a.x) + n * elements + begin;
    const int count = elements < kLookElements ? elements : kLookElements;
    constexpr int kEach = kLookElements / kThreads;
    float values[kEach];
#pragma unroll
    for (int i = 0; i < kEach; i++) values[i] = i * kThreads + threadIdx.x < count ? to_acc(part[i * kThreads + threadIdx.x]) : 0.0f;
    if constexpr (kNorm) {
        const T* activation = static_cast<const T*>(a.norm.r) + n * elements + begin;
        float activations[kEach];
#pragma unroll
        for (int i = 0; i < kEach; i++) activations[i] = i * kThreads + threadIdx.x < count ? to_acc(activation[i * kThreads + threadIdx.x]) : 0.0f;
        group_norm::ChannelGradient<float> gradient;
        int64_t channel_end = 0;    // of the elements that it is for
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            const int64_t at = begin + i * kThreads + threadIdx.x;
            if (at >= channel_end && at < elements) {
                const int64_t c = at / a.norm.shape.S;
                gradient = a.norm.channel(n, c), channel_end = (c + 1) * a.norm.shape.S;
            }
            values[i] = gradient.dz(values[i], activations[i]);    // zero where the activation is
        }
    }
    unsigned max = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) max = umax(max, finite_magnitude(values[i]));
    max = block_max(max);
    if (threadIdx.x == 0) atomicMax(&a.max[n].part, max);
}

template <typename T> using Four = Vector<T, 4>;

enum class Kind { kPlain, kSplit, kNorm };

// Element `f` of a sample's channel, counted in the order (position d, phase d, position h, phase h, u): x, the element of the
// source's channel, or -1 where there is none; y, the position and phase of the copy.
__device__ __forceinline__ int2 place_of(const Activation& a, unsigned f) {
    const auto &ad = a.axis[0], &ah = a.axis[1], &aw = a.axis[2];
    const unsigned row_u = aw.positions * aw.phases, rows = ah.positions * ah.phases, row = f / row_u;
    const int w = int(f - row * row_u), d = int(row / rows), h = int(row - d * rows);    // u of each axis
    const int source_d = d - ad.crop, source_h = h - ah.crop, source_w = w - aw.crop;
    const bool inside = source_d >= 0 && source_d < ad.size && source_h >= 0 && source_h < ah.size && source_w >= 0 && source_w < aw.size;
    const int pd = divide_by_phases(d, ad.phases), ph = divide_by_phases(h, ah.phases), pw = divide_by_phases(w, aw.phases);
    const int position = (pd * ah.positions + ph) * aw.positions + pw, phase = ((d - pd * ad.phases) * ah.phases + h - ph * ah.phases) * aw.phases + w - pw * aw.phases;
    return make_int2(inside ? (source_d * ah.size + source_h) * aw.size + source_w : -1, position * a.phases() + phase);
}

// Where shared memory has channels 8 * octet to 8 * octet + 7 of position s, counted in vectors of 16 bytes. Eight of them, of consecutive
// positions, of every fourth, or of consecutive octets, are in different banks.
template <int kOctets> __device__ __forceinline__ int staged_at(int s, int octet) {
    const int at = s * kOctets + octet, line = at / 8;
    return at ^ ((line ^ line >> 3) & 7);
}

// Four elements of each of eight channels; zero where `from` is -1, and from channel `channels` on. kVectors: they are neighbours; kAll: there are all channels.
template <bool kVectors, bool kAll, typename T> __device__ __forceinline__ void load_octet(const T* channel, int64_t volume, int channels, const int (&from)[4], Four<T> (&eight)[8]) {
    const T* at[4];
#pragma unroll
    for (int e = 0; e < 4; e++) at[e] = channel + from[e];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (kVectors) eight[i] = from[0] >= 0 ? *reinterpret_cast<const Four<T>*>(at[0]) : Four<T>{};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (!kVectors) eight[i].v[e] = (kAll || i < channels) && from[e] >= 0 ? *at[e] : from_acc<T>(0.0f);
            at[e] += volume;
        }
    }
}

// Tile `index` of a sample: channels x positions, transposed through shared memory; returns the thread's extremes.
template <typename T, int kChannels, Kind kKind> __device__ Extremes copy_tile(const Activation& a, int64_t n, unsigned index, float scale) {
    constexpr int kOctets = kChannels / 8, kPositions = kTileElements / kChannels;
    constexpr bool kSplit = kKind == Kind::kSplit, kNorm = kKind == Kind::kNorm;
    const unsigned channel_tiles = ceil_div(a.channels(), kChannels);
    const int c0 = int(index % channel_tiles) * kChannels, f0 = int(index / channel_tiles) * kPositions, count = int(elements_of_channel(a));
    const int64_t volume = int64_t(a.axis[0].size) * a.axis[1].size * a.axis[2].size;
    const bool plain = a.phases() == 1;    // then the source and the copy have the same order
    __shared__ uint4 tile[kSplit ? 2 : 1][kPositions * kOctets];    // high, low
    __shared__ int2 places[kPositions];    // source element or -1, position and phase of the copy
    if (!plain) {
        if (threadIdx.x < kPositions) places[threadIdx.x] = f0 + int(threadIdx.x) < count ? place_of(a, f0 + threadIdx.x) : make_int2(-1, 0);
        __syncthreads();
    }
    // A warp has eight channels of 128 positions, four a lane.
    static_assert(kOctets * (kPositions / 128) * 32 == kThreads, "one for each");
    const int lane = threadIdx.x % 32, octet = threadIdx.x / 32 % kOctets, c = c0 + octet * 8, channels = int(a.C) - c;
    const int first = threadIdx.x / 32 / kOctets * 128 + (a.vectors ? lane * 4 : lane), step = a.vectors ? 1 : 32;
    int from[4];                           // elements of the source, or -1
#pragma unroll
    for (int e = 0; e < 4; e++) from[e] = plain ? (f0 + first + e * step < count ? f0 + first + e * step : -1) : places[first + e * step].x;
    const auto load = [&](const void* x, Four<T> (&eight)[8]) {
        const T* channel = static_cast<const T*>(x) + (n * a.C + c) * volume;
        if (channels < 8) load_octet<false, false>(channel, volume, channels, from, eight);
        else if (a.vectors) load_octet<true, true>(channel, volume, channels, from, eight);
        else load_octet<false, true>(channel, volume, channels, from, eight);
    };
    Four<T> values[8];
    load(a.x, values);
    if constexpr (kNorm) {
        Four<T> activations[8];
        load(a.norm.r, activations);
        __shared__ group_norm::ChannelGradient<float> gradients[kChannels];    // taken while those loads are under way
        if (threadIdx.x < kChannels) gradients[threadIdx.x] = a.norm.channel(n, min(c0 + int(threadIdx.x), int(a.C) - 1));
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const group_norm::ChannelGradient<float> gradient = gradients[octet * 8 + i];
#pragma unroll
            for (int e = 0; e < 4; e++) values[i].v[e] = gradient.dz(values[i].v[e], activations[i].v[e]);    // zero where r is zero: outside too
        }
    }
    unsigned any = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        __half2 high[4], low[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float x = to_acc(values[k * 2].v[e]), y = to_acc(values[k * 2 + 1].v[e]);
            any = umax(any, umax(magnitude(x), magnitude(y)));
            const SplitPair pair = split(x * scale, y * scale);
            high[k] = pair.high, low[k] = pair.low;
        }
        const int at = staged_at<kOctets>(first + e * step, octet);
        tile[0][at] = *reinterpret_cast<const uint4*>(high);
        if (kSplit) tile[kSplit][at] = *reinterpret_cast<const uint4*>(low);
    }
    Extremes max = {any, any};
    if (any >= kInfinity) {
        max.finite = 0;
        for (const Four<T>& four : values)
            for (const T& value : four.v) max.finite = umax(max.finite, finite_magnitude(to_acc(value)));
    }
    __syncthreads();
    const bool thirds = kSplit && a.third;
    const int column = c0 + int(threadIdx.x) % kOctets * 8, channel = kSplit && !thirds ? column / a.split * 2 * a.split + column % a.split : column;
    if (column < a.channels()) {
        __half* copy = a.copy + n * count * a.phase_channels + channel;
#pragma unroll
        for (int s = threadIdx.x / kOctets; s < kPositions; s += kThreads / kOctets) {
            if (f0 + s >= count) continue;
            __half* to = copy + int64_t(plain ? f0 + s : places[s].y) * int(a.phase_channels);
            const int at = staged_at<kOctets>(s, threadIdx.x % kOctets);
            if (!thirds) *reinterpret_cast<uint4*>(to) = tile[0][at];
            if (kSplit && !thirds) *reinterpret_cast<uint4*>(to + a.split) = tile[kSplit][at];
            if (thirds && column < a.third) *reinterpret_cast<uint4*>(to) = tile[kSplit][at], *reinterpret_cast<uint4*>(to + a.third) = tile[0][at];
            if (thirds) *reinterpret_cast<uint4*>(to + 2 * a.third) = tile[0][at];
            if (kSplit && a.unsplit && column < a.unsplit_channels) *reinterpret_cast<uint4*>(a.unsplit + (n * count + (plain ? f0 + s : places[s].y)) * a.unsplit_channels + column) = tile[0][at];
        }
    }
    return max;
}

// The weight, and every sample: so many blocks each.
template <typename T, int kChannels, Kind kKind> __global__ void __launch_bounds__(kThreads) copy_kernel(Activation a, Weight p, unsigned weight_tiles, unsigned sample_tiles) {
    wait_for_previous_kernel();
    if (blockIdx.x < weight_tiles) return kKind == Kind::kSplit && p.split ? copy_split_weight<T>(p, blockIdx.x) : copy_weight_tile<T, kKind == Kind::kSplit>(p, blockIdx.x);
    const unsigned block = blockIdx.x - weight_tiles, n = block / sample_tiles;
    const Extremes extremes = copy_tile<T, kChannels, kKind>(a, n, block - n * sample_tiles, power_of_two(first_shift_of(a.max[n])));
    const unsigned max = block_max(extremes.finite);
    if (threadIdx.x == 0 && max > a.max[n].all) atomicMax(&a.max[n].all, max);
    if (extremes.any >= kInfinity) a.max[n].non_finite = 1;
}

// The weight alone, beside the kernel before, which started when the look's maxima were there.
__global__ void __launch_bounds__(kThreads) copy_weight_kernel(Weight p) {
    let_next_kernel_come();
    copy_weight_tile<float, false>(p, blockIdx.x);
    wait_for_end_of_previous_kernel();
}

// Whether some sample's first copy does not hold: mostly none. Each warp finds out by itself.
__device__ __forceinline__ bool any_copied_again(const SampleMax* max, int samples) {
    bool again = false;
#pragma unroll 1
    for (int n = threadIdx.x % 32; n < samples; n += 32) again |= !first_copy_holds(max[n]);
    return __any_sync(~0u, again);
}

// Copies those again.
template <typename T, int kChannels, Kind kKind> __global__ void __launch_bounds__(kThreads) copy_again_kernel(Activation a, unsigned sample_tiles) {
    wait_for_previous_kernel();
    if (!any_copied_again(a.max, int(a.N))) return;
    for (int64_t n = 0; n < a.N; n++) {
        if (first_copy_holds(a.max[n])) continue;
        const float scale = power_of_two(shift_of(a.max[n]));
        for (unsigned tile = blockIdx.x; tile < sample_tiles; tile += gridDim.x) {
            copy_tile<T, kChannels, kKind>(a, n, tile, scale);
            __syncthreads();
        }
    }
}

// ---------------------------------------------------------------------------------------------------- Launcher

template <typename T, bool kNorm> int look(const Activation& a, const Weight& p, bool overlaps, void* stream) { return launch_kernel(look_kernel<T, kNorm>, p.look_blocks() + a.N * look_blocks(a), kThreads, 0, overlaps, stream, a, p); }

template <typename T, int kChannels, Kind kKind> int copy(const Activation& a, const Weight& p, int multiprocessors, void* stream) {
    RETURN_IF_ERROR((look<T, kKind == Kind::kNorm>(a, p, true, stream)));
    const int64_t weight_tiles = tiles_of_weight(p), sample_tiles = tiles_of_sample(a);
    RETURN_IF_ERROR(launch(copy_kernel<T, kChannels, kKind>, weight_tiles + a.N * sample_tiles, kThreads, stream, a, p, unsigned(weight_tiles), unsigned(sample_tiles)));
    if (looks_at_all(a)) return cudaSuccess;    // then the first copy holds
    return launch(copy_again_kernel<T, kChannels, kKind>, multiprocessors * 2, kThreads, stream, a, unsigned(sample_tiles));
}

template <typename T> int pack(Activation a, const Weight& p, int multiprocessors, void* stream) {
    const auto& w = a.axis[2];
    const bool whole_rows = a.phases() == 1 || (w.size % 4 == 0 && w.crop == 0 && w.positions * w.phases % 4 == 0);    // a vector lies in one row
    a.vectors = whole_rows && a.sample() / a.C % 4 == 0 && holds<Four<T>>(a.x) && holds<Four<T>>(a.norm.r);
    const bool narrow = tile_channels(a) == 32;
    if constexpr (sizeof(T) == 4) {
        if (a.split || a.third) return copy<T, 32, Kind::kSplit>(a, p, multiprocessors, stream);
        if (a.norm.r) return narrow ? copy<T, 32, Kind::kNorm>(a, p, multiprocessors, stream) : copy<T, 64, Kind::kNorm>(a, p, multiprocessors, stream);
    }
    if (a.split || a.third || a.norm.r) return cudaErrorNotSupported;
    return narrow ? copy<T, 32, Kind::kPlain>(a, p, multiprocessors, stream) : copy<T, 64, Kind::kPlain>(a, p, multiprocessors, stream);
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

// Where another kernel copies the activation, float32, one operand, no norm: the look at both, and, beside that kernel, the copy of the weight. That kernel lives on the L1 cache, of which a
// multiprocessor has what the kernels before left it (the convolution 28 KB) until it was idle: so no block of the look comes early.
inline int look_when_idle(const Activation& a, const Weight& p, void* stream) { return look<float, false>(a, p, false, stream); }
inline int copy_weight_beside(const Weight& p, void* stream) { return launch(copy_weight_kernel, tiles_of_weight(p), kThreads, stream, p); }

}  // namespace scaled_half
