// Convolutions with few tiles, whose GEMM_K is cut into parts: each part is a convolution into scratch memory, and here they are added.
#pragma once

#include "conv_epilogue.cuh"
#include "group_norm.cuh"

namespace conv {

constexpr int kAddThreads = 256;

// Grid: (n, channel, kAddedOutputs outputs). out = epilogue(the sum of the parts, in their order), and its moments where they are wanted.
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ Parameters a) {
    wait_for_previous_kernel();
    constexpr int kOwn = kAddedOutputs / kAddThreads;
    const int volume = int(a.p.out_volume), spans = parts_of_sample(a.p), span = blockIdx.x % spans, row = blockIdx.x / spans, channel = row % int(a.p.C_out), n = row / int(a.p.C_out);
    const int first = span * kAddedOutputs + threadIdx.x, count = min(kAddedOutputs, volume - span * kAddedOutputs);
    const int64_t origin = int64_t(row) * volume, part_size = a.p.N * a.p.C_out * volume;
    const float bias = a.bias ? load_as_float(a.bias, a.dtype, channel) : 0.0f;
    float values[kOwn] = {};
#pragma unroll 4
    for (int part = 0; part < a.p.t.k_parts; part++)
#pragma unroll
        for (int i = 0; i < kOwn; i++)
            if (first + i * kAddThreads < volume) values[i] += a.workspace.parts[part * part_size + origin + first + i * kAddThreads];
    group_norm::Pair sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        if (first + i * kAddThreads >= volume) continue;
        values[i] += bias;
        if (a.apply_relu) values[i] = relu(values[i]);
        store_as(a.out, a.dtype, origin + first + i * kAddThreads, values[i]);
        sum.a += values[i];
    }
    if (!a.workspace.moments) return;
    const double mean = group_norm::block_sum<kAddThreads>(sum).a / count;
    sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++)
        if (first + i * kAddThreads < volume) sum.a += (values[i] - mean) * (values[i] - mean);
    sum = group_norm::block_sum<kAddThreads>(sum);
    if (threadIdx.x > 0) return;
    const int64_t set = int64_t(n) * spans + span;
    a.workspace.moments[set * a.p.t.channels() + channel] = make_float2(float(mean), float(sum.a));
    a.workspace.counts[set] = float(count);    // the same from every channel
}

}  // namespace conv
