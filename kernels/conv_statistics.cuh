// Statistics of GroupNorm from the moments that the convolution's epilogue leaves.
#pragma once

#include "conv_epilogue.cuh"
#include "group_norm.cuh"

namespace conv {

// Sums of squares in float64 lose nothing that float32 had.
struct ChannelSums { double sum, squares; };

// One warp: the sums of a channel of a sample from its moments, in a fixed order.
__device__ __forceinline__ ChannelSums sums_of_channel(const Problem& p, const Workspace& workspace, int n, int channel) {
    const int parts = parts_of_sample(p), channels = p.t.channels();
    const float* counts = workspace.counts + int64_t(n) * parts;
    const float2* moments = workspace.moments + int64_t(n) * parts * channels + channel;
    ChannelSums s = {0, 0};
#pragma unroll 8
    for (int part = threadIdx.x % 32; part < parts; part += 32) {
        const double count = counts[part];
        const float2 m = moments[int64_t(part) * channels];
        s.sum += count == 0 ? 0 : count * m.x;
        s.squares += count == 0 ? 0 : m.y + count * m.x * m.x;
    }
    for (int offset = 16; offset > 0; offset /= 2) s.sum += __shfl_xor_sync(~0u, s.sum, offset), s.squares += __shfl_xor_sync(~0u, s.squares, offset);
    return s;
}

constexpr int kStatisticsThreads = 512;

// mean, rstd (N, num_groups): a block for each.
__global__ void __launch_bounds__(kStatisticsThreads)
statistics_kernel(const __grid_constant__ Problem p, Workspace workspace, group_norm::Shape shape, double eps, double* mean, double* rstd) {
    const int group = blockIdx.x % shape.num_groups, n = blockIdx.x / shape.num_groups, channels = int(shape.group_channels());
    ChannelSums total = {0, 0};
    for (int c = threadIdx.x / 32; c < channels; c += kStatisticsThreads / 32) {
        const ChannelSums of_channel = sums_of_channel(p, workspace, n, group * channels + c);
        total.sum += of_channel.sum, total.squares += of_channel.squares;
    }
    __shared__ ChannelSums warps[kStatisticsThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int i = 1; i < kStatisticsThreads / 32; i++) total.sum += warps[i].sum, total.squares += warps[i].squares;
    const double mean_of_all = total.sum / double(shape.group_count()), variance = total.squares / double(shape.group_count()) - mean_of_all * mean_of_all;
    mean[blockIdx.x] = mean_of_all, rstd[blockIdx.x] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
}

}  // namespace conv
