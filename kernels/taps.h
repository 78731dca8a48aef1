// A layer's outputs as sums of products, one for each element k of the kernel and position i of the input, and its outputs' gradient spread out likewise: the index
// arithmetic, for host and device.
//
//   out[n, co, o] = bias[co] + sum over k, i with i * stride - padding + k * dilation = o of products[n, co, k, i]
//   spread[n, co, k, i] = dout[n, co, i * stride - padding + k * dilation], or 0 outside
//
//   products, spread (N, C_out, kernel volume, positions of the input)   out, dout (N, C_out, D_out, H_out, W_out)
#pragma once

#include "geometry.h"

namespace taps {

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
HOST_DEVICE Tap first_tap(const TapAxis& a, int o) {
    int k = 0;
    while (k < a.period && (o + a.padding - k * a.dilation) % a.stride != 0) k++;
    if (k == a.period) return {a.kernel, 0};
    Tap tap = {k, (o + a.padding - k * a.dilation) / a.stride};
    while (tap.i >= a.in && tap.k < a.kernel) tap.k += a.period, tap.i -= a.step;
    return tap;
}

// The sum that output o of a channel is. products: the channel's.
HOST_DEVICE float sum_of(const Layer& layer, const float* products, int o) {
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    int od = o;
    const int ow = aw.by_out.take(od), oh = ah.by_out.take(od);
    const Tap first_h = first_tap(ah, oh), first_w = first_tap(aw, ow);
    float sum = 0;
    for (Tap d = first_tap(ad, od); d.k < ad.kernel && d.i >= 0; d.k += ad.period, d.i -= ad.step)
        for (Tap h = first_h; h.k < ah.kernel && h.i >= 0; h.k += ah.period, h.i -= ah.step)
#ifdef __CUDACC__
#pragma unroll 4
#endif
            for (Tap w = first_w; w.k < aw.kernel && w.i >= 0; w.k += aw.period, w.i -= aw.step)
                sum += products[int64_t((d.k * ah.kernel + h.k) * aw.kernel + w.k) * layer.positions + (d.i * ah.in + h.i) * aw.in + w.i];
    return sum;
}

// The output of a channel that element k of its kernel makes of position i, or -1.
HOST_DEVICE int output_of(const Layer& layer, int k, int i) {
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    const int kw = aw.by_kernel.take(k), kh = ah.by_kernel.take(k), iw = aw.by_in.take(i), ih = ah.by_in.take(i);
    const int od = i * ad.stride - ad.padding + k * ad.dilation, oh = ih * ah.stride - ah.padding + kh * ah.dilation, ow = iw * aw.stride - aw.padding + kw * aw.dilation;
    const bool inside = unsigned(od) < unsigned(ad.out) && unsigned(oh) < unsigned(ah.out) && unsigned(ow) < unsigned(aw.out);
    return inside ? (od * ah.out + oh) * aw.out + ow : -1;
}

}  // namespace taps
