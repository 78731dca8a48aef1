// The sums that the backward of ReLU and GroupNorm needs, and its elementwise half:
//
//   dr = rstd * (gamma * dy - m1 - xhat * m2), xhat = (r - mean) * rstd,
//   m1, m2 = mean over the group of gamma * dy and of gamma * dy * xhat;   dz = dr where r > 0 (or NaN), else 0
//   dgamma[c] = sum over n, s of dy * xhat,   dbeta[c] = sum over n, s of dy
//   dbias[c] = sum over n, s of dz = sum over n of rstd * (gamma * sum of dy - m1 * count - m2 * sum of xhat), all of these over the s with r > 0:
//   of the bias in front of ReLU, without dz
//
// Sums are taken in float64 (those over r > 0 of four elements at a time) and added in a fixed order. Formula: torch.nn.GroupNorm.
#pragma once

#include "group_norm.cuh"

namespace group_norm {

// Whether ReLU passes the gradient; NaN keeps its gradient, as in torch.
template <typename A> __device__ __forceinline__ bool is_active(A r) { return !(r <= A(0)); }

// Of the active elements: their number, the sums of dy and of xhat.
struct ActiveSums { double count, dy, xhat; };

// partial (N * C, splits): sums of dy and of dy * xhat. active (N * C, splits): where kActive. kWidth: elements that are loaded at once.
template <typename T, typename Y, int kWidth, bool kActive>
__global__ void __launch_bounds__(kThreads)
gradient_sums_kernel(Shape s, int64_t splits, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd, Pair* __restrict__ partial, ActiveSums* __restrict__ active) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t row = blockIdx.x / splits, group = row / s.group_channels();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.S ? begin + kSplitElements : s.S;
    const Mean<A> m(mean[group]);
    Pair sum = {0, 0}, active_sum = {0, 0};
    int active_count = 0;
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
        if constexpr (!kActive) continue;
        A of_dy = 0, of_r = 0;
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            if (!is_active(to_acc(rs.v[e]))) continue;
            active_count++;
            of_dy += to_acc(dys.v[e]);
            of_r += m.center(to_acc(rs.v[e]));
        }
        active_sum.a += of_dy;
        active_sum.b += of_r;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = {sum.a, sum.b * rstd[group]};
    if constexpr (!kActive) return;
    active_sum = block_sum(active_sum);
    const Pair counts = block_sum(Pair{double(active_count), 0});
    if (threadIdx.x == 0) active[blockIdx.x] = {counts.a, active_sum.a, active_sum.b * rstd[group]};
}

// One block per (n, group): channel_sums (N, C) of the partials, group_means (N, num_groups) weighted by gamma, and, where `active` is not null, bias_sums (N, C) of dz.
template <typename A>
__global__ void __launch_bounds__(kThreads)
finish_gradient_sums_kernel(Shape s, int64_t splits, const A* __restrict__ gamma, const double* __restrict__ rstd, const Pair* __restrict__ partial, const ActiveSums* __restrict__ active,
                            Pair* __restrict__ channel_sums, Pair* __restrict__ group_means, double* __restrict__ bias_sums) {
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
    const Pair means = {weighted.a / s.group_count(), weighted.b / s.group_count()};
    if (threadIdx.x == 0) group_means[blockIdx.x] = means;
    if (!active) return;
    for (int64_t k = threadIdx.x; k < s.group_channels(); k += kThreads) {
        const int64_t row = blockIdx.x * s.group_channels() + k;
        ActiveSums sum = {0, 0, 0};
        for (int64_t i = 0; i < splits; i++) {
            const ActiveSums& p = active[row * splits + i];
            sum.count += p.count, sum.dy += p.dy, sum.xhat += p.xhat;
        }
        const double weight = gamma ? gamma[row % s.C] : A(1);
        bias_sums[row] = sum.count == 0 ? 0 : rstd[blockIdx.x] * (weight * sum.dy - means.a * sum.count - means.b * sum.xhat);    // a NaN of the group does not get to where none is active
    }
}

// dgamma, dbeta, dbias (C): channel_sums and bias_sums (N, C) over n
template <typename T>
__global__ void __launch_bounds__(kThreads)
parameter_gradients_kernel(Shape s, const Pair* __restrict__ channel_sums, const double* __restrict__ bias_sums, Acc<T>* __restrict__ dgamma, Acc<T>* __restrict__ dbeta, T* __restrict__ dbias) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (c >= s.C) return;
    Pair sum = {0, 0};
    double bias_sum = 0;
    for (int64_t n = 0; n < s.N; n++) {
        sum.a += channel_sums[n * s.C + c].a;
        sum.b += channel_sums[n * s.C + c].b;
        if (dbias) bias_sum += bias_sums[n * s.C + c];
    }
    if (dbeta) dbeta[c] = A(sum.a);
    if (dgamma) dgamma[c] = A(sum.b);
    if (dbias) dbias[c] = from_acc<T>(A(bias_sum));
}

// dz of one (n, channel).
template <typename A> struct ChannelGradient {
    Mean<A> m;
    A inv, weight, mean1, mean2;
    ChannelGradient() = default;
    __device__ __forceinline__ ChannelGradient(double mean, double rstd, A weight, Pair group_means) : m(mean), inv(A(rstd)), weight(weight), mean1(A(group_means.a)), mean2(A(group_means.b)) {}
    __device__ __forceinline__ A dz(A dy, A r) const {
        const A dr = inv * (weight * dy - mean1 - m.center(r) * inv * mean2);
        return is_active(r) ? dr : A(0);
    }
};

// ---------------------------------------------------------------------------------------------------- Launcher

// What the sums leave for dz and for the parameters' gradients.
struct GradientSums {
    Pair *partial, *channel_sums, *group_means;    // (N * C, splits), (N, C), (N, num_groups)
    ActiveSums* active;                            // (N * C, splits)
    double* bias_sums;                             // (N, C)
    static int64_t splits(const Shape& s) { return ceil_div(s.S, kSplitElements); }
    static int64_t bytes(const Shape& s) {
        const int64_t rows = s.N * s.C;
        return (rows * (splits(s) + 1) + s.N * s.num_groups) * int64_t(sizeof(Pair)) + rows * splits(s) * int64_t(sizeof(ActiveSums)) + rows * int64_t(sizeof(double));
    }
    GradientSums(const Shape& s, void* memory)
        : partial(static_cast<Pair*>(memory)), channel_sums(partial + s.N * s.C * splits(s)), group_means(channel_sums + s.N * s.C),
          active(reinterpret_cast<ActiveSums*>(group_means + s.N * s.num_groups)), bias_sums(reinterpret_cast<double*>(active + s.N * s.C * splits(s))) {}
};

// dgamma, dbeta and dbias may be null: not wanted.
template <typename T, typename Y>
int sum_gradients(const Shape& s, void* stream, const void* dy, const void* r, const double* statistics, const void* gamma, const GradientSums& sums, void* dgamma, void* dbeta, void* dbias) {
    using A = Acc<T>;
    const int64_t splits = GradientSums::splits(s);
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    ActiveSums* active = dbias ? sums.active : nullptr;
    const bool vectors = has_vectors<T, Y>(s, r, dy);
    const auto sum = active ? vectors ? gradient_sums_kernel<T, Y, 4, true> : gradient_sums_kernel<T, Y, 1, true> : vectors ? gradient_sums_kernel<T, Y, 4, false> : gradient_sums_kernel<T, Y, 1, false>;
    RETURN_IF_ERROR(launch(sum, s.N * s.C * splits, kThreads, stream, s, splits, static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd, sums.partial, active));
    RETURN_IF_ERROR(launch(finish_gradient_sums_kernel<A>, s.N * s.num_groups, kThreads, stream, s, splits, static_cast<const A*>(gamma), rstd, static_cast<const Pair*>(sums.partial), static_cast<const ActiveSums*>(active), sums.channel_sums, sums.group_means, sums.bias_sums));
    if (!dgamma && !dbeta && !dbias) return cudaSuccess;
    return launch(parameter_gradients_kernel<T>, ceil_div(s.C, kThreads), kThreads, stream, s, static_cast<const Pair*>(sums.channel_sums), static_cast<const double*>(sums.bias_sums), static_cast<A*>(dgamma), static_cast<A*>(dbeta), static_cast<T*>(dbias));
}

}  // namespace group_norm
