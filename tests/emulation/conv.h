// Runs the kernels of a tensor cores' path on the host (host_cuda/), as model_new.py calls them: random layers, alone and with ReLU and GroupNorm behind them, forward and backward.
// Included behind the path's sources, with PATH defined. Usage: conv_PATH LAYERS SEED; exit code 1 where an element is wrong.
#pragma once

#include <cstdlib>

#include "emulated_layer.h"
#include "norm_truth.h"

#define NAME_(a, b, c) a##b##c
#define NAME(a, b, c) NAME_(a, b, c)
#define LAUNCHER(operation) NAME(conv_transpose3d_, operation, PATH)
#define SIZE_OF(operation, what) NAME(LAUNCHER(operation), _, what)

static int with_norm = 0, normalized_inside = 0, with_joined_planes = 0, differentiated = 0, kept_inputs = 0, split_operands = 0;    // layers that were

// Forward, from x's packed copy (or with memory for it) to the gradients.
template <typename T> bool emulate(const Geometry& g, int dtype, bool biased, bool relu, int offset, int device, std::mt19937& random) {
    const bool splits = splits_groups(g) || third_of(g);
    split_operands += splits;
    for (Direction direction : {Direction::kForward, Direction::kDInput}) with_joined_planes += conv::plan_of<NAME(conv_, PATH, )::Path>(g, direction, device).problem.t.run_planes > 1;
    EmulatedLayer layer(g, biased, relu, offset, random, splits ? 5000 : 2);    // 14 bits
    ArrayOf<T> x(layer.x, offset), w(layer.w, offset), dout(layer.dout, offset), bias(layer.bias, 0), y(layer.y.size(), 0), dx(layer.dx.size(), 0), dw(layer.dw.size(), 0);    // what torch allocates is aligned
    const bool differentiates = LAUNCHER(gradients_supports_)(&g, device), keeps = differentiates && random() % 2;
    const int64_t copied = SIZE_OF(gradients_, packed)(&g, dtype, device), beside = SIZE_OF(forward_, packed)(&g, dtype, device);
    Memory workspace(SIZE_OF(forward_, workspace)(&g, dtype, device)), packed(keeps ? copied : beside);
    int error = LAUNCHER(forward_)(&g, dtype, device, nullptr, workspace.data(), keeps || beside ? packed.data() : nullptr, x.data(), w.data(), biased ? bias.data() : nullptr, relu, y.data());
    if (error) std::printf("error %d\n", error);
    if (error || !equal("out", y, layer.y)) return false;
    if (!differentiates) return true;
    differentiated++, kept_inputs += keeps;

    const bool wants_dx = random() % 4, wants_dw = !wants_dx || random() % 4;
    Memory gradients_workspace(SIZE_OF(gradients_, workspace)(&g, dtype, device)), own_packed(copied);
    error = LAUNCHER(gradients_)(&g, dtype, device, nullptr, gradients_workspace.data(), keeps ? packed.data() : own_packed.data(), dout.data(), keeps || !wants_dw ? nullptr : x.data(), wants_dx ? w.data() : nullptr,
                                 wants_dx ? dx.data() : nullptr, wants_dw ? dw.data() : nullptr);
    if (error) std::printf("error %d in the gradients\n", error);
    return !error && (!wants_dx || equal("dx", dx, layer.dx)) && (!wants_dw || (splits ? close("dweight", dw, {layer.dw.begin(), layer.dw.end()}, 1e-3) : equal("dweight", dw, layer.dw)));    // the copy of x has 11 bits
}

// With ReLU and GroupNorm behind it.
static bool emulate_with_norm(const Geometry& g, bool biased, int device, std::mt19937& random) {
    std::normal_distribution<float> normal;
    Among among = {random};
    EmulatedLayer layer(g, biased, true, 0, random);
    int num_groups = among(1, int(g.C_out));
    while (g.C_out % num_groups) num_groups--;
    const group_norm::Shape s = {g.N, g.C_out, out_volume(g), num_groups};
    if (s.group_count() < 8) return true;
    with_norm++;
    const bool in_place = random() % 4 == 0, differentiates = !in_place && LAUNCHER(gradients_supports_)(&g, device), keeps = differentiates && random() % 2;
    Array gamma(g.C_out, 0), beta(g.C_out, 0), r(layer.y.size(), 0), y(layer.y.size(), 0), dx(layer.dx.size(), 0), dw(layer.dw.size(), 0), dgamma(g.C_out, 0), dbeta(g.C_out, 0), dbias(g.C_out, 0);
    for (int c = 0; c < g.C_out; c++) gamma.data()[c] = normal(random), beta.data()[c] = normal(random);
    for (size_t i = 0; i < layer.dout.count; i++) layer.dout.data()[i] = normal(random);
    Memory statistics(2 * s.N * num_groups * sizeof(double)), workspace(SIZE_OF(relu_group_norm_forward_, workspace)(&g, kFloat32, device));
    const int64_t copied = SIZE_OF(gradients_, packed)(&g, kFloat32, device), beside = SIZE_OF(relu_group_norm_forward_, packed)(&g, kFloat32, device);
    Memory packed(keeps ? copied : beside);
    using Path = NAME(conv_, PATH, )::Path;
    normalized_inside += Path::normalizing_blocks(conv::plan_of<Path>(g, Direction::kForward, device), s, kFloat32, kFloat32, r.data(), y.data()) > 0;
    int error = LAUNCHER(relu_group_norm_forward_)(&g, kFloat32, kFloat32, device, nullptr, workspace.data(), keeps || beside ? packed.data() : nullptr, layer.x.data(), layer.w.data(), biased ? layer.bias.data() : nullptr,
                                                   gamma.data(), beta.data(), num_groups, 1e-5, r.data(), in_place ? r.data() : y.data(), static_cast<double*>(statistics.data()));
    if (error) std::printf("error %d\n", error);
    if (error || (!in_place && !equal("relu", r, layer.y))) return false;

    const NormTruth truth(s, layer.y.data(), layer.dout.data(), gamma.data(), beta.data());
    if (!close("y", in_place ? r : y, truth.y, 1e-5)) return false;
    if (!differentiates) return true;

    Doubles true_dx(layer.dx.size()), true_dw(layer.dw.size());
    for_each_product(g, [&](int64_t at_x, int64_t at_w, int64_t at_y) { true_dx[at_x] += truth.dz[at_y] * layer.w.data()[at_w], true_dw[at_w] += truth.dz[at_y] * layer.x.data()[at_x]; });
    const bool wants_dbias = random() % 2;
    Memory gradients_workspace(SIZE_OF(relu_group_norm_gradients_, workspace)(&g, kFloat32, device)), own_packed(copied);
    error = LAUNCHER(relu_group_norm_gradients_)(&g, kFloat32, device, nullptr, gradients_workspace.data(), keeps ? packed.data() : own_packed.data(), layer.dout.data(), r.data(), static_cast<double*>(statistics.data()), gamma.data(), num_groups,
                                                 keeps ? nullptr : layer.x.data(), layer.w.data(), dx.data(), dw.data(), dgamma.data(), dbeta.data(), wants_dbias ? dbias.data() : nullptr);
    if (error) std::printf("error %d in the gradients\n", error);
    double largest = 0;
    for (double v : truth.dz) largest = std::max(largest, std::abs(v));
    if (largest < 1e-3) return !error;    // nothing but rounding
    return !error && close("dx", dx, true_dx, 2e-3) && close("dweight", dw, true_dw, 2e-3) && close("dgamma", dgamma, truth.dgamma, 1e-5) && close("dbeta", dbeta, truth.dbeta, 1e-5) && (!wants_dbias || close("dbias", dbias, truth.dbias, 1e-5, truth.dz_sizes));
}

constexpr int kWithNorm = -1;    // in a dtype's place: float32 with the norm

template <typename F> bool ran(F* kernel) { return fibers::launched.count(reinterpret_cast<const void*>(kernel)) > 0; }
static bool all_ran();    // what only this path has

int main(int, char** arguments) {
    const int layers = std::atoi(arguments[1]);
    std::mt19937 random(std::atoi(arguments[2]));
    Among among = {random};
    for (int done = 0; done < layers;) {
        const int64_t groups = among(1, 3) == 1 ? 2 : 1, channels[] = {8, 16, 32};
        Geometry g = {among(1, 3), groups * (groups > 1 ? channels[among(0, 2)] : among(1, 80)), groups * among(1, 40), groups, {}};
        const bool same = random() % 2, single = random() % 6 == 0;
        const int stride = among(1, 3);
        bool exists = true;
        const int large = done % 10;
        for (Axis& a : g.axis) {
            a = random_axis(among, large > 7 ? 6 : &a == g.axis + 2 ? among(4, 40) : 7, 4, 4, single);
            if (same && !single) a.stride = stride, a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + among(0, stride - 1) + 1;
            exists &= a.out > 0;
        }
        const int device = among(0, 2), kinds[] = {kFloat32, kWithNorm, kFloat16, kBFloat16}, kind = kinds[large == 0 ? 1 : large <= 2 ? 0 : among(0, 3)], offset = random() % 3 ? 0 : among(1, 3);
        if (large == 0) {    // so many samples and products that some blocks normalize; so much of dout that dweight's kernel packs it
            g = {4, 32, 32, 1, {{12, 12, 1, 1, 0, 1}, {among(8, 10), 0, 3, 1, 1, 1}, {12, 12, 3, 1, 1, 1}}};
            g.axis[1].out = g.axis[1].in;
        } else if (large == 1) {
            g = {3, among(4, 8), among(9, 12), 1, {{11, 21, 3, 2, 1, 1}, {12, 23, 3, 2, 1, 1}, {among(20, 24), 0, 3, 2, 1, 1}}};
            g.axis[2].out = 2 * g.axis[2].in - 1;
        } else if (large == 2) {    // many channels of small grids
            g = {among(1, 2), among(33, 150), among(33, 150), 1, {}};
            for (Axis& a : g.axis) a = {among(1, 4), 0, among(1, 3), among(1, 2), 0, 1}, a.padding = among(0, a.kernel - 1), a.out = (a.in - 1) * a.stride - 2 * a.padding + a.kernel + among(0, a.stride - 1);
            if (std::min({g.axis[0].out, g.axis[1].out, g.axis[2].out}) < 1) continue;
        } else if (!exists || products_of(g) > 3e6) {
            continue;
        }
        if (!LAUNCHER(forward_supports_)(&g, device)) continue;
        done++;
        const bool splits = splits_groups(g) || third_of(g), biased = random() % 2, relu = random() % 2;
        const int dtype = kind == kWithNorm || splits ? kFloat32 : kind;
        const auto emulate_element = [&](auto element) { return emulate<decltype(element)>(g, dtype, biased, relu, offset, device, random); };
        if (kind == kWithNorm && g.groups == 1 ? emulate_with_norm(g, biased, device, random) : with_dtype(dtype, emulate_element)) continue;
        std::printf("device %d, dtype %d\n", device, dtype);
        print(g);
        return 1;
    }
    std::printf("%d with norm, %d of them normalized inside, %d with joined planes, %d differentiated, %d from a kept copy, %d with split operands; %zu kernels\n", with_norm, normalized_inside, with_joined_planes, differentiated, kept_inputs, split_operands, fibers::launched.size());
    return std::min({with_norm, differentiated, kept_inputs, split_operands}) > 0 && all_ran() ? 0 : 1;
}
