// dweight.cuh's product on Hopper for small grids and many channels: one element of the kernel at a time.
//
//   dweight[ci, co, k] = sum over n, p of x[n, first + p - shift, ci] * dout[n, p, (phase, co)],   (shift, phase) of k
//
// A block is a warp that loads and two warpgroups that multiply: an element of the kernel, 128 or 256 input channels, 64 or 128 output channels, a part of GEMM_K (dweight_taps_tiles.h). Both operands
// are transposed ones, a row of shared memory for each position. Sums go to scratch memory, from which a second kernel adds the parts and puts the elements of a kernel together.
#pragma once

#include "dweight.cuh"
#include "dweight_taps_tiles.h"
#include "pipeline_sm90.cuh"

namespace dweight_taps {

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 208;
constexpr int kMostRescaled = 32;    // by which powers of two sums are scaled again, rather than added to scratch memory, when the scale changes

struct Parameters {
    Plan p;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                                    // (splits, kernel, rows, columns)
};

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };
static_assert(sizeof(SharedHead) <= kHeadBytes, "the stages begin behind the head");

#ifdef HAS_SM90A

// A thread: loads a tile's boxes, of x's channels, then of dout's.
__device__ __forceinline__ void load_all(const Plan& p, const Tile& tile, SharedHead& head, uint8_t* stages, const CUtensorMap* x_map, const CUtensorMap* dout_map) {
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const TapPhase place = place_of_kernel(p.s, tile.k);
    const int tap_dh = place.tap / aw.taps, shift_d = ad.first - ad.shift[tap_dh / ah.taps], shift_h = ah.first - ah.shift[tap_dh % ah.taps], shift_w = aw.first - aw.shift[place.tap % aw.taps];
    const int channel = place.phase * p.dout_phase_channels + tile.column, x_blocks = kConsumers * p.x_blocks;
    RingPosition stage;
    const int end = p.begin_of(tile.split + 1);
    for (int i = p.begin_of(tile.split); i < end; i++) {
        const Box b = box_of(p, i);
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        uint64_t* full = head.full + stage.stage;
        mbarrier_arrive_expect_tx(full, p.stage_blocks() * p.positions() * kBlock * 2);
        uint8_t* to = stages + stage.stage * p.stage_bytes();
        for (int j = 0; j < x_blocks; j++, to += p.block_bytes()) tma_load_5d(to, x_map, full, tile.row + j * kBlock, b.w + shift_w, b.h + shift_h, b.d + shift_d, b.n);
        for (int j = 0; j < p.dout_blocks; j++, to += p.block_bytes()) tma_load_5d(to, dout_map, full, channel + j * kBlock, b.w, b.h, b.d, b.n);
        stage.advance(p.stages);
    }
}

// A consumer warpgroup.
template <int kXBlocks, int kDoutBlocks> struct Consumer {
    static constexpr int kSums = kDoutBlocks * kBlock / 2;
    const Parameters& a;
    const Tile& tile;
    int consumer, lane;
    bool first = true;                         // nothing is in scratch memory yet
    int shift_x = 0, shift_dout = 0;           // the scales of the sums
    float d[kXBlocks][kSums] = {};

    __device__ __forceinline__ Consumer(const Parameters& a, const Tile& tile) : a(a), tile(tile), consumer(threadIdx.x / 128 - 1), lane(threadIdx.x % 32) {}

    // Adds the sums to scratch memory, scaled back, and clears them: what no wgmma adds to any more.
    __device__ __forceinline__ void flush() {
        const Plan& p = a.p;
        const dweight::ScaleBack back(shift_x, shift_dout);
        const int row = tile.row + consumer * kXBlocks * kBlock + threadIdx.x / 32 % 4 * 16 + lane / 4;
        float* const to = a.partial + ((int64_t(tile.split) * kernel_volume(p.s) + tile.k) * p.rows() + row) * p.columns() + tile.column + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kXBlocks; i++)
#pragma unroll
            for (int j = 0; j < kSums; j += 2) {
                float2& sums = *reinterpret_cast<float2*>(to + (i * kBlock + j / 2 % 2 * 8) * p.columns() + j / 4 * 8);
                const float2 before = first ? make_float2(0, 0) : sums;
                sums = make_float2(before.x + back(d[i][j]), before.y + back(d[i][j + 1]));
                d[i][j] = d[i][j + 1] = 0;
            }
        first = false;
    }

    __device__ __forceinline__ void run(SharedHead& head, uint8_t* stages) {
        const Plan& p = a.p;
        const int begin = p.begin_of(tile.split), end = p.begin_of(tile.split + 1), block = p.block_bytes() / 16;
        const uint64_t x_descriptor = wgmma_descriptor_base(kBlock * 2), dout_descriptor = wgmma_descriptor_base(kBlock * 2, p.block_bytes());
        int sample_end = begin, base = 0, chain = 0, reading = -1;    // base: the scale at the last flush; the stage that wgmmas in flight read
        RingPosition stage;
        const auto wait = [&] {
            wgmma_wait_group<0>();
            if (lane == 0 && reading >= 0) mbarrier_arrive(head.empty + reading);
            reading = -1;
#pragma unroll
            for (int i = 0; i < kXBlocks; i++)
#pragma unroll
                for (int j = 0; j < kSums; j++) keep_after(d[i][j]);
        };
        for (int i = begin; i < end; i++) {
            if (i == sample_end) {
                const int n = i / p.sample_boxes(), next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]), change = next_x + next_dout - shift_x - shift_dout;
                if (i > begin && change != 0) {
                    wait();
                    if (abs(next_x + next_dout - base) > kMostRescaled || abs(change) > kMostRescaled) {
                        flush(), chain = 0, base = next_x + next_dout;
                    } else {
                        const float scale = scaled_half::power_of_two(change);
#pragma unroll
                        for (int k = 0; k < kXBlocks; k++)
#pragma unroll
                            for (int j = 0; j < kSums; j++) d[k][j] *= scale;
                    }
                } else if (i == begin) {
                    base = next_x + next_dout;
                }
                sample_end = (n + 1) * p.sample_boxes(), shift_x = next_x, shift_dout = next_dout;
            }
            if (chain >= dweight::kChain) wait(), flush(), chain = 0, base = shift_x + shift_dout;
            chain += p.steps * 16;
            mbarrier_wait(head.full + stage.stage, stage.phase);
            const uint32_t at = shared_vector(stages + stage.stage * p.stage_bytes()), x = at + consumer * kXBlocks * block, dout = at + kConsumers * kXBlocks * block;
            wgmma_fence();
#pragma unroll 1
            for (int step = 0; step < p.steps; step++)
#pragma unroll
                for (int k = 0; k < kXBlocks; k++) wgmma_m64k16_f16<1>(d[k], wgmma_descriptor(x_descriptor, x + k * block + step * kBlock * 2), wgmma_descriptor(dout_descriptor, dout + step * kBlock * 2));
            wgmma_commit_group();
            wgmma_wait_group<1>();
            if (lane == 0 && reading >= 0) mbarrier_arrive(head.empty + reading);
            reading = stage.stage;
            stage.advance(p.stages);
        }
        wait();
        flush();
    }
};

#endif  // HAS_SM90A

template <int kXBlocks, int kDoutBlocks>
__global__ void __launch_bounds__(kThreads, 1) dweight_taps_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap dout_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(base);
    uint8_t* const stages = base + kHeadBytes;
    const Plan& p = a.p;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.stages; i++) mbarrier_init(head.full + i, 1), mbarrier_init(head.empty + i, kConsumers * 4);
        fence_mbarrier_init();
    }
    // Zeros behind the box.
    const int rest = p.block_bytes() - p.positions() * kBlock * 2;
    for (int i = threadIdx.x * 16; i < p.stages * p.stage_blocks() * rest; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i / rest * p.block_bytes() + p.positions() * kBlock * 2 + i % rest) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();
    const Tile tile = tile_of(p, blockIdx.x);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == 0) load_all(p, tile, head, stages, &x_map, &dout_map);
    } else {
        setmaxnreg_inc<kMultiplyRegisters>();
        Consumer<kXBlocks, kDoutBlocks>(a, tile).run(head, stages);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------- Adding

constexpr int kAddThreads = 256, kAddOutputs = 32;

// dweight (C_in, C_out, kernel) from the parts: a block has some output channels of an input channel, whose kernels are neighbours in memory.
__global__ void __launch_bounds__(kAddThreads) add_taps_kernel(const __grid_constant__ Plan p, const float* __restrict__ partial, int dtype, void* __restrict__ dweight) {
    extern __shared__ __align__(16) uint8_t memory[];
    float* const values = reinterpret_cast<float*>(memory);    // (outputs, volume)
    const int volume = kernel_volume(p.s), tiles = (p.C_out + kAddOutputs - 1) / kAddOutputs, ci = blockIdx.x / tiles, co0 = blockIdx.x % tiles * kAddOutputs, outputs = min(kAddOutputs, p.C_out - co0);
    const int output = threadIdx.x % kAddOutputs;
    const int64_t element = int64_t(p.rows()) * p.columns();
    wait_for_previous_kernel();
    const float* const from = partial + int64_t(ci) * p.columns() + co0 + output;    // there are columns() of them
    constexpr int kAtOnce = 4, kStep = kAddThreads / kAddOutputs;    // elements of the kernel
    for (int k0 = threadIdx.x / kAddOutputs; k0 < volume; k0 += kAtOnce * kStep) {
        float sums[kAtOnce] = {};
        for (int split = 0; split < p.splits; split++)
#pragma unroll
            for (int i = 0; i < kAtOnce; i++)
                if (k0 + i * kStep < volume) sums[i] += from[(int64_t(split) * volume + k0 + i * kStep) * element];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
            if (k0 + i * kStep < volume) values[output * volume + k0 + i * kStep] = sums[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < outputs * volume; i += kAddThreads) store_as(dweight, dtype, (int64_t(ci) * p.C_out + co0) * volume + i, values[i]);
}

// ------------------------------------------------------------------------------------------------------- Launcher

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Plan& p = a.p;
    const StencilAxis* axis = p.s.axis;
    CUtensorMap x_map, dout_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kBlock * 2), x.copy, {x.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, p.N}, {kBlock, p.box[2], p.box[1], p.box[0], 1}));
    RETURN_IF_ERROR(make_tensor_map<5>(&dout_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kBlock * 2), dout.copy, {dout.phase_channels * dout.phases(), axis[2].positions, axis[1].positions, axis[0].positions, p.N}, {kBlock, p.box[2], p.box[1], p.box[0], 1}));
    const auto kernel = p.x_blocks == 2 ? (p.dout_blocks == 2 ? dweight_taps_kernel<2, 2> : dweight_taps_kernel<2, 1>) : (p.dout_blocks == 2 ? dweight_taps_kernel<1, 2> : dweight_taps_kernel<1, 1>);
    RETURN_IF_ERROR(launch_with_shared(kernel, p.tiles() * p.splits, kThreads, p.shared_bytes(), stream, x_map, dout_map, a));
    return launch_with_shared(add_taps_kernel, int64_t(p.C_in) * ceil_div(p.C_out, kAddOutputs), kAddThreads, kAddOutputs * kernel_volume(p.s) * 4, stream, p, a.partial, dtype, dweight);
}

}  // namespace dweight_taps
