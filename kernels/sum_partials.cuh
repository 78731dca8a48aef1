// Sums of what blocks have left, one array each.
#pragma once

#include "launch.cuh"

constexpr int kSumThreads = 256;

// out[i] = sum over s of partial[s, i], in order; partial (splits, count)
template <typename T, typename P>
__global__ void sum_partials_kernel(const P* __restrict__ partial, int64_t splits, int64_t count, T* __restrict__ out) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
    if (i >= count) return;
    double sum = 0;
#pragma unroll 8
    for (int64_t s = 0; s < splits; s++) sum += partial[s * count + i];
    out[i] = from_acc<T>(Acc<T>(sum));
}

template <typename T, typename P> int sum_partials(const P* partial, int64_t splits, int64_t count, void* stream, void* out) {
    return launch(sum_partials_kernel<T, P>, ceil_div(count, kSumThreads), kSumThreads, stream, partial, splits, count, static_cast<T*>(out));
}
