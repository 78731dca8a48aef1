// Runs the kernels of conv_transpose3d_sweep_sm90.cu on the host (host_cuda/): random layers, small integers.
// Usage: sweep_sm90 LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_sweep_sm90.cu"

#include "emulated_layer.h"

template <typename T> bool emulate(const Geometry& g, int, bool biased, bool relu, int offset, std::mt19937& random) {
    const bool other_rows = random() % 3 == 0;    // of other magnitudes
    EmulatedLayer layer(g, biased, relu && !other_rows, offset, random, 3);
    relu = relu && !other_rows;
    if (other_rows) {
        std::vector<float> added(layer.x.count);
        for (size_t i = 0; i < layer.x.count; i++) {
            const float x = layer.x.data()[i], scaled = x * (1 << (i / g.axis[2].in * 2654435761u >> 7) % 12);
            added[i] = scaled - x, layer.x.data()[i] = scaled;
        }
        for_each_product(g, [&](int64_t at_x, int64_t at_w, int64_t at_y) { layer.y[at_y] += added[at_x] * layer.w.data()[at_w]; });
    }
    if (random() % 8 == 0) {    // a value that is not finite, and what it makes of the outputs that it reaches
        const size_t at = random() % layer.x.count;
        for_each_product(g, [&](int64_t at_x, int64_t, int64_t at_y) { if (size_t(at_x) == at) layer.y[at_y] = NAN; });
        layer.x.data()[at] = INFINITY;
    }
    Array y(layer.y.size(), offset);
    const int error = conv_transpose3d_forward_sweep_sm90(&g, kFloat32, 0, nullptr, nullptr, layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr, relu, y.data());
    if (error) std::printf("error %d\n", error);
    for (size_t i = 0; i < layer.y.size(); i++)
        if (std::isnan(layer.y[i])) {
            if (std::isfinite(y.data()[i]) && y.data()[i] != 0) { std::printf("element %zu is %g\n", i, y.data()[i]); return false; }
            y.data()[i] = layer.y[i] = 0;
        }
    return !error && equal("out", y, layer.y);
}

static std::optional<Drawn> draw(Among& among, int) {
    std::mt19937& random = among.random;
    Geometry g = {among(1, 2), 16 * among(1, 2), 8 * among(1, 5), 1, {}};
    bool exists = true;
    for (Axis& a : g.axis) {
        a = random_axis(among, &a == g.axis + 2 && random() % 3 == 0 ? 70 : 11, 5, 2, false);
        if (random() % 3) a.kernel = among(2, 4), a.padding = 1, a.dilation = 1;
        if (&a != g.axis || random() % 2) a.stride = 2;
        a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + 1 + among(0, int(std::max(a.stride, a.dilation)) - 1);
        exists &= a.out > 0;
    }
    if (!exists || products_of(g) > 6000000 || !conv_transpose3d_supports_sweep_sm90(&g, 0)) return {};
    return Drawn{g, kFloat32, random() % 3 ? 0 : among(1, 3)};
}

int main(int, char** arguments) {
    fibers::some_are_slow = true;    // those that store, for instance, while others multiply
    return emulate_layers(arguments, draw, [](auto element, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate<decltype(element)>(d.g, d.dtype, biased, relu, d.offset, random); });
}
