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
#include "dweight_parts.cuh"

namespace dweight {

constexpr int kChain = 32768;

struct Parameters {
    Problem p;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                    // partial_count of them, as dweight_parts.cuh tells
};

// Scales a sum back by 2^-shift_a and 2^-shift_b, in an order in which nothing overflows.
struct ScaleBack {
    float small, large;
    __device__ __forceinline__ ScaleBack(int shift_a, int shift_b) : small(scaled_half::power_of_two(-max(shift_a, shift_b))), large(scaled_half::power_of_two(-min(shift_a, shift_b))) {}
    __device__ __forceinline__ float operator()(float sum) const { return sum * small * large; }
};

// Adds a vector's sums to those before, if there are any.
__device__ __forceinline__ void add_sums(float4& sums, bool first, const ScaleBack& back, const float* d) {
    const float4 before = first ? make_float4(0, 0, 0, 0) : sums;
    sums = make_float4(before.x + back(d[0]), before.y + back(d[1]), before.z + back(d[4]), before.w + back(d[5]));
}

}  // namespace dweight
