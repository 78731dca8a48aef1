// Gradients of a transposed convolution's input and weight on Hopper's tensor cores.
//
//   dx[n, ci, i]       = sum over co, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]
//
// Both read one packed copy of dout, in which the phases of the stride are channels. dx is the convolution of conv_sm90.cuh, its
// stencil the other way round; dweight is in dweight_sm90.cuh.

#include "dweight_sm90.cuh"

namespace gradients_sm90 {

using namespace conv_sm90;

static const dweight_sm90::Problem& dweight_plan_of(const Geometry& g, int device) {
    static Memo<dweight_sm90::Problem> plans;
    return plans.get(g, int64_t(Use::kDInput), device, [&] {
        dweight_sm90::Problem p = {};
        if (!has_stencil(g)) return p;
        p.s = make_stencil(Direction::kForward, g);
        p.N = g.N, p.C_in = g.C_in, p.C_out = g.C_out, p.groups = g.groups, p.dout_phase_channels = padded_channels(g.C_out);
        p.t = dweight_sm90::choose_tiling(p, padded_channels(g.C_in), plan_of(g, Use::kDInput, device).multiprocessors);
        return p;
    });
}

struct Memory {
    Scratch scratch;
    Workspace workspace;
    scaled_half::Activation dout, x;
    scaled_half::Weight weight;
    float* partial;
    Memory(const Geometry& g, int device, void* base, const void* dout_data, const void* x_data, const void* w) : scratch(base) {
        const Plan& plan = plan_of(g, Use::kDInput, device);
        const dweight_sm90::Problem& dweight = dweight_plan_of(g, device);
        auto *dout_max = scratch.take_zeroed<scaled_half::SampleMax>(g.N), *x_max = scratch.take_zeroed<scaled_half::SampleMax>(g.N);
        workspace = take_workspace(scratch, plan.problem, false);
        dout = take_activation(scratch, plan.problem.s, g.N, g.C_out, 0, dout_max, dout_data);
        weight = take_weight(scratch, plan, g, w);
        x = take_activation(scratch, dweight.s, g.N, g.C_in, 0, x_max, x_data);
        partial = scratch.take<float>(dweight_sm90::partial_count(dweight.t));
    }
};

// dx (and w) or dweight (and x) may be null: not wanted.
static int run(const Geometry& g, int dtype, int device, cudaStream_t stream, void* workspace, const void* dout, const scaled_half::NormGradient& norm, const void* x, const void* w, void* dx, void* dweight) {
    const Plan& plan = plan_of(g, Use::kDInput, device);
    Memory memory(g, device, workspace, dout, x, w);
    memory.dout.norm = norm;
    RETURN_IF_ERROR(memory.scratch.zero(stream));
    scaled_half::Weight none = memory.weight;
    none.channels = 0;
    RETURN_IF_ERROR(scaled_half::pack(memory.dout, dx ? memory.weight : none, dtype, plan.multiprocessors, stream));
    if (dx) RETURN_IF_ERROR(convolve(plan, memory.dout, memory.weight, memory.workspace, dtype, nullptr, false, dx, Fusion{}, stream));
    if (dx && !norm.r) RETURN_IF_ERROR(repair<Direction::kDInput>(plan, g, dtype, memory.dout.max, dout, w, nullptr, false, dx, stream));
    if (!dweight) return cudaSuccess;
    RETURN_IF_ERROR(scaled_half::pack(memory.x, none, dtype, plan.multiprocessors, stream));
    const dweight_sm90::Parameters a = {dweight_plan_of(g, device), memory.x.max, memory.dout.max, memory.partial};
    return dweight_sm90::differentiate(a, memory.x, memory.dout, dtype, dweight, stream);
}

}  // namespace gradients_sm90

// ---------------------------------------------------------------------------------------------------- Launchers

// Whether tilings fit for both: 1 or 0.
extern "C" int conv_transpose3d_gradients_sm90_supports(const Geometry* g, int device) {
    return conv_sm90::plan_of(*g, conv_sm90::Use::kDInput, device).problem.t.block_n > 0 && gradients_sm90::dweight_plan_of(*g, device).t.block_n > 0;
}

extern "C" int64_t conv_transpose3d_gradients_sm90_workspace(const Geometry* g, int, int device) {
    return gradients_sm90::Memory(*g, device, nullptr, nullptr, nullptr, nullptr).scratch.bytes();
}

extern "C" int conv_transpose3d_gradients_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                               const void* dout, const void* x, const void* w, void* dx, void* dweight) {
    DeviceGuard guard(device);
    return gradients_sm90::run(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, dout, {}, x, w, dx, dweight);
}

// The same of group_norm(relu(conv_transpose3d(...))), and dgamma and dbeta, which may be null too: dy, r and its statistics
// (2, N, num_groups) in place of dout.
extern "C" int64_t conv_transpose3d_relu_group_norm_gradients_sm90_workspace(const Geometry* g, int dtype, int device) {
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), g->C_out};    // the largest, whatever num_groups is
    return conv_transpose3d_gradients_sm90_workspace(g, dtype, device) + group_norm::GradientSums::count(shape) * int64_t(sizeof(group_norm::Pair));
}

extern "C" int conv_transpose3d_relu_group_norm_gradients_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                               const void* dy, const void* r, const double* statistics, const void* gamma, int num_groups, const void* x, const void* w,
                                                               void* dx, void* dweight, void* dgamma, void* dbeta) {
    DeviceGuard guard(device);
    if (dtype != kFloat32) return cudaErrorNotSupported;
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), num_groups};
    const group_norm::GradientSums sums(shape, static_cast<uint8_t*>(workspace) + conv_transpose3d_gradients_sm90_workspace(g, dtype, device));
    RETURN_IF_ERROR((group_norm::sum_gradients<float, float>(shape, stream, dy, r, statistics, gamma, sums, dgamma, dbeta)));
    const scaled_half::NormGradient norm = {r, shape, statistics, statistics + shape.N * num_groups, static_cast<const float*>(gamma), sums.group_means};
    return gradients_sm90::run(*g, dtype, device, static_cast<cudaStream_t>(stream), workspace, dy, norm, x, w, dx, dweight);
}
