// Runs the kernels of conv_transpose3d_sweep_sm90.cu on the host (host_cuda/).
// Usage: sweep_sm90 LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_sweep_sm90.cu"

#include "sweep.h"

static bool emulate(const Drawn& d, bool biased, bool relu, std::mt19937& random) {
    return emulate_sweep(d.g, biased, relu, d.offset, 3, random, [&](const float* x, const float* w, const float* bias, bool relu, float* y) {
        return conv_transpose3d_forward_sweep_sm90(&d.g, kFloat32, 0, nullptr, nullptr, x, w, bias, relu, y);
    });
}

static std::optional<Drawn> draw(Among& among, int) {
    const int64_t C_in = 16 * among(1, 2), C_out = 8 * among(1, 5);
    return draw_sweep(among, C_in, C_out, 1, 6e6, conv_transpose3d_supports_sweep_sm90);
}

int main(int, char** arguments) {
    fibers::some_are_slow = true;
    return emulate_layers(arguments, draw, [](auto, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate(d, biased, relu, random); });
}
