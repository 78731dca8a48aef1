// Statistics of GroupNorm from the moments that the convolution's epilogue leaves.
#pragma once

#include "conv_epilogue.cuh"
#include "group_norm.cuh"

namespace conv {

constexpr int kStatisticsThreads = 512, kStatisticsBlocks = 16;    // of a group, at most

// Blocks of a group: each has some 8 thousand moments or more.
inline int statistics_blocks(const Problem& p, const group_norm::Shape& shape) {
    const int64_t blocks = int64_t(parts_of_sample(p)) * shape.group_channels() / 8192;
    return int(blocks < 1 ? 1 : blocks > kStatisticsBlocks ? kStatisticsBlocks : blocks);
}

// A thread's share of a group's sums, of values and of their squares: the moments of a channel in some of its parts. They are shared out to `blocks` blocks of kThreads
// threads each. Sums of squares in float64 lose nothing that float32 had.
template <int kThreads>
__device__ __forceinline__ group_norm::Pair sum_moments(const Problem& p, const Workspace& workspace, const group_norm::Shape& shape, int index, int thread, int block, int blocks) {
    const int group = index % int(shape.num_groups), n = index / int(shape.num_groups), group_channels = int(shape.C) / int(shape.num_groups);
    const int parts = parts_of_sample(p), channels = p.t.channels();
    const float* counts = workspace.counts + int64_t(n) * parts;
    const float2* moments = workspace.moments + int64_t(n) * parts * channels + group * group_channels;
    const int columns = min(group_channels, kThreads), rows = kThreads / columns, row = thread / columns;
    group_norm::Pair sums = {0, 0};
    constexpr int kAtOnce = 10;    // that are under way
    for (int c = thread % columns; c < group_channels && row < rows; c += columns) {
        for (int first = block * rows + row; first < parts; first += kAtOnce * blocks * rows) {
            float count[kAtOnce];
            float2 m[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const int part = min(first + i * blocks * rows, parts - 1);
                count[i] = counts[part], m[i] = moments[int64_t(part) * channels + c];
                if (first + i * blocks * rows >= parts) count[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; i++) {
                const double own = count[i], mean = count[i] > 0 ? m[i].x : 0, square = count[i] > 0 ? m[i].y : 0;    // else there are no moments
                sums.a += own * mean;
                sums.b += square + own * mean * mean;
            }
        }
    }
    return sums;
}

__device__ __forceinline__ void leave_statistics(const group_norm::Shape& shape, double eps, group_norm::Pair sums, int index, double* mean, double* rstd) {
    const group_norm::Statistics statistics(sums, double(shape.group_count()), eps);
    mean[index] = statistics.mean, rstd[index] = statistics.rstd;
}

// mean, rstd (N, num_groups): some blocks for each. Sums are added in a fixed order, those of the blocks by the last one that is done.
__global__ void __launch_bounds__(kStatisticsThreads, 2)
statistics_kernel(const __grid_constant__ Problem p, Workspace workspace, group_norm::Shape shape, int blocks, double eps, double* mean, double* rstd) {
    wait_for_previous_kernel();
    const int index = blockIdx.x / blocks, block = blockIdx.x % blocks;
    group_norm::Pair sums = group_norm::block_sum<kStatisticsThreads>(sum_moments<kStatisticsThreads>(p, workspace, shape, index, threadIdx.x, block, blocks));
    if (threadIdx.x != 0) return;
    volatile group_norm::Pair* all = workspace.group_sums + int64_t(index) * kStatisticsBlocks;
    all[block].a = sums.a, all[block].b = sums.b;
    __threadfence();
    if (atomicAdd(workspace.group_tickets + index, 1u) != blocks - 1) return;
    __threadfence();
    sums = {0, 0};
    for (int i = 0; i < blocks; i++) sums.a += all[i].a, sums.b += all[i].b;
    leave_statistics(shape, eps, sums, index, mean, rstd);
}

}  // namespace conv
