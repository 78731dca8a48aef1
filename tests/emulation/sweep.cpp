// Runs the kernels of conv_transpose3d_sweep.cu on the host (host_cuda/).
// Usage: sweep LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_sweep.cu"
#include "conv_transpose3d_sweep_16.cu"
#include "conv_transpose3d_sweep_24.cu"

#include "sweep.h"

static bool emulate(const Drawn& d, bool biased, bool relu, std::mt19937& random) {
    const sweep::Plan& plan = sweep::plan_of(d.g, 0);
    last_shared_bytes = plan.shared_bytes() - 1;    // room for one stage
    const int device = plan.stages == 1 || random() % 2 ? 0 : 3, most_x = 100000;    // more than the mantissa of a half holds
    return emulate_sweep(d.g, biased, relu, d.offset, most_x, random, [&](const float* x, const float* w, const float* bias, bool relu, float* y) {
        return conv_transpose3d_forward_sweep(&d.g, kFloat32, device, nullptr, nullptr, x, w, bias, relu, y);
    });
}

static std::optional<Drawn> draw(Among& among, int) {
    const int64_t groups = among(1, 3), group_in = 8 * among(1, 3), group_out = 8 * among(1, 2);
    return draw_sweep(among, groups * group_in, groups * group_out, groups, 3e6, conv_transpose3d_supports_sweep);
}

int main(int, char** arguments) {
    fibers::some_are_slow = true;    // those that store, for instance, while others multiply
    return emulate_layers(arguments, draw, [](auto, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return emulate(d, biased, relu, random); });
}
