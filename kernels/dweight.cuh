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
    float* partial;                    // (splits, groups, consumers, items, block_n / 8, 128, 4): a thread's sums, four by four
};

HOST_DEVICE int64_t partial_count(const Tiling& t) { return int64_t(t.splits) * t.groups * t.consumers * t.items * kRows * t.block_n; }

// A thread has rows r and r + 8, two neighbours of every eight columns: sums 4i and 4i + 1 the first row's, 4i + 2 and 4i + 3 the second's. Vector v of scratch memory has
// four sums of one row, which are in two columns' eights, the first at sum_at(v), so that neighbours have 16 columns of a row.
HOST_DEVICE constexpr int sum_at(int v) { return v / 2 * 8 + v % 2 * 2; }
HOST_DEVICE int place_in_partial(const Tiling& t, const Sum& s) {
    const int item = (s.group * t.consumers + s.consumer) * t.items + s.item, vector = s.column / 16 * 2 + s.row / 8 % 2, thread = s.row / 16 * 32 + s.row % 8 * 4 + s.column % 8 / 2;
    return ((item * (t.block_n / 8) + vector) * 128 + thread) * 4 + s.column / 8 % 2 * 2 + s.column % 2;
}

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

constexpr int kAddThreads = 256, kAddInputs = 16, kAddFloats = 8192, kAddBlocks = 256;    // kAddBlocks: fewer would leave multiprocessors idle
constexpr int kMostVolume = kMaxTaps * kMaxTaps * kMaxTaps;

// 2^added_outputs output channels of a block. Neighbouring rows of shared memory begin in different banks.
HOST_DEVICE int added_row(int outputs, int volume) { return (volume << outputs) | 1; }
inline int added_outputs(const Problem& p) {
    const int64_t inputs = ceil_div(p.C_in, kAddInputs), group_out = p.C_out / p.groups;
    int outputs = 6;
    while (outputs > 0 && (added_row(outputs, kernel_volume(p.s)) * kAddInputs > kAddFloats || inputs * ceil_div(group_out, 1 << outputs) < kAddBlocks)) outputs--;
    return outputs;
}

// A thread's share of a block's sums over the parts, kEach elements at a time, for each of them kParts parts at a time: so much is under way.
template <int kEach, int kParts, typename F, typename G> __device__ __forceinline__ void gather(const Parameters& a, int count, F from, G to) {
    const int64_t stride = partial_count(a.p.t) / a.p.t.splits;
    for (int first = threadIdx.x; first < count; first += kEach * kAddThreads) {
        const float* partial[kEach];
        double sums[kEach] = {};
#pragma unroll
        for (int e = 0; e < kEach; e++) partial[e] = a.partial + from(first + e * kAddThreads);
#pragma unroll kParts
        for (int split = 0; split < a.p.t.splits; split++)
#pragma unroll
            for (int e = 0; e < kEach; e++) sums[e] += partial[e][split * stride];
#pragma unroll
        for (int e = 0; e < kEach; e++) to(first + e * kAddThreads, float(sums[e]));
    }
}

// dweight (C_in, C_out / groups, kernel) from the parts' sums. A block has kAddInputs input channels and 2^outputs output channels with their whole kernels, which
// are neighbours in memory; threads gather sums, neighbouring ones of neighbouring input channels, and put them together in shared memory.
template <typename T> __global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ Parameters a, int outputs, T* __restrict__ dweight) {
    __shared__ SumOfTap taps[kMostVolume];
    __shared__ float values[kAddFloats];
    const int volume = kernel_volume(a.p.s), group_in = int(a.p.C_in / a.p.groups), group_out = int(a.p.C_out / a.p.groups), output_tiles = (group_out + (1 << outputs) - 1) >> outputs;
    const int ci0 = blockIdx.x / output_tiles * kAddInputs, co0 = blockIdx.x % output_tiles << outputs, row = added_row(outputs, volume);
    const int inputs = min(kAddInputs, int(a.p.C_in) - ci0), last_output = min(1 << outputs, group_out - co0) - 1, count = volume * kAddInputs << outputs;
    for (int k = threadIdx.x; k < volume; k += kAddThreads) taps[k] = sum_of_tap(a.p, k);
    wait_for_previous_kernel();
    __syncthreads();
    // Element i: input channel, the thread's own; output channel; k. Where there is none: one of the others.
    const int input = threadIdx.x % kAddInputs, ci = ci0 + min(input, inputs - 1), co = ci / group_in * group_out + co0;
    const SumOfInput sum_input = sum_of_input(a.p, ci);
    const auto from = [&](int i) {
        const int at = i / kAddInputs, k = at >> outputs, output = at - (k << outputs);
        return place_in_partial(a.p.t, sum_of(a.p, taps[min(k, volume - 1)], sum_input, co + min(output, last_output)));
    };
    const auto to = [&](int i, float sum) {
        const int at = i / kAddInputs, k = at >> outputs, output = at - (k << outputs);
        if (k < volume) values[input * row + output * volume + k] = sum;
    };
    if (a.p.t.splits > 8) gather<1, 16>(a, count, from, to);
    else gather<8, 2>(a, count, from, to);
    __syncthreads();
    const int floats = (last_output + 1) * volume;
    for (int input = threadIdx.x / 32; input < inputs; input += kAddThreads / 32)
        for (int i = threadIdx.x % 32; i < floats; i += 32) dweight[(int64_t(ci0 + input) * group_out + co0) * volume + i] = from_acc<T>(values[input * row + i]);
}

inline int add_parts(const Parameters& a, int dtype, void* dweight, cudaStream_t stream) {
    const int outputs = added_outputs(a.p);
    const int64_t blocks = ceil_div(a.p.C_in, kAddInputs) * ceil_div(a.p.C_out / a.p.groups, 1 << outputs);
    switch (dtype) {
        case kFloat32: return launch(add_parts_kernel<float>, blocks, kAddThreads, stream, a, outputs, static_cast<float*>(dweight));
        case kFloat16: return launch(add_parts_kernel<__half>, blocks, kAddThreads, stream, a, outputs, static_cast<__half*>(dweight));
        case kBFloat16: return launch(add_parts_kernel<__nv_bfloat16>, blocks, kAddThreads, stream, a, outputs, static_cast<__nv_bfloat16*>(dweight));
    }
    return cudaErrorInvalidValue;
}

}  // namespace dweight
