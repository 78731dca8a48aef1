// A layer's outputs as sums of products, one for each element k of the kernel and position i of the input, and its outputs' gradient spread out likewise: the index
// arithmetic, for host and device.
//
//   out[n, co, o] = bias[co] + sum over k, i with i * stride - padding + k * dilation = o of products[n, co, k, i]
//   spread[n, co, k, i] = dout[n, co, i * stride - padding + k * dilation], or 0 outside
//
//   products, spread (N, C_out, kernel volume, positions of the input)   out, dout (N, C_out, D_out, H_out, W_out)
#pragma once

#include "geometry.h"

#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace taps {

// Of an axis: the taps k, k + period, ... of an output read the positions i, i - step, ...
struct TapAxis {
    int in, out, kernel, stride, padding, dilation, period, step;
    Divisor by_in, by_out, by_kernel;
};

struct Layer {
    TapAxis d, h, w;
    int64_t rows;                              // (sample, output channel)
    int C_out, volume, positions, outputs;     // volume: of a kernel; positions and outputs: of a channel, whose products an int counts
};

inline TapAxis make_axis(const Axis& a) {
    const int64_t period = tap_period(a);
    return {int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(period), int(period * a.dilation / a.stride),
            make_divisor(int(a.in)), make_divisor(int(a.out)), make_divisor(int(a.kernel))};
}
inline Layer make_layer(const Geometry& g) {
    return {make_axis(g.axis[0]), make_axis(g.axis[1]), make_axis(g.axis[2]), g.N * g.C_out, int(g.C_out), int(kernel_volume(g)), int(in_volume(g)), int(out_volume(g))};
}

// Whether element k of the kernel and position i make output i * stride + k, and no others do. `_has_single_taps` in model_new.py is the same (tests/test_paths.py).
inline bool has_single_taps(const Geometry& g) {
    bool single = true;
    for (const Axis& a : g.axis) single &= a.kernel == a.stride && a.padding == 0 && (a.dilation == 1 || a.kernel == 1) && a.out == a.in * a.stride;
    return single;
}

// Taps that an output has along an axis, at most.
inline int most_taps(const TapAxis& a) { return int(ceil_div(a.kernel, a.period)); }
inline int most_taps(const Layer& layer) {
    const int d = most_taps(layer.d), h = most_taps(layer.h), w = most_taps(layer.w);
    return d > h ? (d > w ? d : w) : (h > w ? h : w);
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

// Where the taps of an output along an axis are among a channel's products, which is the sum of the three axes' places, or -1 where there is no such tap.
template <int kMost> struct Places {
    int at[kMost];
    HOST_DEVICE Places(const TapAxis& a, int o, int kernel_step, int position_step) {
        Tap tap = first_tap(a, o);
        UNROLL
        for (int& place : at) {
            place = tap.k < a.kernel && tap.i >= 0 ? tap.k * kernel_step + tap.i * position_step : -1;
            tap.k += a.period, tap.i -= a.step;
        }
    }
};

// The sum that output o of a channel is, where each axis has at most kMost taps; any number where kMost is 0. products: the channel's.
template <int kMost> HOST_DEVICE float sum_of(const Layer& layer, const float* products, int o) {
    const TapAxis &ad = layer.d, &ah = layer.h, &aw = layer.w;
    int od = o;
    const int ow = aw.by_out.take(od), oh = ah.by_out.take(od), plane = ah.in * aw.in, row_kernels = aw.kernel * layer.positions;
    float sum = 0;
    if constexpr (kMost > 0) {
        const Places<kMost> d(ad, od, ah.kernel * row_kernels, plane), h(ah, oh, row_kernels, aw.in), w(aw, ow, layer.positions, 1);
        UNROLL
        for (int i = 0; i < kMost; i++) {
            float values[kMost * kMost];    // under way at once
            UNROLL
            for (int j = 0; j < kMost * kMost; j++) {
                const int at_h = h.at[j / kMost], at_w = w.at[j % kMost];
                values[j] = d.at[i] >= 0 && at_h >= 0 && at_w >= 0 ? products[d.at[i] + at_h + at_w] : 0.0f;
            }
            UNROLL
            for (float v : values) sum += v;
        }
    } else {
        const Tap first_h = first_tap(ah, oh), first_w = first_tap(aw, ow);
        for (Tap d = first_tap(ad, od); d.k < ad.kernel && d.i >= 0; d.k += ad.period, d.i -= ad.step)
            for (Tap h = first_h; h.k < ah.kernel && h.i >= 0; h.k += ah.period, h.i -= ah.step)
                for (Tap w = first_w; w.k < aw.kernel && w.i >= 0; w.k += aw.period, w.i -= aw.step)
                    sum += products[(d.k * ah.kernel + h.k) * row_kernels + d.i * plane + h.i * aw.in + w.k * layer.positions + w.i];
    }
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
