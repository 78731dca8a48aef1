// A transposed convolution of any stride, and its gradient, as a convolution of stride 1.
//
// Output o of an axis has u = o + padding + start = stride * q + r with phase r in [0, stride). Input i reaches it through tap k where
// u = stride * i + dilation * k + start: then r = (dilation * k + start) mod stride, and i = q - m with m = (dilation * k + start) div stride. So each tap k
// belongs to one phase r and one shift m, and the layer is a convolution of stride 1 on the grid of the q, with one output
// channel per (channel, phase), and taps (m). Backwards, for dx, the grid of the q is the source, its (channel, phase) pairs are
// the source channels, and i reads q = i + m. Not every phase has a weight at every shift. Any start in [0, stride) will do: the one with the fewest taps, then positions, is
// taken, so that a kernel of 3 and stride 2 that doubles sizes has as many positions as inputs.
#pragma once

#include "geometry.h"

constexpr int kMaxTaps = 7, kMaxStride = 4;

// x / phases, of 1 to 4 phases.
HOST_DEVICE int divide_by_phases(unsigned x, int phases) {
    static_assert(kMaxStride == 4, "below");
    return int(phases == 3 ? multiply_high(x, 0xaaaaaaabu) >> 1 : x >> phases / 2);
}

// One axis. Position p of the destination's grid reads the source's grid at first + p - shift[t] for every tap t, where that
// is in [0, sources). Position p and phase r of the destination's grid are its element p * phases + r - crop, where that is in
// [0, out); the same for the source. Only the layer's output has phases: the destination forward, the source for dx.
struct StencilAxis {
    int sources, positions, first;
    int taps, shift[kMaxTaps];                   // ascending
    int phases, crop, out;
    int source_phases, source_crop, source_out;
    int live[kMaxStride];                        // bit t: tap t has a weight in this phase
    int8_t kernel_of[kMaxTaps][kMaxStride];      // which weight: the kernel index of (tap, phase), or -1
    int8_t tap_of[kMaxTaps], phase_of[kMaxTaps]; // of a kernel index
    int kernel;
};

struct Stencil {
    StencilAxis axis[3];              // D, H, W
    HOST_DEVICE int taps() const { return axis[0].taps * axis[1].taps * axis[2].taps; }
    HOST_DEVICE int phases() const { return axis[0].phases * axis[1].phases * axis[2].phases; }
    HOST_DEVICE int source_phases() const { return axis[0].source_phases * axis[1].source_phases * axis[2].source_phases; }
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

HOST_DEVICE int kernel_volume(const Stencil& s) { return s.axis[0].kernel * s.axis[1].kernel * s.axis[2].kernel; }

// The index in the kernel's volume of a tap (d, h, w) and a phase, each counted over all axes, W fastest; -1 where there is none.
HOST_DEVICE int kernel_index(const Stencil& s, int tap, int phase) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int phases_h = h.phases * h.source_phases, phases_w = w.phases * w.source_phases;    // one of the two is 1
    const int kd = d.kernel_of[tap / w.taps / h.taps][phase / phases_w / phases_h];
    const int kh = h.kernel_of[tap / w.taps % h.taps][phase / phases_w % phases_h];
    const int kw = w.kernel_of[tap % w.taps][phase % phases_w];
    return kd >= 0 && kh >= 0 && kw >= 0 ? (kd * h.kernel + kh) * w.kernel + kw : -1;
}

// The tap and the phase of element k of the kernel's volume: the other way round.
struct TapPhase { int tap, phase; };
HOST_DEVICE TapPhase place_of_kernel(const Stencil& s, int k) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int kw = k % w.kernel, kh = k / w.kernel % h.kernel, kd = k / w.kernel / h.kernel;
    return {(d.tap_of[kd] * h.taps + h.tap_of[kh]) * w.taps + w.tap_of[kw], (d.phase_of[kd] * h.phases * h.source_phases + h.phase_of[kh]) * w.phases * w.source_phases + w.phase_of[kw]};
}

inline StencilAxis forward_axis_from(const Axis& a, int start) {
    StencilAxis s = {};
    s.kernel = a.kernel;
    s.phases = a.stride, s.crop = (a.padding + start) % a.stride, s.out = a.out;
    s.source_phases = 1, s.source_out = s.sources = a.in;
    s.first = (a.padding + start) / a.stride;
    s.positions = (a.out - 1 + s.crop) / a.stride + 1;
    for (auto& phases : s.kernel_of)
        for (int8_t& k : phases) k = -1;
    for (int k = 0; k < s.kernel; k++) {
        const int shift = (k * a.dilation + start) / a.stride, phase = (k * a.dilation + start) % a.stride;
        if (s.taps == 0 || s.shift[s.taps - 1] != shift) s.shift[s.taps++] = shift;
        s.live[phase] |= 1 << (s.taps - 1);
        s.kernel_of[s.taps - 1][phase] = k;
        s.tap_of[k] = s.taps - 1, s.phase_of[k] = phase;
    }
    return s;
}

inline StencilAxis make_forward_axis(const Axis& a) {
    StencilAxis best = forward_axis_from(a, 0);
    for (int start = 1; start < a.stride; start++) {
        const StencilAxis s = forward_axis_from(a, start);
        if (s.taps < best.taps || (s.taps == best.taps && s.positions < best.positions)) best = s;
    }
    return best;
}

// The forward axis the other way round: the source's position is first + p - shift with the shifts counted from the largest on.
inline StencilAxis make_dinput_axis(const Axis& a) {
    const StencilAxis forward = make_forward_axis(a);
    StencilAxis s = forward;
    s.sources = forward.positions, s.positions = forward.sources;
    s.phases = 1, s.crop = 0, s.out = forward.sources;
    s.source_phases = forward.phases, s.source_crop = forward.crop, s.source_out = forward.out;
    const int last = forward.taps - 1;
    s.first = forward.shift[last] - forward.first;
    for (int& live : s.live) live = 0;
    for (int k = 0; k < s.kernel; k++) s.tap_of[k] = last - forward.tap_of[k];
    for (int t = 0; t < s.taps; t++) {
        s.shift[t] = forward.shift[last] - forward.shift[last - t];
        for (int phase = 0; phase < s.source_phases; phase++) {
            s.kernel_of[t][phase] = forward.kernel_of[last - t][phase];
            s.live[phase] |= (forward.live[phase] >> (last - t) & 1) << t;
        }
    }
    return s;
}

inline Stencil make_stencil(Direction direction, const Geometry& g) {
    const auto make = direction == Direction::kForward ? make_forward_axis : make_dinput_axis;
    return {{make(g.axis[0]), make(g.axis[1]), make(g.axis[2])}};
}

// Whether the arrays above suffice, and 32-bit indices into a channel, the phases at its edges included.
inline bool has_stencil(const Geometry& g) {
    double in = 1, out = 1;
    for (const Axis& a : g.axis) {
        if (a.kernel > kMaxTaps || a.stride > kMaxStride) return false;
        in *= double(a.in), out *= double(a.out + 2 * a.stride);
    }
    return in < 1 << 30 && out < 1 << 30;
}
