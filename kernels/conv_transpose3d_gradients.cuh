// Gradients of a transposed convolution's input and weight on the tensor cores.
//
//   dx[n, ci, i]       = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]
//
// Both read one packed copy of dout, in which the phases of the stride are channels; dweight's kernel may also make it (dweight_packing_sm90.cuh). dx is the forward's convolution, its
// stencil the other way round; dweight is in dweight.cuh.

#pragma once

#include "dweight.cuh"
#include "dweight_taps_tiles.h"
#include "group_norm_backward.cuh"

namespace conv {

// dweight from dout's packed copy, from float32 dout, and element by element of the kernel; the latter two have block_n 0 and no cycles where that does not pay.
struct DweightPlans {
    dweight::Problem plain, packing;
    dweight_taps::Plan taps;
};

template <typename Path> static const DweightPlans& dweight_plans_of(const Geometry& g, int device) {
    static Memo<DweightPlans> plans;
    return plans.get(g, Direction::kDInput, device, [&] {
        dweight::Problem p = {};
        if (!has_stencil(g)) return DweightPlans{p, p, {}};
        p.s = make_stencil(Direction::kForward, g);
        p.N = g.N, p.C_in = g.C_in, p.C_out = g.C_out, p.groups = g.groups, p.dout_phase_channels = padded_channels(g.C_out);
        const int multiprocessors = plan_of<Path>(g, Direction::kDInput, device).multiprocessors;
        DweightPlans both = {p, p, {}};
        both.plain.t = dweight::choose_tiling(p, padded_channels(g.C_in), multiprocessors, Path::shared_bytes(device), false);
        if constexpr (Path::kHopper) {
            both.packing.t = dweight::choose_tiling(p, padded_channels(g.C_in), multiprocessors, Path::kPackingSharedBytes, true);
            both.taps = dweight_taps::make_plan(p.s, g, int(p.dout_phase_channels), block_shared_bytes(device), multiprocessors);
            if (both.taps.cycles > 0.9 * both.plain.t.cycles) both.taps = {};
        }
        return both;
    });
}

struct GradientsMemory {
    Scratch scratch, packed;    // packed: the copy of x
    Workspace workspace;
    scaled_half::Activation dout, x;
    scaled_half::Weight weight;
    float* partial;
    GradientsMemory(const Geometry& g, const Plan& plan, const DweightPlans& dweight, void* base, void* packed_base, const void* dout_data, const void* x_data, const void* w) : scratch(base), packed(packed_base) {
        auto* weight_max = scratch.take_zeroed<unsigned>(plan.problem.C_out);
        workspace = take_workspace(scratch, plan.problem, false);
        dout = take_activation(scratch, plan.problem.s, g.N, g.C_out, 0, 0, dout_data);
        weight = take_weight(scratch, plan, g, weight_max, w);
        x = take_activation(packed, dweight.plain.s, g.N, g.C_in, 0, 0, x_data);
        partial = scratch.take<float>(std::max({dweight::partial_count(dweight.plain.t), dweight::partial_count(dweight.packing.t), dweight.taps.partial_count()}));
    }
};

// dx (and w) or dweight (and x) may be null: not wanted. Where x alone is, `packed` has the copy of it that the forward made.
template <typename Path>
int gradients(const Geometry& g, int dtype, int device, cudaStream_t stream, void* workspace, void* packed, const void* dout, const scaled_half::NormGradient& norm, const void* x, const void* w, void* dx, void* dweight) {
    const Plan& plan = plan_of<Path>(g, Direction::kDInput, device);
    const DweightPlans& dweight_plans = dweight_plans_of<Path>(g, device);
    GradientsMemory memory(g, plan, dweight_plans, workspace, packed, dout, x, w);
    memory.dout.norm = norm;
    RETURN_IF_ERROR(memory.scratch.zero(x ? memory.packed : Scratch(nullptr), stream));
    scaled_half::Weight none = memory.weight;
    none.channels = 0;
    const scaled_half::Weight& weight = dx ? memory.weight : none;
    const auto pack_x = [&] { return x ? scaled_half::pack(memory.x, none, dtype, plan.multiprocessors, stream) : int(cudaSuccess); };
    const auto parameters = [&](const dweight::Problem& p) { return dweight::Parameters{p, memory.x.max, memory.dout.max, memory.partial}; };
    const bool packs = dweight && dweight_plans.packing.t.block_n > 0 && dtype == kFloat32 && !norm.r;
    if constexpr (Path::kHopper) {
        if (packs) {
            RETURN_IF_ERROR(pack_x());
            RETURN_IF_ERROR(Path::pack_and_differentiate(parameters(dweight_plans.packing), memory.x, memory.dout, weight, dweight, stream));
        }
    }
    if (!packs) RETURN_IF_ERROR(scaled_half::pack(memory.dout, weight, dtype, plan.multiprocessors, stream));
    if (dx) RETURN_IF_ERROR(convolve<Path>(plan, memory.dout, memory.weight, memory.workspace, dtype, nullptr, false, dx, {}, stream));
    if (dx && !norm.r) RETURN_IF_ERROR(repair<Direction::kDInput>(plan, g, dtype, memory.dout.max, dout, w, nullptr, false, dx, stream));
    if (!dweight || packs) return cudaSuccess;
    RETURN_IF_ERROR(pack_x());
    if constexpr (Path::kHopper) {
        if (dweight_plans.taps.cycles > 0) return Path::differentiate_taps({dweight_plans.taps, memory.x.max, memory.dout.max, memory.partial}, memory.x, memory.dout, dtype, dweight, stream);
    }
    return Path::differentiate(parameters(dweight_plans.plain), memory.x, memory.dout, dtype, dweight, stream);
}

// Whether tilings fit for both: 1 or 0.
template <typename Path> int gradients_supports(const Geometry& g, int device) {
    return plan_of<Path>(g, Direction::kDInput, device).problem.t.block_n > 0 && dweight_plans_of<Path>(g, device).plain.t.block_n > 0;
}

template <typename Path> GradientsMemory gradients_memory(const Geometry& g, int device) {
    return GradientsMemory(g, plan_of<Path>(g, Direction::kDInput, device), dweight_plans_of<Path>(g, device), nullptr, nullptr, nullptr, nullptr, nullptr);
}

// The same of group_norm(relu(conv_transpose3d(...))), and dgamma, dbeta and dbias, which may be null too: dy, r and its statistics
// (2, N, num_groups) in place of dout.
template <typename Path> int64_t relu_group_norm_gradients_workspace(const Geometry& g, int device) {
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), g.C_out};    // the largest, whatever num_groups is
    const int64_t bytes = gradients_memory<Path>(g, device).scratch.bytes() + group_norm::GradientSums::bytes(shape);
    return ceil_div(bytes, 256) * 256;    // what is behind it is aligned too
}

template <typename Path>
int relu_group_norm_gradients(const Geometry& g, int dtype, int device, cudaStream_t stream, void* workspace, void* packed, const void* dy, const void* r, const double* statistics, const void* gamma,
                              int num_groups, const void* x, const void* w, void* dx, void* dweight, void* dgamma, void* dbeta, void* dbias) {
    if (dtype != kFloat32) return cudaErrorNotSupported;
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), num_groups};
    const group_norm::GradientSums sums(shape, static_cast<uint8_t*>(workspace) + gradients_memory<Path>(g, device).scratch.bytes());
    RETURN_IF_ERROR((group_norm::sum_gradients<float, float>(shape, stream, dy, r, statistics, gamma, sums, dgamma, dbeta, dbias)));
    const scaled_half::NormGradient norm = {r, shape, statistics, statistics + shape.N * num_groups, static_cast<const float*>(gamma), sums.group_means};
    return gradients<Path>(g, dtype, device, stream, workspace, packed, dy, norm, x, w, dx, dweight);
}

}  // namespace conv

// The C functions of a path. packed: memory for the copy of x, or, where x is null, that copy.
#define GRADIENTS_LAUNCHERS(path, Path)                                                                                                                    \
    extern "C" int conv_transpose3d_gradients_supports_##path(const Geometry* g, int device) { return conv::gradients_supports<Path>(*g, device); }        \
    extern "C" int64_t conv_transpose3d_gradients_##path##_workspace(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_gradients_##path##_packed(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).packed.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_gradients_##path##_workspace(const Geometry* g, int, int device) { return conv::relu_group_norm_gradients_workspace<Path>(*g, device); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_gradients_##path##_packed(const Geometry* g, int, int device) { return conv::gradients_memory<Path>(*g, device).packed.bytes(); } \
    extern "C" int conv_transpose3d_gradients_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* dout, const void* x, const void* w, void* dx, void* dweight) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::gradients<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, dout, {}, x, w, dx, dweight);                \
    }                                                                                                                                                      \
    extern "C" int conv_transpose3d_relu_group_norm_gradients_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* dy, const void* r, const double* statistics, \
                                                                     const void* gamma, int num_groups, const void* x, const void* w, void* dx, void* dweight, void* dgamma, void* dbeta, void* dbias) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::relu_group_norm_gradients<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, dy, r, statistics, gamma, num_groups, x, w, dx, dweight, dgamma, dbeta, dbias); \
    }
