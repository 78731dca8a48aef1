// Runs the kernels of conv_transpose3d_gemm.cu on the host (host_cuda/): random layers, small integers.
// Usage: gemm_emulation LAYERS SEED; exit code 1 where an element is wrong.
#include <cstdlib>

#include "conv_transpose3d_gemm.cu"

#include "emulated_layer.h"

static bool emulate(const Geometry& g, bool biased, bool relu, int offset, std::mt19937& random) {
    EmulatedLayer layer(g, biased, relu, offset, random);
    Array y(layer.y.size(), offset), dx(layer.dx.size(), offset), dw(layer.dw.size(), offset);
    Memory forward_memory(conv_transpose3d_forward_gemm_workspace(&g, kFloat32, 0)), gradients_memory(conv_transpose3d_gradients_gemm_workspace(&g, kFloat32, 0));
    const int error = conv_transpose3d_forward_gemm(&g, kFloat32, 0, nullptr, forward_memory.data(), layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr, relu, y.data());
    const int error_gradients = conv_transpose3d_gradients_gemm(&g, kFloat32, 0, nullptr, gradients_memory.data(), layer.dout.data(), layer.x.data(), layer.w.data(), dx.data(), dw.data());
    if (error || error_gradients) std::printf("errors %d, %d\n", error, error_gradients);
    return !error && !error_gradients && equal("out", y, layer.y) && equal("dx", dx, layer.dx) && equal("dweight", dw, layer.dw);
}

int main(int, char** arguments) {
    const int layers = std::atoi(arguments[1]);
    std::mt19937 random(std::atoi(arguments[2]));
    Among among = {random};
    for (int done = 0; done < layers;) {
        const bool single = random() % 2;
        const int64_t groups = among(1, 4) == 1 ? 2 : 1;
        Geometry g = {among(1, 3), groups * among(1, 40), groups * among(1, 24), groups, {}};
        bool exists = true;
        for (Axis& a : g.axis) a = random_axis(among, 9, 3, 3, single), exists &= a.out > 0;
        if (!exists || products_of(g) > 500000) continue;
        done++;
        if (emulate(g, random() % 2, random() % 2, random() % 2 ? 0 : among(1, 3), random)) continue;
        print(g);
        return 1;
    }
}
