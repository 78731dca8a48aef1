// Strided transposed convolution of one group of few channels, TF32-equivalent, straight from the tensors: wgmma for sm_90a.
//
//   out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// There is little to multiply and much to write, so memory is the limit: x is read as it lies, and outputs leave as whole lines. A block sweeps down the rows of one
// plane of positions (stencil.h) with all its weights in shared memory. A warpgroup brings the rows of x, as fp16 scaled by a power of two for each batch of rows; they stay
// as long as later rows of positions need them. GEMM_M is (phase of W, 32 output channels), GEMM_N the positions of a row, GEMM_K the channels of a tap; a tap of W is a shift of the operand's first column.
// Each output plane has a warpgroup that multiplies row after row of it. A warp has the outputs of 8 channels: these are neighbours in memory from row to row, so it stages
// them in the order of memory, stores the whole lines by the copy engine, and what does not fill a line waits for the next row.
// Where x or w is not finite, zeros of GEMM_M must not meet it: such a block computes its outputs once more, product by product.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "pipeline_sm90.cuh"
#include "scaled_half.cuh"
#include "sweep_direct.cuh"
#include "sweep_sm90_tiles.h"

namespace sweep_sm90 {

constexpr int kMultiplyRegisters = 128, kBringRegisters = 128, kStoreRegisters = 48;    // of a thread: no more than all have at first, 96 each
constexpr int kNoShift = 1 << 20;
constexpr int kMostShiftAdded = 80;    // to the batch's before: sums are scaled from one batch's scale to the next one's, and must not overflow
constexpr int kLowestExponent = 8, kExponent = 11, kHighestExponent = 14;    // of the scaled maximum of a batch: where the scale stays as it was, what a new one is for

// A tap (d, w): where its weights begin behind those of kernel elements h before, and its columns in a row of the source; in units of 16 bytes.
struct alignas(8) Item { int weight, source; };

struct SharedHead {
    alignas(16) uint64_t full[kMaxBatches], free[kMaxBatches];    // batches of rows
    uint64_t staged[kMaxPhases][4][kSegments], stored[kMaxPhases][4][kSegments];    // stages of the warps of each output plane
    unsigned row_max[2][4];            // bits of the largest magnitudes of a batch of rows that the warps have, by its parity
    int weight_shift[kChannels];       // 2^shift is the scale of an output channel's weights
    int row_shift[kMaxSlots];          // 2^shift is the scale of the row in a slot
    int not_finite;
    int items[kMaxPhases];             // taps (d, w) that have weights in phase d
    Item item[kMaxPhases][kMaxTaps * kMaxTaps];
    uint16_t place[kMaxKernel];        // of the first input channel's weight at an element of the kernel: in units of 16 bytes from the weights on
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the weights begin behind the head");

// 8 values, scaled.
__device__ __forceinline__ uint4 as_halves(const float* values, float scale) {
    alignas(16) __half2 h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) h[i] = __floats2half2_rn(values[2 * i] * scale, values[2 * i + 1] * scale);
    return *reinterpret_cast<const uint4*>(h);
}

// The last digit of i, which is below `count`; i becomes what is left.
__device__ __forceinline__ int take_digit(int& i, int count) {
    const int digit = i % count;
    i /= count;
    return digit;
}

#ifdef HAS_SM90A

// What a block has.
template <int kOcts, int kTapsD> struct Block {
    const Plan& p;
    const float *x, *w;                // of the sample; of the first output channel
    int n, channel0, channels, d, q0, q1;    // output channels that there are; plane of positions, rows of positions
    int thread, lane, warp;            // of the role

    static __device__ __forceinline__ uint8_t* shared() {
        extern __shared__ __align__(128) uint8_t base[];
        return base;
    }
    static __device__ __forceinline__ SharedHead& head() { return *reinterpret_cast<SharedHead*>(shared()); }
    static __device__ __forceinline__ uint4* weights() { return reinterpret_cast<uint4*>(shared() + kHeadBytes); }
    __device__ __forceinline__ uint4* slots() const { return weights() + p.weight_units(); }
    __device__ __forceinline__ float* stages() const { return reinterpret_cast<float*>(slots() + p.batches() * p.rows * p.row_units()); }    // (phase d, channel, kStageFloats)
    enum Barrier { kMultiply = 1, kBring };

    __device__ __forceinline__ Block(const Plan& p, const float* x_all, const float* w_all) : p(p), thread(threadIdx.x % kRoleThreads), lane(threadIdx.x % 32), warp(threadIdx.x / 32 % 4) {
        int i = blockIdx.x;
        d = take_digit(i, p.s.axis[0].positions);
        q0 = take_digit(i, p.segments) * p.segment_rows, q1 = min(q0 + p.segment_rows, p.s.axis[1].positions);
        channel0 = take_digit(i, p.channel_tiles) * kChannels, channels = min(kChannels, p.C_out - channel0), n = i;
        x = x_all + int64_t(n) * p.C_in * volume(), w = w_all + int64_t(channel0) * kernel_volume(p.s);
    }
    __device__ __forceinline__ int volume() const { return p.s.axis[0].sources * p.s.axis[1].sources * p.s.axis[2].sources; }
    __device__ __forceinline__ int last_batch() const {
        const StencilAxis& ah = p.s.axis[1];
        return (q1 - q0 - 1 + ah.shift[ah.taps - 1] - ah.shift[0]) / p.rows;
    }

    // ------------------------------------------------------------------------------------------------ Weights

    // f(place of a kernel's element among those of all output channels, its weights for all input channels): of all elements, which are neighbours in memory for each input channel.
    template <typename F> __device__ __forceinline__ void for_each_element(int threads, F f) const {
        const int elements = channels * kernel_volume(p.s);
        const int64_t step = int64_t(p.C_out) * kernel_volume(p.s);
        for (int i = threadIdx.x; i < elements; i += threads) {
            float values[kOcts * 8];
#pragma unroll
            for (int ci = 0; ci < kOcts * 8; ci++) values[ci] = w[ci * step + i];
            f(i, values);
        }
    }

    // All weights, scaled by a power of two for each output channel; zeros where a phase has none at a tap.
    __device__ __forceinline__ void prepare_weights(int threads) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int volume = kernel_volume(p.s);
        SharedHead& h = head();
        for (int i = threadIdx.x; i < p.weight_units(); i += threads) weights()[i] = make_uint4(0, 0, 0, 0);
        if (threadIdx.x < volume) {
            int rest = threadIdx.x;
            const int kw = take_digit(rest, aw.kernel);
            h.place[threadIdx.x] = (rest * aw.taps + aw.tap_of[kw]) * p.tile_units() + aw.phase_of[kw] * kWarpChannels;
        }
        if (threadIdx.x < ad.phases) {
            int count = 0;
            for (int td = 0; td < kTapsD; td++) for (int tw = 0; tw < aw.taps; tw++) {
                const int kd = ad.kernel_of[td][threadIdx.x];
                if (kd >= 0) h.item[threadIdx.x][count++] = {(kd * ah.kernel * aw.taps + tw) * p.tile_units(), td * kOcts * p.pitch + aw.shift[aw.taps - 1] - aw.shift[tw]};
            }
            h.items[threadIdx.x] = count;
        }
        unsigned* const element_max = reinterpret_cast<unsigned*>(stages());
        for_each_element(threads, [&](int i, const float (&values)[kOcts * 8]) {
            unsigned most = 0;
#pragma unroll
            for (float value : values) most = umax(most, scaled_half::magnitude(value));
            element_max[i] = most;
        });
        named_barrier(kMultiply, threads);
        if (threadIdx.x < kChannels * 4) {    // 4 lanes have a channel
            const int channel = threadIdx.x / 4;
            unsigned most = 0;
            for (int i = threadIdx.x % 4; i < volume && channel < channels; i += 4) most = umax(most, element_max[channel * volume + i]);
            most = umax(most, __shfl_xor_sync(~0u, most, 1));
            most = umax(most, __shfl_xor_sync(~0u, most, 2));
            h.weight_shift[channel] = scaled_half::shift_of(most);
            if (most >= scaled_half::kInfinity) h.not_finite = 1;
        }
        named_barrier(kMultiply, threads);
        for_each_element(threads, [&](int i, const float (&values)[kOcts * 8]) {
            const int channel = i / volume, unit = h.place[i - channel * volume] + channel / kWarpChannels * kPhasesW * kWarpChannels + channel % kWarpChannels;
            const float scale = scaled_half::power_of_two(h.weight_shift[channel]);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++) weights()[unit + oct * kPhasesW * kChannels] = as_halves(values + oct * 8, scale);
        });
        fence_proxy_async();
        named_barrier(kMultiply, threads);
    }

    // ------------------------------------------------------------------------------------------- Rows of the source

    struct Column {
        int row, column;               // the thread's, of a batch; its row is p.rows or more if it has none
        float v[kTapsD][kOcts][8];
    };

    // Begins to bring a batch. Rows of the source are counted from the first one that the first row of positions reads.
    __device__ __forceinline__ void load(Column& c, int batch) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int row = ah.first + q0 - ah.shift[ah.taps - 1] + batch * p.rows + c.row, channel_step = volume();
        const bool inside = c.row < p.rows && unsigned(row) < unsigned(ah.sources) && batch <= last_batch();
#pragma unroll
        for (int td = 0; td < kTapsD; td++) {
            const int plane = ad.first + d - ad.shift[td];
            const bool exists = inside && unsigned(plane) < unsigned(ad.sources);
            const float* from = x + (exists ? (plane * ah.sources + row) * aw.sources + p.first_column + c.column : 0);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (int i = 0; i < 8; i++, from += channel_step) c.v[td][oct][i] = exists ? *from : 0.0f;
        }
    }

    // Waits for what has been brought; the largest magnitude of the batch.
    __device__ __forceinline__ unsigned find_max(const Column& c, int batch) const {
        unsigned most = 0;
#pragma unroll
        for (int td = 0; td < kTapsD; td++)
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (float value : c.v[td][oct]) most = umax(most, scaled_half::magnitude(value));
        most = __reduce_max_sync(~0u, most);
        unsigned(&all)[4] = head().row_max[batch % 2];
        if (lane == 0) all[warp] = most;
        named_barrier(kBring, kRoleThreads);
        return umax(umax(all[0], all[1]), umax(all[2], all[3]));
    }

    // The scale of a batch: the one of the batch before, if that does.
    static __device__ __forceinline__ int next_shift(int before, unsigned most) {
        const int exponent = scaled_half::exponent_of(most) + before;
        if (most == 0 || most >= scaled_half::kInfinity || (exponent >= kLowestExponent && exponent <= kHighestExponent)) return before;
        return min(scaled_half::clamp_shift(kExponent - scaled_half::exponent_of(most)), before + kMostShiftAdded);
    }

    __device__ __forceinline__ void bring() const {
        const int columns = max(p.columns, 1), row = thread / columns;
        Column c;
        c.row = thread < p.rows * p.columns ? row : p.rows, c.column = p.column0 + thread - row * columns;
        load(c, 0);
        int shift = scaled_half::kMaxShift;
        RingPosition at;
        for (int batch = 0; batch <= last_batch(); batch++, at.advance(p.batches())) {
            const unsigned most = find_max(c, batch);
            shift = next_shift(shift, most);
            if (most >= scaled_half::kInfinity) head().not_finite = 1;
            if (batch >= p.batches()) mbarrier_wait(&head().free[at.stage], at.phase ^ 1);
            const float scale = scaled_half::power_of_two(shift);
            uint4* const to = slots() + (at.stage * p.rows + c.row) * p.row_units() + c.column;
            if (c.row < p.rows)
#pragma unroll
                for (int td = 0; td < kTapsD; td++)
#pragma unroll
                    for (int oct = 0; oct < kOcts; oct++)
                        to[(td * kOcts + oct) * p.pitch] = as_halves(c.v[td][oct], scale);
            if (thread < p.rows) head().row_shift[at.stage * p.rows + thread] = shift;
            load(c, batch + 1);
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&head().full[at.stage]);
        }
    }

    // ------------------------------------------------------------------------------------------------ Products

    using Sums = float[kColumns / 2];

    // The sums of a row of positions in phases (d, h), the row's own place in the ring being `slot`: returns the shift of what they are sums of. Rows of the source come in
    // their order, from the first on.
    __device__ __forceinline__ int multiply(Sums& sums, int slot, int pd, int ph) const {
        const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
        const uint64_t weight = wgmma_plain_descriptor_base(kPhasesW * kChannels), source = wgmma_plain_descriptor_base(p.pitch);
        const uint32_t weight0 = shared_vector(weights()), source0 = shared_vector(slots());
        const int slots = p.batches() * p.rows, items = head().items[pd];
#pragma unroll
        for (float& sum : sums) make_zero(sum);
        int shift = kNoShift;
        for (int th = ah.taps - 1; th >= 0; th--) {
            const int kh = ah.kernel_of[th][ph];
            if (kh < 0) continue;
            int from = slot + ah.shift[ah.taps - 1] - ah.shift[th];
            if (from >= slots) from -= slots;
            const int before = shift;
            shift = head().row_shift[from];
            if (shift != before && before != kNoShift) {
                const float factor = scaled_half::power_of_two(max(shift - before, -126));
#pragma unroll
                for (float& sum : sums) sum *= factor;
            }
            const uint32_t weight1 = weight0 + kh * aw.taps * p.tile_units(), source1 = source0 + from * p.row_units();
            wgmma_fence();
            int i = 0;
#pragma unroll 1
            do {
                const Item item = head().item[pd][i];
                wgmma_fence();
#pragma unroll
                for (int oct = 0; oct < kOcts; oct += 2) wgmma_m64k16_f16<0>(sums, wgmma_descriptor(weight, weight1 + item.weight + oct * kPhasesW * kChannels), wgmma_descriptor(source, source1 + item.source + oct * p.pitch));
                wgmma_commit_group();
            } while (++i < items);
            wgmma_wait_group<0>();
#pragma unroll
            for (float& sum : sums) keep_after(sum);
        }
        return shift;
    }

    // ------------------------------------------------------------------------------------------------- Outputs

    // The outputs of one channel on one output plane, in the segments that are staged: they are neighbours in memory, from row to row.
    struct Stream {
        int64_t origin;                // in floats from address 0 on
        int out_row, crop, rows0, rows1;    // floats; those that positions have in front of a row; rows of outputs that the block has
        float* stages;
        int bank;
        // Where a segment begins, in floats from address 0 on.
        __device__ __forceinline__ int64_t begin(int row, int segment) const { return origin + int64_t(row) * out_row + min(max(segment * kSegmentFloats - crop, 0), out_row); }
        // Where the line of memory is staged that a segment begins in.
        __device__ __forceinline__ float* staged(int64_t at, int segment) const { return stages + segment * kStageFloats + ((bank - int(at & (kLine - 8))) & (kLine - 1)); }
    };

    __device__ __forceinline__ bool has_plane(int pd) const { return pd < p.s.axis[0].phases && unsigned(d * p.s.axis[0].phases + pd - p.s.axis[0].crop) < unsigned(p.s.axis[0].out); }
    __device__ __forceinline__ Stream stream_of(float* out, int pd, int channel) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int64_t plane = (int64_t(n) * p.C_out + channel0 + channel) * ad.out + d * ad.phases + pd - ad.crop;
        return {int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(float)) + plane * ah.out * aw.out, aw.out, aw.crop, max(q0 * ah.phases - ah.crop, 0), min(q1 * ah.phases - ah.crop, ah.out),
                stages() + (pd * kChannels + channel) * kSegments * kStageFloats, channel % kWarpChannels / 4 * 16};
    }

    // Stages a segment of a row behind what did not fill a line before. Four lanes have a channel's.
    template <int kSegment> __device__ __forceinline__ void stage(const Stream& stream, const Sums& sums, int row, uint64_t* stored, uint32_t parity) const {
        constexpr int kBefore = (kSegment + kSegments - 1) % kSegments;
        const int64_t at = stream.begin(row, kSegment), before = stream.begin(kSegment == 0 ? row - 1 : row, kBefore);
        const int64_t line_before = before & -kLine;
        const float* const carried = stream.staged(before, kBefore) + int((at & -kLine) - line_before) + lane % 4 * 8;
        float* const from = stream.staged(at, kSegment);
        const float4 low = *reinterpret_cast<const float4*>(carried), high = *reinterpret_cast<const float4*>(carried + 4);
        mbarrier_wait(stored, parity);
        __syncwarp();
        float4* const to_line = reinterpret_cast<float4*>(from + lane % 4 * 8);
        to_line[0] = low, to_line[1] = high;
        __syncwarp();
        const int column = lane % 4 * 4 - (kSegment == 0 ? stream.crop : 0);
        const uint32_t to = shared_address(from + int(at & (kLine - 1)) + column);
#pragma unroll
        for (int u = 0; u < kSegmentFloats / 16; u++)
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (u > 0 || column + k >= 0) shared_store(to + (u * 16 + k) * 4, sums[(kSegment * kSegmentFloats / 16 + u) * 4 + k % 2 * 2 + k / 2]);
        fence_proxy_async();
    }

    __device__ __forceinline__ void multiply_all(int pd, const float* bias, bool apply_relu, float* out) const {
        const StencilAxis& ah = p.s.axis[1];
        SharedHead& h = head();
        const int channel = warp * kWarpChannels + lane / 4, span = ah.shift[ah.taps - 1] - ah.shift[0], slots = p.batches() * p.rows;
        const bool planned = has_plane(pd), has_outputs = planned && warp * kWarpChannels < channels;
        const Stream stream = stream_of(out, pd, channel);
        const int weight_shift = h.weight_shift[channel];
        const float added = bias && has_outputs ? bias[channel0 + channel] : 0.0f;
        RingPosition needed;           // the next batch that has not been waited for
        int rows_there = 0, slot = 0, last_of_batch = p.rows - 1;
        uint32_t parity = 1;
        for (int q = q0; q < q1; q++) {
            for (; rows_there <= q - q0 + span; rows_there += p.rows, needed.advance(p.batches())) mbarrier_wait(&h.full[needed.stage], needed.phase);
            for (int ph = 0; ph < ah.phases; ph++) {
                const int row = q * ah.phases + ph - ah.crop;
                const bool exists = planned && row >= stream.rows0 && row < stream.rows1;
                Sums sums;
                int shift = 0;
                if (exists) shift = multiply(sums, slot, pd, ph);
                if (ph == ah.phases - 1 && slot == last_of_batch && lane == 0) mbarrier_arrive(&h.free[slot / p.rows]);
                if (!exists || !has_outputs) continue;
                const scaled_half::ScaleInParts back = scaled_half::scale_in_parts(-shift - weight_shift);
                if (__any_sync(~0u, back.more != 1)) {
#pragma unroll
                    for (float& sum : sums) sum *= back.more;
                }
#pragma unroll
                for (float& sum : sums) sum = fmaf(sum, back.scale, added);
                if (apply_relu) {
#pragma unroll
                    for (float& sum : sums) sum = max_nan(sum, 0.0f);
                }
                const auto stage_segment = [&](auto segment) {
                    constexpr int kSegment = decltype(segment)::value;
                    stage<kSegment>(stream, sums, row, &h.stored[pd][warp][kSegment], parity);
                    __syncwarp();
                    if (lane == 0) mbarrier_arrive(&h.staged[pd][warp][kSegment]);
                };
                stage_segment(std::integral_constant<int, 0>{});
                if constexpr (kSegments > 1) stage_segment(std::integral_constant<int, kSegments - 1>{});
                parity ^= 1;
            }
            if (slot == last_of_batch) last_of_batch = last_of_batch + 1 == slots ? p.rows - 1 : last_of_batch + p.rows;
            slot = slot + 1 == slots ? 0 : slot + 1;
        }
    }

    // Stores what a warp stages, a lane for each of its channels.
    __device__ __forceinline__ void store_all(int pd, float* out) const {
        if (!has_plane(pd) || warp * kWarpChannels >= channels || lane >= kWarpChannels) return;
        const Stream stream = stream_of(out, pd, warp * kWarpChannels + lane);
        uint64_t *const staged = head().staged[pd][warp], *const stored = head().stored[pd][warp];
        const int64_t first = stream.begin(stream.rows0, 0);
        uint32_t parity = 0;
        for (int row = stream.rows0; row < stream.rows1; row++, parity ^= 1)
#pragma unroll
            for (int segment = 0; segment < kSegments; segment++) {
                const bool is_first = row == stream.rows0 && segment == 0, is_last = row == stream.rows1 - 1 && segment == kSegments - 1;
                const int64_t at = stream.begin(row, segment), next = stream.begin(segment == kSegments - 1 ? row + 1 : row, (segment + 1) % kSegments), at_line = at & -kLine;
                const int begin = int(max(first - at_line, int64_t(0))), end = int((is_last ? next : next & -kLine) - at_line);
                const int whole = (begin + 3) & -4, whole_end = end & -4;
                const float* const from = stream.staged(at, segment);
                float* const line = reinterpret_cast<float*>(uintptr_t(at_line) * sizeof(float));
                mbarrier_wait(staged + segment, parity);
                if (whole < whole_end) bulk_store(line + whole, from + whole, (whole_end - whole) * 4);
                bulk_commit_group();
                // What is in front of whole vectors where a sweep begins, and behind where it ends.
                for (int i = begin; i < min(whole, end); i++) line[i] = from[i];
                for (int i = max(whole, whole_end); i < end; i++) line[i] = from[i];
                if (kSegments == 1) bulk_wait_group_read<0>();
                else bulk_wait_group_read<1>();    // the segment before
                if (kSegments == 1 || !is_first) mbarrier_arrive(stored + (segment + kSegments - 1) % kSegments);
            }
        bulk_wait_group<0>();
    }

    // The block's outputs.
    __device__ __forceinline__ sweep_direct::Part part(const float* bias, float* out) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        float* const first = out + (int64_t(n) * p.C_out + channel0) * (int64_t(ad.out) * ah.out * aw.out);
        return {x, w, bias ? bias + channel0 : nullptr, first, p.C_in, p.C_out, channels, d, max(q0 * ah.phases - ah.crop, 0), min(q1 * ah.phases - ah.crop, ah.out)};
    }

    __device__ __forceinline__ void run(const float* bias, bool apply_relu, float* out) const {
        constexpr int consumers = kMaxPhases;
        SharedHead& h = head();
        if (threadIdx.x == 0) {
            for (int i = 0; i < p.batches(); i++) mbarrier_init(&h.full[i], 4), mbarrier_init(&h.free[i], 4 * consumers);
            for (int pd = 0; pd < consumers; pd++)
                for (int w = 0; w < 4; w++)
                    for (int i = 0; i < kSegments; i++) mbarrier_init(&h.staged[pd][w][i], 1), mbarrier_init(&h.stored[pd][w][i], kWarpChannels);
            fence_mbarrier_init();
            h.not_finite = 0;
        }
        for (int i = threadIdx.x; i < p.batches() * p.rows * p.row_units(); i += kThreads) slots()[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        const int role = __shfl_sync(~0u, int(threadIdx.x) / kRoleThreads, 0);
        if (role < consumers) {
            setmaxnreg_inc<kMultiplyRegisters>();
            prepare_weights(consumers * kRoleThreads);
            multiply_all(role, bias, apply_relu, out);
        } else if (role == consumers) {
            setmaxnreg_inc<kBringRegisters>();
            bring();
        } else {
            setmaxnreg_dec<kStoreRegisters>();
            store_all(role - consumers - 1, out);
        }
        __syncthreads();
    }
};

#endif  // HAS_SM90A

template <int kOcts, int kTapsD>
__global__ void __launch_bounds__(kThreads, 1)
sweep_kernel(const __grid_constant__ Plan p, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
#ifdef HAS_SM90A
    wait_for_previous_kernel();
    const Block<kOcts, kTapsD> block(p, x, w);
    block.run(bias, apply_relu, out);
    if (block.head().not_finite) sweep_direct::compute(p.s, block.part(bias, out), apply_relu);
#endif
}

template <int kOcts> int forward(const Plan& p, cudaStream_t stream, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    const StencilAxis& d = p.s.axis[0];
    const auto kernel = d.taps == 1 ? sweep_kernel<kOcts, 1> : sweep_kernel<kOcts, 2>;
    return launch_with_shared(kernel, p.blocks(), kThreads, p.shared_bytes(), stream, p, x, w, bias, apply_relu, out);
}

}  // namespace sweep_sm90
