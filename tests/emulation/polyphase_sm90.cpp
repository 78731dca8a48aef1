// Runs the kernels of conv_transpose3d_polyphase_sm90.cu on the host (host_cuda/).
// Usage: polyphase_sm90 LAYERS SEED; exit code 1 where an element is wrong.
#include "conv_transpose3d_polyphase_sm90.cu"

#include "emulated_layer.h"
#include "norm_truth.h"

static int with_rows = 0, with_row_tiles = 0, with_run_planes = 0, with_strips = 0, with_interleaved = 0, with_vectors = 0, with_norm = 0;    // layers

static bool emulate(const Drawn& d, bool biased, bool relu, std::mt19937& random) {
    const Geometry& g = d.g;
    const polyphase::Plan p = polyphase::plan_of(g, 0);
    with_rows += !p.consumers_have_planes, with_row_tiles += p.row_tiles > 1, with_run_planes += p.run_planes > 1, with_strips += p.strips > 1, with_interleaved += p.places > p.last_places, with_vectors += p.stores_vectors();
    EmulatedLayer layer(g, biased, relu, d.offset, random);
    Array y(layer.y.size(), 0);    // what torch allocates is aligned
    Memory workspace(conv_transpose3d_forward_polyphase_sm90_workspace(&g, kFloat32, 0)), packed(conv_transpose3d_forward_polyphase_sm90_packed(&g, kFloat32, 0));
    const int error = conv_transpose3d_forward_polyphase_sm90(&g, kFloat32, 0, nullptr, workspace.data(), packed.data(), layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr, relu, y.data());
    if (error) std::printf("error %d\n", error);
    return !error && equal("out", y, layer.y);
}

// With ReLU and GroupNorm behind it.
static bool emulate_with_norm(const Geometry& g, bool biased, std::mt19937& random) {
    std::normal_distribution<float> normal;
    EmulatedLayer layer(g, biased, true, 0, random);
    Among among = {random};
    int num_groups = among(1, int(g.C_out));
    while (g.C_out % num_groups) num_groups--;
    const group_norm::Shape s = {g.N, g.C_out, out_volume(g), num_groups};
    with_norm++;
    const bool in_place = random() % 4 == 0;
    Array gamma(g.C_out, 0), beta(g.C_out, 0), r(layer.y.size(), 0), y(layer.y.size(), 0);
    for (int c = 0; c < g.C_out; c++) gamma.data()[c] = normal(random), beta.data()[c] = normal(random);
    Memory statistics(2 * s.N * num_groups * sizeof(double)), workspace(conv_transpose3d_relu_group_norm_forward_polyphase_sm90_workspace(&g, kFloat32, 0)), packed(conv_transpose3d_relu_group_norm_forward_polyphase_sm90_packed(&g, kFloat32, 0));
    const int error = conv_transpose3d_relu_group_norm_forward_polyphase_sm90(&g, kFloat32, kFloat32, 0, nullptr, workspace.data(), packed.data(), layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr,
                                                                              gamma.data(), beta.data(), num_groups, 1e-5, r.data(), in_place ? r.data() : y.data(), static_cast<double*>(statistics.data()));
    if (error) std::printf("error %d\n", error);
    if (error || (!in_place && !equal("relu", r, layer.y))) return false;
    const NormTruth truth(s, layer.y.data(), layer.dout.data(), gamma.data(), beta.data());
    return close("y", in_place ? r : y, truth.y, 1e-5);
}

static std::optional<Drawn> draw(Among& among, int) {
    Geometry g = {among(1, 2), among(1, 4) == 1 ? among(65, 130) : among(33, 64), among(1, 3) == 1 ? among(1, 130) : among(1, 20), 1, {}};
    for (Axis& a : g.axis) a = random_axis(among, &a == g.axis + 2 ? among(2, 40) : &a == g.axis + 1 ? among(3, 16) : among(1, 6), 4, 2, false);
    if (among(1, 6) == 1) g.axis[0] = {1, 1, 1, 1, 0, 1}, g.axis[1] = {among(30, 60), 0, 2, 1, 0, 1}, g.axis[1].out = g.axis[1].in + 1;    // more rows than one tile has
    Axis& w = g.axis[2];
    w.stride = 2, w.dilation = among(1, 3) == 1 ? 3 : 1, w.kernel = among(2, 4);
    const int added = among(0, 1);
    w.out = (w.in - 1) * 2 - 2 * w.padding + w.dilation * (w.kernel - 1) + added + 1;
    for (const Axis& a : g.axis)
        if (a.out <= 0) return {};
    if (products_of(g) > 6e6 || !conv_transpose3d_supports_polyphase_sm90(&g, 0)) return {};
    return Drawn{g, kFloat32, among(0, 2) ? 0 : among(1, 3)};
}

int main(int, char** arguments) {
    fibers::some_are_slow = true;
    const int failed = emulate_layers(arguments, draw, [](auto, const Drawn& d, bool biased, bool relu, std::mt19937& random) { return random() % 3 ? emulate(d, biased, relu, random) : emulate_with_norm(d.g, biased, random); });
    std::printf("%d whose consumers have rows, %d of several tiles, %d whose consumers have several planes, %d with strips, %d with interleaved phases, %d whose rows are vectors, %d with norm; %zu kernels\n", with_rows, with_row_tiles, with_run_planes, with_strips, with_interleaved, with_vectors, with_norm, fibers::launched.size());
    return failed || std::min({with_rows, with_row_tiles, with_run_planes, with_strips, with_interleaved, with_vectors, with_norm}) == 0;
}
