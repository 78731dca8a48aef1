// Strided transposed convolution by the phases of its outputs on Hopper, alone or with ReLU and GroupNorm behind it: the launchers. For float32.

#include "conv_plan.cuh"
#include "polyphase_sm90.cuh"

namespace polyphase {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

// Scratch memory. The packed copy of x has memory of its own, which the gradients may need.
struct Memory {
    conv::Scratch scratch, packed;
    unsigned* ticket;
    group_norm::MomentSets sets = {};
    scaled_half::Activation source;
    scaled_half::Weight weight;
    Memory(const Geometry& g, const Plan& p, bool fused, void* base, void* packed_base, const void* x, const void* w) : scratch(base), packed(packed_base) {
        Geometry plain = g;    // every element of the kernel a tap of its own
        for (Axis& axis : plain.axis) axis.stride = axis.dilation = 1;
        auto* weight_max = scratch.take_zeroed<unsigned>(g.C_out);
        ticket = scratch.take_zeroed<unsigned>(1);
        if (fused) sets = conv::take_moment_sets(scratch, g.N, g.C_out, p.parts(), kRows * p.channel_tiles);
        source = conv::take_activation(packed, make_stencil(Direction::kForward, g), g.N, g.C_in, 0, 0, x);
        weight = {make_stencil(Direction::kForward, plain), {1, kRows / 8, p.channel_tiles}, g.C_out, g.C_in, kRows * p.channel_tiles, source.phase_channels, 0, 0, 1, g.C_out, true, false, w, nullptr, weight_max};
        weight.copy = scratch.take<__half>(weight.copied());
    }
};

static Memory memory_of(const Geometry& g, bool fused, int device) { return Memory(g, plan_of(g, device), fused, nullptr, nullptr, nullptr, nullptr); }

static int forward(const Plan& plan, const Memory& memory, int device, void* stream, const void* bias, bool apply_relu, void* out) {
    if (plan.tiles == 0) return cudaErrorNotSupported;
    const int multiprocessors = multiprocessors_of(device);
    RETURN_IF_ERROR(memory.scratch.zero(memory.packed, static_cast<cudaStream_t>(stream)));
    RETURN_IF_ERROR(scaled_half::pack(memory.source, memory.weight, kFloat32, multiprocessors, stream));
    return convolve({plan, apply_relu, static_cast<const float*>(bias), static_cast<float*>(out), memory.source.max, memory.weight.max, memory.ticket, memory.sets}, memory.source, memory.weight, multiprocessors, static_cast<cudaStream_t>(stream));
}

}  // namespace polyphase

extern "C" int conv_transpose3d_supports_polyphase_sm90(const Geometry* g, int device) { return polyphase::plan_of(*g, device).tiles > 0; }

// Estimated, of a multiprocessor.
extern "C" double conv_transpose3d_forward_cycles_polyphase_sm90(const Geometry* g, int device) { return polyphase::plan_of(*g, device).cycles; }

extern "C" int64_t conv_transpose3d_forward_polyphase_sm90_workspace(const Geometry* g, int, int device) { return polyphase::memory_of(*g, false, device).scratch.bytes(); }
extern "C" int64_t conv_transpose3d_forward_polyphase_sm90_packed(const Geometry* g, int, int device) { return polyphase::memory_of(*g, false, device).packed.bytes(); }
extern "C" int64_t conv_transpose3d_relu_group_norm_forward_polyphase_sm90_workspace(const Geometry* g, int, int device) { return polyphase::memory_of(*g, true, device).scratch.bytes(); }
extern "C" int64_t conv_transpose3d_relu_group_norm_forward_polyphase_sm90_packed(const Geometry* g, int, int device) { return polyphase::memory_of(*g, true, device).packed.bytes(); }

// bias may be null; apply_relu writes relu(out). packed: memory for the copy of x that the gradients read.
extern "C" int conv_transpose3d_forward_polyphase_sm90(const Geometry* g, int, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const polyphase::Plan& plan = polyphase::plan_of(*g, device);
    return polyphase::forward(plan, polyphase::Memory(*g, plan, false, workspace, packed, x, w), device, stream, bias, apply_relu != 0, out);
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_polyphase_sm90(const Geometry* g, int, int, int device, void* stream, void* workspace, void* packed, const void* x, const void* w, const void* bias,
                                                                       const void* gamma, const void* beta, int num_groups, double eps, void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    const polyphase::Plan& plan = polyphase::plan_of(*g, device);
    const polyphase::Memory memory(*g, plan, true, workspace, packed, x, w);
    RETURN_IF_ERROR(polyphase::forward(plan, memory, device, stream, bias, true, activation));
    return conv::normalize(memory.sets, {g->N, g->C_out, out_volume(*g), num_groups}, kFloat32, kFloat32, eps, gamma, beta, activation, y, statistics, stream);
}
