// GroupNorm of an activation r = relu(z), and the backward of both, for any shape and dtype.
//
//   forward   y = (r - mean) * rstd * gamma + beta, mean and variance (biased) over each (n, group)
//   backward  group_norm_backward.cuh
//
//   r, dz (N, C, S) of type T   y, dy (N, C, S) of type Y   statistics (2, N, num_groups) float64: mean, rstd   gamma, beta, dgamma, dbeta (C) Acc<T>   dbias (C) T
//
// Sums are taken in float64, of values shifted by the group's first element, so neither a large mean nor a large range
// cancels; they are added in a fixed order. Formula: torch.nn.GroupNorm.

#include "group_norm_backward.cuh"

namespace relu_group_norm_generic {

using namespace group_norm;

// ------------------------------------------------------------------------------------------------------ Forward

// partial (N * num_groups, splits): sum and sum of squares of r - r[first of the group]
template <typename T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Shape s, int64_t splits, const T* __restrict__ r, Pair* __restrict__ partial) {
    wait_for_previous_kernel();
    const T* group = r + blockIdx.x / splits * s.group_count();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.group_count() ? begin + kSplitElements : s.group_count();
    const double shift = to_acc(group[0]);
    Pair sum = {0, 0};
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const double v = to_acc(group[i]) - shift;
        sum.a += v;
        sum.b += v * v;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
finish_statistics_kernel(Shape s, int64_t splits, double eps, const T* __restrict__ r, const Pair* __restrict__ partial, double* __restrict__ mean, double* __restrict__ rstd) {
    wait_for_previous_kernel();
    Pair sum = {0, 0};
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) {
        sum.a += partial[blockIdx.x * splits + i].a;
        sum.b += partial[blockIdx.x * splits + i].b;
    }
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const Statistics shifted(sum, double(s.group_count()), eps);
    mean[blockIdx.x] = to_acc(r[blockIdx.x * s.group_count()]) + shifted.mean;
    rstd[blockIdx.x] = shifted.rstd;
}

// ----------------------------------------------------------------------------------------------------- Backward

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
dz_kernel(Shape s, int64_t tiles, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd,
          const Acc<T>* __restrict__ gamma, const Pair* __restrict__ group_means, T* __restrict__ dz) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t row = blockIdx.x / tiles, c = row % s.C, group = row / s.group_channels();
    const ChannelGradient<A> gradient(mean[group], rstd[group], gamma ? gamma[c] : A(1), group_means[group]);
    const int64_t begin = blockIdx.x % tiles * (kThreads * kApplyElements) + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kApplyElements; e++) {
        const int64_t i = begin + e * kThreads;
        if (i < s.S) dz[row * s.S + i] = from_acc<T>(gradient.dz(to_acc(dy[row * s.S + i]), to_acc(r[row * s.S + i])));
    }
}

}  // namespace relu_group_norm_generic

// ---------------------------------------------------------------------------------------------------- Launchers

using group_norm::Shape;

extern "C" int64_t group_norm_forward_generic_workspace(const Shape* s, int, int) {
    using namespace relu_group_norm_generic;
    return s->N * s->num_groups * ceil_div(s->group_count(), kSplitElements) * int64_t(sizeof(Pair));
}

// y may be r (in place) where the types agree.
extern "C" int group_norm_forward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                          const void* r, const void* gamma, const void* beta, double eps, void* y, double* statistics) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        const int64_t splits = ceil_div(s.group_count(), kSplitElements);
        double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        auto* partial = static_cast<Pair*>(workspace);
        RETURN_IF_ERROR(launch(statistics_kernel<T>, s.N * s.num_groups * splits, kThreads, stream, s, splits, static_cast<const T*>(r), partial));
        RETURN_IF_ERROR(launch(finish_statistics_kernel<T>, s.N * s.num_groups, kThreads, stream, s, splits, eps, static_cast<const T*>(r), static_cast<const Pair*>(partial), mean, rstd));
        return normalize<T, Y>(s, stream, r, mean, rstd, gamma, beta, y);
    });
}

extern "C" int64_t relu_group_norm_backward_generic_workspace(const Shape* s, int, int) {
    return group_norm::GradientSums::bytes(*s);
}

// dz, dgamma, dbeta and dbias may be null: not wanted.
extern "C" int relu_group_norm_backward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                                const void* dy, const void* r, const double* statistics, const void* gamma, void* dz, void* dgamma, void* dbeta, void* dbias) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        using A = Acc<T>;
        const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        const GradientSums sums(s, workspace);
        RETURN_IF_ERROR((sum_gradients<T, Y>(s, stream, dy, r, statistics, gamma, sums, dgamma, dbeta, dbias)));
        if (!dz) return int(cudaSuccess);
        return launch(dz_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd,
                      static_cast<const A*>(gamma), static_cast<const Pair*>(sums.group_means), static_cast<T*>(dz));
    });
}

extern "C" const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
