// Transposed convolution and its gradients as products of matrices (gemm.cuh): the launchers. With i the positions of a sample, and k the elements of a kernel,
//
//   forward   products[n, (co, k), i] = sum over ci of w[ci, (co, k)] * x[n, ci, i], which are the outputs where each has one tap; otherwise taps.cuh adds them up
//   dx        dx[n, ci, i] = sum over co, k of w[ci, (co, k)] * spread[n, (co, k), i], dout as taps.cuh spreads it
//   dweight   dw[ci, (co, k)] = sum over n, i of x[n, ci, i] * spread[n, (co, k), i]
//
// Formula: torch.nn.ConvTranspose3d.

#include "add_parts.cuh"
#include "gemm.cuh"
#include "precision.h"
#include "taps.cuh"

namespace gemm {

using Forward = Layout<false, false>;
using DInput = Layout<true, false>;
using DWeight = Layout<true, true>;

constexpr int kLeastSteps = 8;                 // of a part of the sum

template <typename T> Matrix matrix_of(const void* data, int64_t sample_pitch, int64_t group_pitch, int64_t pitch) {
    const auto whole = [](int64_t elements) { return elements * int64_t(sizeof(T)) % 16 == 0; };
    return {data, sample_pitch, group_pitch, pitch, whole(sample_pitch) && whole(group_pitch) && whole(pitch) && holds<uint4>(data)};
}

// The positions of samples as GEMM_N.
inline void set_columns(Parameters& a, int64_t positions, int64_t samples, bool whole) {
    const bool together = whole && samples * positions < 1 << 30;
    a.positions = int(positions), a.by_positions = make_divisor(a.positions);
    a.N = int(together ? samples * positions : positions), a.column_samples = int(together ? 1 : samples);
}

// Outputs of a layer with single taps.
template <typename T> void set_outputs(Parameters& a, const Geometry& g, void* out) {
    const Axis &d = g.axis[0], &h = g.axis[1], &w = g.axis[2];
    a.by_volume = make_divisor(int(kernel_volume(g))), a.by_kernel_w = make_divisor(int(w.kernel)), a.by_kernel_h = make_divisor(int(h.kernel));
    a.by_in_w = make_divisor(int(w.in)), a.by_in_h = make_divisor(int(h.in));
    a.out_h = int(h.out), a.out_w = int(w.out), a.out_volume = int(out_volume(g)), a.sample_outputs = g.C_out * a.out_volume;
    a.stride_d = int(d.stride), a.stride_h = int(h.stride), a.stride_w = int(w.stride), a.out = out;
    if (w.kernel == 2 && holds<Vector<T, 4>>(out)) a.neighbours = w.in % 2 == 0 ? Neighbours::kPairsOfTwo : Neighbours::kPairs;
    if (w.kernel == 1 && holds<Vector<T, 4>>(out) && w.in % 4 == 0) a.neighbours = Neighbours::kFour;
}

// The layer whose outputs are (channels, positions) of a sample, a row each: a kernel of 1.
inline Geometry rows_of(int64_t channels, int64_t positions) {
    const Axis one = {1, 1, 1, 1, 0, 1}, all = {positions, positions, 1, 1, 0, 1};
    return {1, channels, channels, 1, {one, one, all}};
}

// ------------------------------------------------------------------------------------------------------- Forward

inline int64_t products_of(const Geometry& g) { return g.N * g.C_out * kernel_volume(g) * in_volume(g); }

inline int64_t forward_workspace(const Geometry& g) { return taps::has_single_taps(g) ? 0 : products_of(g) * int64_t(sizeof(float)); }

template <typename T> int forward(const Geometry& g, int device, void* stream, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const int64_t in = g.C_in / g.groups, rows = g.C_out / g.groups * kernel_volume(g), positions = in_volume(g);
    const bool single = taps::has_single_taps(g);
    if (!single && sizeof(T) != 4) return cudaErrorNotSupported;
    Parameters a = {};
    a.rows = matrix_of<T>(w, 0, in * rows, rows), a.columns = matrix_of<T>(x, g.C_in * positions, in * positions, positions);
    a.groups = int(g.groups), a.M = int(rows), a.K = int(in), a.k_samples = a.k_parts = 1, a.part_steps = a.sample_steps();
    set_columns(a, positions, g.N, positions * sizeof(T) % 16 == 0);
    if (single) set_outputs<T>(a, g, out), a.bias = bias, a.apply_relu = apply_relu;
    else set_outputs<T>(a, rows_of(g.C_out * kernel_volume(g), positions), workspace);
    const int multiprocessors = multiprocessors_of(device);
    RETURN_IF_ERROR((sizeof(T) == 4 && forward_in_float32(g) ? multiply<T, sizeof(T) == 4, Forward>(a, multiprocessors, stream) : multiply<T, false, Forward>(a, multiprocessors, stream)));
    return single ? cudaSuccess : taps::add(taps::make_layer(g), stream, static_cast<const float*>(workspace), static_cast<const float*>(bias), apply_relu, static_cast<float*>(out));
}

// ----------------------------------------------------------------------------------------------------- Gradients

// The sum in so many parts that all multiprocessors have tiles.
inline void cut_sum(Parameters& a, int multiprocessors) {
    const int64_t tiles = ceil_div(a.M, Small::kRows) * ceil_div(a.N, Small::kColumns) * a.groups * a.column_samples, steps = int64_t(a.sample_steps()) * a.k_samples;
    const int64_t wanted = Small::kResident * multiprocessors / tiles, most = ceil_div(steps, kLeastSteps), parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
    a.part_steps = int(ceil_div(steps, parts)), a.k_parts = int(ceil_div(steps, a.part_steps));
}

// dx, without its addresses.
inline Parameters dinput_of(const Geometry& g, int multiprocessors) {
    Parameters a = {};
    a.groups = int(g.groups), a.M = int(g.C_in / g.groups), a.K = int(g.C_out / g.groups * kernel_volume(g)), a.k_samples = 1;
    set_columns(a, in_volume(g), g.N, in_volume(g) % 4 == 0);
    cut_sum(a, multiprocessors);
    return a;
}
// dweight, likewise: rows are input channels, columns elements of their kernels, as the positions of one sample.
inline Parameters dweight_of(const Geometry& g, int multiprocessors) {
    Parameters a = {};
    a.groups = int(g.groups), a.M = int(g.C_in / g.groups), a.K = int(in_volume(g)), a.k_samples = int(g.N);
    set_columns(a, g.C_out / g.groups * kernel_volume(g), 1, true);
    cut_sum(a, multiprocessors);
    return a;
}

struct GradientsMemory {
    float *spread, *parts;
    int64_t bytes;
    GradientsMemory(const Geometry& g, const Parameters& dinput, const Parameters& dweight, void* base) {
        const int64_t spread_count = kernel_volume(g) == 1 && taps::has_single_taps(g) ? 0 : ceil_div(products_of(g), 64) * 64;
        const auto count = [](const Parameters& a, int64_t outputs) { return a.k_parts > 1 ? a.k_parts * outputs : 0; };
        const int64_t dinput_count = count(dinput, g.N * g.C_in * in_volume(g)), dweight_count = count(dweight, g.C_in * (g.C_out / g.groups) * kernel_volume(g));
        spread = spread_count > 0 ? static_cast<float*>(base) : nullptr, parts = static_cast<float*>(base) + spread_count;
        bytes = (spread_count + (dinput_count > dweight_count ? dinput_count : dweight_count)) * int64_t(sizeof(float));    // one after the other
    }
};

inline int64_t gradients_workspace(const Geometry& g, int device) {
    const int multiprocessors = multiprocessors_of(device);
    return GradientsMemory(g, dinput_of(g, multiprocessors), dweight_of(g, multiprocessors), nullptr).bytes;
}

// out (samples, channels, positions): the product, or the sum of its parts.
template <typename L> int multiply_parts(Parameters& a, int64_t samples, int64_t channels, float* parts, float* out, int multiprocessors, void* stream) {
    set_outputs<float>(a, rows_of(channels, a.positions), a.k_parts > 1 ? parts : out);
    a.part_outputs = samples * a.sample_outputs;
    RETURN_IF_ERROR((multiply<float, false, L>(a, multiprocessors, stream)));
    return a.k_parts == 1 ? cudaSuccess : parts::add({parts, a.k_parts, samples, int(channels), a.positions}, kFloat32, nullptr, false, out, {}, stream);
}

// dx and dweight may be null.
inline int gradients(const Geometry& g, int device, void* stream, void* workspace, const float* dout, const float* x, const float* w, float* dx, float* dweight) {
    const int multiprocessors = multiprocessors_of(device);
    const int64_t in = g.C_in / g.groups, elements = g.C_out / g.groups * kernel_volume(g), positions = in_volume(g), spread_channels = g.C_out * kernel_volume(g);
    Parameters dinput_product = dinput_of(g, multiprocessors), dweight_product = dweight_of(g, multiprocessors);
    const GradientsMemory memory(g, dinput_product, dweight_product, workspace);
    if (memory.spread) RETURN_IF_ERROR(taps::spread(taps::make_layer(g), stream, dout, memory.spread));
    const Matrix spread = matrix_of<float>(memory.spread ? memory.spread : dout, spread_channels * positions, elements * positions, positions);
    if (dx) {
        dinput_product.rows = matrix_of<float>(w, 0, in * elements, elements), dinput_product.columns = spread;
        RETURN_IF_ERROR(multiply_parts<DInput>(dinput_product, g.N, g.C_in, memory.parts, dx, multiprocessors, stream));
    }
    if (!dweight) return cudaSuccess;
    dweight_product.rows = matrix_of<float>(x, g.C_in * positions, in * positions, positions), dweight_product.columns = spread;
    return multiply_parts<DWeight>(dweight_product, 1, g.C_in, memory.parts, dweight, multiprocessors, stream);
}

}  // namespace gemm

extern "C" int64_t conv_transpose3d_forward_gemm_workspace(const Geometry* g, int, int) { return gemm::forward_workspace(*g); }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_gemm(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) -> int {
        using T = decltype(element);
        if constexpr (sizeof(T) == 8) return cudaErrorNotSupported;
        else return gemm::forward<T>(*g, device, stream, workspace, x, w, bias, apply_relu != 0, out);
    });
}

extern "C" int64_t conv_transpose3d_gradients_gemm_workspace(const Geometry* g, int, int device) { return gemm::gradients_workspace(*g, device); }

// float32. dx and dweight may be null.
extern "C" int conv_transpose3d_gradients_gemm(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* dout, const void* x, const void* w, void* dx, void* dweight) {
    DeviceGuard guard(device);
    if (dtype != kFloat32) return cudaErrorNotSupported;
    return gemm::gradients(*g, device, stream, workspace, static_cast<const float*>(dout), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<float*>(dx), static_cast<float*>(dweight));
}
