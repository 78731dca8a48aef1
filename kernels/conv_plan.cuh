// What a launcher of the tensor cores' convolutions needs: the plan of a shape, scratch memory, packed operands.
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "add_parts.cuh"
#include "conv_statistics.cuh"
#include "direct_generic.cuh"
#include "precision.h"

namespace conv {

// ----------------------------------------------------------------------------------------------------------- Plan

// What was found for a shape, a direction and a device, once. (To be held by static functions: an inline function's static variables would
// be shared with other builds of this file in the same process.)
template <typename T> class Memo {
public:
    template <typename F> const T& get(const Geometry& g, Direction direction, int device, F find) {
        std::lock_guard<std::mutex> lock(mutex_);
        const Key key = {g, int64_t(direction), device};
        const auto found = values_.find(key);
        return found != values_.end() ? found->second : values_[key] = find();
    }

private:
    struct Key {
        Geometry g;
        int64_t direction, device;
        bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) < 0; }
    };
    std::mutex mutex_;
    std::map<Key, T> values_;
};

// How the convolution of some shape is done.
struct Plan {
    Problem problem;
    Direction direction;
    int64_t source_channels;
    int third;                   // channels of a third of GEMM_K (precision.h), or 0
    bool repairs;                // some packed weights are zeros that stand for nothing, and must not meet an infinite input
    int multiprocessors;
};

// Path: the launches of an architecture (conv_launch_sm90.cuh, conv_launch_sm80.cuh).
template <typename Path> Plan make_plan(const Geometry& g, Direction direction, int device) {
    const bool forward = direction == Direction::kForward;
    Plan plan = {};
    plan.direction = direction;
    plan.multiprocessors = multiprocessors_of(device);
    plan.source_channels = forward ? g.C_in : g.C_out;
    plan.problem.N = g.N, plan.problem.C_out = forward ? g.C_out : g.C_in, plan.problem.out_volume = forward ? out_volume(g) : in_volume(g);
    if (has_stencil(g)) {
        plan.problem.s = make_stencil(plan.direction, g);
        plan.third = forward ? third_of(g) : 0;
        plan.repairs = g.groups > 1 || plan.third;
        for (const StencilAxis& a : plan.problem.s.axis)
            for (int phase = 0; phase < a.phases; phase++) plan.repairs |= a.phases > 1 && a.live[phase] != (1 << a.taps) - 1;
        const bool split = forward && splits_groups(g);
        if (!split || can_split(g))
            plan.problem.t = Path::choose_tiling(plan.problem.s, g.N, plan.third ? 3 * plan.third : plan.source_channels, plan.problem.C_out, split ? g.groups : 1, plan.multiprocessors, device);
        const StencilAxis& w = plan.problem.s.axis[2];
        plan.repairs |= plan.problem.t.block_n > 0 && w.source_phases > 1 && taps_w_of_phases(plan.problem.t, w) > w.kernel;    // joined with others
    }
    return plan;
}

template <typename Path> static const Plan& plan_of(const Geometry& g, Direction direction, int device) {
    static Memo<Plan> plans;
    return plans.get(g, direction, device, [&] { return make_plan<Path>(g, direction, device); });
}

// -------------------------------------------------------------------------------------------------- Scratch memory

// A kernel of its own: one behind a memset would not be brought to the multiprocessors before that ends.
__global__ void __launch_bounds__(256) zero_kernel(uint4* memory, int64_t count, uint4* other, int64_t other_count) {
    wait_for_previous_kernel();
    const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (i < count) memory[i] = make_uint4(0, 0, 0, 0);
    else if (i - count < other_count) other[i - count] = make_uint4(0, 0, 0, 0);
}

// Takes pieces of the memory from `base` on (null where only their sizes are wanted), those that start at zero first.
class Scratch {
public:
    explicit Scratch(void* base) : base_(static_cast<uint8_t*>(base)) {}
    template <typename T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base_ + bytes_);
        bytes_ += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
        return p;
    }
    template <typename T> T* take_zeroed(int64_t count) {
        T* p = take<T>(count);
        zeroed_ = bytes_;
        return p;
    }
    int64_t bytes() const { return bytes_; }
    // This one's and the other's.
    int zero(const Scratch& other, cudaStream_t stream) const {
        return launch(zero_kernel, ceil_div((zeroed_ + other.zeroed_) / 16, 256), 256, stream, reinterpret_cast<uint4*>(base_), zeroed_ / 16, reinterpret_cast<uint4*>(other.base_), other.zeroed_ / 16);
    }

private:
    uint8_t* base_;
    int64_t bytes_ = 0, zeroed_ = 0;
};

// Takes the memory of moments, behind all else that starts at zero.
inline MomentSets take_moment_sets(Scratch& scratch, int64_t N, int64_t C_out, int parts, int channels) {
    MomentSets sets = {};
    sets.parts = parts, sets.channels = channels;
    sets.counts = scratch.take_zeroed<float>(N * parts);
    sets.group_tickets = scratch.take_zeroed<unsigned>(N * C_out);    // as many groups as there can be
    sets.group_sums = scratch.take<group_norm::Pair>(N * C_out * kStatisticsBlocks);
    sets.moments = scratch.take<float2>(N * parts * channels);
    return sets;
}

inline Workspace take_workspace(Scratch& scratch, const Problem& p, bool fused) {
    Workspace w = {};
    w.tile_tickets = scratch.take_zeroed<unsigned>(p.t.queues);
    if (fused) {
        w.stored = scratch.take_zeroed<unsigned>(p.N), w.ready = scratch.take_zeroed<unsigned>(p.N);
        w.groups = scratch.take_zeroed<unsigned>(1), w.pieces = scratch.take_zeroed<unsigned>(1);
        w.sets = take_moment_sets(scratch, p.N, p.C_out, parts_of_sample(p), p.t.channels());
    }
    if (p.t.k_parts > 1) w.parts = scratch.take<float>(p.t.k_parts * p.N * p.C_out * p.out_volume);
    return w;
}

// These take the memory of the copies of an activation, maxima included unless there are some, and of a weight.
inline scaled_half::Activation take_activation(Scratch& scratch, const Stencil& s, int64_t N, int64_t channels, int split, int third, const void* x, scaled_half::SampleMax* max = nullptr) {
    scaled_half::Activation a = scaled_half::make_activation(s, N, channels, split ? 2 * channels : padded_channels(third ? 3 * third : channels), split, third);
    a.x = x, a.max = max ? max : scratch.take_zeroed<scaled_half::SampleMax>(N);
    a.copy = scratch.take<__half>(a.copied());
    return a;
}

inline scaled_half::Weight take_weight(Scratch& scratch, const Plan& plan, const Geometry& g, unsigned* max, const void* w) {
    const Problem& p = plan.problem;
    scaled_half::Weight weight = {p.s, p.t.rows, p.C_out, plan.source_channels, p.t.M_pad, p.t.phase_channels * p.t.products, p.t.split, plan.third, g.groups, g.C_out / g.groups, plan.direction == Direction::kForward, p.t.fragments, w, nullptr, max};
    weight.copy = scratch.take<__half>(weight.copied());
    return weight;
}

// ---------------------------------------------------------------------------------------------------- Convolution

// out = the convolution of packed operands, and its moments where there is room for them. bias may be null; apply_relu writes relu(out). norm: where it has blocks, its
// y too.
template <typename Path>
int convolve(const Plan& plan, const scaled_half::Activation& source, const scaled_half::Weight& weight, const Workspace& workspace, int dtype, const void* bias, bool apply_relu, void* out, const Normalization& norm, cudaStream_t stream) {
    const Problem& p = plan.problem;
    if (p.t.block_n == 0) return cudaErrorNotSupported;
    Parameters a = {p, dtype, apply_relu, bias, out, source.max, weight.max, workspace, norm};
    if (p.t.k_parts == 1) return Path::convolve(a, source, weight, plan.multiprocessors, stream);
    a.dtype = kFloat32, a.apply_relu = false, a.bias = nullptr, a.out = workspace.parts, a.workspace.sets.moments = nullptr;
    RETURN_IF_ERROR(Path::convolve(a, source, weight, plan.multiprocessors, stream));
    return parts::add({workspace.parts, p.t.k_parts, p.N, int(p.C_out), int(p.out_volume)}, dtype, bias, apply_relu, out, workspace.sets, stream);
}

// --------------------------------------------------------------------------------------------------------- Repair

// Computes the samples with non-finite inputs once more, without the zeros that the tensor cores multiply them by.
template <Direction kDirection>
int repair(const Plan& plan, const Geometry& g, int dtype, const scaled_half::SampleMax* max, const void* source, const void* w, const void* bias, bool apply_relu, void* out, void* stream) {
    if (!plan.repairs) return cudaSuccess;
    return direct_generic::direct<kDirection>(g, dtype, stream, {&max->non_finite, int(sizeof(*max) / sizeof(unsigned))}, source, w, bias, apply_relu, out);
}

}  // namespace conv
