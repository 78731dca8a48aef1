// Runs the kernels of conv_transpose3d_depthwise.cu on the host (host_cuda/): random layers, small integers.
// Usage: depthwise LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_depthwise.cu"

#include "emulated_layer.h"

template <typename T> bool emulate(const Geometry& g, int dtype, bool biased, bool relu, int offset, std::mt19937& random) {
    EmulatedLayer layer(g, biased, relu, offset, random);
    ArrayOf<T> x(layer.x, offset), w(layer.w, offset), dout(layer.dout, offset), bias(layer.bias, 0), y(layer.y.size(), 0), dx(layer.dx.size(), 0), dw(layer.dw.size(), 0);
    Memory memory(conv_transpose3d_dweight_depthwise_workspace(&g, dtype, 0));
    const int64_t most = std::max({depthwise::shared_bytes(depthwise::tiling_of(Direction::kForward, g, 3)), depthwise::shared_bytes(depthwise::tiling_of(Direction::kDInput, g, 3)), depthwise::make_dweight_plan(g, 3).shared_bytes()});
    if (most > 99 << 10) std::printf("%d bytes of shared memory are more than some GPUs have\n", int(most));
    const int error = conv_transpose3d_forward_depthwise(&g, dtype, 0, nullptr, nullptr, x.data(), w.data(), biased ? bias.data() : nullptr, relu, y.data());
    const int error_dx = conv_transpose3d_dinput_depthwise(&g, dtype, 0, nullptr, nullptr, dout.data(), w.data(), dx.data());
    const int error_dw = conv_transpose3d_dweight_depthwise(&g, dtype, 0, nullptr, memory.data(), x.data(), dout.data(), dw.data());
    if (error || error_dx || error_dw) std::printf("errors %d, %d, %d\n", error, error_dx, error_dw);
    return most <= 99 << 10 && !error && !error_dx && !error_dw && equal("out", y, layer.y) && equal("dx", dx, layer.dx) && equal("dweight", dw, layer.dw);
}

static std::optional<Drawn> draw(Among& among, int) {
    std::mt19937& random = among.random;
    const int64_t groups = among(1, 3);
    Geometry g = {among(1, 2), groups * among(1, 4), groups * among(1, 4), groups, {}};
    const bool small = random() % 4 == 0;
    bool exists = true;
    for (Axis& a : g.axis) a = random_axis(among, small ? 2 : &a == g.axis + 2 && random() % 4 == 0 ? 140 : 20, 5, 4, random() % 4 == 0);
    if (random() % 2) {    // kernels that the compiler knows
        Axis &h = g.axis[1], &w = g.axis[2];
        w.stride = h.stride = among(1, 2), w.kernel = h.kernel = h.stride == 1 ? among(1, 2) * 2 + 1 : among(2, 5), w.dilation = h.dilation = 1;
        w.padding = h.padding = (h.kernel - 1) / 2;
        for (Axis* a : {&h, &w}) a->out = (a->in - 1) * a->stride - 2 * a->padding + a->kernel + among(0, int(a->stride) - 1);
    }
    for (const Axis& a : g.axis) exists &= a.out > 0;
    if (!exists || products_of(g) * g.groups > 300000 || !conv_transpose3d_supports_depthwise(&g, 0)) return {};
    const int dtypes[] = {kFloat32, kFloat16, kBFloat16}, dtype = dtypes[among(0, 2)], offset = random() % 3 ? 0 : among(1, 3);
    return Drawn{g, dtype, offset};
}

int main(int, char** arguments) {
    return emulate_layers(arguments, draw, [](auto element, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate<decltype(element)>(d.g, d.dtype, biased, relu, d.offset, random); });
}
