// Runs the kernels of conv_transpose3d_gemm.cu on the host (host_cuda/): random layers, small integers.
// Usage: gemm_emulation LAYERS SEED; exit code 1 where an element is wrong.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "conv_transpose3d_gemm.cu"

namespace gemm {
alignas(16) uint8_t base[kSharedMemoryBytes];
}

// `offset` floats behind a multiple of 16 bytes.
struct Array {
    std::vector<float> memory;
    size_t count;
    int offset;
    Array(size_t count, int offset, float value = NAN) : memory(count + 8, value), count(count), offset(offset) {}
    float* data() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16) + offset; }
};

static bool equal(const char* what, Array& ours, const std::vector<float>& truth) {
    for (size_t i = 0; i < truth.size(); i++)
        if (ours.data()[i] != truth[i]) {
            std::printf("%s: element %zu is %g, not %g\n", what, i, ours.data()[i], truth[i]);
            return false;
        }
    return true;
}

static bool emulate(const Geometry& g, bool biased, bool relu, int offset, std::mt19937& random) {
    const int64_t in = in_volume(g), out = out_volume(g), volume = kernel_volume(g), group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
    const auto small = [&](Array& a) { for (size_t i = 0; i < a.count; i++) a.data()[i] = int(random() % 5) - 2; };
    Array x(g.N * g.C_in * in, offset), w(g.C_in * group_out * volume, offset), dout(g.N * g.C_out * out, offset), bias(g.C_out, 0);
    small(x), small(w), small(dout), small(bias);
    std::vector<float> y(g.N * g.C_out * out), dx(x.count, 0), dw(w.count, 0);
    for (size_t i = 0; i < y.size(); i++) y[i] = biased ? bias.data()[i / out % g.C_out] : 0;
    const taps::Layer layer = taps::make_layer(g);
    for (int n = 0; n < g.N; n++) for (int ci = 0; ci < g.C_in; ci++) for (int c = 0; c < group_out; c++) for (int k = 0; k < volume; k++) for (int i = 0; i < in; i++) {
        const int o = taps::output_of(layer, k, i);    // which taps_emulation.cpp proves
        if (o < 0) continue;
        const int64_t at_x = (n * g.C_in + ci) * in + i, at_w = (ci * group_out + c) * volume + k, at_y = (n * g.C_out + ci / group_in * group_out + c) * out + o;
        y[at_y] += x.data()[at_x] * w.data()[at_w], dx[at_x] += dout.data()[at_y] * w.data()[at_w], dw[at_w] += dout.data()[at_y] * x.data()[at_x];
    }
    if (relu) for (float& v : y) v = v < 0 ? 0 : v;
    Array ours_y(y.size(), offset), ours_dx(dx.size(), offset), ours_dw(dw.size(), offset);
    Array forward_memory(conv_transpose3d_forward_gemm_workspace(&g, kFloat32, 0) / 4, 0), gradients_memory(conv_transpose3d_gradients_gemm_workspace(&g, kFloat32, 0) / 4, 0);
    const int error = conv_transpose3d_forward_gemm(&g, kFloat32, 0, nullptr, forward_memory.data(), x.data(), w.data(), biased ? bias.data() : nullptr, relu, ours_y.data());
    const int error_gradients = conv_transpose3d_gradients_gemm(&g, kFloat32, 0, nullptr, gradients_memory.data(), dout.data(), x.data(), w.data(), ours_dx.data(), ours_dw.data());
    if (error || error_gradients) std::printf("errors %d, %d\n", error, error_gradients);
    return !error && !error_gradients && equal("out", ours_y, y) && equal("dx", ours_dx, dx) && equal("dweight", ours_dw, dw);
}

int main(int, char** arguments) {
    const int layers = std::atoi(arguments[1]);
    shared_memory = gemm::base;
    std::mt19937 random(std::atoi(arguments[2]));
    const auto among = [&](int least, int most) { return least + int(random() % (most - least + 1)); };
    for (int done = 0; done < layers;) {
        const bool single = random() % 2;
        const int64_t groups = among(1, 4) == 1 ? 2 : 1;
        Geometry g = {among(1, 3), groups * among(1, 40), groups * among(1, 24), groups, {}};
        bool exists = true;
        for (Axis& a : g.axis) {
            a = {among(1, 9), 0, among(1, 3), among(1, 3), among(0, 2), among(1, 2)};
            if (single) a.kernel = a.stride, a.padding = 0, a.dilation = 1;
            const int64_t most_added = single ? 1 : a.stride > a.dilation ? a.stride : a.dilation;
            a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + among(0, int(most_added) - 1) + 1;
            exists &= a.out > 0;
        }
        if (!exists || in_volume(g) * kernel_volume(g) * g.C_in * g.C_out * g.N > 500000) continue;
        done++;
        if (emulate(g, random() % 2, random() % 2, random() % 2 ? 0 : among(1, 3), random)) continue;
        std::printf("N %d C_in %d C_out %d groups %d\n", int(g.N), int(g.C_in), int(g.C_out), int(g.groups));
        for (const Axis& a : g.axis) std::printf("in %d kernel %d stride %d padding %d dilation %d out %d\n", int(a.in), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(a.out));
        return 1;
    }
}
