// dweight.cuh on Hopper where a block reads all of a box of dout (Tiling::packs): from its float32 elements, whose packed copy is made on the way.
//
// A block is two warpgroups of packers and two that multiply. Shared memory leaves 60 KB of the L1 cache, which the packers' loads go through.
#pragma once

#include "dout_packer_sm90.cuh"
#include "dweight_sm90.cuh"

namespace dweight_sm90 {

constexpr int kPackingN = 64;          // GEMM_N
constexpr int kPackerThreads = 32 * kPackerWarps, kPackingThreads = kPackerThreads + 128 * kPackingConsumers, kPackerRegisters = 56, kPackingConsumerRegisters = 200;
static_assert(kPackerThreads * kPackerRegisters + 128 * kPackingConsumers * kPackingConsumerRegisters <= 65536, "the register file of a multiprocessor");

struct PackingHead : SharedHead {
    Unit units[kMostUnits];
};
constexpr int kPackingHeadBytes = 2048;    // a multiple of 1024
static_assert(sizeof(PackingHead) <= kPackingHeadBytes, "the stages begin behind the head");

// For head and stages, as choose_tiling counts them.
constexpr int kPackingSharedBytes = 195 * 1024 - kPackerBytes - (kPackingHeadBytes - kHeadBytes);

// --------------------------------------------------------------------------------------------------------- Kernel

#ifdef HAS_SM90A

// The packers; one thread also loads x.
__device__ __forceinline__ void pack(const Parameters& a, const Packing& packing, const CUtensorMap& x_map, PackingHead& head, uint8_t* stages, const Group& g, int boxes) {
    const Tiling& t = a.p.t;
    Packer packer(a.p, packing, head.units, stages + t.stages * t.stage_bytes, boxes);
    RingPosition stage;
    for (int i = blockIdx.x; i < boxes; i += t.splits) {
        const Box b = box_of(a.p, packing, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect_tx(full, x_bytes_of(t, g));
            load_x(a, x_map, g, b, base, full);
        }
        __syncwarp();
        packer.pack(b, base);
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(full);
        stage.advance(t.stages);
    }
    packer.report();
}

// A lane of each consumer's warps: its share of a packed box.
__device__ __forceinline__ void store_packed(const Tiling& t, const CUtensorMap& dout_map, const Box& b, const uint8_t* stage, int warp) {
    for (int i = warp; i < t.dout_boxes * t.rows; i += kPackingConsumers * 4) {
        const int j = i / t.rows, row = i - j * t.rows;
        tma_store_5d(&dout_map, stage + j * t.dout_bytes + row * t.pitch * kRows * 2, j * kRows, b.w0, b.h0 + row, b.d, b.n);
    }
    bulk_commit_group();
}

__device__ __forceinline__ void multiply_packed(const Parameters& a, const Packing& packing, const CUtensorMap& dout_map, PackingHead& head, uint8_t* stages, const Group& g, int boxes, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const bool elected = threadIdx.x % 32 == 0;
    const Operands<kPackingItems> operands(a.p, g, stages, consumer, items_of(a.p, g, consumer));
    float d[kPackingItems][kPackingN / 2] = {};
    RingPosition stage;
    int sample = -1, shift_x = 0, shift_dout = 0, chain = 0, reading = -1;    // the stage that wgmmas and stores in flight read
    bool first = true;
    const auto free_stage = [&] {
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
    };
    for (int i = blockIdx.x; i < boxes; i += t.splits) {
        const Box b = box_of(a.p, packing, i);
        if (b.n != sample || chain >= kChain) {
            const int next_x = scaled_half::shift_of(a.x_max[b.n]), next_dout = shift_of(packing, b.n);
            if (sample >= 0 && (next_x != shift_x || next_dout != shift_dout || chain >= kChain)) {
                wgmma_wait_group<0>();
                if (elected) bulk_wait_group_read<0>();
                free_stage();
                reading = -1;
                flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
                first = false, chain = 0;
            }
            sample = b.n, shift_x = next_x, shift_dout = next_dout;
        }
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        fence_proxy_async();               // what the packers have stored; there it would wait for their loads
        if (elected && packing.stores) store_packed(t, dout_map, b, stages + stage.stage * t.stage_bytes, consumer * 4 + threadIdx.x / 32 % 4);
        __syncwarp();
        operands.multiply(t, stage.stage, d);
        wgmma_wait_group<1>();
        if (elected) bulk_wait_group_read<1>();
        free_stage();
        reading = stage.stage;
        stage.advance(t.stages);
    }
    wgmma_wait_group<0>();
    flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
    if (elected) bulk_wait_group<0>();
}

#endif  // HAS_SM90A

__global__ void __launch_bounds__(kPackingThreads, 1)
packing_dweight_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a, const __grid_constant__ Packing packing) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    PackingHead& head = *reinterpret_cast<PackingHead*>(base);
    uint8_t* stages = base + kPackingHeadBytes;
    const Tiling& t = a.p.t;
    const Group g(t, a.p.s, 0);
    const int boxes = Boxes(a.p, g).count;
    if (packing.again) {
        wait_for_previous_kernel();
        if (!scaled_half::any_copied_again(packing.max, int(a.p.N))) return;
    }
    prepare_stages<kPackingThreads>(head, t, stages, 1 + kPackerWarps, kPackingConsumers * 4);
    for (int i = threadIdx.x; i < packing.units; i += kPackingThreads) head.units[i] = unit_of(a.p, i);
    fence_proxy_async();
    __syncthreads();
    wait_before_next_kernel();
    if (threadIdx.x < kPackerThreads) {
        setmaxnreg_dec<kPackerRegisters>();
        pack(a, packing, x_map, head, stages, g, boxes);
    } else {
        setmaxnreg_inc<kPackingConsumerRegisters>();
        const int consumer = (threadIdx.x - kPackerThreads) / 128;
        float4* partial = reinterpret_cast<float4*>(a.partial) + (int64_t(blockIdx.x) * kPackingConsumers + consumer) * kPackingItems * (kPackingN / 8 * 128) + threadIdx.x % 128;
        multiply_packed(a, packing, dout_map, head, stages, g, boxes, partial, consumer);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

// dweight from packed x and float32 dout; and for dx, unless the weight has no channels, the copies of dout and weight.
inline int pack_and_differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, const scaled_half::Weight& weight, void* dweight, cudaStream_t stream) {
    Maps maps;
    RETURN_IF_ERROR(maps.make(a.p, x, dout));
    RETURN_IF_ERROR(scaled_half::look_when_idle(dout, weight, stream));
    const int shared = kPackingHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kPackerBytes;
    Packing packing = make_packing(a.p, dout, weight.channels > 0);
    RETURN_IF_ERROR(launch_with_shared(packing_dweight_kernel, a.p.t.splits, kPackingThreads, shared, stream, maps.x, maps.dout, a, packing));
    RETURN_IF_ERROR(scaled_half::copy_weight_beside(weight, stream));
    packing.again = true;
    if (!looks_at_all(dout)) RETURN_IF_ERROR(launch_with_shared(packing_dweight_kernel, a.p.t.splits, kPackingThreads, shared, stream, maps.x, maps.dout, a, packing));
    return add_parts(a.p, a.partial, kFloat32, dweight, stream);
}

}  // namespace dweight_sm90
