// Transposed convolution of stride 1 to few channels in float32, the last layer of many a generator: forward by direct convolution.
//
//   out[n, co, o] = bias[co] + sum over ci, k with o + padding - k * dilation == i of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Loads are what such a layer takes: the kernel of direct_generic.cuh has one for each product of a position. Here a thread owns kRows
// neighbouring rows of one column (neighbouring lanes, neighbouring columns), so that a source element it loads serves all taps h. Where that makes few
// blocks, C_in is cut into parts.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "add_parts.cuh"

namespace direct_rows {

constexpr int kThreads = 128;
constexpr int kRows = 8;             // of a thread
constexpr int kChain = 8;            // source channels summed before the sum joins the total: keeps fp32 chains short
constexpr int kMaxChannels = 4;
constexpr int kMaxWeights = 8192;    // of kChain source channels, in shared memory

inline bool supports(const Geometry& g, int dtype) {
    const Axis* axis = g.axis;
    return dtype == kFloat32 && g.groups == 1 && g.C_out <= kMaxChannels && axis[0].stride == 1 && axis[1].stride == 1 && axis[2].stride == 1 && axis[1].dilation == 1 &&
           (axis[1].kernel == 3 || axis[1].kernel == 5) && kernel_volume(g) * kChain * kMaxChannels <= kMaxWeights && in_volume(g) < 1 << 30 && out_volume(g) < 1 << 30;
}

// A sample's threads are (d, group of kRows rows, w).
HOST_DEVICE int row_groups(const Geometry& g) { return (int(g.axis[1].out) + kRows - 1) / kRows; }
HOST_DEVICE int sample_threads(const Geometry& g) { return int(g.axis[0].out) * row_groups(g) * int(g.axis[2].out); }
HOST_DEVICE int sample_blocks(const Geometry& g) { return (sample_threads(g) + kThreads - 1) / kThreads; }

// Source channels of each part: whole chains, fewer for more blocks.
constexpr int kWantedBlocks = 512;
inline int64_t part_channels(const Geometry& g) {
    const int64_t blocks = g.N * sample_blocks(g), chains = ceil_div(g.C_in, kChain);
    const int64_t parts = blocks == 0 || blocks * 2 > kWantedBlocks ? 1 : kWantedBlocks / blocks;
    return ceil_div(chains, parts) * kChain;
}
inline int64_t parts_of(const Geometry& g) { return ceil_div(g.C_in, part_channels(g)); }
inline int64_t out_elements(const Geometry& g) { return g.N * g.C_out * out_volume(g); }
inline int64_t workspace_bytes(const Geometry& g) { return parts_of(g) > 1 ? parts_of(g) * out_elements(g) * int64_t(sizeof(float)) : 0; }

// out: of each part. bias may be null.
template <int kTapsH, int kChannels>
__global__ void __launch_bounds__(kThreads)
forward_kernel(Geometry g, int channels_of_part, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
    wait_for_previous_kernel();
    __shared__ __align__(16) float weights[kMaxWeights / kMaxChannels * kChannels];    // (chain, K_d, K_w, K_h, kChannels)
    const int in_d = g.axis[0].in, in_h = g.axis[1].in, in_w = g.axis[2].in, out_h = g.axis[1].out, out_w = g.axis[2].out;
    const int taps_d = g.axis[0].kernel, taps_w = g.axis[2].kernel, volume = taps_d * kTapsH * taps_w, C_in = g.C_in, C_out = g.C_out;
    const int64_t in_channel = in_volume(g), out_channel = out_volume(g);

    // The thread's column: source coordinates of the first taps, and which of its source rows there are.
    const int groups = row_groups(g), blocks = sample_blocks(g);
    const int part = int(blockIdx.x) / blocks / int(g.N);
    const int64_t n = int(blockIdx.x) / blocks % int(g.N);
    const int q = int(blockIdx.x) % blocks * kThreads + threadIdx.x, column = q % out_w, first_row = q / out_w % groups * kRows, plane = q / out_w / groups;
    const bool exists = q < sample_threads(g);
    const int src_d = plane + int(g.axis[0].padding), src_w = column + int(g.axis[2].padding), src_h = first_row + int(g.axis[1].padding) - (kTapsH - 1);
    unsigned rows = 0;    // bit s: source row src_h + s
#pragma unroll
    for (int s = 0; s < kRows + kTapsH - 1; s++) rows |= unsigned(exists && unsigned(src_h + s) < unsigned(in_h)) << s;

    float total[kRows][kChannels] = {};
    for (int c0 = part * channels_of_part; c0 < min((part + 1) * channels_of_part, C_in); c0 += kChain) {
        const int chain = min(kChain, C_in - c0);
        __syncthreads();
        for (int i = threadIdx.x; i < chain * kChannels * volume; i += kThreads) {    // in the order of w
            const int k = i % volume, m = i / volume % kChannels, c = i / volume / kChannels, kw = k % taps_w, kh = k / taps_w % kTapsH, kd = k / taps_w / kTapsH;
            weights[(((c * taps_d + kd) * taps_w + kw) * kTapsH + kh) * kChannels + m] = m < C_out ? w[(int64_t(c0 + c) * C_out + m) * volume + k] : 0.0f;
        }
        __syncthreads();
        float sum[kRows][kChannels] = {};
        const float* tap = weights;
#pragma unroll 1
        for (int c = 0; c < chain; c++) {
            const float* source = x + (n * C_in + c0 + c) * in_channel;
#pragma unroll 1
            for (int kd = 0; kd < taps_d; kd++) {
                const int d = src_d - kd * int(g.axis[0].dilation);
#pragma unroll 3
                for (int kw = 0; kw < taps_w; kw++, tap += kTapsH * kChannels) {
                    const int v = src_w - kw * int(g.axis[2].dilation);
                    const unsigned inside = unsigned(d) < unsigned(in_d) && unsigned(v) < unsigned(in_w) ? rows : 0;
                    const float* at = source + (int64_t(d) * in_h + src_h) * in_w + v;
                    float values[kRows + kTapsH - 1], own[kTapsH][kChannels];
#pragma unroll
                    for (int s = 0; s < kRows + kTapsH - 1; s++, at += in_w) values[s] = inside >> s & 1 ? *at : 0.0f;
#pragma unroll
                    for (int kh = 0; kh < kTapsH; kh++)
#pragma unroll
                        for (int m = 0; m < kChannels; m++) own[kh][m] = tap[kh * kChannels + m];
#pragma unroll
                    for (int s = 0; s < kRows + kTapsH - 1; s++)
                        if (inside >> s & 1)    // not a product with zero: the weight may be Inf
#pragma unroll
                            for (int kh = 0; kh < kTapsH; kh++) {
                                const int row = s + kh - (kTapsH - 1);
                                if (row < 0 || row >= kRows) continue;
#pragma unroll
                                for (int m = 0; m < kChannels; m++) sum[row][m] += values[s] * own[kh][m];
                            }
                }
            }
        }
#pragma unroll
        for (int row = 0; row < kRows; row++)
#pragma unroll
            for (int m = 0; m < kChannels; m++) total[row][m] += sum[row][m];
    }

    if (!exists) return;
    float* to = out + (part * g.N + n) * C_out * out_channel + (int64_t(plane) * out_h + first_row) * out_w + column;
#pragma unroll
    for (int row = 0; row < kRows; row++)
#pragma unroll
        for (int m = 0; m < kChannels; m++) {
            if (m >= C_out || first_row + row >= out_h) continue;
            const float v = total[row][m] + (bias ? bias[m] : 0.0f);
            to[m * out_channel + int64_t(row) * out_w] = apply_relu ? relu(v) : v;
        }
}

// bias may be null; apply_relu writes relu(out).
inline int forward(const Geometry& g, void* stream, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const int64_t count = parts_of(g);
    auto* part = static_cast<float*>(count > 1 ? workspace : out);
    const auto run = [&](auto kernel) {
        return launch(kernel, count * g.N * sample_blocks(g), kThreads, stream, g, int(part_channels(g)), static_cast<const float*>(x), static_cast<const float*>(w), count > 1 ? nullptr : static_cast<const float*>(bias), count == 1 && apply_relu, part);
    };
    RETURN_IF_ERROR(g.axis[1].kernel == 3 ? g.C_out == 1 ? run(forward_kernel<3, 1>) : run(forward_kernel<3, kMaxChannels>) : g.C_out == 1 ? run(forward_kernel<5, 1>) : run(forward_kernel<5, kMaxChannels>));
    if (count == 1) return cudaSuccess;
    return parts::add({part, int(count), g.N, int(g.C_out), int(out_volume(g))}, kFloat32, bias, apply_relu, out, {}, stream);
}

}  // namespace direct_rows
