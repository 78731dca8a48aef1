// Transposed convolution on the tensor cores, alone or with ReLU and GroupNorm behind it.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, i] * w[ci, co, k] with i * stride - padding + k * dilation = o
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#pragma once

#include "conv_plan.cuh"

namespace conv {

// The packed copy of x has memory of its own, which the gradients may need. Where operands are split, the convolution has another, and that one is made if there is memory for it.
struct ForwardMemory {
    Scratch scratch, packed;
    Workspace workspace;
    scaled_half::Activation source;
    scaled_half::Weight weight;
    ForwardMemory(const Geometry& g, const Plan& plan, bool fused, void* base, void* packed_base, const void* x, const void* w) : scratch(base), packed(packed_base) {
        const Problem& p = plan.problem;
        const bool splits = p.t.split || plan.third, has_unsplit = !splits || packed_base;
        auto* weight_max = scratch.take_zeroed<unsigned>(p.C_out);
        auto* max = has_unsplit ? nullptr : scratch.take_zeroed<scaled_half::SampleMax>(g.N);
        workspace = take_workspace(scratch, p, fused);
        const scaled_half::Activation unsplit = has_unsplit ? take_activation(packed, p.s, g.N, g.C_in, 0, 0, x) : scaled_half::Activation{};
        source = splits ? take_activation(scratch, p.s, g.N, g.C_in, p.t.split, plan.third, x, has_unsplit ? unsplit.max : max) : unsplit;
        if (splits) source.unsplit = unsplit.copy, source.unsplit_channels = unsplit.phase_channels;
        weight = take_weight(scratch, plan, g, weight_max, w);
    }
};

// Whether a tiling fits: 1 or 0.
template <typename Path> int forward_supports(const Geometry& g, int device) { return plan_of<Path>(g, Direction::kForward, device).problem.t.block_n > 0; }

template <typename Path> ForwardMemory forward_memory(const Geometry& g, bool fused, int device) {
    return ForwardMemory(g, plan_of<Path>(g, Direction::kForward, device), fused, nullptr, nullptr, nullptr, nullptr);
}

template <typename Path>
int pack_and_convolve(const Plan& plan, const ForwardMemory& memory, int dtype, cudaStream_t stream, const void* bias, bool apply_relu, void* out, const Normalization& norm) {
    RETURN_IF_ERROR(memory.scratch.zero(memory.packed, stream));
    RETURN_IF_ERROR(scaled_half::pack(memory.source, memory.weight, dtype, plan.multiprocessors, stream));
    return convolve<Path>(plan, memory.source, memory.weight, memory.workspace, dtype, bias, apply_relu, out, norm, stream);
}

template <typename Path>
int forward(const Geometry& g, int dtype, int device, cudaStream_t stream, void* base, void* packed, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const Plan& plan = plan_of<Path>(g, Direction::kForward, device);
    const ForwardMemory memory(g, plan, false, base, packed, x, w);
    RETURN_IF_ERROR(pack_and_convolve<Path>(plan, memory, dtype, stream, bias, apply_relu, out, {}));
    return repair<Direction::kForward>(plan, g, dtype, memory.source.max, x, w, bias, apply_relu, out, stream);
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd. Needs no repair: a group
// with a value that is not finite is NaN as a whole.
template <typename Path>
int forward_relu_group_norm(const Geometry& g, int dtype, int y_dtype, int device, cudaStream_t stream, void* base, void* packed, const void* x, const void* w, const void* bias,
                            const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) {
    const Plan& plan = plan_of<Path>(g, Direction::kForward, device);
    const ForwardMemory memory(g, plan, true, base, packed, x, w);
    const group_norm::Shape shape = {g.N, g.C_out, out_volume(g), num_groups};
    double* rstd = statistics + g.N * num_groups;
    const Normalization norm = {Path::normalizing_blocks(plan, shape, dtype, y_dtype, activation, y), shape, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), static_cast<float*>(y), statistics, rstd};
    RETURN_IF_ERROR(pack_and_convolve<Path>(plan, memory, dtype, stream, bias, true, activation, norm));
    if (norm.blocks > 0) return cudaSuccess;
    return normalize(memory.workspace.sets, shape, dtype, y_dtype, eps, gamma, beta, activation, y, statistics, stream);
}

}  // namespace conv

// The C functions of a path. packed: memory for the copy of x that the gradients read (theirs tell its size); null where the forward needs none and they do not want it.
#define FORWARD_LAUNCHERS(path, Path)                                                                                                                      \
    extern "C" int conv_transpose3d_forward_supports_##path(const Geometry* g, int device) { return conv::forward_supports<Path>(*g, device); }            \
    extern "C" int64_t conv_transpose3d_forward_##path##_workspace(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, false, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_forward_##path##_packed(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, false, device).packed.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_forward_##path##_workspace(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, true, device).scratch.bytes(); } \
    extern "C" int64_t conv_transpose3d_relu_group_norm_forward_##path##_packed(const Geometry* g, int, int device) { return conv::forward_memory<Path>(*g, true, device).packed.bytes(); } \
    extern "C" int conv_transpose3d_forward_##path(const Geometry* g, int dtype, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, \
                                                   int apply_relu, void* out) {                                                                            \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::forward<Path>(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, x, w, bias, apply_relu != 0, out);             \
    }                                                                                                                                                      \
    extern "C" int conv_transpose3d_relu_group_norm_forward_##path(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, \
                                                                   const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) { \
        DeviceGuard guard(device);                                                                                                                         \
        return conv::forward_relu_group_norm<Path>(*g, dtype, y_dtype, device, static_cast<cudaStream_t>(stream), workspace, packed, x, w, bias, gamma, beta, num_groups, eps, activation, y, statistics); \
    }
