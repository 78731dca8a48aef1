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

// A block's share of the prologue: barriers, of so many arrivals, and zeros wherever the copies leave gaps.
template <int kBlockThreads> __device__ __forceinline__ void prepare_stages(SharedHead& head, const Tiling& t, uint8_t* stages, int full, int empty) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.stages; i++) mbarrier_init(head.full + i, full), mbarrier_init(head.empty + i, empty);
        fence_mbarrier_init();
    }
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kBlockThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void load_x(const Parameters& a, const CUtensorMap& x_map, const Group& g, const Box& b, uint8_t* stage, uint64_t* full) {
    const Tiling& t = a.p.t;
    const StencilAxis& ad = a.p.s.axis[0];
    for (int j = 0; j < x_boxes_of(t, g); j++) {
        const BoxOfX x = box_of_x(t, g, j);
        tma_load_5d(stage + t.dout_boxes * t.dout_bytes + j * t.x_bytes, &x_map, full, x.chunk * t.chunk, first_column(a.p) + b.w0, first_row(a.p, g) + b.h0, ad.first + b.d - ad.shift[x.td], b.n);
    }
}

// One thread: loads the boxes from `begin` to `end`.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap& x_map, const CUtensorMap& dout_map, SharedHead& head, uint8_t* stages, const Group& g, int split) {
    const Tiling& t = a.p.t;
    const Boxes boxes(a.p, g);
    const int dout_boxes = dout_boxes_of(t, g), bytes = dout_boxes * t.rows * t.tile_w * kRows * 2 + x_bytes_of(t, g);
    RingPosition stage;
    const int end = boxes.begin_of(t, split + 1);
    for (int i = boxes.begin_of(t, split); i < end; i++) {
        const Box b = box_of(a.p, boxes, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
        load_x(a, x_map, g, b, base, full);
        for (int j = 0; j < dout_boxes; j++)
            for (int row = 0; row < t.rows; row++)
                tma_load_5d(base + j * t.dout_bytes + row * t.pitch * kRows * 2, &dout_map, full, (g.m + j) * kRows, b.w0, b.h0 + row, b.d, b.n);
        stage.advance(t.stages);
    }
}

// What a consumer multiplies: where its jobs' operands are in the first stage.
template <int kItems> struct Operands {
    uint64_t dout_descriptor, x_descriptor;
    uint32_t dout[kItems], x[kItems];
    __device__ __forceinline__ Operands(const Problem& p, const Group& g, const uint8_t* stages, int consumer, int items) {
        const Tiling& t = p.t;
        dout_descriptor = wgmma_descriptor_base(kRows * 2), x_descriptor = wgmma_descriptor_base(t.chunk * 2, block_bytes(t, p.s));
#pragma unroll
        for (int i = 0; i < kItems; i++) {    // a consumer with fewer jobs has its last one several times
            dout[i] = x[i] = 0;
            if (items == 0) continue;
            const Job job = job_of(p, g, consumer, min(i, items - 1));
            dout[i] = shared_vector(stages + dout_box_of(t, job, consumer) * t.dout_bytes);
            x[i] = shared_vector(stages + t.dout_boxes * t.dout_bytes + x_box_of(t, job) * t.x_bytes + first_shift(p, g, job) * t.chunk * 2);
        }
    }
    // Adds a stage's products to d, in the background.
    template <int kSums> __device__ __forceinline__ void multiply(const Tiling& t, int stage, float (&d)[kItems][kSums]) const {
        const uint32_t at = stage * t.stage_bytes / 16;
        const int row_bytes = t.chunk * 2;
        wgmma_fence();
#pragma unroll 1
        for (int step = 0; step < t.steps; step++) {
            const uint32_t dout_offset = at + step * kRows * 2, x_offset = at + step * row_bytes;
#pragma unroll
            for (int item = 0; item < kItems; item++) wgmma_m64k16_f16<1>(d[item], wgmma_descriptor(dout_descriptor, dout[item] + dout_offset), wgmma_descriptor(x_descriptor, x[item] + x_offset));
        }
        wgmma_commit_group();
    }
};

// Adds sums to scratch memory, scaled back, and clears them: what no wgmma adds to any more.
template <int kItems, int kSums> __device__ __forceinline__ void flush_sums(float4* partial, bool first, const ScaleBack& back, float (&d)[kItems][kSums]) {
#pragma unroll
    for (int i = 0; i < kItems; i++) {
#pragma unroll
        for (int j = 0; j < kSums; j++) keep_after(d[i][j]);
#pragma unroll
        for (int j = 0; j < kSums / 4; j++) add_sums(partial[(i * (kSums / 4) + j) * 128], first, back, &d[i][sum_at(j)]);
#pragma unroll
        for (int j = 0; j < kSums; j++) d[i][j] = 0.0f;
    }
}

template <int kBlockN, int kItems>
__device__ __forceinline__ void consume(const Parameters& a, SharedHead& head, uint8_t* stages, const Group& g, int split, float4* partial, int consumer) {
    const Tiling& t = a.p.t;
    const int items = items_of(a.p, g, consumer);
    const Operands<kItems> operands(a.p, g, stages, consumer, items);
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
        if (elected && reading >= 0) mbarrier_arrive(head.empty + reading);
        reading = -1;
        flush_sums(partial, first, ScaleBack(shift_x, shift_dout), d);
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
            operands.multiply(t, stage.stage, d);
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

    prepare_stages<kThreads>(head, t, stages, 1, kConsumers * 4);
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

// Of the copies of x and dout.
struct Maps {
    CUtensorMap x, dout;
    int make(const Problem& p, const scaled_half::Activation& x_copy, const scaled_half::Activation& dout_copy) {
        const Tiling& t = p.t;
        const StencilAxis* axis = p.s.axis;
        RETURN_IF_ERROR(make_tensor_map<5>(&x, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(t.chunk * 2), x_copy.copy, {x_copy.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
        return make_tensor_map<5>(&dout, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kRows * 2), dout_copy.copy, {dout_copy.phase_channels * dout_copy.phases(), axis[2].positions, axis[1].positions, axis[0].positions, p.N}, {kRows, t.tile_w, 1, 1, 1});
    }
};

template <int kBlockN, int kItems = 1> int launch_dweight(const Maps& maps, const Parameters& a, cudaStream_t stream) {
    const int shared = kHeadBytes + a.p.t.stages * a.p.t.stage_bytes + kTailBytes;
    return launch_with_shared(dweight_kernel<kBlockN, kItems>, a.p.t.groups * a.p.t.splits, kThreads, shared, stream, maps.x, maps.dout, a);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    Maps maps;
    RETURN_IF_ERROR(maps.make(a.p, x, dout));
    switch (a.p.t.block_n) {
        case 64: RETURN_IF_ERROR((a.p.t.joint ? launch_dweight<64, kMaxItems>(maps, a, stream) : launch_dweight<64>(maps, a, stream))); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(maps, a, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(maps, a, stream)); break;
    }
    return add_parts(a.p, a.partial, dtype, dweight, stream);
}

}  // namespace dweight_sm90
