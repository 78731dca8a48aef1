// Sums over source channels that were made in parts, where whole ones are work for too few blocks: each part is an array like the result, in scratch
// memory, and here they are added.
#pragma once

#include "group_norm.cuh"

namespace parts {

constexpr int kThreads = 256;

// The result is (N, C, volume), the parts (count, N, C, volume).
struct Parts {
    const float* values;
    int count;
    int64_t N;
    int C, volume;
};

// Grid: (n, channel, kAddedOutputs values). A part of the moments is a block's values. out = epilogue(the sum of the parts, in their order); bias may be null.
__global__ void __launch_bounds__(kThreads) add_kernel(Parts p, int dtype, const void* bias, bool apply_relu, void* out, group_norm::MomentSets sets) {
    wait_for_previous_kernel();
    constexpr int kOwn = kAddedOutputs / kThreads;
    const int spans = (p.volume + kAddedOutputs - 1) / kAddedOutputs, span = blockIdx.x % spans, row = blockIdx.x / spans, channel = row % p.C, n = row / p.C;
    const int first = span * kAddedOutputs + threadIdx.x, count = min(kAddedOutputs, p.volume - span * kAddedOutputs);
    const int64_t origin = int64_t(row) * p.volume, part_size = p.N * p.C * p.volume;
    const float own_bias = bias ? load_as_float(bias, dtype, channel) : 0.0f;
    float values[kOwn] = {};
#pragma unroll 4
    for (int part = 0; part < p.count; part++)
#pragma unroll
        for (int i = 0; i < kOwn; i++)
            if (first + i * kThreads < p.volume) values[i] += p.values[part * part_size + origin + first + i * kThreads];
    group_norm::Pair sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        if (first + i * kThreads >= p.volume) continue;
        values[i] += own_bias;
        if (apply_relu) values[i] = relu(values[i]);
        store_as(out, dtype, origin + first + i * kThreads, values[i]);
        sum.a += values[i];
    }
    if (!sets.moments) return;
    const double mean = group_norm::block_sum<kThreads>(sum).a / count;
    sum = {0, 0};
#pragma unroll
    for (int i = 0; i < kOwn; i++)
        if (first + i * kThreads < p.volume) sum.a += (values[i] - mean) * (values[i] - mean);
    sum = group_norm::block_sum<kThreads>(sum);
    if (threadIdx.x > 0) return;
    const int64_t set = int64_t(n) * spans + span;
    sets.moments[set * sets.channels + channel] = make_float2(float(mean), float(sum.a));
    sets.counts[set] = float(count);    // the same from every channel
}

inline int add(const Parts& p, int dtype, const void* bias, bool apply_relu, void* out, const group_norm::MomentSets& sets, void* stream) {
    return launch(add_kernel, p.N * p.C * ceil_div(p.volume, kAddedOutputs), kThreads, stream, p, dtype, bias, apply_relu, out, sets);
}

}  // namespace parts
