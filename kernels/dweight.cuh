// Gradient of a transposed convolution's weight on the tensor cores, any stride as in stencil.h.
//
//   dweight[ci, co, k] = sum over n, p of dout[n, p, (phase, co)] * x[n, first + p - shift, ci],   k = kernel_index(shift, phase)
//
// A matrix product on the scaled fp16 copies that dx and the forward read (scaled_half.cuh), channels-last: GEMM_M = (phase, output
// channel), GEMM_N = (neighbouring taps w, input channel), GEMM_K = positions p. Both operands are transposed ones, a row of shared
// memory for each position; a tap is a shift of x by whole rows. Where there is one tap w, GEMM_N is several chunks of channels.
//
// Samples have scales of their own: where the scale changes, and after kChain positions, which keeps the tensor cores' chains of
// additions short, the sums are scaled back and added to those in scratch memory.
#pragma once

#include "conv_plan.cuh"
#include "dweight_tiles.h"

namespace dweight {

constexpr int kChain = 32768;

struct Parameters {
    Problem p;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                    // (splits, groups, kConsumers, block_n / 8, 128, 4): a thread's sums, four by four
};

inline int64_t partial_count(const Tiling& t) { return int64_t(t.splits) * t.groups * kConsumers * kRows * t.block_n; }

// Scales a sum back by 2^-shift_a and 2^-shift_b, in an order in which nothing overflows.
struct ScaleBack {
    float small, large;
    __device__ __forceinline__ ScaleBack(int shift_a, int shift_b) : small(scaled_half::power_of_two(-max(shift_a, shift_b))), large(scaled_half::power_of_two(-min(shift_a, shift_b))) {}
    __device__ __forceinline__ float operator()(float sum) const { return sum * small * large; }
};

// dweight (C_in, C_out / groups, kernel) from the parts' sums. A thread has the four that one of the kernel above had.
template <typename T> __global__ void __launch_bounds__(128) add_parts_kernel(const __grid_constant__ Parameters a, T* __restrict__ dweight) {
    wait_for_previous_kernel();
    const Tiling& t = a.p.t;
    const int quads = t.block_n / 8, quad = blockIdx.x % quads, consumer = blockIdx.x / quads % kConsumers, index = blockIdx.x / quads / kConsumers;
    const Group g(t, a.p.s, index);
    if (!is_live(a.p, g, consumer)) return;
    const float4* partial = reinterpret_cast<const float4*>(a.partial) + ((int64_t(index) * kConsumers + consumer) * quads + quad) * 128 + threadIdx.x;
    const int64_t stride = int64_t(t.groups) * kConsumers * quads * 128;
    double sums[4] = {};
#pragma unroll 4
    for (int split = 0; split < t.splits; split++) {
        const float4 v = partial[split * stride];
        sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int64_t element = element_of(a.p, g, consumer, warp * 16 + lane / 4 + e / 2 * 8, quad * 8 + lane % 4 * 2 + e % 2);
        if (element >= 0) dweight[element] = from_acc<T>(float(sums[e]));
    }
}

inline int add_parts(const Parameters& a, int dtype, void* dweight, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const int64_t blocks = int64_t(t.groups) * kConsumers * (t.block_n / 8);
    switch (dtype) {
        case kFloat32: return launch(add_parts_kernel<float>, blocks, 128, stream, a, static_cast<float*>(dweight));
        case kFloat16: return launch(add_parts_kernel<__half>, blocks, 128, stream, a, static_cast<__half*>(dweight));
        case kBFloat16: return launch(add_parts_kernel<__nv_bfloat16>, blocks, 128, stream, a, static_cast<__nv_bfloat16*>(dweight));
    }
    return cudaErrorInvalidValue;
}

}  // namespace dweight
