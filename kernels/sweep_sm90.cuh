// Strided transposed convolution of one group of few channels, TF32-equivalent, straight from the tensors: wgmma for sm_90a.
//
//   out[n, co, o] = bias[co] + sum over ci, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// There is little to multiply and much to write, so memory is the limit: x is read as it lies, and outputs leave as whole lines. A block sweeps down the rows of one
// plane of positions (stencil.h), with all weights of its 32 output channels in shared memory. A warpgroup brings the rows of x as fp16, and they stay as long as later rows of
// positions need them; all that are there have one power of two for their scale. GEMM_M is (phase of W, output channel), GEMM_N the positions of a row, GEMM_K the channels of a tap;
// a tap of W is a shift of the operand's first column. Each output plane has a warpgroup that multiplies for one output row after the other. A warp of it has the outputs of 8 channels:
// a channel's are neighbours in memory from row to row, so it stages them in the order of memory, a storing warp has whole lines copied, and what does not fill a line waits for the next row.
// Where x or w is not finite, zeros of GEMM_M must not meet it: such a block computes its outputs once more, product by product.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "pipeline_sm90.cuh"
#include "scaled_half.cuh"
#include "sweep_direct.cuh"
#include "sweep_sm90_tiles.h"

namespace sweep_sm90 {

constexpr int kMultiplyRegisters = 168, kBringRegisters = 120, kStoreRegisters = 56;    // of a thread: no more than all have at first, 128 each
constexpr int kLowestExponent = 8, kExponent = 11, kHighestExponent = 14;    // of the scaled maximum of the rows that are there: where the scale stays as it was, what a new one is for

// A tap: where its weights begin, and its columns in a row of the source, in units of 16 bytes; rows of the source behind the row of positions' first one.
struct alignas(16) Product { int weight, source, row; };
struct Products { int count; Product of[kMaxTaps * kMaxTaps * kMaxTaps]; };

struct SharedHead {
    alignas(16) uint64_t full[kMaxBatches], free[kMaxBatches];    // batches of rows of the source
    uint64_t staged[kMaxPhases][4], stored[kMaxPhases][4];    // what the warps of an output plane stage
    Products products[kMaxPhases][kMaxPhases];    // of phases (d, h)
    unsigned warp_max[2][4];           // bits of the largest magnitudes of a batch that warps have, by its parity
    int weight_shift[kChannels];       // 2^shift is the scale of an output channel's weights
    int shift[kMaxBatches];            // and of all rows that are there when this batch has come
    int not_finite;
    uint16_t place[kMaxKernel];        // of the weights at an element of the kernel, for the first channels: in units of 16 bytes
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the weights begin behind the head");

// 8 values, scaled.
__device__ __forceinline__ uint4 as_halves(const float* values, float scale) {
    alignas(16) __half2 h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) h[i] = __floats2half2_rn(values[2 * i] * scale, values[2 * i + 1] * scale);
    return *reinterpret_cast<const uint4*>(h);
}

#ifdef HAS_SM90A

// What a block has. kOcts: times 8 input channels; kTapsD: of D; known to the compiler, as a row is brought in registers.
template <int kOcts, int kTapsD, int kColumns> struct Block {
    static constexpr int kUnitRows = kMaxColumns / kColumns;    // output rows that are staged together: of one phase of H, or of both
    const Plan& p;
    const float *x, *w;                // of the sample; of the first output channel
    int n, channel0, channels, d, q0, q1;    // output channels that there are; plane of positions, its rows
    int thread, lane, warp;            // of the role

    static __device__ __forceinline__ uint8_t* shared() {
        extern __shared__ __align__(128) uint8_t base[];
        return base;
    }
    static __device__ __forceinline__ SharedHead& head() { return *reinterpret_cast<SharedHead*>(shared()); }
    static __device__ __forceinline__ uint4* weights() { return reinterpret_cast<uint4*>(shared() + kHeadBytes); }
    __device__ __forceinline__ uint4* slots() const { return weights() + p.weight_units(); }
    __device__ __forceinline__ float* stages() const { return reinterpret_cast<float*>(slots() + p.slots() * p.row_units()); }    // (phase d, channel, kStageFloats)
    enum Barrier { kPrepare = 1, kBring };

    __device__ __forceinline__ Block(const Plan& p, const float* x_all, const float* w_all) : p(p), thread(threadIdx.x % kRoleThreads), lane(threadIdx.x % 32), warp(threadIdx.x / 32 % 4) {
        int i = blockIdx.x;
        d = take_digit(i, p.s.axis[0].positions);
        q0 = take_digit(i, p.segments) * p.segment_rows, q1 = min(q0 + p.segment_rows, p.s.axis[1].positions);
        channel0 = take_digit(i, p.channel_tiles) * kChannels, channels = min(kChannels, p.C_out - channel0), n = i;
        x = x_all + int64_t(n) * p.C_in * volume(), w = w_all + int64_t(channel0) * kernel_volume(p.s);
    }
    __device__ __forceinline__ int volume() const { return p.s.axis[0].sources * p.s.axis[1].sources * p.s.axis[2].sources; }
    __device__ __forceinline__ int source_rows() const { return q1 - q0 + p.span; }
    __device__ __forceinline__ int source_batches() const { return (source_rows() + p.rows - 1) / p.rows; }
    __device__ __forceinline__ int output_row0() const { return max(q0 * p.s.axis[1].phases - p.s.axis[1].crop, 0); }
    __device__ __forceinline__ int output_row1() const { return min(q1 * p.s.axis[1].phases - p.s.axis[1].crop, p.s.axis[1].out); }
    __device__ __forceinline__ bool has_plane(int pd) const { return pd < p.s.axis[0].phases && unsigned(d * p.s.axis[0].phases + pd - p.s.axis[0].crop) < unsigned(p.s.axis[0].out); }

    // ------------------------------------------------------------------------------------------------ Weights

    static constexpr int kPreparing = (kMaxPhases + 1) * kRoleThreads;    // threads that prepare the weights: all but those that bring rows

    // f(place of an element of a kernel among those of all output channels, its weights for all input channels). Elements are neighbours in memory.
    template <typename F> __device__ __forceinline__ void for_each_element(F f) const {
        const int elements = channels * kernel_volume(p.s);
        const int64_t step = int64_t(p.C_out) * kernel_volume(p.s);
        for (int i = threadIdx.x; i < elements; i += kPreparing) {
            float values[kOcts * 8];
#pragma unroll
            for (int ci = 0; ci < kOcts * 8; ci++) values[ci] = w[ci * step + i];
            f(i, values);
        }
    }

    // The weights, scaled by a power of two for each output channel; zeros where a phase has none at a tap. The products of all phases.
    __device__ __forceinline__ void prepare_weights() const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int volume = kernel_volume(p.s);
        SharedHead& h = head();
        for (int i = threadIdx.x; i < p.weight_units(); i += kPreparing) weights()[i] = make_uint4(0, 0, 0, 0);
        if (threadIdx.x < volume) {
            int rest = threadIdx.x;
            const int kw = take_digit(rest, aw.kernel);
            h.place[threadIdx.x] = (rest * aw.taps + aw.tap_of[kw]) * p.tile_units() + aw.phase_of[kw] * kWarpChannels;
        }
        if (threadIdx.x < ad.phases * ah.phases) {
            const int pd = threadIdx.x / ah.phases, ph = threadIdx.x % ah.phases;
            Products& products = h.products[pd][ph];
            products.count = 0;
            for (int th = 0; th < ah.taps; th++) for (int td = 0; td < ad.taps; td++) for (int tw = 0; tw < aw.taps; tw++) {
                const int kd = ad.kernel_of[td][pd], kh = ah.kernel_of[th][ph];
                if (kd < 0 || kh < 0) continue;
                products.of[products.count++] = {((kd * ah.kernel + kh) * aw.taps + tw) * p.tile_units(), td * kOcts * p.pitch + aw.shift[aw.taps - 1] - aw.shift[tw], ah.shift[ah.taps - 1] - ah.shift[th]};
            }
        }
        unsigned* const element_max = reinterpret_cast<unsigned*>(stages());
        for_each_element([&](int i, const float (&values)[kOcts * 8]) {
            unsigned most = 0;
#pragma unroll
            for (float value : values) most = umax(most, scaled_half::magnitude(value));
            element_max[i] = most;
        });
        named_barrier(kPrepare, kPreparing);
        if (threadIdx.x < kChannels * 4) {    // 4 lanes have a channel
            const int channel = threadIdx.x / 4;
            unsigned most = 0;
            for (int i = threadIdx.x % 4; i < volume && channel < channels; i += 4) most = umax(most, element_max[channel * volume + i]);
            most = umax(most, __shfl_xor_sync(~0u, most, 1));
            most = umax(most, __shfl_xor_sync(~0u, most, 2));
            h.weight_shift[channel] = scaled_half::shift_of(most);
            if (most >= scaled_half::kInfinity) h.not_finite = 1;
        }
        named_barrier(kPrepare, kPreparing);
        for_each_element([&](int i, const float (&values)[kOcts * 8]) {
            const int channel = i / volume, unit = h.place[i - channel * volume] + channel / kWarpChannels * kPhasesW * kWarpChannels + channel % kWarpChannels;
            const float scale = scaled_half::power_of_two(h.weight_shift[channel]);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++) weights()[unit + oct * kPhasesW * kChannels] = as_halves(values + oct * 8, scale);
        });
        fence_proxy_async();
        named_barrier(kPrepare, kPreparing);
    }

    // ------------------------------------------------------------------------------------------- Rows of the source

    // The thread's, of a batch. Its row is p.rows where it has none.
    struct Column {
        int row, column;
        float v[kTapsD][kOcts][8];
    };

    // Begins to bring a batch. Rows are counted from the first one that the first row of positions reads.
    __device__ __forceinline__ void load(Column& column, int batch) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int i = batch * p.rows + column.row, row = ah.first + q0 - ah.shift[ah.taps - 1] + i, channel_step = volume();
        const bool inside = column.row < p.rows && unsigned(row) < unsigned(ah.sources) && i < source_rows();
#pragma unroll
        for (int td = 0; td < kTapsD; td++) {
            const int plane = ad.first + d - ad.shift[td];
            const bool exists = inside && unsigned(plane) < unsigned(ad.sources);
            const float* from = x + (exists ? (plane * ah.sources + row) * aw.sources + p.first_column + column.column : 0);
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (int c = 0; c < 8; c++, from += channel_step) column.v[td][oct][c] = exists ? *from : 0.0f;
        }
    }

    // Waits for what has been brought; the bits of the batch's largest magnitude.
    __device__ __forceinline__ unsigned find_max(const Column& column, int batch) const {
        unsigned most = 0;
#pragma unroll
        for (int td = 0; td < kTapsD; td++)
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++)
#pragma unroll
                for (float value : column.v[td][oct]) most = umax(most, scaled_half::magnitude(value));
        most = __reduce_max_sync(~0u, most);
        unsigned(&all)[4] = head().warp_max[batch % 2];
        if (lane == 0) all[warp] = most;
        named_barrier(kBring, kRoleThreads);
        return umax(umax(all[0], all[1]), umax(all[2], all[3]));
    }

    // The scale of all rows that are there: the one that there was, if it does. most: the bits of their largest magnitude.
    static __device__ __forceinline__ int next_shift(int before, unsigned most) {
        const int exponent = scaled_half::exponent_of(most) + before;
        const bool does = most == 0 || most >= scaled_half::kInfinity || (exponent >= kLowestExponent && exponent <= kHighestExponent);
        return does ? before : scaled_half::clamp_shift(kExponent - scaled_half::exponent_of(most));
    }

    __device__ __forceinline__ uint4* place_of(const Column& column, int batch_slot) const { return slots() + (batch_slot * p.rows + column.row) * p.row_units() + column.column; }

    // The thread's column of a batch that is there, at another scale.
    __device__ __forceinline__ void scale_again(uint4* unit, int shift_added) const {
        const float factor = scaled_half::power_of_two(max(min(shift_added, 127), -126));
        for (int i = 0; i < kTapsD * kOcts; i++, unit += p.pitch) {
            alignas(16) __half2 h[4];
            *reinterpret_cast<uint4*>(h) = *unit;
#pragma unroll
            for (__half2& two : h) two = __floats2half2_rn(__low2float(two) * factor, __high2float(two) * factor);
            *unit = *reinterpret_cast<const uint4*>(h);
        }
    }

    __device__ __forceinline__ void bring() const {
        SharedHead& h = head();
        Column column;
        const bool is_second = thread >= p.columns;
        column.row = thread < p.rows * p.columns ? is_second : p.rows, column.column = p.column0 + thread - (is_second ? p.columns : 0);
        load(column, 0);
        int shift = scaled_half::kMaxShift, slot_before = 0;
        unsigned most_before = 0;      // of the batch that is needed beside this one
        RingPosition at;
        for (int batch = 0; batch < source_batches(); batch++) {
            const unsigned most = find_max(column, batch);
            if (most >= scaled_half::kInfinity) h.not_finite = 1;
            const int before = shift;
            shift = next_shift(before, umax(most, most_before));
            most_before = p.span > 0 ? most : 0;
            if (batch >= p.batches()) mbarrier_wait(&h.free[at.stage], at.phase ^ 1);
            if (shift != before && batch > 0 && p.span > 0) {    // the batch before must not be in use for the one before that
                if (batch > 1) mbarrier_wait(&h.free[(batch - 2) % p.batches()], (batch - 2) / p.batches() & 1);
                if (column.row < p.rows) scale_again(place_of(column, slot_before), shift - before);
            }
            const float scale = scaled_half::power_of_two(shift);
            uint4* const to = place_of(column, at.stage);
            if (column.row < p.rows)
#pragma unroll
                for (int td = 0; td < kTapsD; td++)
#pragma unroll
                    for (int oct = 0; oct < kOcts; oct++) to[(td * kOcts + oct) * p.pitch] = as_halves(column.v[td][oct], scale);
            if (thread == 0) h.shift[at.stage] = shift;
            load(column, batch + 1);
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&h.full[at.stage]);
            slot_before = at.stage;
            at.advance(p.batches());
        }
    }

    // ------------------------------------------------------------------------------------------------ Products

    using Sums = float[kColumns / 2];

    // The sums of a row of positions whose first row of the source is in a slot.
    __device__ __forceinline__ void multiply(Sums& sums, const Products& products, int first_slot) const {
        const uint64_t weight = wgmma_plain_descriptor_base(kPhasesW * kChannels), source = wgmma_plain_descriptor_base(p.pitch);
        const uint32_t weight0 = shared_vector(weights()), source0 = shared_vector(slots());
        const int count = products.count;
#pragma unroll
        for (float& sum : sums) make_zero(sum);
        int i = 0;
#pragma unroll 1
        do {
            const Product product = products.of[i];
            int slot = first_slot + product.row;
            if (slot >= p.slots()) slot -= p.slots();
            const uint32_t a = weight0 + product.weight, b = source0 + slot * p.row_units() + product.source;
            wgmma_fence();
#pragma unroll
            for (int oct = 0; oct < kOcts; oct += 2) wgmma_m64k16_f16<0>(sums, wgmma_descriptor(weight, a + oct * kPhasesW * kChannels), wgmma_descriptor(source, b + oct * p.pitch));
            wgmma_commit_group();
        } while (++i < count);
        wgmma_wait_group<0>();
#pragma unroll
        for (float& sum : sums) keep_after(sum);
    }

    // ------------------------------------------------------------------------------------------------- Outputs

    // The outputs of one channel on one output plane, which are neighbours in memory from row to row. Places in memory are counted in floats from address 0 on.
    struct Stream {
        int64_t origin;
        int out_row;                   // floats
        float* stage;
        bool vectors;                  // positions' outputs are as vectors are aligned
        int bank;                      // so that lanes that stage together meet different banks
        __device__ __forceinline__ int64_t begin(int row) const { return origin + int64_t(row) * out_row; }
        // Where the line of memory is staged that a place is in.
        __device__ __forceinline__ float* staged(int64_t at) const { return stage + ((bank - int(at & (kLine - 8))) & (kLine - 1)); }
    };

    __device__ __forceinline__ Stream stream_of(float* out, int pd, int channel) const {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int64_t plane = (int64_t(n) * p.C_out + channel0 + channel) * ad.out + d * ad.phases + pd - ad.crop, origin = int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(float)) + plane * ah.out * aw.out;
        const bool vectors = aw.crop == 0 && aw.out % 4 == 0 && origin % 4 == 0;
        return {origin, aw.out, stages() + (pd * kChannels + channel) * kStageFloats, vectors, (vectors ? channel % 2 : channel % kWarpChannels / 4) * 16};
    }

    // Stages a unit, output rows from `row` on, behind what did not fill a line before. Four lanes have a channel's, two positions of 8 each, which are four neighbours.
    __device__ __forceinline__ void stage(const Stream& stream, const Sums (&sums)[kUnitRows], int row, int rows, int rows_before, uint64_t* stored, uint32_t parity) const {
        const int64_t at = stream.begin(row), before = stream.begin(row - rows_before);
        const float* const carried = stream.staged(before) + int((at & -kLine) - (before & -kLine)) + lane % 4 * 8;
        float* const line = stream.staged(at);
        const float4 low = *reinterpret_cast<const float4*>(carried), high = *reinterpret_cast<const float4*>(carried + 4);
        mbarrier_wait(stored, parity);
        __syncwarp();
        float4* const to_line = reinterpret_cast<float4*>(line + lane % 4 * 8);
        to_line[0] = low, to_line[1] = high;
        __syncwarp();
        const int column = lane % 4 * 4 - p.s.axis[2].crop;
#pragma unroll
        for (int i = 0; i < kUnitRows; i++) {
            float* const to = line + int(at & (kLine - 1)) + i * stream.out_row + column;
            if (i > 0) {
                if (i == rows) break;
                __syncwarp();          // a row's columns that are not there are where the next one begins
            }
            if (stream.vectors) {
#pragma unroll
                for (int u = 0; u < kColumns / 8; u++) *reinterpret_cast<float4*>(to + u * 16) = make_float4(sums[i][u * 4], sums[i][u * 4 + 2], sums[i][u * 4 + 1], sums[i][u * 4 + 3]);
            } else {
#pragma unroll
                for (int u = 0; u < kColumns / 8; u++)
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        if (u > 0 || column + k >= 0) to[u * 16 + k] = sums[i][u * 4 + k % 2 * 2 + k / 2];
            }
        }
        fence_proxy_async();
        __syncwarp();
    }

    // The units of a row of positions, units() of them. One has the rows from `row` on that there are, of phases from `phase` on.
    struct Unit { int row, rows, phase; };
    __device__ __forceinline__ int units() const { return kUnitRows > 1 ? 1 : p.s.axis[1].phases; }
    __device__ __forceinline__ Unit unit_of(int q, int i) const {
        const StencilAxis& ah = p.s.axis[1];
        const int first = q * ah.phases - ah.crop + i, row = max(first, 0), end = min(first + (kUnitRows > 1 ? ah.phases : 1), ah.out);
        return {row, max(end - row, 0), i + row - first};
    }

    // Multiplies for an output plane, unit after unit.
    __device__ __forceinline__ void multiply_all(int pd, const float* bias, bool apply_relu, float* out) const {
        SharedHead& h = head();
        const int channel = warp * kWarpChannels + lane / 4, weight_shift = h.weight_shift[channel];
        const bool has_outputs = warp * kWarpChannels < channels;
        const Stream stream = stream_of(out, pd, channel);
        const float added = bias && has_outputs ? bias[channel0 + channel] : 0.0f;
        RingPosition needed;           // the next batch that has not been waited for
        int batches_there = 0, shift = 0, slot = 0, rows_before = 0;
        uint32_t parity = 1;
        for (int q = q0; q < q1; q++) {
            for (const int last = min((q - q0) / p.rows + p.span, source_batches() - 1); batches_there <= last; batches_there++, needed.advance(p.batches())) {
                mbarrier_wait(&h.full[needed.stage], needed.phase);
                shift = h.shift[needed.stage];
            }
            const bool ends_batch = (slot + 1) % p.rows == 0;
            const scaled_half::ScaleInParts back = scaled_half::scale_in_parts(-shift - weight_shift);
            const bool in_parts = __any_sync(~0u, back.more != 1);
            for (int i = 0; i < units(); i++) {
                const Unit unit = unit_of(q, i);
                const bool frees = i == units() - 1 && ends_batch && lane == 0;
                if (unit.rows == 0) {
                    if (frees) mbarrier_arrive(&h.free[slot / p.rows]);
                    continue;
                }
                Sums sums[kUnitRows];
                multiply(sums[0], h.products[pd][unit.phase], slot);
                if constexpr (kUnitRows > 1) multiply(sums[1], h.products[pd][unit.phase + unit.rows - 1], slot);
                if (frees) mbarrier_arrive(&h.free[slot / p.rows]);
                if (!has_outputs) continue;
                for (Sums& of_row : sums) {
                    if (in_parts) {
#pragma unroll
                        for (float& sum : of_row) sum *= back.more;
                    }
#pragma unroll
                    for (float& sum : of_row) sum = fmaf(sum, back.scale, added);
                    if (apply_relu) {
#pragma unroll
                        for (float& sum : of_row) sum = max_nan(sum, 0.0f);
                    }
                }
                stage(stream, sums, unit.row, unit.rows, rows_before, &h.stored[pd][warp], parity);
                if (lane == 0) mbarrier_arrive(&h.staged[pd][warp]);
                rows_before = unit.rows, parity ^= 1;
            }
            slot = slot + 1 == p.slots() ? 0 : slot + 1;
        }
    }

    // Stores what two of a plane's warps stage, a lane for each of their channels.
    __device__ __forceinline__ void store_all(float* out) const {
        constexpr int kLanes = 2 * kWarpChannels;
        const int pd = warp / 2, channel = warp % 2 * kLanes + lane;
        if (lane >= kLanes || channel >= channels || !has_plane(pd)) return;
        const Stream stream = stream_of(out, pd, channel);
        const int64_t first = stream.begin(output_row0());
        const int row1 = output_row1();
        uint32_t parity = 0;
        for (int q = q0; q < q1; q++)
            for (int i = 0; i < units(); i++) {
                const Unit unit = unit_of(q, i);
                if (unit.rows == 0) continue;
                const int64_t at = stream.begin(unit.row), next = stream.begin(unit.row + unit.rows), line_at = at & -kLine;
                const int begin = int(max(first - line_at, int64_t(0))), end = int((unit.row + unit.rows == row1 ? next : next & -kLine) - line_at);
                const int whole = (begin + 3) & -4, whole_end = end & -4;
                const float* const from = stream.staged(at);
                float* const line = reinterpret_cast<float*>(uintptr_t(line_at) * sizeof(float));
                for (int w = 0; w < 4; w++) {
                    if (w != channel / kWarpChannels) continue;
                    mbarrier_wait(&head().staged[pd][w], parity);
                    if (whole < whole_end) bulk_store(line + whole, from + whole, (whole_end - whole) * 4);
                    bulk_commit_group();
                }
                // What is in front of whole vectors where a sweep begins, and behind where it ends.
#pragma unroll 1
                for (int k = begin; k < min(whole, end); k++) line[k] = from[k];
#pragma unroll 1
                for (int k = max(whole, whole_end); k < end; k++) line[k] = from[k];
                bulk_wait_group_read<0>();
                mbarrier_arrive(&head().stored[pd][channel / kWarpChannels]);
                parity ^= 1;
            }
        bulk_wait_group<0>();
    }

    // --------------------------------------------------------------------------------------------------- Sweep

    // The block's outputs.
    __device__ __forceinline__ sweep_direct::Part part(const float* bias, float* out) const {
        const int64_t volume = int64_t(p.s.axis[0].out) * p.s.axis[1].out * p.s.axis[2].out;
        return {x, w, bias ? bias + channel0 : nullptr, out + (int64_t(n) * p.C_out + channel0) * volume, p.C_in, p.C_out, channels, d, output_row0(), output_row1()};
    }

    __device__ __forceinline__ void run(const float* bias, bool apply_relu, float* out) const {
        SharedHead& h = head();
        if (threadIdx.x == 0) {
            for (int i = 0; i < p.batches(); i++) mbarrier_init(&h.full[i], 4), mbarrier_init(&h.free[i], 4 * (has_plane(0) + has_plane(1)));
            for (int pd = 0; pd < kMaxPhases; pd++)
                for (int w = 0; w < 4; w++) mbarrier_init(&h.staged[pd][w], 1), mbarrier_init(&h.stored[pd][w], kWarpChannels);
            fence_mbarrier_init();
            h.not_finite = 0;
        }
        for (int i = threadIdx.x; i < p.slots() * p.row_units(); i += kThreads) slots()[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        const int role = __shfl_sync(~0u, int(threadIdx.x) / kRoleThreads, 0);
        if (role == kMaxPhases + 1) {
            setmaxnreg_dec<kBringRegisters>();
            bring();
        } else {
            prepare_weights();
            if (role < kMaxPhases) {
                setmaxnreg_inc<kMultiplyRegisters>();
                if (has_plane(role)) multiply_all(role, bias, apply_relu, out);
            } else {
                setmaxnreg_dec<kStoreRegisters>();
                store_all(out);
            }
        }
        __syncthreads();
    }
};

#endif  // HAS_SM90A

template <int kOcts, int kTapsD, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
sweep_kernel(const __grid_constant__ Plan p, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
#ifdef HAS_SM90A
    wait_for_previous_kernel();
    const Block<kOcts, kTapsD, kColumns> block(p, x, w);
    block.run(bias, apply_relu, out);
    if (block.head().not_finite) sweep_direct::compute(p.s, block.part(bias, out), apply_relu);
#endif
}

template <int kOcts> int forward(const Plan& p, cudaStream_t stream, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    const bool one_tap = p.s.axis[0].taps == 1, narrow = p.gemm_n < kMaxColumns;
    const auto kernel = narrow ? one_tap ? sweep_kernel<kOcts, 1, 64> : sweep_kernel<kOcts, 2, 64> : one_tap ? sweep_kernel<kOcts, 1, 128> : sweep_kernel<kOcts, 2, 128>;
    return launch_with_shared(kernel, p.blocks(), kThreads, p.shared_bytes(), stream, p, x, w, bias, apply_relu, out);
}

}  // namespace sweep_sm90
