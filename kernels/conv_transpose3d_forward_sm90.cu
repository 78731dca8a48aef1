// Transposed convolution on Hopper's tensor cores, alone or with ReLU and GroupNorm behind it: kernel and launchers.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, i] * w[ci, co, k] with i * stride - padding + k * dilation = o
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#include <cstring>
#include <map>
#include <mutex>

#include "group_norm.cuh"
#include "conv_sm90.cuh"
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
        for (int i = 0; i < kInputStages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 8);
        for (int consumer = 0; consumer < 2; consumer++)
            for (int i = 0; i < t.weight_stages; i++) mbarrier_init(head.weight_full[consumer] + i, 1), mbarrier_init(head.weight_empty[consumer] + i, 4);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 256 + 2);
        for (int i = 0; i < 2; i++) mbarrier_init(head.buffer_free + i, 1), mbarrier_init(head.staged + i, 4);
        for (int i = 0; i < t.norm_stages; i++) mbarrier_init(head.norm_full + i, 1), mbarrier_init(head.norm_empty + i, 1);
        fence_mbarrier_init();
    }
    const int box_bytes = t.box_rows * t.pitch * t.chunk * 2;
    for (int stage = 0; stage < kInputStages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += kThreads * 4) *reinterpret_cast<uint32_t*>(shared.input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (warp < 2) Producer{a, shared, &x_map, &w_map, &out_map, warp}.run();
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

// ------------------------------------------------------------------------------------------------------- Launcher

// What a call of some shape does, found once. (Static: an inline function's static variables would be shared with other builds
// of this file in the same process.)
struct Plan {
    Problem problem;
    int multiprocessors;
};

static const Plan& plan_of(const Geometry& g, bool fused, int device) {
    struct Key {
        Geometry g;
        int64_t fused, device;
        bool operator<(const Key& other) const { return std::memcmp(this, &other, sizeof(Key)) < 0; }
    };
    static std::mutex mutex;
    static std::map<Key, Plan> plans;
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = plans.find({g, fused, device});
    if (found != plans.end()) return found->second;
    Plan plan = {};
    cudaDeviceGetAttribute(&plan.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    plan.problem.N = g.N, plan.problem.C_out = g.C_out, plan.problem.out_volume = out_volume(g);
    if (has_stencil(g)) {
        plan.problem.s = make_forward_stencil(g);
        plan.problem.t = choose_tiling(g, plan.problem.s, fused, plan.multiprocessors);
    }
    return plans[{g, fused, device}] = plan;
}

// Scratch memory of a call, laid out at `base`.
struct Scratch {
    scaled_half::Activation activation;
    scaled_half::Weight weight;
    Workspace workspace;
    unsigned* counters;
    int64_t counter_bytes, bytes = 0;

    Scratch(const Geometry& g, const Plan& plan, int64_t num_groups, void* base) : base_(static_cast<uint8_t*>(base)) {
        const Tiling& t = plan.problem.t;
        const int64_t taps = plan.problem.s.axis[0].taps * plan.problem.s.axis[1].taps * plan.problem.s.axis[2].taps, parts = num_groups > 0 ? parts_of_sample(plan.problem) : 0;
        const int64_t volume = kernel_volume(g);
        const int64_t sums = num_groups > 0 ? 2 * g.N * g.C_out : 0, count = 2 * sums + 1 + (5 + parts) * g.N;
        counter_bytes = count * 4;
        counters = take<unsigned>(count);
        workspace = {};
        workspace.channel_sums = reinterpret_cast<unsigned long long*>(counters + 2 * g.N);
        workspace.tile_ticket = counters + 2 * g.N + 2 * sums;
        workspace.runs_done = workspace.tile_ticket + 1;
        workspace.channel_tickets = workspace.runs_done + g.N, workspace.item_tickets = workspace.channel_tickets + g.N;
        workspace.counts = reinterpret_cast<float*>(workspace.item_tickets + g.N);
        workspace.moments = take<float2>(g.N * parts * t.channels());
        activation = {g.N, g.C_in, in_volume(g), t.C_pad, nullptr, false, take<__half>(g.N * in_volume(g) * t.C_pad), reinterpret_cast<scaled_half::SampleMax*>(counters)};
        weight = {plan.problem.s, t.rows, g.C_out, g.C_in, t.M_pad, t.C_pad, volume, g.C_out * volume, nullptr, take<__half>(taps * t.M_pad * t.C_pad), take<unsigned>(g.C_out)};
    }

private:
    template <typename T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base_ + bytes);
        bytes += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
        return p;
    }
    uint8_t* base_;
};

template <int kBlockN>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    RETURN_IF_ERROR(cudaFuncSetAttribute(conv_kernel<kBlockN>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes(t))));
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;
    conv_kernel<kBlockN><<<unsigned(blocks), kThreads, shared_bytes(t), stream>>>(x_map, w_map, out_map, a);
    return cudaGetLastError();
}

static int run(const Geometry& g, int dtype, int device, void* stream_pointer, void* base, const void* x, const void* w, const void* bias, bool apply_relu, void* out, const Fusion& fusion) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    const Plan& plan = plan_of(g, fusion.num_groups > 0, device);
    const Tiling& t = plan.problem.t;
    if (t.block_n == 0) return cudaErrorNotSupported;
    Scratch scratch(g, plan, fusion.num_groups, base);
    scratch.activation.x = x, scratch.weight.w = w;
    RETURN_IF_ERROR(cudaMemsetAsync(scratch.counters, 0, scratch.counter_bytes, stream));
    switch (dtype) {
        case kFloat32: RETURN_IF_ERROR(scaled_half::pack<float>(scratch.activation, scratch.weight, plan.multiprocessors, stream)); break;
        case kFloat16: RETURN_IF_ERROR(scaled_half::pack<__half>(scratch.activation, scratch.weight, plan.multiprocessors, stream)); break;
        case kBFloat16: RETURN_IF_ERROR(scaled_half::pack<__nv_bfloat16>(scratch.activation, scratch.weight, plan.multiprocessors, stream)); break;
        default: return cudaErrorInvalidValue;
    }
    CUtensorMap x_map, w_map, out_map = {};
    const CUtensorMapSwizzle swizzle = swizzle_of(t.chunk * 2);
    const StencilAxis* axis = plan.problem.s.axis;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, scratch.activation.copy, {t.C_pad, axis[2].sources, axis[1].sources, axis[0].sources, g.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, scratch.weight.copy, {t.C_pad, t.M_pad, axis[0].taps * axis[1].taps * axis[2].taps}, {t.chunk, kRows, 1}));
    if (t.tensor_store && dtype == kFloat32)
        RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE, out, {int64_t(axis[1].out) * axis[2].out, axis[0].out, g.C_out, g.N}, {t.run, 1, kRows, 1}));
    const Parameters a = {plan.problem, dtype, apply_relu, bias, out, scratch.activation.max, scratch.weight.max, scratch.workspace, fusion};
    switch (t.block_n) {
        case 240: return launch_conv<240>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 232: return launch_conv<232>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 224: return launch_conv<224>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 192: return launch_conv<192>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 160: return launch_conv<160>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        case 128: return launch_conv<128>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
        default: return launch_conv<64>(x_map, w_map, out_map, a, plan.multiprocessors, stream);
    }
}

}  // namespace conv_sm90

// Whether a tiling fits: 1 or 0.
extern "C" int conv_transpose3d_sm90_supports(const Geometry* g, int device) {
    return conv_sm90::plan_of(*g, true, device).problem.t.block_n > 0;
}

extern "C" int64_t conv_transpose3d_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::Scratch(*g, conv_sm90::plan_of(*g, false, device), 0, nullptr).bytes;
}

extern "C" int conv_transpose3d_forward_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                             const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, apply_relu != 0, out, conv_sm90::Fusion{});
}

extern "C" int64_t conv_transpose3d_relu_group_norm_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::Scratch(*g, conv_sm90::plan_of(*g, true, device), g->C_out, nullptr).bytes;
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_sm90(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace,
                                                             const void* x, const void* w, const void* bias, const void* gamma, const void* beta, int num_groups, double eps,
                                                             void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    // The copy engine moves float32 rows whose length is a multiple of 16 bytes; the rest is normalized by a kernel of its own.
    const bool in_kernel = dtype == kFloat32 && out_volume(*g) % 4 == 0;
    double* rstd = statistics + g->N * num_groups;
    const conv_sm90::Fusion fusion = {num_groups, in_kernel, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), y, statistics, rstd};
    RETURN_IF_ERROR(conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, true, activation, fusion));
    if (in_kernel) return cudaSuccess;
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), num_groups};
    return group_norm::with_dtypes(dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, activation, statistics, rstd, gamma, beta, y);
    });
}
