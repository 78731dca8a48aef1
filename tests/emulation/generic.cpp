// Runs the generic kernels, any size and dtype, on the host (host_cuda/): random layers, small integers.
// Usage: generic LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_dweight_generic.cu"
#include "conv_transpose3d_generic.cu"

#include "emulated_layer.h"

template <typename T> bool emulate(const Geometry& g, int dtype, bool biased, bool relu, int offset, std::mt19937& random) {
    EmulatedLayer layer(g, biased, relu, offset, random);
    ArrayOf<T> x(layer.x, offset), w(layer.w, offset), dout(layer.dout, offset), bias(layer.bias, 0), y(layer.y.size(), offset), dx(layer.dx.size(), offset), dw(layer.dw.size(), offset), dbias(g.C_out, 0);
    std::vector<float> true_dbias(g.C_out, 0);
    for (size_t i = 0; i < layer.dout.count; i++) true_dbias[i / out_volume(g) % g.C_out] += layer.dout.data()[i];
    Memory forward(conv_transpose3d_forward_generic_workspace(&g, dtype, 0)), dinput(conv_transpose3d_dinput_generic_workspace(&g, dtype, 0)), dweight(conv_transpose3d_dweight_generic_workspace(&g, dtype, 0)), sums(conv_transpose3d_dbias_generic_workspace(&g, dtype, 0));
    const int errors[] = {conv_transpose3d_forward_generic(&g, dtype, 0, nullptr, forward.data(), x.data(), w.data(), biased ? bias.data() : nullptr, relu, y.data()),
                          conv_transpose3d_dinput_generic(&g, dtype, 0, nullptr, dinput.data(), dout.data(), w.data(), dx.data()),
                          conv_transpose3d_dweight_generic(&g, dtype, 0, nullptr, dweight.data(), x.data(), dout.data(), dw.data()), conv_transpose3d_dbias_generic(&g, dtype, 0, nullptr, sums.data(), dout.data(), dbias.data())};
    for (int error : errors)
        if (error) return std::printf("errors %d, %d, %d, %d\n", errors[0], errors[1], errors[2], errors[3]), false;
    return equal("out", y, layer.y) && equal("dx", dx, layer.dx) && equal("dweight", dw, layer.dw) && equal("dbias", dbias, true_dbias);
}

static std::optional<Drawn> draw(Among& among, int done) {
    const int64_t groups = among(1, 3);
    Geometry g = {among(1, 3), groups * among(1, done % 2 ? 20 : 4), groups * among(1, done % 3 ? 20 : 4), groups, {}};
    bool exists = true;
    for (Axis& a : g.axis) a = random_axis(among, &a == g.axis + 2 ? 40 : 8, 5, done % 4 ? 6 : 1, false), exists &= a.out > 0;
    if (!exists || products_of(g) > 300000) return {};
    const int dtype = among(0, 3), offset = among.random() % 2 ? 0 : dtype == kFloat64 ? 2 : among(1, 3);
    return Drawn{g, dtype, offset};
}

int main(int, char** arguments) {
    return emulate_layers(arguments, draw, [](auto element, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate<decltype(element)>(d.g, d.dtype, biased, relu, d.offset, random); });
}
