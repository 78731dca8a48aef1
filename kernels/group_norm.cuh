// What every path of GroupNorm shares: reductions, and the elementwise half y = (r - mean) * rstd * gamma + beta.
#pragma once

#include "launch.cuh"

namespace group_norm {

constexpr int kThreads = 256;
constexpr int kApplyElements = 8;            // of one thread of an elementwise kernel

// Mirrored by `_NormShape` in model_new.py.
struct Shape {
    int64_t N, C, S, num_groups;
    HOST_DEVICE int64_t group_channels() const { return C / num_groups; }
    HOST_DEVICE int64_t group_count() const { return group_channels() * S; }
};

// r - mean without losing the mean's low bits: the mean is kept as a sum of two numbers of the accumulation type.
template <typename A> struct Mean {
    A high, low;
    Mean() = default;
    __device__ explicit Mean(double mean) : high(A(mean)), low(A(mean - double(A(mean)))) {}
    __device__ __forceinline__ A center(A r) const { return (r - high) - low; }
};

// The elementwise half, in one channel.
template <typename A> struct ChannelNorm {
    Mean<A> mean;
    A scale, offset;
    ChannelNorm() = default;
    __device__ __forceinline__ ChannelNorm(double mean, double rstd, A gamma, A beta) : mean(mean), scale(A(rstd) * gamma), offset(beta) {}
    __device__ __forceinline__ A operator()(A r) const { return mean.center(r) * scale + offset; }
};

constexpr int64_t kSplitElements = 16384;    // of one block of a reduction

struct Pair { double a, b; };

// Moments that the epilogue of a convolution leaves, and what the statistics need beside them; null: not wanted.
struct MomentSets {
    float2* moments;         // (N, parts, channels): mean and sum of squared deviations of a channel in a part of the sample
    float* counts;           // (N, parts): how many values they are of; starts at zero
    Pair* group_sums;        // (N, num_groups, blocks): what the blocks of a group found (conv_statistics.cuh)
    unsigned* group_tickets; // (N, num_groups): how many of them are done; start at zero
    int parts, channels;
};

// Of `count` values, given their sum and that of their squares.
struct Statistics {
    double mean, rstd;
    __device__ __forceinline__ Statistics(Pair sums, double count, double eps) : mean(sums.a / count) {
        const double variance = sums.b / count - mean * mean;
        rstd = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
    }
};

// The sum over the block, in a fixed order, in every thread.
template <int kBlock = kThreads> __device__ __forceinline__ Pair block_sum(Pair v) {
    static_assert((kBlock & (kBlock - 1)) == 0, "halved again and again");
    __shared__ Pair sums[kBlock];
    __syncthreads();
    sums[threadIdx.x] = v;
    for (int half = kBlock / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x].a += sums[threadIdx.x + half].a;
            sums[threadIdx.x].b += sums[threadIdx.x + half].b;
        }
    }
    __syncthreads();
    return sums[0];
}

// gamma, beta may be null (1, 0). y may be r. Grid: (n, c, tile), the last first, which is still in the L2 cache. kWidth: elements that
// are loaded and stored at once.
template <typename T, typename Y, int kWidth>
__global__ void __launch_bounds__(kThreads)
normalize_kernel(Shape s, int64_t tiles, const T* r, const double* __restrict__ mean, const double* __restrict__ rstd,
                 const Acc<T>* __restrict__ gamma, const Acc<T>* __restrict__ beta, Y* y) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    const int64_t block = gridDim.x - 1 - blockIdx.x, row = block / tiles, c = row % s.C, group = row / s.group_channels();
    const int64_t begin = row * s.S + block % tiles * (kThreads * kApplyElements) + threadIdx.x * kWidth, end = (row + 1) * s.S;
    Vector<T, kWidth> values[kApplyElements / kWidth];
#pragma unroll
    for (int i = 0; i < kApplyElements / kWidth; i++)
        if (begin + i * kThreads * kWidth < end) values[i] = *reinterpret_cast<const Vector<T, kWidth>*>(r + begin + i * kThreads * kWidth);
    const ChannelNorm<A> norm(mean[group], rstd[group], gamma ? gamma[c] : A(1), beta ? beta[c] : A(0));
#pragma unroll
    for (int i = 0; i < kApplyElements / kWidth; i++) {
        Vector<Y, kWidth> normalized;
#pragma unroll
        for (int e = 0; e < kWidth; e++) normalized.v[e] = from_acc<Y>(norm(to_acc(values[i].v[e])));
        if (begin + i * kThreads * kWidth < end) *reinterpret_cast<Vector<Y, kWidth>*>(y + begin + i * kThreads * kWidth) = normalized;
    }
}

// Calls f with the types of r and of y: y is of r's type, or float32 after a low-precision r (autocast).
template <typename F> int with_dtypes(int r_dtype, int y_dtype, F f) {
    return with_dtype(r_dtype, [&](auto r) {
        if (y_dtype == r_dtype) return f(r, r);
        if (y_dtype == kFloat32 && acc_bytes(r_dtype) == 4) return f(r, float{});
        return int(cudaErrorInvalidValue);
    });
}

// Whether rows of two tensors can be read and written four elements at a time.
template <typename T, typename Y> bool has_vectors(const Shape& s, const void* r, const void* y) { return s.S % 4 == 0 && holds<Vector<T, 4>>(r) && holds<Vector<Y, 4>>(y); }

inline int64_t tiles_of(const Shape& s) { return ceil_div(s.S, kThreads * kApplyElements); }

template <typename T, typename Y>
int normalize(const Shape& s, void* stream, const void* r, const double* mean, const double* rstd, const void* gamma, const void* beta, void* y) {
    return launch(has_vectors<T, Y>(s, r, y) ? normalize_kernel<T, Y, 4> : normalize_kernel<T, Y, 1>, s.N * s.C * tiles_of(s), kThreads, stream, s, tiles_of(s), static_cast<const T*>(r), mean, rstd,
                  static_cast<const Acc<T>*>(gamma), static_cast<const Acc<T>*>(beta), static_cast<Y*>(y));
}

}  // namespace group_norm
