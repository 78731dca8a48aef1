// A transposed convolution of any stride as a convolution of stride 1.
//
// Output o of an axis has u = o + padding = stride * q + r with phase r in [0, stride). Input i reaches it through tap k where
// u = stride * i + dilation * k: then r = dilation * k mod stride, and i = q - m with m = dilation * k div stride. So each tap k
// belongs to one phase r and one shift m, and the layer is a convolution of stride 1 on the grid of the q, with one output
// channel per (channel, phase), taps (m), and zeros where a phase has no tap with that shift. Backwards, for dx, the grid of
// the q is the source and its (channel, phase) pairs are the input channels: i reads q = i + m.
#pragma once

#include "geometry.h"

constexpr int kMaxTaps = 7, kMaxStride = 4;

// One axis. Position p of the destination's grid reads the source's grid at first + p - shift[t] for every tap t, where that
// is in [0, sources). Forward, position p and phase r are output p * phases + r - crop, where that is in [0, out).
struct StencilAxis {
    int sources, positions, first;
    int taps, shift[kMaxTaps];        // ascending
    int phases, crop, out;
    int live[kMaxStride];             // bit t: tap t has a weight in this phase
    int kernel, dilation;
};

struct Stencil {
    StencilAxis axis[3];              // D, H, W
};

// Which row of GEMM_M is which (channel, phase), phase = (r_d * phases_h + r_h) * phases_w + r_w. A row tile is 8 granules of 8
// channels each, `octets` channel octets times `packed_phases` neighbouring phases; the other phases have row tiles of their own.
struct RowMap {
    int packed_phases, octets, channel_tiles;
    HOST_DEVICE int row(int channel, int phase) const {
        const int row_tile = phase / packed_phases * channel_tiles + channel / (octets * 8);
        return row_tile * 64 + (channel / 8 % octets * packed_phases + phase % packed_phases) * 8 + channel % 8;
    }
};

// The kernel index k of (shift, phase), or -1 where there is none.
HOST_DEVICE int kernel_index(const StencilAxis& a, int shift, int phase) {
    const int distance = shift * a.phases + phase;
    return distance % a.dilation == 0 && distance / a.dilation < a.kernel ? distance / a.dilation : -1;
}

// The same for a tap (d, h, w) and a phase, each counted over all axes, W fastest: the index in the kernel's volume.
HOST_DEVICE int kernel_index(const Stencil& s, int tap, int phase) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int kd = kernel_index(d, d.shift[tap / w.taps / h.taps], phase / w.phases / h.phases);
    const int kh = kernel_index(h, h.shift[tap / w.taps % h.taps], phase / w.phases % h.phases);
    const int kw = kernel_index(w, w.shift[tap % w.taps], phase % w.phases);
    return kd >= 0 && kh >= 0 && kw >= 0 ? (kd * h.kernel + kh) * w.kernel + kw : -1;
}

inline StencilAxis make_forward_axis(const Axis& a) {
    StencilAxis s = {};
    s.kernel = a.kernel, s.dilation = a.dilation;
    s.phases = a.stride, s.out = a.out, s.sources = a.in;
    s.first = a.padding / a.stride, s.crop = a.padding % a.stride;
    s.positions = (a.out - 1 + a.padding) / a.stride - s.first + 1;
    for (int k = 0; k < s.kernel; k++) {
        const int shift = k * s.dilation / s.phases;
        if (s.taps == 0 || s.shift[s.taps - 1] != shift) s.shift[s.taps++] = shift;
        s.live[k * s.dilation % s.phases] |= 1 << (s.taps - 1);
    }
    return s;
}

inline Stencil make_forward_stencil(const Geometry& g) { return {{make_forward_axis(g.axis[0]), make_forward_axis(g.axis[1]), make_forward_axis(g.axis[2])}}; }

// Whether the arrays above suffice.
inline bool has_stencil(const Geometry& g) {
    for (const Axis& a : g.axis)
        if (a.kernel > kMaxTaps || a.stride > kMaxStride) return false;
    return true;
}
