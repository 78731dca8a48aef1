// dweight.cuh on Hopper.
//
// A block is 1 producer and 3 consumer warpgroups. The consumers share x and dout and have neighbouring taps h, or, where there
// is one tap h, neighbouring 64 rows of GEMM_M; or, where channels are few, they share out all rows of GEMM_M and all taps (d, h). A block
// of the grid is one group of taps and channels and one part of GEMM_K; the parts' sums go to scratch memory and are added in a fixed order.
// dout has zeros between its rows, where x has its halo.
#pragma once

#include "conv_launch_sm90.cuh"
#include "dweight.cuh"

namespace dweight_sm90 {

using namespace dweight;

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
// Behind the last stage: compute-sanitizer takes the blocks of columns of an operand, which overlap, for neighbours in memory, and would see them read there.
constexpr int kTailBytes = 4096;
static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// --------------------------------------------------------------------------------------------------------- Kernel

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };

#ifdef HAS_SM90A

// One thread: loads the boxes from `begin` to `end`.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap& x_map, const CUtensorMap& dout_map, SharedHead& head, uint8_t* stages, const Group& g, int split) {
    const Tiling& t = a.p.t;
    const StencilAxis& ad = a.p.s.axis[0];
    const int row0 = first_row(a.p, g), column0 = first_column(a.p);
    const Boxes boxes(a.p, g);
    const int dout_boxes = dout_boxes_of(t, g), x_boxes = x_boxes_of(t, g);
    const int bytes = dout_boxes * t.rows * t.tile_w * kRows * 2 + x_boxes * t.box_rows * t.pitch * t.chunk * 2;
    RingPosition stage;
    const int end = boxes.begin_of(t, split + 1);
    for (int i = boxes.begin_of(t, split); i < end; i++) {
        const Box b = box_of(a.p, boxes, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
        for (int j = 0; j < x_boxes; j++) {
            const BoxOfX x = box_of_x(t, g, j);
            tma_load_5d(base + t.dout_boxes * t.dout_bytes + j * t.x_bytes, &x_map, full, x.chunk * t.chunk, column0 + b.w0, row0 + b.h0, ad.first + b.d - ad.shift[x.td], b.n);
        }
        for (int j = 0; j < dout_boxes; j++)
            for (int row = 0; row < t.rows; row++)
                tma_load_5d(base + j * t.dout_bytes + row * t.pitch * kRows * 2, &dout_map, full, (g.m + j) * kRows, b.w0, b.h0 + row, b.d, b.n);
        stage.advance(t.stages);
    }
}

template <int kBlockN, int kItems>
__device__ __forceinline__ void consume(const Parameters& a, SharedHead& head, uint8_t* stages, const Group& g, int split, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const int items = items_of(a.p, g, consumer), row_bytes = t.chunk * 2;
    const uint64_t dout_descriptor = wgmma_descriptor_base(kRows * 2), x_descriptor = wgmma_descriptor_base(row_bytes, block_bytes(t, a.p.s));
    uint32_t dout_base[kItems] = {}, x_base[kItems] = {};    // in the first stage
#pragma unroll
    for (int i = 0; i < kItems; i++) {    // a consumer with fewer jobs has its last one several times
        if (items == 0) break;
        const Job job = job_of(a.p, g, consumer, min(i, items - 1));
        dout_base[i] = shared_vector(stages + dout_box_of(t, job, consumer) * t.dout_bytes);
        x_base[i] = shared_vector(stages + t.dout_boxes * t.dout_bytes + x_box_of(t, job) * t.x_bytes + first_shift(a.p, g, job) * row_bytes);
    }
    const bool elected = threadIdx.x % 32 == 0;
    float d[kItems][kBlockN / 2];
#pragma unroll
    for (int i = 0; i < kItems; i++)
#pragma unroll
        for (int j = 0; j < kBlockN / 2; j++) d[i][j] = 0.0f;
    RingPosition stage;
    const Boxes boxes(a.p, g);
    const int begin = boxes.begin_of(t, split), end = boxes.begin_of(t, split + 1), sample_boxes = boxes.count / int(a.p.N);
    int sample_end = begin, shift_x = 0, shift_dout = 0, chain = 0, reading = -1;    // the stage that wgmma groups in flight read
    bool first = true;
    // Adds the sums to scratch memory, scaled back, and clears them.
    auto finish = [&] {
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kItems; i++)
#pragma unroll
            for (int j = 0; j < kBlockN / 2; j++) keep_after(d[i][j]);
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = -1;
        const ScaleBack back(shift_x, shift_dout);
#pragma unroll
        for (int i = 0; i < kItems; i++) {
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) add_sums(partial[(i * (kBlockN / 8) + j) * 128], first, back, &d[i][sum_at(j)]);
#pragma unroll
            for (int j = 0; j < kBlockN / 2; j++) d[i][j] = 0.0f;
        }
        first = false, chain = 0;
    };
    for (int i = begin; i < end; i++) {
        if (i == sample_end) {
            const int n = i / sample_boxes, next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]);
            if (i > begin && (next_x != shift_x || next_dout != shift_dout)) finish();
            sample_end = (n + 1) * sample_boxes, shift_x = next_x, shift_dout = next_dout;
        }
        if (chain >= kChain) finish();
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        if (items > 0) {
            const uint32_t at = stage.stage * t.stage_bytes / 16;
            wgmma_fence();
#pragma unroll 1
            for (int step = 0; step < t.steps; step++) {
                const uint32_t dout_offset = at + step * kRows * 2, x_offset = at + step * row_bytes;
#pragma unroll
                for (int item = 0; item < kItems; item++) wgmma_m64k16_f16<1>(d[item], wgmma_descriptor(dout_descriptor, dout_base[item] + dout_offset), wgmma_descriptor(x_descriptor, x_base[item] + x_offset));
            }
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
template <int kBlockN, int kItems>
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

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        if (threadIdx.x == 0) produce(a, x_map, dout_map, head, stages, g, split);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        const int consumer = threadIdx.x / 128 - 1;
        float4* partial = reinterpret_cast<float4*>(a.partial) + ((int64_t(split) * t.groups + index) * kConsumers + consumer) * t.items * (kBlockN / 8 * 128) + threadIdx.x % 128;
        consume<kBlockN, kItems>(a, head, stages, g, split, partial, consumer);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN, int kItems = 1> int launch_dweight(const CUtensorMap& x_map, const CUtensorMap& dout_map, const Parameters& a, cudaStream_t stream) {
    const int shared = kHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kTailBytes;
    return launch_with_shared(dweight_kernel<kBlockN, kItems>, a.p.t.groups * a.p.t.splits, kThreads, shared, stream, x_map, dout_map, a);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const StencilAxis* axis = a.p.s.axis;
    CUtensorMap x_map, dout_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(t.chunk * 2), x.copy, {x.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, a.p.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<5>(&dout_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kRows * 2), dout.copy, {dout.phase_channels * dout.phases(), axis[2].positions, axis[1].positions, axis[0].positions, a.p.N}, {kRows, t.tile_w, 1, 1, 1}));
    switch (t.block_n) {
        case 64: RETURN_IF_ERROR((t.joint ? launch_dweight<64, kMaxItems>(x_map, dout_map, a, stream) : launch_dweight<64>(x_map, dout_map, a, stream))); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(x_map, dout_map, a, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(x_map, dout_map, a, stream)); break;
    }
    return add_parts(a, dtype, dweight, stream);
}

}  // namespace dweight_sm90
