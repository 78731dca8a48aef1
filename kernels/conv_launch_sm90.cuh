// The Hopper convolution's kernel and its launch.
#pragma once

#include "conv_plan.cuh"
#include "conv_sm90.cuh"

namespace conv_sm90 {

// --------------------------------------------------------------------------------------------------------- Kernel

// kRelu: a.apply_relu. Each of the two is a kernel of its own: much of a short call is code that is brought for the first time.
template <int kBlockN, int kConsumers, bool kRelu>
__global__ void __launch_bounds__(threads_of(kConsumers), 1)
conv_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map,
            const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    const Tiling& t = a.p.t;
    const SharedParts shared(base, t);
    SharedHead& head = shared.head;
    const bool normalizes = kRelu && a.norm.blocks > 0;

    // Prologue: barriers, and zeros behind each box, where the last row's halo looks.
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.input_stages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 4 * kConsumers);
        for (int i = 0; i < t.weight_rings * t.weight_stages; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, t.weight_rings == 2 ? 4 : 4 * kConsumers);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, kConsumers), mbarrier_init(head.tile_empty + i, 128 * kConsumers + 2 * 32 + t.loaders * 32);
        for (int i = 0; normalizes && i < 4 * kConsumers * kPieceStages; i++) mbarrier_init(head.piece_full[0] + i, 1);
        for (int i = 0; i < kConsumers; i++) mbarrier_init(head.buffer_free + i, 32), mbarrier_init(head.staged[0] + i, 128), mbarrier_init(head.staged[1] + i, 128);
        fence_mbarrier_init();
    }
    if (t.items > 1 && threadIdx.x < t.items) head.item_rows[threadIdx.x] = rows_of_item(a.p, threadIdx.x);
    const int box_bytes = t.box_bytes();
    for (int stage = 0; stage < t.input_stages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += blockDim.x * 4) *reinterpret_cast<uint32_t*>(shared.input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    // A warp for each task beside the warpgroups that compute. The first tile is located while the kernel before this one ends: what reads memory waits for that.
    const int warp = threadIdx.x / 32;
    if (warp < 4) {
        setmaxnreg_dec<producer_registers(kConsumers)>();
        if (warp < t.loaders) {
            Loader{a, shared, &x_map, &w_map, t.weight_rings == 2 ? warp : 0, warp == t.box_loader, warp < t.weight_rings}.run();
        } else {
            const bool publishes = warp == (t.loaders == 2 ? 3 : 1);
            Publisher publisher(a, head);
            if (warp >= 2) Storer{a, shared, &out_map, warp - 2}.run(publisher, publishes, normalizes);
            else while (publisher.publish()) {}
        }
        if (normalizes) find_statistics(a, Storer::reports_of_sample(a.p), head.statistics, kStatisticsBarrier);
    } else {
        setmaxnreg_inc<consumer_registers(kConsumers)>();
        wait_for_previous_kernel();
        consume<kBlockN, kRelu>(a, shared);
        if (normalizes) {
            named_barrier(kStagesFreeBarrier, 128 * kConsumers);
            PieceNormalizer(a, shared.input + (warp - 4) * kPieceStages * piece_floats(t) * 4, head.piece_full[warp - 4]).run();
        }
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN, int kConsumers = 2>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;    // those that normalize beside the others included
    return launch_with_shared(a.apply_relu ? conv_kernel<kBlockN, kConsumers, true> : conv_kernel<kBlockN, kConsumers, false>, blocks, threads_of(kConsumers), shared_bytes(t), stream, x_map, w_map, out_map, a);
}

// The convolution's launches on Hopper (conv_plan.cuh).
struct Path {
    static Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int) {
        return conv_sm90::choose_tiling(s, samples, source_channels, channels, groups, multiprocessors);
    }
    static int normalizing_blocks(const Plan& plan, const group_norm::Shape& shape, int dtype, int y_dtype, const void* r, const void* y) {
        return conv::normalizing_blocks(plan.problem, shape, dtype, y_dtype, plan.multiprocessors, r, y);
    }
    // a.out = the convolution of packed operands, or the parts of it, and its moments where there is room for them.
    static int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
        const Problem& p = a.p;
        const Tiling& t = p.t;
        const StencilAxis* axis = p.s.axis;
        CUtensorMap x_map, w_map, out_map = {};
        const CUtensorMapSwizzle swizzle = swizzle_of(t.chunk * 2);
        RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, source.copy, {source.phase_channels * source.phases(), axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {t.chunk, t.pitch, t.box_rows, t.planes, 1}));
        RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle, weight.copy, {t.C_pad * t.products, t.M_pad, p.s.taps()}, {t.chunk, kRows, t.item_taps}));
        if (t.tensor_store && a.dtype == kFloat32)
            RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE, a.out, {int64_t(axis[1].out) * axis[2].out, axis[0].out, p.C_out, p.N * t.k_parts}, {t.run, 1, t.region_channels, 1}));
        switch (t.block_n) {
            case 232: return launch_conv<232>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 224: return launch_conv<224>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 200: return launch_conv<200>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 192: return launch_conv<192>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 160: return launch_conv<160>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 136: return launch_conv<136, 3>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 128: return launch_conv<128>(x_map, w_map, out_map, a, multiprocessors, stream);
            case 88: return launch_conv<88>(x_map, w_map, out_map, a, multiprocessors, stream);
            default: return launch_conv<64>(x_map, w_map, out_map, a, multiprocessors, stream);
        }
    }
};

}  // namespace conv_sm90
