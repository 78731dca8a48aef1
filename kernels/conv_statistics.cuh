// Moments of what a convolution's epilogue has, and statistics of GroupNorm from them.
#pragma once

#include "conv_epilogue.cuh"
#include "group_norm.cuh"

namespace conv {

using group_norm::MomentSets;

constexpr int kStatisticsThreads = 512, kStatisticsBlocks = 16;    // of a group, at most

// The moments of a lane's share of a row. They are of deviations from one of the row's values, whose own squared deviation is part of
// the result, which bounds the cancellation.
struct Moments {
    float shift = 0, sum = 0, squares = 0;
    int count = 0;    // whoever adds counts
    __device__ __forceinline__ void add(float value) {
        const float deviation = value - shift;
        sum += deviation, squares = fmaf(deviation, deviation, squares);
    }
    // Mean and sum of squared deviations of a row that a quad has, and how many values they are of.
    __device__ __forceinline__ float2 of_quad(float& total) const {
        total = quad_sum(float(count));
        const float all = quad_sum(sum), mean = total > 0 ? all / total : 0.0f, deviations = quad_sum(squares) - all * mean;
        return make_float2(shift + mean, deviations < 0 ? 0 : deviations);    // NaN stays
    }
};

// Blocks of a group: each has some 8 thousand moments or more.
inline int statistics_blocks(const MomentSets& sets, const group_norm::Shape& shape) {
    const int64_t blocks = int64_t(sets.parts) * shape.group_channels() / 8192;
    return int(blocks < 1 ? 1 : blocks > kStatisticsBlocks ? kStatisticsBlocks : blocks);
}

// A thread's share of a group's sums, of values and of their squares: the moments of a channel in some of its parts. They are shared out to `blocks` blocks of kThreads
// threads each. Sums of squares in float64 lose nothing that float32 had.
template <int kThreads>
__device__ __forceinline__ group_norm::Pair sum_moments(const MomentSets& sets, const group_norm::Shape& shape, int index, int thread, int block, int blocks) {
    const int group = index % int(shape.num_groups), n = index / int(shape.num_groups), group_channels = int(shape.C) / int(shape.num_groups);
    const int parts = sets.parts, channels = sets.channels;
    const float* counts = sets.counts + int64_t(n) * parts;
    const float2* moments = sets.moments + int64_t(n) * parts * channels + group * group_channels;
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
statistics_kernel(MomentSets sets, group_norm::Shape shape, int blocks, double eps, double* mean, double* rstd) {
    wait_for_previous_kernel();
    const int index = blockIdx.x / blocks, block = blockIdx.x % blocks;
    group_norm::Pair sums = group_norm::block_sum<kStatisticsThreads>(sum_moments<kStatisticsThreads>(sets, shape, index, threadIdx.x, block, blocks));
    if (threadIdx.x != 0) return;
    volatile group_norm::Pair* all = sets.group_sums + int64_t(index) * kStatisticsBlocks;
    all[block].a = sums.a, all[block].b = sums.b;
    __threadfence();
    if (atomicAdd(sets.group_tickets + index, 1u) != blocks - 1) return;
    __threadfence();
    sums = {0, 0};
    for (int i = 0; i < blocks; i++) sums.a += all[i].a, sums.b += all[i].b;
    leave_statistics(shape, eps, sums, index, mean, rstd);
}

// statistics (2, N, num_groups): mean, rstd; y = the group norm of r, which may be y.
inline int normalize(const MomentSets& sets, const group_norm::Shape& shape, int r_dtype, int y_dtype, double eps, const void* gamma, const void* beta, const void* r, void* y, double* statistics, void* stream) {
    const int blocks = statistics_blocks(sets, shape);
    double* rstd = statistics + shape.N * shape.num_groups;
    RETURN_IF_ERROR(launch(statistics_kernel, shape.N * shape.num_groups * blocks, kStatisticsThreads, stream, sets, shape, blocks, eps, statistics, rstd));
    return group_norm::with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, r, statistics, rstd, gamma, beta, y);
    });
}

}  // namespace conv
