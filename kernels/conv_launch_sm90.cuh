// The Hopper convolution's kernel, and what a launcher needs to run it: the plan of a shape, scratch memory, packed operands.
#pragma once

#include <cstring>
#include <map>
#include <mutex>

#include "conv_sm90.cuh"
#include "direct_generic.cuh"
#include "normalizer_sm90.cuh"

namespace conv_sm90 {

// --------------------------------------------------------------------------------------------------------- Kernel

template <int kBlockN>
__global__ void __launch_bounds__(kThreads, 1)
conv_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map,
            const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    const Tiling& t = a.p.t;
    const SharedParts shared(base, t);
    SharedHead& head = shared.head;

    // Prologue: barriers, and zeros behind each box, where the last row's halo looks.
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.input_stages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 8);
        for (int i = 0; i < t.weight_rings * t.weight_stages; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, t.weight_rings == 2 ? 4 : 8);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 256 + 2);
        for (int i = 0; i < 2; i++) mbarrier_init(head.buffer_free + i, 32), mbarrier_init(head.staged + i, 128);
        for (int i = 0; i < t.norm_stages; i++) mbarrier_init(head.norm_full + i, 1), mbarrier_init(head.norm_empty + i, 32);
        fence_mbarrier_init();
    }
    if (t.items > 1 && threadIdx.x < t.items) head.item_rows[threadIdx.x] = rows_of_item(a.p, threadIdx.x);
    const int box_bytes = t.box_bytes();
    for (int stage = 0; stage < t.input_stages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += kThreads * 4) *reinterpret_cast<uint32_t*>(shared.input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (warp < t.weight_rings) Producer{a, shared, &x_map, &w_map, &out_map, warp}.run();
        else if (warp < 2) Producer{a, shared, &x_map, &w_map, &out_map, warp}.run_stores();
        if (warp == 2 && a.fusion.num_groups > 0) {
            if (a.fusion.in_kernel) load_rows(a, shared);
            else for (int n = 0; n < a.p.N; n++) combine_sample(a, n);
        }
        if (warp == 3 && a.fusion.in_kernel) normalize_rows(shared, t.norm_stages);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        consume<kBlockN>(a, shared);
    }
#endif
}

// ----------------------------------------------------------------------------------------------------------- Plan

enum class Use { kForward, kFused, kDInput };

// What was found for a shape, a use and a device, once. (To be held by static functions: an inline function's static variables would
// be shared with other builds of this file in the same process.)
template <typename T> class Memo {
public:
    template <typename F> const T& get(const Geometry& g, int64_t use, int device, F find) {
        std::lock_guard<std::mutex> lock(mutex_);
        const Key key = {g, use, device};
        const auto found = values_.find(key);
        return found != values_.end() ? found->second : values_[key] = find();
    }

private:
    struct Key {
        Geometry g;
        int64_t use, device;
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
    bool repairs;                // some packed weights are zeros that stand for nothing, and must not meet an infinite input
    int multiprocessors;
};

inline Plan make_plan(const Geometry& g, Use use, int device) {
    const bool forward = use != Use::kDInput;
    Plan plan = {};
    plan.direction = forward ? Direction::kForward : Direction::kDInput;
    cudaDeviceGetAttribute(&plan.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    plan.source_channels = forward ? g.C_in : g.C_out;
    plan.problem.N = g.N, plan.problem.C_out = forward ? g.C_out : g.C_in, plan.problem.out_volume = forward ? out_volume(g) : in_volume(g);
    if (has_stencil(g)) {
        plan.problem.s = make_stencil(plan.direction, g);
        plan.repairs = g.groups > 1;
        for (const StencilAxis& a : plan.problem.s.axis)
            for (int phase = 0; phase < a.phases; phase++) plan.repairs |= a.phases > 1 && a.live[phase] != (1 << a.taps) - 1;
        const bool split = forward && g.groups > 1;
        if (!split || can_split(g))
            plan.problem.t = choose_tiling(plan.problem.s, g.N, plan.source_channels, plan.problem.C_out, split ? g.groups : 1, use == Use::kFused, plan.multiprocessors);
    }
    return plan;
}

static const Plan& plan_of(const Geometry& g, Use use, int device) {
    static Memo<Plan> plans;
    return plans.get(g, int64_t(use), device, [&] { return make_plan(g, use, device); });
}

// -------------------------------------------------------------------------------------------------- Scratch memory

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
    int zero(cudaStream_t stream) const { return cudaMemsetAsync(base_, 0, zeroed_, stream); }

private:
    uint8_t* base_;
    int64_t bytes_ = 0, zeroed_ = 0;
};

inline Workspace take_workspace(Scratch& scratch, const Problem& p, bool fused) {
    Workspace w = {};
    w.tile_ticket = scratch.take_zeroed<unsigned>(1);
    if (!fused) return w;
    const int64_t parts = parts_of_sample(p);
    w.channel_tickets = scratch.take_zeroed<unsigned>(p.N), w.item_tickets = scratch.take_zeroed<unsigned>(p.N);
    w.runs_done = scratch.take_zeroed<unsigned>(p.N);
    w.channel_sums = scratch.take_zeroed<unsigned long long>(2 * p.N * p.C_out);
    w.counts = scratch.take_zeroed<float>(p.N * parts);
    w.moments = scratch.take<float2>(p.N * parts * p.t.channels());
    return w;
}

// These take the memory of the copies of an activation and of a weight.
inline scaled_half::Activation take_activation(Scratch& scratch, const Stencil& s, int64_t N, int64_t channels, int split, scaled_half::SampleMax* max, const void* x) {
    scaled_half::Activation a = scaled_half::make_activation(s, N, channels, split ? 2 * channels : padded_channels(channels), split);
    a.x = x, a.max = max;
    a.copy = scratch.take<__half>(a.copied());
    return a;
}

inline scaled_half::Weight take_weight(Scratch& scratch, const Plan& plan, const Geometry& g, const void* w) {
    const Problem& p = plan.problem;
    scaled_half::Weight weight = {p.s, p.t.rows, p.C_out, plan.source_channels, p.t.M_pad, p.t.phase_channels * p.t.products, p.t.split, g.groups, g.C_out / g.groups, plan.direction == Direction::kForward, w, nullptr, nullptr};
    weight.copy = scratch.take<__half>(weight.copied());
    weight.max = scratch.take<unsigned>(p.C_out);
    return weight;
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    RETURN_IF_ERROR(cudaFuncSetAttribute(conv_kernel<kBlockN>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes(t))));
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;
    conv_kernel<kBlockN><<<unsigned(blocks), kThreads, shared_bytes(t), stream>>>(x_map, w_map, out_map, a);
    return cudaGetLastError();
}

// Computes the samples with non-finite inputs once more, without the zeros that the tensor cores multiply them by.
template <Direction kDirection>
int repair(const Plan& plan, const Geometry& g, int dtype, const scaled_half::SampleMax* max, const void* source, const void* w, const void* bias, bool apply_relu, void* out, void* stream) {
    if (!plan.repairs) return cudaSuccess;
    return direct_generic::direct<kDirection>(g, dtype, stream, {&max->non_finite, int(sizeof(*max) / sizeof(unsigned))}, source, w, bias, apply_relu, out);
}

// out = the convolution of packed operands, with whatever `fusion` wants behind it.
inline int convolve(const Plan& plan, const scaled_half::Activation& source, const scaled_half::Weight& weight, const Workspace& workspace, int dtype, const void* bias, bool apply_relu,
                    void* out, const Fusion& fusion, cudaStream_t stream) {
    const Problem& p = plan.problem;
    const Tiling& t = p.t;
    const StencilAxis* axis = p.s.axis;
    CUtensorMap x_map, w_map, out_map = {};
    const CUtensorMapSwizzle swizzle = swizzle_of(t.chunk * 2);
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, source.copy, {source.phase_channels * source.phases(), axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, weight.copy, {t.C_pad * t.products, t.M_pad, p.s.taps()}, {t.chunk, kRows, t.item_taps}));
    if (t.tensor_store && dtype == kFloat32)
        RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE, out, {int64_t(axis[1].out) * axis[2].out, axis[0].out, p.C_out, p.N}, {t.run, 1, kRows, 1}));
    const Parameters a = {p, dtype, apply_relu, bias, out, source.max, weight.max, workspace, fusion};
    switch (t.block_n) {
        case 232: return launch_conv<232>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 224: return launch_conv<224>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 192: return launch_conv<192>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 160: return launch_conv<160>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 128: return launch_conv<128>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        default: return launch_conv<64>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
    }
}

}  // namespace conv_sm90
