// Runs the kernels of relu_group_norm_generic.cu on the host (host_cuda/): random activations and gradients, those of the bias in front of ReLU included.
// Usage: group_norm SHAPES SEED; exit code 1 where an element is wrong.
#include <cstdlib>

#include "relu_group_norm_generic.cu"

#include "emulated_layer.h"
#include "norm_truth.h"

// Equal but for float32's rounding of numbers as large as the largest, or as `largest`: what the elements are differences of.
static bool close(const char* what, Array& ours, const std::vector<double>& truth, double largest = 1e-30) {
    for (double v : truth) largest = std::isfinite(v) ? std::max(largest, std::abs(v)) : largest;
    for (size_t i = 0; i < truth.size(); i++)
        if (std::isnan(truth[i]) != std::isnan(ours.data()[i]) || std::abs(ours.data()[i] - truth[i]) > 1e-6 * largest) {
            std::printf("%s: element %zu is %g, not %g (largest %g)\n", what, i, ours.data()[i], truth[i], largest);
            return false;
        }
    return true;
}

static bool emulate(const Shape& s, bool weighted, bool poisoned, double shift, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const int64_t rows = s.N * s.C;
    const int offset = random() % 2;
    Array r(rows * s.S, offset), dy(rows * s.S, offset), gamma(s.C, 0), beta(s.C, 0), y(rows * s.S, offset), dz(rows * s.S, 0), dgamma(s.C, 0), dbeta(s.C, 0), dbias(s.C, 0);
    for (int64_t i = 0; i < rows * s.S; i++) r.data()[i] = std::max(0.0f, float(normal(random) + shift)), dy.data()[i] = normal(random) + 1;
    for (int64_t c = 0; c < s.C; c++) gamma.data()[c] = weighted ? normal(random) : 1, beta.data()[c] = weighted ? normal(random) : 0;
    for (int64_t i = 0; i < s.S; i++) r.data()[i] = 0;    // a channel whose gradient ReLU stops
    if (poisoned) r.data()[s.S] = NAN;

    const NormTruth truth(s, r.data(), dy.data(), gamma.data(), beta.data());
    std::vector<double> statistics(2 * s.N * s.num_groups);
    Memory forward_memory(group_norm_forward_generic_workspace(&s, 0, 0)), backward_memory(relu_group_norm_backward_generic_workspace(&s, 0, 0));
    const auto wanted = [&](Array& a) { return random() % 4 ? static_cast<void*>(a.data()) : nullptr; };
    void *own_dz = wanted(dz), *own_dgamma = wanted(dgamma), *own_dbeta = wanted(dbeta), *own_dbias = wanted(dbias);
    const int error = group_norm_forward_generic(&s, kFloat32, kFloat32, 0, nullptr, forward_memory.data(), r.data(), weighted ? gamma.data() : nullptr, weighted ? beta.data() : nullptr, 1e-5, y.data(), statistics.data());
    const int error_backward = relu_group_norm_backward_generic(&s, kFloat32, kFloat32, 0, nullptr, backward_memory.data(), dy.data(), r.data(), statistics.data(), weighted ? gamma.data() : nullptr, own_dz, own_dgamma, own_dbeta, own_dbias);
    if (error || error_backward) std::printf("errors %d, %d\n", error, error_backward);
    return !error && !error_backward && close("y", y, truth.y) && (!own_dz || close("dz", dz, truth.dz, truth.largest_term)) && (!own_dgamma || close("dgamma", dgamma, truth.dgamma))
           && (!own_dbeta || close("dbeta", dbeta, truth.dbeta)) && (!own_dbias || close("dbias", dbias, truth.dbias, truth.largest_term));
}

int main(int, char** arguments) {
    std::mt19937 random(std::atoi(arguments[2]));
    Among among = {random};
    for (int done = 0; done < std::atoi(arguments[1]); done++) {
        const int64_t groups = among(1, 3);
        const Shape s = {among(1, 3), groups * among(2, 4), done % 10 ? among(2, 300) : among(16383, 33000), groups};
        const double shifts[] = {0, 2, -1};
        if (emulate(s, random() % 2, random() % 4 == 0, shifts[random() % 3], random)) continue;
        std::printf("N %d C %d S %d num_groups %d\n", int(s.N), int(s.C), int(s.S), int(s.num_groups));
        return 1;
    }
}
