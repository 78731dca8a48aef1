// A layer whose kernels are run on the host (host_cuda/): its tensors, of small integers, and what is to come out.
#pragma once

#include <cstdio>
#include <random>

#include "taps.h"

// `offset` floats behind a multiple of 16 bytes.
struct Array {
    std::vector<float> memory;
    size_t count;
    int offset;
    Array(size_t count, int offset, float value = NAN) : memory(count + 8, value), count(count), offset(offset) {}
    float* data() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16) + offset; }
};

inline bool equal(const char* what, Array& ours, const std::vector<float>& truth) {
    for (size_t i = 0; i < truth.size(); i++)
        if (ours.data()[i] != truth[i]) {
            std::printf("%s: element %zu is %g, not %g\n", what, i, ours.data()[i], truth[i]);
            return false;
        }
    return true;
}

struct EmulatedLayer {
    Array x, w, dout, bias;
    std::vector<float> y, dx, dw;    // the truth

    EmulatedLayer(const Geometry& g, bool biased, bool relu, int offset, std::mt19937& random)
        : x(g.N * g.C_in * in_volume(g), offset), w(g.C_in * (g.C_out / g.groups) * kernel_volume(g), offset), dout(g.N * g.C_out * out_volume(g), offset), bias(g.C_out, 0), y(dout.count), dx(x.count, 0), dw(w.count, 0) {
        for (Array* a : {&x, &w, &dout, &bias})
            for (size_t i = 0; i < a->count; i++) a->data()[i] = int(random() % 5) - 2;
        const int64_t in = in_volume(g), out = out_volume(g), volume = kernel_volume(g), group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
        for (size_t i = 0; i < y.size(); i++) y[i] = biased ? bias.data()[i / out % g.C_out] : 0;
        const taps::Layer layer = taps::make_layer(g);
        for (int n = 0; n < g.N; n++) for (int ci = 0; ci < g.C_in; ci++) for (int c = 0; c < group_out; c++) for (int k = 0; k < volume; k++) for (int i = 0; i < in; i++) {
            const int o = taps::output_of(layer, k, i);    // which taps_emulation.cpp proves
            if (o < 0) continue;
            const int64_t at_x = (n * g.C_in + ci) * in + i, at_w = (ci * group_out + c) * volume + k, at_y = (n * g.C_out + ci / group_in * group_out + c) * out + o;
            y[at_y] += x.data()[at_x] * w.data()[at_w], dx[at_x] += dout.data()[at_y] * w.data()[at_w], dw[at_w] += dout.data()[at_y] * x.data()[at_x];
        }
        if (relu) for (float& v : y) v = v < 0 ? 0 : v;
    }
};

// Between least and most.
struct Among {
    std::mt19937& random;
    int operator()(int least, int most) { return least + int(random() % (most - least + 1)); }
};

// A random axis; out <= 0: there is no such layer.
inline Axis random_axis(Among& among, int most_in, int most_kernel, int most_stride, bool single) {
    Axis a = {among(1, most_in), 0, among(1, most_kernel), among(1, most_stride), among(0, 2), among(1, 2)};
    if (single) a.kernel = a.stride, a.padding = 0, a.dilation = 1;
    const int64_t most_added = single ? 1 : a.stride > a.dilation ? a.stride : a.dilation;
    a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + among(0, int(most_added) - 1) + 1;
    return a;
}

inline void print(const Geometry& g) {
    std::printf("N %d C_in %d C_out %d groups %d\n", int(g.N), int(g.C_in), int(g.C_out), int(g.groups));
    for (const Axis& a : g.axis) std::printf("in %d kernel %d stride %d padding %d dilation %d out %d\n", int(a.in), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(a.out));
}
