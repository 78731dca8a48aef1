// Runs the kernels of conv_transpose3d_gemm.cu on the host (host_cuda/): random layers, small integers.
// Usage: gemm LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_gemm.cu"

#include "emulated_layer.h"

// Gradients are float32's only.
template <typename T> bool emulate(const Geometry& g, int dtype, bool biased, bool relu, int offset, std::mt19937& random) {
    EmulatedLayer layer(g, biased, relu, offset, random);
    ArrayOf<T> x(layer.x, offset), w(layer.w, offset), dout(layer.dout, offset), bias(layer.bias, 0), y(layer.y.size(), offset), dx(layer.dx.size(), offset), dw(layer.dw.size(), offset);
    Memory forward_memory(conv_transpose3d_forward_gemm_workspace(&g, dtype, 0)), gradients_memory(conv_transpose3d_gradients_gemm_workspace(&g, dtype, 0));
    const int error = conv_transpose3d_forward_gemm(&g, dtype, 0, nullptr, forward_memory.data(), x.data(), w.data(), biased ? bias.data() : nullptr, relu, y.data());
    const int error_gradients = dtype == kFloat32 ? conv_transpose3d_gradients_gemm(&g, dtype, 0, nullptr, gradients_memory.data(), dout.data(), x.data(), w.data(), dx.data(), dw.data()) : int(cudaSuccess);
    if (error || error_gradients) std::printf("errors %d, %d\n", error, error_gradients);
    return !error && !error_gradients && equal("out", y, layer.y) && (dtype != kFloat32 || (equal("dx", dx, layer.dx) && equal("dweight", dw, layer.dw)));
}

static std::optional<Drawn> draw(Among& among, int) {
    std::mt19937& random = among.random;
    const bool single = random() % 2;
    const int64_t groups = among(1, 4) == 1 ? 2 : 1;
    Geometry g = {among(1, 3), groups * among(1, 40), groups * among(1, 24), groups, {}};
    bool exists = true;
    for (Axis& a : g.axis) a = random_axis(among, 9, 3, 3, single), exists &= a.out > 0;
    if (!exists || products_of(g) > 500000) return {};
    const int dtypes[] = {kFloat32, kFloat16, kBFloat16}, dtype = dtypes[single ? among(0, 2) : 0], offset = random() % 2 ? 0 : among(1, 3);    // with several taps float32 only
    return Drawn{g, dtype, offset};
}

int main(int, char** arguments) {
    return emulate_layers(arguments, draw, [](auto element, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate<decltype(element)>(d.g, d.dtype, biased, relu, d.offset, random); });
}
