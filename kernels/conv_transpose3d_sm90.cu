// Transposed convolution on Hopper's tensor cores, alone or with ReLU and GroupNorm behind it.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, i] * w[ci, co, k] with i * stride - padding + k * dilation = o
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#include "conv_launch_sm90.cuh"
#include "group_norm.cuh"

namespace conv_transpose3d_sm90 {

using namespace conv_sm90;

struct Memory {
    Scratch scratch;
    Workspace workspace;
    scaled_half::Activation source;
    scaled_half::Weight weight;
    Memory(const Geometry& g, const Plan& plan, bool fused, void* base, const void* x, const void* w) : scratch(base) {
        const Problem& p = plan.problem;
        auto* max = scratch.take_zeroed<scaled_half::SampleMax>(g.N);
        workspace = take_workspace(scratch, p, fused);
        source = take_activation(scratch, p.s, g.N, g.C_in, p.t.split, max, x);
        weight = take_weight(scratch, plan, g, w);
    }
};

static int run(const Geometry& g, int dtype, int device, void* stream_pointer, void* base, const void* x, const void* w, const void* bias, bool apply_relu, void* out, const Fusion& fusion) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    const bool fused = fusion.num_groups > 0;
    const Plan& plan = plan_of(g, fused ? Use::kFused : Use::kForward, device);
    if (plan.problem.t.block_n == 0) return cudaErrorNotSupported;
    const Memory memory(g, plan, fused, base, x, w);
    RETURN_IF_ERROR(memory.scratch.zero(stream));
    RETURN_IF_ERROR(scaled_half::pack(memory.source, memory.weight, dtype, plan.multiprocessors, stream));
    RETURN_IF_ERROR(convolve(plan, memory.source, memory.weight, memory.workspace, dtype, bias, apply_relu, out, fusion, stream));
    if (fused) return cudaSuccess;    // a group with a value that is not finite is NaN as a whole
    return repair<Direction::kForward>(plan, g, dtype, memory.source.max, x, w, bias, apply_relu, out, stream);
}

static int64_t workspace_bytes(const Geometry& g, bool fused, int device) {
    return Memory(g, plan_of(g, fused ? Use::kFused : Use::kForward, device), fused, nullptr, nullptr, nullptr).scratch.bytes();
}

}  // namespace conv_transpose3d_sm90

// ---------------------------------------------------------------------------------------------------- Launchers

// Whether a tiling fits: 1 or 0.
extern "C" int conv_transpose3d_sm90_supports(const Geometry* g, int device) {
    return conv_sm90::plan_of(*g, conv_sm90::Use::kFused, device).problem.t.block_n > 0;
}

extern "C" int64_t conv_transpose3d_forward_sm90_workspace(const Geometry* g, int, int device) { return conv_transpose3d_sm90::workspace_bytes(*g, false, device); }

extern "C" int conv_transpose3d_forward_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                             const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return conv_transpose3d_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, apply_relu != 0, out, conv_sm90::Fusion{});
}

extern "C" int64_t conv_transpose3d_relu_group_norm_forward_sm90_workspace(const Geometry* g, int, int device) { return conv_transpose3d_sm90::workspace_bytes(*g, true, device); }

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_sm90(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace,
                                                             const void* x, const void* w, const void* bias, const void* gamma, const void* beta, int num_groups, double eps,
                                                             void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    // The copy engine moves float32 rows whose length is a multiple of 16 bytes; the rest is normalized by a kernel of its own.
    const bool in_kernel = dtype == kFloat32 && out_volume(*g) % 4 == 0;
    double* rstd = statistics + g->N * num_groups;
    const conv_sm90::Fusion fusion = {num_groups, int(g->C_out) / num_groups, in_kernel, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), y, statistics, rstd};
    RETURN_IF_ERROR(conv_transpose3d_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, true, activation, fusion));
    if (in_kernel) return cudaSuccess;
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), num_groups};
    return group_norm::with_dtypes(dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, activation, statistics, rstd, gamma, beta, y);
    });
}
