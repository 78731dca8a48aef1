// Strided transposed convolution of one group of many channels, alone or with ReLU and GroupNorm behind it, TF32-equivalent, from packed operands: wgmma for sm_90a.
//
//   out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh), channels-last: GEMM_M = output channels, GEMM_N = positions, GEMM_K = (tap, input channel), for one phase of the outputs (polyphase_tiles.h) at a time,
// so that nothing is multiplied with zeros between taps. Both phases of W are in the registers of the same warpgroup: a thread has two neighbouring positions of each, four neighbours in memory.
//
// One block per multiprocessor: a warp that takes tiles from a queue and loads their boxes of the source and their weights, and two warpgroups that multiply. These share boxes and weights, and take
// turns to store, so that one multiplies while the other stores. Fused: it leaves the moments of relu(out), of which conv_statistics.cuh makes the statistics.
// Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.
#pragma once

#include <type_traits>

#include "conv_statistics.cuh"
#include "pipeline_sm90.cuh"
#include "polyphase_tiles.h"
#include "scaled_half.cuh"

namespace polyphase {

constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;

struct Parameters {
    Plan p;
    bool apply_relu;
    const float* bias;                               // (C_out), or null
    float* out;
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (C_out)
    unsigned* ticket;                                // of the next tile but a block's first; starts at zero
    group_norm::MomentSets sets;                     // of relu(out)
};

struct SharedHead {
    uint64_t box_full[kMaxBoxes], box_empty[kMaxBoxes], weight_full[kMaxWeights], weight_empty[kMaxWeights], tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t stored[kConsumers];
    Tile tiles[kTileSlots];
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the boxes begin behind the head");

#ifdef HAS_SM90A

// The parts of shared memory: the head, boxes (planes, box_rows, pitch, kChunk), weights (taps_w, kRows, kChunk), eight channels' outputs of each warp that multiplies (8, staged_channel).
struct SharedParts {
    SharedHead& head;
    uint8_t *boxes, *weights;
    float* staged;
    __device__ SharedParts(uint8_t* base, const Plan& p)
        : head(*reinterpret_cast<SharedHead*>(base)), boxes(base + kHeadBytes), weights(boxes + p.boxes * p.box_stage_bytes()), staged(reinterpret_cast<float*>(weights + p.weights * p.weight_bytes())) {}
};

// A thread: takes tiles and loads what they need.
__device__ __forceinline__ void load_all(const Parameters& a, const SharedParts& shared, const CUtensorMap* x_map, const CUtensorMap* w_map) {
    const Plan& p = a.p;
    SharedHead& head = shared.head;
    RingPosition box, weight, slot;
    for (int i = blockIdx.x;; i = gridDim.x + atomicAdd(a.ticket, 1u)) {
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        Tile tile = {-1};
        if (i < p.tiles) tile = locate(p, i);
        head.tiles[slot.stage] = tile;
        mbarrier_arrive(head.tile_full + slot.stage);
        slot.advance(kTileSlots);
        if (tile.n < 0) return;
        const Phase &d = p.phase_d[tile.phase_d], &h = p.phase_h[tile.phase_h];
        for (int tap_d = tile.first_tap; tap_d < tile.first_tap + tile.taps_d; tap_d++)
            for (int chunk = 0; chunk < p.chunks; chunk++) {
                mbarrier_wait(head.box_empty + box.stage, box.phase ^ 1);
                mbarrier_arrive_expect_tx(head.box_full + box.stage, p.box_bytes());
                tma_load_5d(shared.boxes + box.stage * p.box_stage_bytes(), x_map, head.box_full + box.stage, chunk * kChunk, tile.w0 + p.first_w, tile.h0 + first_row(h), tile.d + d.src + tap_d * d.src_tap_step, tile.n);
                box.advance(p.boxes);
                for (int tap_h = 0; tap_h < h.taps; tap_h++) {
                    mbarrier_wait(head.weight_empty + weight.stage, weight.phase ^ 1);
                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, p.weight_bytes());
                    tma_load_3d(shared.weights + weight.stage * p.weight_bytes(), w_map, head.weight_full + weight.stage, chunk * kChunk, tile.channel0, ((d.k + tap_d * d.k_step) * p.kernel_h + h.k + tap_h * h.k_step) * p.taps_w);
                    weight.advance(p.weights);
                }
            }
    }
}

// One of the two output channels that a thread has.
struct Channel {
    bool exists;
    unsigned weight_max;
    float bias, scale, more;    // back to what the sums stand for: scale, unless that would not be a normal number
};

// A consumer warpgroup.
template <int kBlockN, int kTapsW> struct Consumer {
    const Parameters& a;
    const SharedParts& shared;
    int warpgroup, warp, lane;
    RingPosition box, weight;
    int offsets[kBlockN / 8];    // of the first of two neighbouring columns' outputs, or -1; where they are staged, of that place
    Channel channels[2];
    scaled_half::SampleMax activation_max;    // of the tile's sample

    __device__ __forceinline__ Consumer(const Parameters& a, const SharedParts& shared) : a(a), shared(shared), warpgroup(threadIdx.x / 128 - 1), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const Column at = column_at(a.p, j * 8 + lane % 4 * 2);
            offsets[j] = -1;
            if (at.plane < a.p.run_planes && at.y < a.p.rows && at.x < a.p.tile_w)
                offsets[j] = a.p.stores_vectors() ? offset_of(at) : (at.plane * a.p.rows + at.y) * a.p.staged_row() + at.x * kPhasesW;
        }
    }

    // The first of the thread's output channels, in a tile; the second is 8 further.
    __device__ __forceinline__ int own_channel() const { return warp * 16 + lane / 4; }

    // Loads what the outputs will need; prepare_channels makes use of it, many cycles later.
    __device__ __forceinline__ void load_channels(const Tile& tile) {
        activation_max = a.activation_max[tile.n];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int channel = tile.channel0 + own_channel() + half * 8;
            Channel& c = channels[half];
            c.exists = channel < a.p.C_out;
            c.weight_max = c.exists ? a.weight_max[channel] : 0;
            c.bias = c.exists && a.bias ? a.bias[channel] : 0.0f;
        }
    }
    __device__ __forceinline__ void prepare_channels() {
#pragma unroll
        for (Channel& c : channels) {
            const auto [scale, more] = scaled_half::scale_in_parts(-scaled_half::shift_of(activation_max) - scaled_half::shift_of(c.weight_max));
            c.scale = scale, c.more = more;
        }
    }

    // The sums of a tile: of elements of W in even turns, and in odd ones.
    __device__ __forceinline__ void multiply(const Tile& tile, float (&even)[kBlockN / 2], float (&odd)[kBlockN / 2]) {
        constexpr int kRowVectors = kChunk * 2 / 16;    // of 16 bytes, as all addresses of operands here
        const Plan& p = a.p;
        SharedHead& head = shared.head;
        const Phase& h = p.phase_h[tile.phase_h];
        const uint64_t descriptor = wgmma_descriptor_base(kChunk * 2);
        int stages = tile.taps_d * p.chunks * h.taps;
        if (stages == 0) {
#pragma unroll
            for (int i = 0; i < kBlockN / 2; i++) make_zero(even[i]), make_zero(odd[i]);
            return;
        }
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) make_undefined(even[i]), make_undefined(odd[i]);
        const int step_h = h.src_tap_step * p.pitch * kRowVectors, last_h = (h.taps - 1) * -step_h + warpgroup * p.consumer_row() * kRowVectors;
        int tap_h = 0, box_stage = 0, done_weight = -1, done_box = -1;    // done: stages whose last reader is in flight
        uint32_t b = 0;
        const auto multiply_stage = [&](auto anew) {
            if (tap_h == 0) {
                box_stage = box.stage;
                mbarrier_wait(head.box_full + box_stage, box.phase);
                b = shared_vector(shared.boxes + box_stage * p.box_stage_bytes()) + last_h;
                box.advance(p.boxes);
            }
            mbarrier_wait(head.weight_full + weight.stage, weight.phase);
            const uint32_t w = shared_vector(shared.weights + weight.stage * p.weight_bytes());
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTapsW; k++)
#pragma unroll
                for (int step = 0; step < kChunk / 16; step++) {
                    const uint64_t a_step = wgmma_descriptor(descriptor, w + p.tap_w[k] * kRows * kRowVectors + step * 2), b_step = wgmma_descriptor(descriptor, b + p.shift_w[k] * kRowVectors + step * 2);
                    if (decltype(anew)::value && k < 2 && step == 0) wgmma_m64k16_f16<0, 0>(k % 2 ? odd : even, a_step, b_step);
                    else wgmma_m64k16_f16<0>(k % 2 ? odd : even, a_step, b_step);
                }
            wgmma_commit_group();
            wgmma_wait_group<1>();
            if (lane == 0 && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
            if (lane == 0 && done_box >= 0) mbarrier_arrive(head.box_empty + done_box);
            done_weight = weight.stage, done_box = -1;
            weight.advance(p.weights);
            b += step_h;
            if (++tap_h == h.taps) tap_h = 0, done_box = box_stage;
        };
        multiply_stage(std::true_type());
        while (--stages > 0) multiply_stage(std::false_type());
        wgmma_wait_group<0>();
#pragma unroll
        for (int i = 0; i < kBlockN / 2; i++) keep_after(even[i]), keep_after(odd[i]);    // or ptxas serializes the wgmmas
        if (lane == 0) mbarrier_arrive(head.weight_empty + done_weight), mbarrier_arrive(head.box_empty + done_box);
    }

    // Where the consumer's outputs of a tile are: those of the thread's two channels, from the first position on, and what there is of them.
    struct Outputs {
        float *tile, *first, *second;        // of the tile's first channel; of the thread's two
        int channel0, planes, rows, columns, width;    // positions; outputs of a row
        // How many outputs there are of both phases of a column and the next, four neighbours in memory. (Rows are an even number of columns apart.)
        __device__ __forceinline__ int count(const Column& at) const { return at.plane < planes && at.y < rows ? max(0, min(4, width - at.x * kPhasesW)) : 0; }
    };
    __device__ __forceinline__ Outputs outputs_of(const Tile& tile) const {
        const Plan& p = a.p;
        const Phase &pd = p.phase_d[tile.phase_d], &ph = p.phase_h[tile.phase_h];
        const int d0 = tile.d + (p.consumers_have_planes ? warpgroup * p.run_planes : 0), h0 = tile.h0 + (p.consumers_have_planes ? 0 : warpgroup * p.rows), row = (pd.dst + d0 * pd.dst_step) * p.H + ph.dst + h0 * ph.dst_step;
        const int64_t volume = int64_t(p.D) * p.H * p.W;
        float* const to = a.out + (int64_t(tile.n) * p.C_out + tile.channel0) * volume + int64_t(row) * p.W + tile.w0 * kPhasesW, * const first = to + own_channel() * volume;
        const int columns = min(p.tile_w, p.positions_w() - tile.w0);
        return {to, first, first + 8 * volume, tile.channel0, min(p.run_planes, pd.count - d0), min(p.rows, ph.count - h0), columns, min(columns * kPhasesW, p.W - tile.w0 * kPhasesW)};
    }
    __device__ __forceinline__ bool are_whole(const Outputs& to) const { return a.p.stores_vectors() && to.planes == a.p.run_planes && to.rows == a.p.rows && to.columns == a.p.tile_w; }
    // The thread's first column, anew, so that what follows from it is not kept in registers from one use to the next.
    __device__ __forceinline__ int first_column() const {
        int column = lane % 4 * 2;
        asm volatile("" : "+r"(column));
        return column;
    }
    __device__ __forceinline__ int offset_of(const Column& at) const { return (at.plane * a.p.phase_d[0].dst_step * a.p.H + at.y * a.p.phase_h[0].dst_step) * a.p.W + at.x * kPhasesW; }
    __device__ __forceinline__ float output(float sum, int half) const { return fmaf(sum, channels[half].scale, channels[half].bias); }

    // Phases 0 and 1 of two positions, of one of the channels.
    __device__ __forceinline__ float4 four_outputs(int j, int half, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const int i = j * 4 + half * 2;
        return make_float4(output(phase0[i], half), output(phase1[i], half), output(phase0[i + 1], half), output(phase1[i + 1], half));
    }
    __device__ __forceinline__ void store_four(const Outputs& to, int j, int offset, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float4 four = four_outputs(j, half, phase0, phase1);
            if (channels[half].exists) *reinterpret_cast<float4*>((half ? to.second : to.first) + offset) = four;
        }
    }

    // Stores all outputs of a consumer, where rows are whole vectors. The code is short, as it is executed once a tile.
    __device__ __forceinline__ void store_whole(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            if (offsets[j] < 0) continue;
            store_four(to, j, offsets[j], phase0, phase1);
        }
    }

    // Stores those that there are, where rows are whole vectors.
    __device__ __forceinline__ void store_part(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const int first = first_column();
#pragma unroll
        for (int j = 0; j < kBlockN / 8; j++) {
            const Column at = column_at(a.p, j * 8 + first);
            if (to.count(at) == 0) continue;
            store_four(to, j, offset_of(at), phase0, phase1);
        }
    }

    // Stores outputs of rows that begin anywhere: a warp's are staged, eight channels at a time, of which it stores rows.
    __device__ __forceinline__ void store_staged(const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Plan& p = a.p;
        float* const staged = shared.staged + (warpgroup * 4 + warp) * (8 * p.staged_channel());
        const int64_t volume = int64_t(p.D) * p.H * p.W;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            __syncwarp();
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++)
                if (offsets[j] >= 0) *reinterpret_cast<float4*>(staged + lane / 4 * p.staged_channel() + offsets[j]) = four_outputs(j, half, phase0, phase1);
            __syncwarp();
            const int channel = warp * 16 + half * 8, channels = p.C_out - to.channel0 - channel;
            float* const out = to.tile + channel * volume + lane;
            for (int plane = 0; plane < to.planes; plane++)
                for (int y = 0; y < to.rows; y++) {
                    const float* const from = staged + (plane * p.rows + y) * p.staged_row() + lane;
                    float* const row = out + offset_of({plane, y, 0});
#pragma unroll 1
                    for (int k = 0; k < to.width - lane; k += 32) {
                        float v[8];
#pragma unroll
                        for (int c = 0; c < 8; c++) v[c] = from[c * p.staged_channel() + k];
#pragma unroll
                        for (int c = 0; c < 8; c++)
                            if (c < channels) row[c * volume + k] = v[c];
                    }
                }
        }
    }

    // Which outputs there are: of phases 0 and 1, bit j of the first of two neighbouring columns, then of the second.
    struct Masks { uint32_t phase0[2], phase1[2]; };
    __device__ __forceinline__ Masks masks_of(const Outputs& to) const {
        Masks masks = {};
        if (are_whole(to)) {
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++) masks.phase0[0] |= uint32_t(offsets[j] >= 0) << j;
            masks.phase0[1] = masks.phase1[0] = masks.phase1[1] = masks.phase0[0];
        } else {
            const int first = first_column();
#pragma unroll 1
            for (int j = 0; j < kBlockN / 8; j++) {
                const int count = to.count(column_at(a.p, j * 8 + first));
                masks.phase0[0] |= uint32_t(count > 0) << j, masks.phase1[0] |= uint32_t(count > 1) << j, masks.phase0[1] |= uint32_t(count > 2) << j, masks.phase1[1] |= uint32_t(count > 3) << j;
            }
        }
        return masks;
    }

    // Leaves the moments of each channel's outputs, which have their final values.
    __device__ __forceinline__ void leave_moments(const Tile& tile, const Outputs& to, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Masks masks = masks_of(to);
        const int64_t set = int64_t(tile.n) * a.sets.parts + tile.part * kConsumers + warpgroup;
#pragma unroll
        for (int half = 0; half < 2; half++) {    // one after the other, as registers are few
            conv::Moments moments;
            moments.shift = __shfl_sync(~0u, phase0[half * 2], lane & ~3);    // column 0
            moments.count = __popc(masks.phase0[0]) + __popc(masks.phase0[1]) + __popc(masks.phase1[0]) + __popc(masks.phase1[1]);
#pragma unroll
            for (int j = 0; j < kBlockN / 8; j++)
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const int i = j * 4 + half * 2 + k;
                    if (masks.phase0[k] >> j & 1) moments.add(phase0[i]);
                    if (masks.phase1[k] >> j & 1) moments.add(phase1[i]);
                }
            float total;
            const float2 own = moments.of_quad(total);
            if (lane % 4 == 0 && channels[half].exists) a.sets.moments[set * a.sets.channels + tile.channel0 + own_channel() + half * 8] = own, a.sets.counts[set] = total;    // the same from every channel
        }
    }

    // What is to be done with a tile's sums, of phases 0 and 1.
    __device__ __forceinline__ void finish(const Tile& tile, uint32_t turn, const float (&phase0)[kBlockN / 2], const float (&phase1)[kBlockN / 2]) const {
        const Outputs to = outputs_of(tile);
        if (a.sets.moments) leave_moments(tile, to, phase0, phase1);
        if (!a.p.stores_vectors()) {
            store_staged(to, phase0, phase1);
            return;
        }
        // One consumer after the other: the first waits for the second's outputs of the tile before, the second for the first's of this tile.
        mbarrier_wait(shared.head.stored + (warpgroup ^ 1), turn ^ (warpgroup ^ 1));
        if (are_whole(to)) store_whole(to, phase0, phase1);
        else store_part(to, phase0, phase1);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.head.stored + warpgroup);
    }

    __device__ __forceinline__ void run() {
        SharedHead& head = shared.head;
        float even[kBlockN / 2], odd[kBlockN / 2];
        uint32_t turn = 0;
        for (RingPosition slot;; slot.advance(kTileSlots)) {
            mbarrier_wait(head.tile_full + slot.stage, slot.phase);
            const Tile& tile = head.tiles[slot.stage];
            if (tile.n < 0) break;
            load_channels(tile);
            multiply(tile, even, odd);
            prepare_channels();
            if (__any_sync(~0u, channels[0].more != 1 || channels[1].more != 1)) {
#pragma unroll
                for (int i = 0; i < kBlockN / 2; i++) even[i] *= channels[i / 2 % 2].more, odd[i] *= channels[i / 2 % 2].more;
            }
            if (a.apply_relu) {    // of what will be scaled and moved by the bias
#pragma unroll
                for (int i = 0; i < kBlockN / 2; i++) {
                    const Channel& c = channels[i / 2 % 2];
                    even[i] = max_nan(fmaf(even[i], c.scale, c.bias), 0.0f), odd[i] = max_nan(fmaf(odd[i], c.scale, c.bias), 0.0f);
                }
                channels[0].scale = channels[1].scale = 1, channels[0].bias = channels[1].bias = 0;
            }
            constexpr bool kEvenFirst = phase_of_turn(kTapsW, 0) == 0;
            finish(tile, turn, kEvenFirst ? even : odd, kEvenFirst ? odd : even);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(head.tile_empty + slot.stage);
            turn ^= 1;
        }
    }
};

#endif  // HAS_SM90A

template <int kBlockN, int kTapsW>
__global__ void __launch_bounds__(kThreads, 1) polyphase_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t base[];
    const Plan& p = a.p;
    const SharedParts shared(base, p);
    SharedHead& head = shared.head;
    if (threadIdx.x == 0) {
        for (int i = 0; i < p.boxes; i++) mbarrier_init(head.box_full + i, 1), mbarrier_init(head.box_empty + i, 4 * kConsumers);
        for (int i = 0; i < p.weights; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, 4 * kConsumers);
        for (int i = 0; i < kTileSlots; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 4 * kConsumers);
        for (int i = 0; i < kConsumers; i++) mbarrier_init(head.stored + i, 4);
        fence_mbarrier_init();
    }
    // Zeros behind each box, where the last row's halo looks.
    for (int stage = 0; stage < p.boxes; stage++)
        for (int i = p.box_bytes() + threadIdx.x * 4; i < p.box_stage_bytes(); i += kThreads * 4) *reinterpret_cast<uint32_t*>(shared.boxes + stage * p.box_stage_bytes() + i) = 0;
    fence_proxy_async();
    __syncthreads();
    wait_for_previous_kernel();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == 0) load_all(a, shared, &x_map, &w_map);
    } else {
        setmaxnreg_inc<kMultiplyRegisters>();
        Consumer<kBlockN, kTapsW>(a, shared).run();
    }
#endif
}

template <int kBlockN> int launch_polyphase(const CUtensorMap& x_map, const CUtensorMap& w_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Plan& p = a.p;
    const auto kernel = p.taps_w == 2 ? polyphase_kernel<kBlockN, 2> : p.taps_w == 3 ? polyphase_kernel<kBlockN, 3> : polyphase_kernel<kBlockN, 4>;
    return launch_with_shared(kernel, p.tiles < multiprocessors ? p.tiles : multiprocessors, kThreads, p.shared_bytes(), stream, x_map, w_map, a);
}

// a.out = the convolution of packed operands.
inline int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
    const Plan& p = a.p;
    CUtensorMap x_map, w_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kChunk * 2), source.copy, {source.phase_channels, source.axis[2].positions, source.axis[1].positions, source.axis[0].positions, p.N}, {kChunk, p.pitch, p.box_rows, p.planes, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kChunk * 2), weight.copy, {weight.phase_channels, weight.M_pad, weight.stencil.taps()}, {kChunk, kRows, p.taps_w}));
    switch (p.block_n) {
        case 72: return launch_polyphase<72>(x_map, w_map, a, multiprocessors, stream);
        case 80: return launch_polyphase<80>(x_map, w_map, a, multiprocessors, stream);
        case 104: return launch_polyphase<104>(x_map, w_map, a, multiprocessors, stream);
        default: return launch_polyphase<144>(x_map, w_map, a, multiprocessors, stream);
    }
}

}  // namespace polyphase
