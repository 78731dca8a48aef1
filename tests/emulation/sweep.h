// What the emulations of both kernels that sweep down their planes do: random strided layers, small integers.
#pragma once

#include "emulated_layer.h"

// forward(x, w, bias or null, relu, y) returns its error. most_x: of the inputs, where rows are of like magnitudes.
template <typename F> bool emulate_sweep(const Geometry& g, bool biased, bool relu, int offset, int most_x, std::mt19937& random, F forward) {
    const bool other_rows = random() % 3 == 0;    // of other magnitudes
    EmulatedLayer layer(g, biased, relu && !other_rows, offset, random, other_rows ? 3 : most_x);
    relu = relu && !other_rows;
    if (other_rows) {
        std::vector<float> added(layer.x.count);
        const size_t rows = random() % 2 ? layer.x.count : g.axis[1].in;    // all, or those of a plane: all channels' alike
        for (size_t i = 0; i < layer.x.count; i++) {
            const float x = layer.x.data()[i], scaled = x * (1 << (i / g.axis[2].in % rows * 2654435761u >> 7) % 12);
            added[i] = scaled - x, layer.x.data()[i] = scaled;
        }
        for_each_product(g, [&](int64_t at_x, int64_t at_w, int64_t at_y) { layer.y[at_y] += added[at_x] * layer.w.data()[at_w]; });
    }
    if (random() % 8 == 0) {    // a value that is not finite, and what it makes of the outputs that it reaches
        const bool in_x = random() % 2;
        const size_t at = random() % (in_x ? layer.x.count : layer.w.count);
        for_each_product(g, [&](int64_t at_x, int64_t at_w, int64_t at_y) { if (size_t(in_x ? at_x : at_w) == at) layer.y[at_y] = NAN; });
        (in_x ? layer.x : layer.w).data()[at] = INFINITY;
    }
    Array y(layer.y.size(), offset);
    const int error = forward(layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr, relu, y.data());
    if (error) std::printf("error %d\n", error);
    for (size_t i = 0; i < layer.y.size(); i++)
        if (std::isnan(layer.y[i])) {
            if (std::isfinite(y.data()[i]) && y.data()[i] != 0) { std::printf("element %zu is %g\n", i, y.data()[i]); return false; }
            y.data()[i] = layer.y[i] = 0;
        }
    return !error && equal("out", y, layer.y);
}

// A layer of these channels with a stride of 2, D perhaps excepted, that is not too large.
template <typename Supports> std::optional<Drawn> draw_sweep(Among& among, int64_t C_in, int64_t C_out, int64_t groups, double most_products, Supports supports) {
    std::mt19937& random = among.random;
    Geometry g = {among(1, 2), C_in, C_out, groups, {}};
    bool exists = true;
    for (Axis& a : g.axis) {
        a = random_axis(among, &a == g.axis + 2 && random() % 3 == 0 ? 70 : 11, 5, 2, false);
        if (random() % 3) a.kernel = among(2, 4), a.padding = 1, a.dilation = 1;
        if (&a != g.axis || random() % 2) a.stride = 2;
        a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + 1 + among(0, int(std::max(a.stride, a.dilation)) - 1);
        exists &= a.out > 0;
    }
    if (!exists || products_of(g) > most_products || !supports(&g, 0)) return {};
    return Drawn{g, kFloat32, random() % 3 ? 0 : among(1, 3)};
}
