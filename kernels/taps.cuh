// Sums of taps, and the spread gradient of outputs (taps.h).
#pragma once

#include "launch.cuh"
#include "taps.h"

namespace taps {

constexpr int kThreads = 256;

// Grid: (sample, output channel, kThreads outputs). bias may be null.
template <int kMost> __global__ void __launch_bounds__(kThreads, 4) add_kernel(const __grid_constant__ Layer layer, const float* products, const float* bias, bool apply_relu, float* out) {
    wait_for_previous_kernel();
    const int spans = (layer.outputs + kThreads - 1) / kThreads, row = blockIdx.x / spans, o = (blockIdx.x - row * spans) * kThreads + threadIdx.x;
    if (o >= layer.outputs) return;
    float sum = sum_of<kMost>(layer, products + int64_t(row) * layer.volume * layer.positions, o);
    if (bias) sum += bias[row % layer.C_out];
    out[int64_t(row) * layer.outputs + o] = apply_relu ? relu(sum) : sum;
}

inline int add(const Layer& layer, void* stream, const float* products, const float* bias, bool apply_relu, float* out) {
    const int most = most_taps(layer);
    return launch(most <= 2 ? add_kernel<2> : most == 3 ? add_kernel<3> : add_kernel<0>, layer.rows * ceil_div(layer.outputs, kThreads), kThreads, stream, layer, products, bias, apply_relu, out);
}

// Grid: (sample, output channel, k, kThreads positions).
__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ Layer layer, const float* dout, float* spread) {
    wait_for_previous_kernel();
    const int spans = (layer.positions + kThreads - 1) / kThreads, tap = blockIdx.x / spans, i = (blockIdx.x - tap * spans) * kThreads + threadIdx.x, row = tap / layer.volume;
    if (i >= layer.positions) return;
    const int o = output_of(layer, tap - row * layer.volume, i);
    spread[int64_t(tap) * layer.positions + i] = o >= 0 ? dout[int64_t(row) * layer.outputs + o] : 0.0f;
}

inline int spread(const Layer& layer, void* stream, const float* dout, float* spread) {
    return launch(spread_kernel, layer.rows * layer.volume * ceil_div(layer.positions, kThreads), kThreads, stream, layer, dout, spread);
}

}  // namespace taps
