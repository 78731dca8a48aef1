// GroupNorm of an activation r = relu(z), and the backward of both, for any shape and dtype.
//
//   forward   y = (r - mean) * rstd * gamma + beta, mean and variance (biased) over each (n, group)
//   backward  dr = rstd * (gamma * dy - m1 - xhat * m2), xhat = (r - mean) * rstd,
//             m1, m2 = mean over the group of gamma * dy and of gamma * dy * xhat;   dz = dr where r > 0 (or NaN), else 0
//             dgamma[c] = sum over n, s of dy * xhat,   dbeta[c] = sum over n, s of dy
//
//   r, dz (N, C, S) of type T   y, dy (N, C, S) of type Y   statistics (2, N, num_groups) float64: mean, rstd   gamma, beta, dgamma, dbeta (C) Acc<T>
//
// Sums are taken in float64, of values shifted by the group's first element, so neither a large mean nor a large range
// cancels; they are added in a fixed order. Formula: torch.nn.GroupNorm.

#include "group_norm.cuh"

namespace relu_group_norm_generic {

using namespace group_norm;

constexpr int64_t kSplitElements = 16384;    // of one block of a reduction

struct Pair { double a, b; };

// The sum over the block, in a fixed order, in every thread.
__device__ __forceinline__ Pair block_sum(Pair v) {
    __shared__ Pair sums[kThreads];
    __syncthreads();
    sums[threadIdx.x] = v;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x].a += sums[threadIdx.x + half].a;
            sums[threadIdx.x].b += sums[threadIdx.x + half].b;
        }
    }
    __syncthreads();
    return sums[0];
}

// ------------------------------------------------------------------------------------------------------ Forward

// partial (N * num_groups, splits): sum and sum of squares of r - r[first of the group]
template <typename T>
__global__ void __launch_bounds__(kThreads) statistics_kernel(Shape s, int64_t splits, const T* __restrict__ r, Pair* __restrict__ partial) {
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
    Pair sum = {0, 0};
    for (int64_t i = threadIdx.x; i < splits; i += kThreads) {
        sum.a += partial[blockIdx.x * splits + i].a;
        sum.b += partial[blockIdx.x * splits + i].b;
    }
    sum = block_sum(sum);
    if (threadIdx.x > 0) return;
    const double count = s.group_count(), shifted_mean = sum.a / count;
    const double variance = sum.b / count - shifted_mean * shifted_mean;
    mean[blockIdx.x] = to_acc(r[blockIdx.x * s.group_count()]) + shifted_mean;
    rstd[blockIdx.x] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
}

// ----------------------------------------------------------------------------------------------------- Backward

// partial (N * C, splits): sums of dy and of dy * xhat
template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
gradient_sums_kernel(Shape s, int64_t splits, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd, Pair* __restrict__ partial) {
    using A = Acc<T>;
    const int64_t row = blockIdx.x / splits, group = row / s.group_channels();
    const int64_t begin = blockIdx.x % splits * kSplitElements;
    const int64_t end = begin + kSplitElements < s.S ? begin + kSplitElements : s.S;
    const Mean<A> m(mean[group]);
    Pair sum = {0, 0};
#pragma unroll 4
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
        const double d = to_acc(dy[row * s.S + i]);
        sum.a += d;
        sum.b += d * m.center(to_acc(r[row * s.S + i]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = {sum.a, sum.b * rstd[group]};
}

// One block per (n, group): channel_sums (N, C) of the partials, and group_means (N, num_groups) weighted by gamma.
template <typename A>
__global__ void __launch_bounds__(kThreads)
finish_gradient_sums_kernel(Shape s, int64_t splits, const A* __restrict__ gamma, const Pair* __restrict__ partial, Pair* __restrict__ channel_sums, Pair* __restrict__ group_means) {
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

template <typename T, typename Y>
__global__ void __launch_bounds__(kThreads)
dz_kernel(Shape s, int64_t tiles, const Y* __restrict__ dy, const T* __restrict__ r, const double* __restrict__ mean, const double* __restrict__ rstd,
          const Acc<T>* __restrict__ gamma, const Pair* __restrict__ group_means, T* __restrict__ dz) {
    using A = Acc<T>;
    const int64_t row = blockIdx.x / tiles, c = row % s.C, group = row / s.group_channels();
    const Mean<A> m(mean[group]);
    const A inv = rstd[group], weight = gamma ? gamma[c] : A(1), mean1 = group_means[group].a, mean2 = group_means[group].b;
    const int64_t begin = blockIdx.x % tiles * (kThreads * kApplyElements) + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kApplyElements; e++) {
        const int64_t i = begin + e * kThreads;
        if (i >= s.S) break;
        const A v = to_acc(r[row * s.S + i]);
        const A dr = inv * (weight * to_acc(dy[row * s.S + i]) - mean1 - m.center(v) * inv * mean2);
        dz[row * s.S + i] = from_acc<T>(v <= A(0) ? A(0) : dr);    // NaN keeps its gradient, as in torch
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
    using namespace relu_group_norm_generic;
    return (s->N * s->C * (ceil_div(s->S, kSplitElements) + 1) + s->N * s->num_groups) * int64_t(sizeof(Pair));
}

// dz, or dgamma and dbeta, may be null: not wanted.
extern "C" int relu_group_norm_backward_generic(const Shape* shape, int r_dtype, int y_dtype, int device, void* stream, void* workspace,
                                                const void* dy, const void* r, const double* statistics, const void* gamma, void* dz, void* dgamma, void* dbeta) {
    using namespace relu_group_norm_generic;
    DeviceGuard guard(device);
    const Shape s = *shape;
    return with_dtypes(r_dtype, y_dtype, [&](auto r_element, auto y_element) {
        using T = decltype(r_element);
        using Y = decltype(y_element);
        using A = Acc<T>;
        const int64_t splits = ceil_div(s.S, kSplitElements);
        const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
        Pair* partial = static_cast<Pair*>(workspace);                      // (N * C, splits)
        Pair* channel_sums = partial + s.N * s.C * splits;                  // (N, C)
        Pair* group_means = channel_sums + s.N * s.C;                       // (N, num_groups)
        RETURN_IF_ERROR(launch(gradient_sums_kernel<T, Y>, s.N * s.C * splits, kThreads, stream, s, splits, static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd, partial));
        RETURN_IF_ERROR(launch(finish_gradient_sums_kernel<A>, s.N * s.num_groups, kThreads, stream, s, splits, static_cast<const A*>(gamma), static_cast<const Pair*>(partial), channel_sums, group_means));
        if (dgamma || dbeta)
            RETURN_IF_ERROR(launch(parameter_gradients_kernel<A>, ceil_div(s.C, 256), 256, stream, s, static_cast<const Pair*>(channel_sums), static_cast<A*>(dgamma), static_cast<A*>(dbeta)));
        if (!dz) return int(cudaSuccess);
        return launch(dz_kernel<T, Y>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const Y*>(dy), static_cast<const T*>(r), mean, rstd,
                      static_cast<const A*>(gamma), static_cast<const Pair*>(group_means), static_cast<T*>(dz));
    });
}

extern "C" const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
