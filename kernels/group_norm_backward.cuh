// The sums that the backward of ReLU and GroupNorm needs, and its elementwise half:
//
//   dr = rstd * (gamma * dy - m1 - xhat * m2), xhat = (r - mean) * rstd,
//   m1, m2 = mean over the group of gamma * dy and of gamma * dy * xhat;   dz = dr where r > 0 (or NaN), else 0
//   dgamma[c] = sum over n, s of dy * xhat,   dbeta[c] = sum over n, s of dy
//
// Sums are taken in float64 and added in a fixed order. Formula: torch.nn.GroupNorm.
#pragma once

#include "group_norm.cuh"

namespace group_norm {

// partial (N * C, splits): sums of dy and of dy * xhat. kWidth: elements that are loaded at once.
template <typename T, typename Y, int kWidth>
__global__ void __launch_bounds__(kThreads)
gradient_sums_kernel(Shape s, int64_t splits, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd, Pair* __restrict__ partial) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t row = blockIdx.x / splits, group = row / s.group_channels();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.S ? begin + kSplitElements : s.S;
    const Mean<A> m(mean[group]);
    Pair sum = {0, 0};
#pragma unroll(kWidth == 1 ? 4 : 2)
    for (int64_t i = begin + threadIdx.x * kWidth; i < end; i += kThreads * kWidth) {
        const auto dys = *reinterpret_cast<const Vector<Y, kWidth>*>(dy + row * s.S + i);
        const auto rs = *reinterpret_cast<const Vector<T, kWidth>*>(r + row * s.S + i);
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            const double d = to_acc(dys.v[e]);
            sum.a += d;
            sum.b += d * m.center(to_acc(rs.v[e]));
        }
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = {sum.a, sum.b * rstd[group]};
}

// One block per (n, group): channel_sums (N, C) of the partials, and group_means (N, num_groups) weighted by gamma.
template <typename A>
__global__ void __launch_bounds__(kThreads)
finish_gradient_sums_kernel(Shape s, int64_t splits, const A* __restrict__ gamma, const Pair* __restrict__ partial, Pair* __restrict__ channel_sums, Pair* __restrict__ group_means) {
    wait_for_previous_kernel();
    Pair weighted = {0, 0};
    for (int64_t k = threadIdx.x; k < s.group_channels(); k += kThreads) {
        const int64_t row = blockIdx.x * s.group_channels() + k;
        Pair sum = {0, 0};
        for (int64_t i = 0; i < splits; i++) {
            sum.a += partial[row * splits + i].a;
            sum.b += partial[row * splits + i].b;
        }
        channel_sums[row] = sum;
        const double weight = gamma ? gamma[row % s.C] : A(1);
        weighted.a += weight * sum.a;
        weighted.b += weight * sum.b;
    }
    weighted = block_sum(weighted);
    if (threadIdx.x == 0) group_means[blockIdx.x] = {weighted.a / s.group_count(), weighted.b / s.group_count()};
}

// dgamma, dbeta (C): channel_sums (N, C) over n
template <typename A>
__global__ void parameter_gradients_kernel(Shape s, const Pair* __restrict__ channel_sums, A* __restrict__ dgamma, A* __restrict__ dbeta) {
    wait_for_previous_kernel();
    const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (c >= s.C) return;
    Pair sum = {0, 0};
    for (int64_t n = 0; n < s.N; n++) {
        sum.a += channel_sums[n * s.C + c].a;
        sum.b += channel_sums[n * s.C + c].b;
    }
    if (dbeta) dbeta[c] = A(sum.a);
    if (dgamma) dgamma[c] = A(sum.b);
}

// dz of one (n, channel).
template <typename A> struct ChannelGradient {
    Mean<A> m;
    A inv, weight, mean1, mean2;
    ChannelGradient() = default;
    __device__ __forceinline__ ChannelGradient(double mean, double rstd, A weight, Pair group_means) : m(mean), inv(A(rstd)), weight(weight), mean1(A(group_means.a)), mean2(A(group_means.b)) {}
    __device__ __forceinline__ A dz(A dy, A r) const {
        const A dr = inv * (weight * dy - mean1 - m.center(r) * inv * mean2);
        return r <= A(0) ? A(0) : dr;    // NaN keeps its gradient, as in torch
    }
};

// ---------------------------------------------------------------------------------------------------- Launcher

// What the sums leave for dz.
struct GradientSums {
    Pair *partial, *channel_sums, *group_means;    // (N * C, splits), (N, C), (N, num_groups)
    static int64_t splits(const Shape& s) { return ceil_div(s.S, kSplitElements); }
    static int64_t count(const Shape& s) { return s.N * s.C * (splits(s) + 1) + s.N * s.num_groups; }
    GradientSums(const Shape& s, void* memory) : partial(static_cast<Pair*>(memory)), channel_sums(partial + s.N * s.C * splits(s)), group_means(channel_sums + s.N * s.C) {}
};

// dgamma and dbeta may be null: not wanted.
template <typename T, typename Y>
int sum_gradients(const Shape& s, void* stream, const void* dy, const void* r, const double* statistics, const void* gamma, const GradientSums& sums, void* dgamma, void* dbeta) {
    using A = Acc<T>;
    const int64_t splits = GradientSums::splits(s);
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    RETURN_IF_ERROR(launch(has_vectors<T, Y>(s, r, dy) ? gradient_sums_kernel<T, Y, 4> : gradient_sums_kernel<T, Y, 1>, s.N * s.C * splits, kThreads, stream, s, splits, static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd, sums.partial));
    RETURN_IF_ERROR(launch(finish_gradient_sums_kernel<A>, s.N * s.num_groups, kThreads, stream, s, splits, static_cast<const A*>(gamma), static_cast<const Pair*>(sums.partial), sums.channel_sums, sums.group_means));
    if (!dgamma && !dbeta) return cudaSuccess;
    return launch(parameter_gradients_kernel<A>, ceil_div(s.C, 256), 256, stream, s, static_cast<const Pair*>(sums.channel_sums), static_cast<A*>(dgamma), static_cast<A*>(dbeta));
}

}  // namespace group_norm
