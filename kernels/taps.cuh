// A layer's outputs as sums of products, one for each element k of the kernel and position i of the input, and its outputs' gradient spread out likewise:
//
//   out[n, co, o] = bias[co] + sum over k, i with i * stride - padding + k * dilation = o of products[n, co, k, i]
//   spread[n, co, k, i] = dout[n, co, i * stride - padding + k * dilation], or 0 outside
//
//   products, spread (N, C_out, kernel volume, positions of the input)   out, dout (N, C_out, D_out, H_out, W_out)
#pragma once

#include "launch.cuh"

namespace taps {

constexpr int kThreads = 256;

// Of an axis: the taps k, k + period, ... of an output read the positions i, i - step, ...
struct TapAxis {
    int in, out, kernel, stride, padding, dilation, period, step;
    Divisor by_in, by_out, by_kernel;
};

struct Layer {
    TapAxis d, h, w;
    int64_t rows;                              // (sample, output channel)
    int C_out, volume, positions, outputs;     // volume: of a kernel; positions and outputs: of a channel
};

inline TapAxis make_axis(const Axis& a) {
    const int64_t common = gcd(a.stride, a.dilation);
    return {int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(a.stride / common), int(a.dilation / common),
            make_divisor(int(a.in)), make_divisor(int(a.out)), make_divisor(int(a.kernel))};
}
inline Layer make_layer(const Geometry& g) {
    return {make_axis(g.axis[0]), make_axis(g.axis[1]), make_axis(g.axis[2]), g.N * g.C_out, int(g.C_out), int(kernel_volume(g)), int(in_volume(g)), int(out_volume(g))};
}

struct Tap { int k, i; };

// The first tap that output o has inside the input, or one behind the kernel.
__device__ __forceinline__ Tap first_tap(const TapAxis& a, int o) {
    int k = 0;
    while (k < a.period && (o + a.padding - k * a.dilation) % a.stride != 0) k++;
    if (k == a.period) return {a.kernel, 0};
    Tap tap = {k, (o + a.padding - k * a.dilation) / a.stride};
    while (tap.i >= a.in && tap.k < a.kernel) tap.k += a.period, tap.i -= a.step;
    return tap;
}

// Grid: (sample, output channel, kThreads outputs). bias may be null.
__global__ void __launch_bounds__(kThreads, 4) add_kernel(const __grid_constant__ Layer layer, const float* products, const float* bias, bool apply_relu, float* out) {
    wait_for_previous_kernel();
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    const int spans = (layer.outputs + kThreads - 1) / kThreads, row = blockIdx.x / spans, o = (blockIdx.x - row * spans) * kThreads + threadIdx.x;
    if (o >= layer.outputs) return;
    int od = o;
    const int ow = aw.by_out.take(od), oh = ah.by_out.take(od);
    const float* const own = products + int64_t(row) * layer.volume * layer.positions;
    const Tap first_h = first_tap(ah, oh), first_w = first_tap(aw, ow);
    float sum = 0;
    for (Tap d = first_tap(ad, od); d.k < ad.kernel && d.i >= 0; d.k += ad.period, d.i -= ad.step)
        for (Tap h = first_h; h.k < ah.kernel && h.i >= 0; h.k += ah.period, h.i -= ah.step)
#pragma unroll 4
            for (Tap w = first_w; w.k < aw.kernel && w.i >= 0; w.k += aw.period, w.i -= aw.step)
                sum += own[int64_t((d.k * ah.kernel + h.k) * aw.kernel + w.k) * layer.positions + (d.i * ah.in + h.i) * aw.in + w.i];
    if (bias) sum += bias[row % layer.C_out];
    out[int64_t(row) * layer.outputs + o] = apply_relu ? relu(sum) : sum;
}

inline int add(const Layer& layer, void* stream, const float* products, const float* bias, bool apply_relu, float* out) {
    return launch(add_kernel, layer.rows * ceil_div(layer.outputs, kThreads), kThreads, stream, layer, products, bias, apply_relu, out);
}

// Grid: (sample, output channel, k, kThreads positions).
__global__ void __launch_bounds__(kThreads) spread_kernel(const __grid_constant__ Layer layer, const float* dout, float* spread) {
    wait_for_previous_kernel();
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    const int spans = (layer.positions + kThreads - 1) / kThreads, tap = blockIdx.x / spans, i = (blockIdx.x - tap * spans) * kThreads + threadIdx.x, row = tap / layer.volume;
    if (i >= layer.positions) return;
    int kd = tap - row * layer.volume, id = i;
    const int kw = aw.by_kernel.take(kd), kh = ah.by_kernel.take(kd), iw = aw.by_in.take(id), ih = ah.by_in.take(id);
    const int od = id * ad.stride - ad.padding + kd * ad.dilation, oh = ih * ah.stride - ah.padding + kh * ah.dilation, ow = iw * aw.stride - aw.padding + kw * aw.dilation;
    const bool inside = unsigned(od) < unsigned(ad.out) && unsigned(oh) < unsigned(ah.out) && unsigned(ow) < unsigned(aw.out);
    spread[int64_t(tap) * layer.positions + i] = inside ? dout[int64_t(row) * layer.outputs + (od * ah.out + oh) * aw.out + ow] : 0.0f;
}

inline int spread(const Layer& layer, void* stream, const float* dout, float* spread) {
    return launch(spread_kernel, layer.rows * layer.volume * ceil_div(layer.positions, kThreads), kThreads, stream, layer, dout, spread);
}

}  // namespace taps
