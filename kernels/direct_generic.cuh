// Transposed convolution for any parameters and dtype: forward and dx by direct convolution.
//
//   forward  out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// Both gather a source tensor into a destination along the phases of geometry.h, so they are one kernel: a thread owns
// kPositions destinations of one phase (neighbouring lanes, neighbouring sources) times kChannels channels in registers.
// A block brings the weights of many taps and kChain source channels to shared memory.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "launch.cuh"

namespace direct_generic {

constexpr int kMaxChannels = 8;      // destination channels of a thread: so many, or fewer where there are fewer
constexpr int min_blocks_per_sm(int channels) { return channels == kMaxChannels ? 3 : 4; }    // caps the registers
constexpr int kChain = 16;           // source channels summed before the sum joins the total: keeps fp32 chains short
constexpr int kThreads = 128;
constexpr int kWeights = 2048;       // in shared memory at a time

// Destinations of a thread, kThreads apart: as many as the registers hold.
template <typename T> constexpr int kPositionsOf = sizeof(Acc<T>) == 8 ? 2 : 4;

// Channels of one group on either side of the gather.
struct Channels {
    int64_t src, dst;                // per group
};

HOST_DEVICE Channels channels_of(Direction direction, const Geometry& g) {
    const bool forward = direction == Direction::kForward;
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    return {forward ? in : out, forward ? out : in};
}

// The taps of a phase, counted.
struct TapCounter {
    int d = 0, h = 0, w = 0;
    __device__ __forceinline__ void advance(const Phase& ph, const Phase& pw) {
        if (++w == pw.taps) w = 0, h++;
        if (h == ph.taps) h = 0, d++;
    }
};

// Which samples are wanted: those whose flag, one every `stride` numbers, is not zero. No flags: all.
struct Samples {
    const unsigned* flags;
    int stride;
    __device__ __forceinline__ bool has(int64_t n) const { return flags == nullptr || flags[n * stride] != 0; }
    // A warp: whether it has any. In few instructions, which are fetched when the kernel before this one has ended.
    __device__ __forceinline__ bool any(int N) const {
        if (flags == nullptr) return true;
        bool found = false;
#pragma unroll 1
        for (int n = threadIdx.x % 32; n < N; n += 32) found |= flags[n * stride] != 0;
        return __any_sync(~0u, found);
    }
};

// ------------------------------------------------------------------------------------------- Direct convolution

// dst = epilogue(gather of src), tile `block` of num_blocks; bias may be null.
template <typename T, Direction kDirection, int kChannels>
__device__ __forceinline__ void direct_tile(const Geometry& g, int64_t block, Samples only, const T* __restrict__ src, const T* __restrict__ w, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    using A = Acc<T>;
    constexpr int kPositions = kPositionsOf<T>;
    const Channels channels = channels_of(kDirection, g);

    // Prologue: the block's tile. Phases along W come fastest, so that the blocks which share memory sectors run together.
    __shared__ Phase phases[3];      // shared, not registers: the loops need those
    auto take = [&block](int64_t count) { const int64_t digit = block % count; block /= count; return digit; };
    const int64_t phase_w = take(num_phases(kDirection, g.axis[2]));
    const int64_t channel = take(ceil_div(channels.dst, kChannels)) * kChannels;
    const int64_t phase_h = take(num_phases(kDirection, g.axis[1]));
    const int64_t phase_d = take(num_phases(kDirection, g.axis[0]));
    const int64_t group = take(g.groups);
    const int64_t n = take(g.N);
    if (!only.has(n)) return;
    __syncthreads();
    if (threadIdx.x < 3) {
        const int axis = threadIdx.x;
        phases[axis] = make_phase(kDirection, g.axis[axis], axis == 0 ? phase_d : axis == 1 ? phase_h : phase_w);
    }
    __syncthreads();
    const Phase &pd = phases[0], &ph = phases[1], &pw = phases[2];
    const int64_t first = block * (kThreads * kPositions) + threadIdx.x;
    const int64_t volume = int64_t(pd.count) * ph.count * pw.count;
    if (first - threadIdx.x >= volume) return;

    // The thread's positions: source coordinates of tap 0, and the offset written in the end (shared: not needed until then).
    __shared__ int64_t dst_offset[kPositions][kThreads];
    const bool forward = kDirection == Direction::kForward;
    const int64_t dst_h = forward ? g.axis[1].out : g.axis[1].in, dst_w = forward ? g.axis[2].out : g.axis[2].in;
    int src_d[kPositions], src_h[kPositions], src_w[kPositions];
#pragma unroll
    for (int p = 0; p < kPositions; p++) {
        const int64_t q = first + p * kThreads;
        const int d = q / (int64_t(ph.count) * pw.count), h = q / pw.count % ph.count, w = q % pw.count;
        src_d[p] = q < volume ? pd.src + d * pd.src_step : -(1 << 30);    // outside for every tap
        src_h[p] = ph.src + h * ph.src_step;
        src_w[p] = pw.src + w * pw.src_step;
        dst_offset[p][threadIdx.x] = ((pd.dst + d * pd.dst_step) * dst_h + ph.dst + h * ph.dst_step) * dst_w + pw.dst + w * pw.dst_step;
    }

    // Main loop: chains of kChain source channels over all taps.
    const int64_t src_volume = int64_t(pd.src_size) * ph.src_size * pw.src_size;
    const T* src_group = src + (n * g.groups + group) * channels.src * src_volume;
    const T* w_group = w + group * channels.src * channels.dst * kernel_volume(g);
    constexpr int kTaps = kWeights / (kChain * kChannels);
    __shared__ A weights[kTaps][kChain][kChannels];
    const int taps = pd.taps * ph.taps * pw.taps;
    A total[kPositions][kChannels] = {};
#pragma unroll 1
    for (int64_t c0 = 0; c0 < channels.src; c0 += kChain) {
        const int chain = channels.src - c0 < kChain ? channels.src - c0 : kChain;
        A sum[kPositions][kChannels] = {};
        TapCounter to_bring, tap;
#pragma unroll 1
        for (int first_tap = 0; first_tap < taps; first_tap += kTaps) {
            const int count = taps - first_tap < kTaps ? taps - first_tap : kTaps;
            __syncthreads();
            if (threadIdx.x < kChain * kChannels) {    // a thread has a pair of channels
                const int own_src = threadIdx.x / kChannels, own_dst = threadIdx.x % kChannels;
                const int64_t from = c0 + own_src, to = channel + own_dst, pair = forward ? from * channels.dst + to : to * channels.src + from;
                const bool exists = from < channels.src && to < channels.dst;
                const T* kernel = w_group + (exists ? pair : 0) * kernel_volume(g);
#pragma unroll 4
                for (int i = 0; i < count; i++) {
                    const int at = ((pd.k + to_bring.d * pd.k_step) * int(g.axis[1].kernel) + ph.k + to_bring.h * ph.k_step) * int(g.axis[2].kernel) + pw.k + to_bring.w * pw.k_step;
                    weights[i][own_src][own_dst] = exists ? to_acc(kernel[at]) : A(0);
                    to_bring.advance(ph, pw);
                }
            }
            __syncthreads();
#pragma unroll 1
            for (int i = 0; i < count; i++, tap.advance(ph, pw)) {
                bool inside[kPositions];
                const T* s[kPositions];
                bool any = false;
#pragma unroll
                for (int p = 0; p < kPositions; p++) {
                    const int d = src_d[p] + tap.d * pd.src_tap_step, h = src_h[p] + tap.h * ph.src_tap_step, w = src_w[p] + tap.w * pw.src_tap_step;
                    inside[p] = unsigned(d) < unsigned(pd.src_size) && unsigned(h) < unsigned(ph.src_size) && unsigned(w) < unsigned(pw.src_size);
                    s[p] = src_group + c0 * src_volume + ((int64_t(d) * ph.src_size + h) * pw.src_size + w);
                    any |= inside[p];
                }
                if (!any) continue;
                const auto add = [&](int c) {
                    A v[kPositions], wt[kChannels];
#pragma unroll
                    for (int p = 0; p < kPositions; p++) v[p] = inside[p] ? to_acc(*s[p]) : A(0), s[p] += src_volume;
#pragma unroll
                    for (int m = 0; m < kChannels; m++) wt[m] = weights[i][c][m];
#pragma unroll
                    for (int p = 0; p < kPositions; p++)
                        if (inside[p])    // not a product with zero: the weight may be Inf
#pragma unroll
                            for (int m = 0; m < kChannels; m++) sum[p][m] += v[p] * wt[m];
                };
                if (chain == kChain) {
#pragma unroll(kChannels == kMaxChannels ? 2 : 4)
                    for (int c = 0; c < kChain; c++) add(c);
                } else {
#pragma unroll 1
                    for (int c = 0; c < chain; c++) add(c);
                }
            }
        }
#pragma unroll
        for (int p = 0; p < kPositions; p++)
#pragma unroll
            for (int m = 0; m < kChannels; m++) total[p][m] += sum[p][m];
    }

    // Epilogue.
    const int64_t dst_volume = forward ? out_volume(g) : in_volume(g);
    T* dst_tile = dst + ((n * g.groups + group) * channels.dst + channel) * dst_volume;
#pragma unroll
    for (int p = 0; p < kPositions; p++) {
        if (first + p * kThreads >= volume) break;
#pragma unroll
        for (int m = 0; m < kChannels; m++) {
            if (channel + m >= channels.dst) break;
            A v = total[p][m];
            if (bias) v += to_acc(bias[group * channels.dst + channel + m]);
            if (apply_relu) v = relu(v);
            dst_tile[m * dst_volume + dst_offset[p][threadIdx.x]] = from_acc<T>(v);
        }
    }
}

// A block for each tile, or fewer that take several.
template <typename T, Direction kDirection, int kChannels>
__global__ void __launch_bounds__(kThreads, min_blocks_per_sm(kChannels))
direct_kernel(Geometry g, int64_t tiles, Samples only, const T* __restrict__ src, const T* __restrict__ w, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    wait_for_previous_kernel();
    if (!only.any(int(g.N))) return;
    __shared__ volatile int64_t next;    // shared, not a register: the tile needs those
    if (threadIdx.x == 0) next = blockIdx.x;
    __syncthreads();
    while (next < tiles) {
        direct_tile<T, kDirection, kChannels>(g, next, only, src, w, bias, apply_relu, dst);
        __syncthreads();
        if (threadIdx.x == 0) next = next + gridDim.x;
        __syncthreads();
    }
}

// ---------------------------------------------------------------------------------------------------- Launchers

template <typename T, Direction kDirection> int64_t num_blocks(const Geometry& g, int block_channels) {
    int64_t volume = 1, phases = 1;
    for (const Axis& a : g.axis) {
        volume *= make_phase(kDirection, a, 0).count;    // phase 0 is the longest
        phases *= num_phases(kDirection, a);
    }
    return ceil_div(volume, kThreads * kPositionsOf<T>) * phases * ceil_div(channels_of(kDirection, g).dst, block_channels) * g.groups * g.N;
}

constexpr int64_t kRepairBlocks = 264;    // where only some samples are wanted, mostly none

template <typename T, Direction kDirection, int kChannels>
int launch_direct(const Geometry& g, void* stream, Samples only, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const int64_t tiles = num_blocks<T, kDirection>(g, kChannels);
    return launch(direct_kernel<T, kDirection, kChannels>, only.flags && tiles > kRepairBlocks ? kRepairBlocks : tiles, kThreads, stream,
                  g, tiles, only, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias), apply_relu, static_cast<T*>(dst));
}

template <Direction kDirection>
int direct(const Geometry& g, int dtype, void* stream, Samples only, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const int64_t channels = channels_of(kDirection, g).dst;
    if (dtype == kFloat32 && !only.flags && channels <= 4)
        return channels == 1 ? launch_direct<float, kDirection, 1>(g, stream, only, src, w, bias, apply_relu, dst)
                             : launch_direct<float, kDirection, 4>(g, stream, only, src, w, bias, apply_relu, dst);
    return with_dtype(dtype, [&](auto element) { return launch_direct<decltype(element), kDirection, kMaxChannels>(g, stream, only, src, w, bias, apply_relu, dst); });
}

}  // namespace direct_generic
