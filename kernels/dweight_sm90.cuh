// dweight.cuh on Hopper.
//
// A block is 1 producer and 3 consumer warpgroups. The consumers share x and dout and have neighbouring taps h, or, where there
// is one tap h, neighbouring 64 rows of GEMM_M. A block of the grid is one group of taps and channels and one part of GEMM_K; the
// parts' sums go to scratch memory and are added in a fixed order. dout has zeros between its rows, where x has its halo.
//
#pragma once

#include "conv_launch_sm90.cuh"
#include "dweight.cuh"

namespace dweight_sm90 {

using namespace dweight;

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 152;
// Behind the last stage: compute-sanitizer takes the blocks of columns of an operand, which overlap, for neighbours in memory, and would see them read there.
constexpr int kTailBytes = 4096;
static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// --------------------------------------------------------------------------------------------------------- Kernel

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };

#ifdef HAS_SM90A

// One thread: loads the boxes from `begin` to `end`.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap& x_map, const CUtensorMap& dout_map, SharedHead& head, uint8_t* stages, const Group& g, const Boxes& boxes, int begin, int end) {
    const Tiling& t = a.p.t;
    const StencilAxis& ad = a.p.s.axis[0];
    const int row0 = first_row(a.p, g), column0 = first_column(a.p);
    const int dout_boxes = min(t.dout_boxes, t.row_blocks - g.m), x_boxes = t.n_over_taps ? 1 : min(t.blocks, t.chunks - g.n);
    const int bytes = dout_boxes * t.rows * t.tile_w * kRows * 2 + x_boxes * t.box_rows * t.pitch * t.chunk * 2;
    RingPosition stage;
    for (int i = begin; i < end; i++) {
        const Box b = box_of(a.p, boxes, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
        for (int j = 0; j < x_boxes; j++)
            tma_load_5d(base + t.dout_boxes * t.dout_bytes + j * t.x_bytes, &x_map, full, (g.n + j) * t.chunk, column0 + b.w0, row0 + b.h0, ad.first + b.d - ad.shift[g.td], b.n);
        for (int j = 0; j < dout_boxes; j++)
            for (int row = 0; row < t.rows; row++)
                tma_load_5d(base + j * t.dout_bytes + row * t.pitch * kRows * 2, &dout_map, full, (g.m + j) * kRows, b.w0, b.h0 + row, b.d, b.n);
        stage.advance(t.stages);
    }
}

// Adds a thread's sums to scratch memory, scaled back by 2^-shift_a and 2^-shift_b, and clears them.
template <int kBlockN> __device__ __forceinline__ void flush(float (&d)[kBlockN / 2], float4* partial, bool first, int shift_a, int shift_b) {
    const ScaleBack back(shift_a, shift_b);
#pragma unroll
    for (int i = 0; i < kBlockN / 8; i++) {
        const float4 before = first ? make_float4(0, 0, 0, 0) : partial[i * 128];
        partial[i * 128] = make_float4(before.x + back(d[i * 4]), before.y + back(d[i * 4 + 1]), before.z + back(d[i * 4 + 2]), before.w + back(d[i * 4 + 3]));
    }
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
}

template <int kBlockN>
__device__ __forceinline__ void consume(const Parameters& a, SharedHead& head, uint8_t* stages, const Group& g, const Boxes& boxes, int begin, int end, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const bool live = is_live(a.p, g, consumer);
    const int row_bytes = t.chunk * 2;
    const uint64_t dout_descriptor = wgmma_descriptor_base(kRows * 2), x_descriptor = wgmma_descriptor_base(row_bytes, t.n_over_taps ? step_w(a.p.s) * row_bytes : t.x_bytes);
    const uint32_t dout_base = shared_vector(stages + (t.m_over_taps ? 0 : consumer) * t.dout_bytes);
    const uint32_t x_base = live ? shared_vector(stages + t.dout_boxes * t.dout_bytes + first_shift(a.p, g, consumer) * row_bytes) : 0;
    const bool elected = threadIdx.x % 32 == 0;
    float d[kBlockN / 2];
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
    RingPosition stage;
    int sample = -1, shift_x = 0, shift_dout = 0, reading = -1;    // the stage that wgmma groups in flight read
    int chain = 0;
    bool first = true;
    auto finish = [&] {
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) keep_after(d[i]);
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = -1;
        flush<kBlockN>(d, partial, first, shift_x, shift_dout);
        first = false, chain = 0;
    };
    for (int i = begin; i < end; i++) {
        const int n = box_of(a.p, boxes, i).n;
        if (n != sample) {
            const int next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]);
            if (sample >= 0 && (next_x != shift_x || next_dout != shift_dout)) finish();
            sample = n, shift_x = next_x, shift_dout = next_dout;
        }
        if (chain >= kChain) finish();
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        if (live) {
            const uint32_t dout = dout_base + stage.stage * t.stage_bytes / 16, x = x_base + stage.stage * t.stage_bytes / 16;
            wgmma_fence();
#pragma unroll 1
            for (int step = 0; step < t.steps; step++)
                wgmma_m64k16_f16<1>(d, wgmma_descriptor(dout_descriptor, dout + step * kRows * 2), wgmma_descriptor(x_descriptor, x + step * row_bytes));
            wgmma_commit_group();
            wgmma_wait_group<1>();
        }
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = stage.stage;
        stage.advance(t.stages);
    }
    finish();
}

#endif  // HAS_SM90A

// Grid: (group, split), groups fastest, so that the blocks which read the same boxes run together.
template <int kBlockN>
__global__ void __launch_bounds__(kThreads, 1)
dweight_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    uint8_t* stages = base + kHeadBytes;
    const Tiling& t = a.p.t;
    const int index = blockIdx.x % t.groups, split = blockIdx.x / t.groups;
    const Group g(t, a.p.s, index);
    if (!is_live(a.p, g)) return wait_for_previous_kernel();

    // Prologue: barriers, and zeros wherever the copies leave gaps.
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.stages; i++) mbarrier_init(head.full + i, 1), mbarrier_init(head.empty + i, kConsumers * 4);
        fence_mbarrier_init();
    }
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();

    const Boxes boxes(a.p, g.td);
    const int begin = int(int64_t(boxes.count) * split / t.splits), end = int(int64_t(boxes.count) * (split + 1) / t.splits);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        if (threadIdx.x == 0) produce(a, x_map, dout_map, head, stages, g, boxes, begin, end);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        const int consumer = threadIdx.x / 128 - 1;
        float4* partial = reinterpret_cast<float4*>(a.partial) + ((int64_t(split) * t.groups + index) * kConsumers + consumer) * (kBlockN / 8 * 128) + threadIdx.x % 128;
        consume<kBlockN>(a, head, stages, g, boxes, begin, end, partial, consumer);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN> int launch_dweight(const CUtensorMap& x_map, const CUtensorMap& dout_map, const Parameters& a, cudaStream_t stream) {
    const int shared = kHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kTailBytes;
    return launch_with_shared(dweight_kernel<kBlockN>, a.p.t.groups * a.p.t.splits, kThreads, shared, stream, x_map, dout_map, a);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const StencilAxis* axis = a.p.s.axis;
    CUtensorMap x_map, dout_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(t.chunk * 2), x.copy, {x.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, a.p.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<5>(&dout_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kRows * 2), dout.copy, {dout.phase_channels * dout.phases(), axis[2].positions, axis[1].positions, axis[0].positions, a.p.N}, {kRows, t.tile_w, 1, 1, 1}));
    switch (t.block_n) {
        case 64: RETURN_IF_ERROR(launch_dweight<64>(x_map, dout_map, a, stream)); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(x_map, dout_map, a, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(x_map, dout_map, a, stream)); break;
    }
    return add_parts(a, dtype, dweight, stream);
}

}  // namespace dweight_sm90
