// Strided transposed convolution of groups of few channels, as accurate as float32, straight from the tensors.
//
//   out[n, co, o] = bias[co] + sum over ci of the group, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// There is little to multiply and much to write, so memory is the limit: x is read as it lies, and outputs leave as whole lines. A block sweeps down the rows of one
// plane of positions (stencil.h). It keeps the rows of x that it still needs in shared memory, as fp16 high and low halves scaled by a power of two for each
// row, (x * 2^shift = high + low with 22 bits); products are high * high, high * low and low * high. GEMM_M is (phase of W, 8 output channels), GEMM_N positions of a row,
// GEMM_K (tap w, channel); each phase of (D, H) has sums of its own. Four warps multiply a step and stage its outputs; meanwhile four others store the step before and bring
// the rows that the next one needs. There are two stages, by the step's parity; one, free when the outputs of the step before have left it, where two leave room for one block only. A channel's outputs on a plane are neighbours in memory from row to row: they are staged in
// the order of memory, and what does not fill a line waits for the next row.
// Where x or w is not finite, zeros of GEMM_M must not meet it: such a block computes its outputs once more, product by product.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "ptx_sm90.cuh"
#include "scaled_half.cuh"
#include "sweep_direct.cuh"
#include "sweep_tiles.h"

namespace sweep {

// Outputs are staged as they are aligned in memory, modulo so many floats: as vectors, or as sectors of memory, without which bulk copies take 1.65 times as long (NOTES.md).
#ifdef HAS_SM90A
constexpr int kAlignment = 8;
#else
constexpr int kAlignment = 4;
#endif
constexpr int kMultiplyRegisters = 144, kBringRegisters = 112;    // of a thread, where roles can have different numbers: 128 on average
constexpr int kMostShiftAdded = 80;    // to the row's before: sums are scaled from one row's scale to the next one's, and must not overflow

// A step's outputs of a stream, its channel's on an output plane, which are neighbours in memory. They are staged as they are aligned there.
struct alignas(16) Stage {
    float* to;                         // the line of memory that they begin in
    int from;                          // where that line is staged
    int begin, end;                    // what is stored: floats of that line and those behind it; whole lines, but for the ends of a sweep
    int first, next;                   // where this step's outputs begin, and the next one's
};

// A step's first output row and the next one's; whether it stores parts of vectors.
struct alignas(16) Rows { int begin, end, has_ends; };

// A warp's positions of a step: 8 * kOctets of one of its rows, from an octet on.
struct alignas(8) Positions { int row, octet; };

struct SharedHead {
    alignas(16) unsigned row_max[2][kWarps];    // bits of the largest magnitudes of a batch of rows that its warps have, by its parity
    Rows rows[2];                      // by the step's parity
    int not_finite;
    int q0, q1, steps;                 // rows of positions
    int weight_shift[kChannels];
    float bias[kChannels];
    Positions positions[kWarps];
    int row_shift[kMaxSlots];          // 2^shift is the scale of the row in a slot
    int unit_offset[kMaxUnits];        // of the high half: from a position's column of the row's first unit on
    int64_t origin[2 * kChannels];     // of streams: their plane, in floats from address 0 on; or -1: there is none
    Stage stages[2][2 * kChannels];    // of streams, by the step's parity
};
static_assert(sizeof(SharedHead) <= kHeadBytes, "the weights begin behind the head");

// 8 values as high and low halves, at `high` and `low`. Values that are not finite are another code's business.
__device__ __forceinline__ void split(const float (&v)[8], float scale, uint4* high, uint4* low) {
    alignas(16) __half2 h[4], l[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const scaled_half::SplitPair pair = scaled_half::split(v[2 * i] * scale, v[2 * i + 1] * scale);
        h[i] = pair.high, l[i] = pair.low;
    }
    *high = *reinterpret_cast<const uint4*>(h), *low = *reinterpret_cast<const uint4*>(l);
}

// What a block has. kOcts: times 8 input channels; known to the compiler, as loads behind a branch are waited for at once. kPatternD, kPatternH: which taps have weights.
template <int kOcts, int kPatternD, int kPatternH> struct Block {
    static constexpr int kPhasesD = phases_of(kPatternD), kPhasesH = 2, kPhasesW = 2, kTapsD = taps_of(kPatternD), kTapsH = taps_of(kPatternH), kStreams = kChannels * kPhasesD;
    using Sums = float[kPhasesD][kPhasesH][kOctets][4];
    static HOST_DEVICE constexpr bool has_weights(int td, int th, int pd, int ph) { return (live_of(kPatternD, pd) >> td & live_of(kPatternH, ph) >> th & 1) != 0; }

    const Plan& p;
    const float *x, *w;                // of the group
    int n, group, channel0, d, segment;    // channel of the layer; plane of positions
    int own = 0;                       // where the batch is kept that a step has the number of
    int thread, lane, warp;            // of the role
    // Of those that bring rows: the thread's column of a batch, of as many planes as there are taps d; its row of the batch, if any.
    float v[kTapsD][kOcts][8];
    int own_row, own_column;

    static __device__ __forceinline__ uint8_t* shared() {
        extern __shared__ __align__(128) uint8_t base[];
        return base;
    }
    static __device__ __forceinline__ SharedHead& head() { return *reinterpret_cast<SharedHead*>(shared()); }
    static __device__ __forceinline__ uint4* weights() { return reinterpret_cast<uint4*>(shared() + kHeadBytes); }
    __device__ __forceinline__ uint4* slots() const { return reinterpret_cast<uint4*>(shared() + kHeadBytes + p.weight_bytes); }
    __device__ __forceinline__ float* stage(int step) const { return reinterpret_cast<float*>(slots() + p.slots() * p.row_units) + (step & (p.stages - 1)) * p.stage_floats(); }    // (stream, stage_stride)
    enum Barrier { kMultiply = 1, kBring, kStageFree };
    static __device__ __forceinline__ void sync_role(Barrier role) { named_barrier(role, kRoleThreads); }

    __device__ __forceinline__ Block(const Plan& p, const float* x_all, const float* w_all) : p(p), thread(threadIdx.x % kRoleThreads), lane(threadIdx.x % 32), warp(threadIdx.x / 32 % kWarps) {
        int i = blockIdx.x;
        d = take_digit(i, p.s.axis[0].positions), segment = take_digit(i, p.segments);
        const int channel_tile = take_digit(i, p.group_out / kChannels);
        group = take_digit(i, p.groups), n = i;
        channel0 = group * p.group_out + channel_tile * kChannels;
        x = x_all + (int64_t(n) * p.groups + group) * p.group_in() * volume(), w = w_all + (int64_t(group) * p.group_in() * p.group_out + channel_tile * kChannels) * kernel_volume(p.s);
    }
    __device__ __forceinline__ int64_t volume() const { return int64_t(p.s.axis[0].sources) * p.s.axis[1].sources * p.s.axis[2].sources; }

    // ------------------------------------------------------------------------------------------------ Weights

    __device__ __forceinline__ const float* kernel(int ci, int channel) const { return w + (int64_t(ci) * p.group_out + channel) * kernel_volume(p.s); }

    // Each channel's scale and bias, and all its weights, split; zeros where a phase has none at a tap.
    __device__ __forceinline__ void prepare_weights(const float* bias) {
        const int elements = kernel_volume(p.s), lanes = kRoleThreads / kChannels, channel = thread / lanes;
        unsigned most = 0;
        for (int i = thread % lanes; i < p.group_in() * elements; i += lanes) most = umax(most, scaled_half::magnitude(kernel(i / elements, channel)[i % elements]));
#pragma unroll
        for (int distance = lanes / 2; distance > 0; distance /= 2) most = umax(most, __shfl_xor_sync(~0u, most, distance));
        if (thread % lanes == 0) head().weight_shift[channel] = scaled_half::shift_of(most), head().bias[channel] = bias ? bias[channel0 + channel] : 0.0f;
        if (most >= scaled_half::kInfinity) head().not_finite = 1;
        sync_role(kMultiply);
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        int done = 0;
        for (int th = kTapsH - 1; th >= 0; th--) for (int unit = 0; unit < p.units; unit += 2) for (int td = 0; td < kTapsD; td++) for (int pd = 0; pd < kPhasesD; pd++) for (int ph = 0; ph < kPhasesH; ph++) {
            if (!has_weights(td, th, pd, ph)) continue;
            if (done % kWarps == warp) {
                const int own = lane % kChannels, mine = unit + lane / (kPhasesW * kChannels), tw = mine / kOcts, kw = tw < aw.taps ? aw.kernel_of[tw][lane / kChannels % kPhasesW] : -1;
                const int at = (ad.kernel_of[td][pd] * ah.kernel + ah.kernel_of[th][ph]) * aw.kernel + kw;
                float values[8];
#pragma unroll
                for (int c = 0; c < 8; c++) values[c] = kw >= 0 ? kernel(mine % kOcts * 8 + c, own)[at] : 0.0f;
                uint4* const to = weights() + done * 2 * 32 + lane;
                split(values, scaled_half::power_of_two(head().weight_shift[own]), to, to + 32);
            }
            done++;
        }
    }
    static_assert(2 * kPhasesW * kChannels == 32, "a lane has the row of a matrix");

    // ------------------------------------------------------------------------------------------- Rows of the source

    __device__ __forceinline__ void locate_column() {
        const int columns = max(p.columns, 1), row = thread / columns;
        own_row = thread < p.rows * p.columns ? row : kMaxSlots, own_column = p.column0 + thread - row * columns;
    }

    // f(8 values, tap d, 8 channels) of all that the thread brings.
    template <typename F> __device__ __forceinline__ void for_each_item(F f) {
#pragma unroll
        for (int td = 0; td < kTapsD; td++)
#pragma unroll
            for (int oct = 0; oct < kOcts; oct++) f(v[td][oct], td, oct);
    }

    // Begins to bring a batch. Rows of the source are counted from the first one that the first step reads.
    __device__ __forceinline__ void load(int batch) {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        const int first = ah.first + head().q0 - ah.shift[ah.taps - 1] + batch * p.rows, channel_step = int(volume());
        const bool inside = own_row < p.rows && unsigned(first + own_row) < unsigned(ah.sources) && batch < head().steps + p.lead;    // no step needs later ones
        for_each_item([&](float (&values)[8], int td, int oct) {
            const int plane = ad.first + d - ad.shift[td];
            const bool exists = inside && unsigned(plane) < unsigned(ad.sources);
            const float* from = x + (exists ? oct * 8 * channel_step + (plane * ah.sources + first + own_row) * aw.sources + p.first_column + own_column : 0);
#pragma unroll
            for (int c = 0; c < 8; c++, from += channel_step) values[c] = exists ? *from : 0.0f;
        });
    }

    // Waits for what has been brought.
    __device__ __forceinline__ void find_max(int batch) {
        unsigned most = 0;
        for_each_item([&](const float (&values)[8], int, int) {
#pragma unroll
            for (float value : values) most = umax(most, scaled_half::magnitude(value));
        });
        most = __reduce_max_sync(~0u, most);
        if (lane == 0) head().row_max[batch % 2][warp] = most;
    }

    __device__ __forceinline__ void split_rows(int batch, int slot) {
        unsigned most = 0;
#pragma unroll
        for (unsigned its : head().row_max[batch % 2]) most = umax(most, its);
        const int before = head().row_shift[(slot == 0 ? p.slots() : slot) - 1];
        const int shift = most >= scaled_half::kInfinity ? before : min(most == 0 ? scaled_half::kMaxShift : scaled_half::shift_of(most), before + kMostShiftAdded);
        if (thread < p.rows) head().row_shift[slot + thread] = shift;
        if (most >= scaled_half::kInfinity) head().not_finite = 1;
        const float scale = scaled_half::power_of_two(shift);
        uint4* const to = slots() + (slot + own_row) * p.row_units + own_column;
        if (own_row < p.rows)
            for_each_item([&](const float (&values)[8], int td, int oct) {
                uint4* const high = to + (td * 2 * kOcts + oct) * p.pitch;
                split(values, scale, high, high + kOcts * p.pitch);
            });
    }

    // ------------------------------------------------------------------------------------------------- Outputs

    // The first output row of a step.
    __device__ __forceinline__ int first_row(int step) const {
        const StencilAxis& ah = p.s.axis[1];
        return min(max(min(head().q0 + step * p.rows, head().q1) * kPhasesH - ah.crop, 0), ah.out);
    }
    __device__ __forceinline__ int64_t address(int stream, int row) const { return head().origin[stream] + int64_t(row) * p.s.axis[2].out; }    // in floats

    // The last warp, a lane for each stream or two. Eight channels differ in the bank where their rows are not aligned alike.
    __device__ __forceinline__ void locate_stages(int step) const {
        if (warp != kWarps - 1) return;
        const int stream = lane % kStreams, first = first_row(step), next = first_row(step + 1);
        const int64_t at = address(stream, first), line = at & -kLine, next_at = address(stream, next);
        const bool exists = head().origin[stream] >= 0;
        const int begin = exists ? int(max(address(stream, first_row(0)) - line, int64_t(0))) : 0, end = exists ? int((step == head().steps - 1 ? next_at : next_at & -kLine) - line) : 0;
        Stage& s = head().stages[step % 2][stream];
        s.to = reinterpret_cast<float*>(uintptr_t(line) * sizeof(float)), s.begin = begin, s.end = end, s.first = int(at - line), s.next = int(next_at - line);
        s.from = stream * p.stage_stride + ((stream % kChannels / 4 * 16 - int(at & (kLine - kAlignment))) & (kLine - 1));
        const bool has_ends = __any_sync(~0u, begin % 4 != 0 || end % 4 != 0);
        if (lane == 0) head().rows[step % 2] = {first, next, has_ends};
    }

    // Stores whole vectors, all of a step's but at the ends of a sweep: by the copy engine, where there is one.
    __device__ __forceinline__ void store(int step) const {
        const Stage* const stages = head().stages[step % 2];
#ifdef HAS_SM90A
        if (lane < kStreams / kWarps) {
            const Stage& s = stages[warp * (kStreams / kWarps) + lane];
            const int begin = (s.begin + 3) & -4, end = s.end & -4;
            fence_proxy_async();    // of what was carried here
            if (begin < end) bulk_store(s.to + begin, stage(step) + s.from + begin, (end - begin) * 4);
            bulk_commit_group();
        }
#else
        for (int i = thread * 4; i < p.stage_stride; i += kRoleThreads * 4) {
#pragma unroll 4
            for (int stream = 0; stream < kStreams; stream++) {
                const Stage& s = stages[stream];
                if (i >= s.begin && i + 4 <= s.end) *reinterpret_cast<float4*>(s.to + i) = *reinterpret_cast<const float4*>(stage(step) + s.from + i);
            }
        }
#endif
        if (!head().rows[step % 2].has_ends) return;
        for (int i = thread; i < kStreams * 8; i += kRoleThreads) {    // what is in front of them, and behind
            const Stage& s = stages[i / 8];
            const int k = (i % 8 < 4 ? s.begin & -4 : max((s.begin + 3) & -4, s.end & -4)) + i % 4;
            if (k >= s.begin && k < s.end && (i % 8 >= 4 || s.begin % 4 != 0)) s.to[k] = stage(step)[s.from + k];
        }
    }
    // Waits until what store() reads may be written again.
    __device__ __forceinline__ void wait_for_store() const {
#ifdef HAS_SM90A
        if (lane < kStreams / kWarps) bulk_wait_group_read<0>();
#endif
    }

    // What does not fill a line goes to the next step: 8 threads have a stream's, and read it before a stage of both steps is written.
    static_assert(kStreams * kLine <= kRoleThreads * 4, "one vector a thread");
    static __device__ __forceinline__ int carried_of(int thread) { return thread % (kLine / 4) * 4; }    // float of the line
    __device__ __forceinline__ float4 read_carried(int step) const {
        if (thread >= kStreams * kLine / 4) return {};
        const Stage& s = head().stages[step % 2][thread / (kLine / 4)];
        if (carried_of(thread) >= (s.next & (kLine - 1))) return {};
        return *reinterpret_cast<const float4*>(stage(step) + s.from + (s.next & -kLine) + carried_of(thread));
    }
    __device__ __forceinline__ void write_carried(int step, const float4& values) const {
        if (thread >= kStreams * kLine / 4) return;
        const int first = carried_of(thread);
        const Stage& next = head().stages[(step + 1) % 2][thread / (kLine / 4)];
        const float each[4] = {values.x, values.y, values.z, values.w};
        float* const to = stage(step + 1) + next.from + first;
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (first + k < next.first) to[k] = each[k];
    }

    // ------------------------------------------------------------------------------------------------ Products

    template <typename F> static __device__ __forceinline__ void for_each_sum(Sums& sums, F f) {
#pragma unroll
        for (auto& of_phase : sums)
#pragma unroll
            for (auto& of_phases : of_phase)
#pragma unroll
                for (auto& of_octet : of_phases)
#pragma unroll
                    for (float& sum : of_octet) f(sum);
    }

    // The sums of the warp's positions: returns the shift of what they are sums of. Rows come in their order, from the first on.
    __device__ __forceinline__ int multiply(Sums& sums) const {
        const StencilAxis& ah = p.s.axis[1];
        const Positions at = head().positions[warp];
        const int operand = (at.octet * 8 + lane / 16 * kOcts * p.pitch + lane % 8) * 16;    // what the lane reads for the tensor cores, in bytes from a row on
        const int plane = 2 * kOcts * p.pitch * 16;    // of a tap d, in bytes
        uint32_t weight = shared_address(weights()) + lane * 16;
        int before = 0;
#pragma unroll
        for (int th = kTapsH - 1; th >= 0; th--) {
            int slot = own * p.rows + at.row + ah.shift[kTapsH - 1] - ah.shift[th];
            if (slot >= p.slots()) slot -= p.slots();
            const int shift = head().row_shift[slot];
            if (th < kTapsH - 1 && shift != before) {
                const float factor = scaled_half::power_of_two(max(shift - before, -126));
                for_each_sum(sums, [&](float& sum) { sum *= factor; });
            }
            before = shift;
            const uint32_t from = shared_address(slots()) + slot * p.row_units * 16 + operand;
#pragma unroll 1
            for (int unit = 0; unit < p.units; unit += 2) {
                const uint32_t source = from + head().unit_offset[unit + lane / 8 % 2] * 16;
#pragma unroll
                for (int td = 0; td < kTapsD; td++) {
                    uint32_t b[kOctets][4];    // high halves of two units of the source, their low ones
#pragma unroll
                    for (int u = 0; u < kOctets; u++) ldmatrix_x4(b[u], source + td * plane + u * 128);
#pragma unroll
                    for (int pd = 0; pd < kPhasesD; pd++)
#pragma unroll
                        for (int ph = 0; ph < kPhasesH; ph++) {
                            if (!has_weights(td, th, pd, ph)) continue;
                            uint32_t high[4], low[4];
                            ldmatrix_x4(high, weight), ldmatrix_x4(low, weight + 512);
                            weight += 1024;
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], high, b[u][2], b[u][3]);
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], high, b[u][0], b[u][1]);
#pragma unroll
                            for (int u = 0; u < kOctets; u++) mma_m16n8k16_f16(sums[pd][ph][u], low, b[u][0], b[u][1]);
                        }
                }
            }
        }
        return before;
    }

    // Stages the warp's outputs: a lane has a channel's, two positions of 8, which are four neighbours.
    __device__ __forceinline__ void stage_outputs(int step, Sums& sums, int shift, bool apply_relu) const {
        const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
        const Positions at = head().positions[warp];
        const int output_row = (head().q0 + step * p.rows + at.row) * kPhasesH - ah.crop, column = (at.octet * 8 + lane % 4 * 2) * kPhasesW - aw.crop;
        const Rows rows = head().rows[step % 2];
        const scaled_half::ScaleInParts back = scaled_half::scale_in_parts(-shift - head().weight_shift[lane / 4]);
        const float added = head().bias[lane / 4];
        if (__any_sync(~0u, back.more != 1)) for_each_sum(sums, [&](float& sum) { sum *= back.more; });
        for_each_sum(sums, [&](float& sum) { sum = fmaf(sum, back.scale, added); });
        if (apply_relu) for_each_sum(sums, [&](float& sum) { sum = max_nan(sum, 0.0f); });
        uint32_t to[kPhasesD][kPhasesH];
        bool exists[kPhasesH];
#pragma unroll
        for (int ph = 0; ph < kPhasesH; ph++) {
            exists[ph] = output_row + ph >= rows.begin && output_row + ph < rows.end;
#pragma unroll
            for (int pd = 0; pd < kPhasesD; pd++) {
                const Stage& s = head().stages[step % 2][pd * kChannels + lane / 4];
                to[pd][ph] = shared_address(stage(step) + s.from + s.first + (output_row + ph - rows.begin) * aw.out + column);
            }
        }
        const auto stage_columns = [&](auto whole) {
#pragma unroll
            for (int u = 0; u < kOctets; u++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    if (decltype(whole)::value || unsigned(column + u * 16 + k) < unsigned(aw.out))
#pragma unroll
                        for (int ph = 0; ph < kPhasesH; ph++)
                            if (exists[ph])
#pragma unroll
                                for (int pd = 0; pd < kPhasesD; pd++) shared_store(to[pd][ph] + (u * 16 + k) * 4, sums[pd][ph][u][k % 2 * 2 + k / 2]);
        };
        if (__all_sync(~0u, column >= 0 && column + kOctets * 16 - 12 <= aw.out)) stage_columns(std::true_type());
        else stage_columns(std::false_type());
    }

    // --------------------------------------------------------------------------------------------------- Sweep

    __device__ __forceinline__ void run_multiplying(const float* bias, bool apply_relu) {
        prepare_weights(bias);
        __syncthreads();
        for (int step = 0; step < head().steps; step++) {
            const auto wait_for_stage = [&] { if (p.stages == 1) named_barrier(kStageFree, kThreads); };
            if (head().positions[warp].row < p.rows) {
                Sums sums = {};
                const int shift = multiply(sums);
                wait_for_stage();
                stage_outputs(step, sums, shift, apply_relu);
            } else {
                wait_for_stage();
            }
            own = own + 1 == p.batches() ? 0 : own + 1;
#ifdef HAS_SM90A
            fence_proxy_async();    // of what is staged, for the copy engine
#endif
            __syncthreads();
        }
    }

    __device__ __forceinline__ void run_bringing() {
        locate_column();
        load(0);
        for (int batch = 0; batch <= p.lead; batch++) {
            find_max(batch);
            sync_role(kBring);
            split_rows(batch, batch * p.rows);
            load(batch + 1);
        }
        locate_stages(0);
        __syncthreads();
        for (int step = 0; step < head().steps; step++) {    // those that multiply are at this one
            const int next = step + p.lead + 1;       // batch
            float4 carried = {};
            if (step > 0) {
                store(step - 1), carried = read_carried(step - 1);
                if (p.stages == 2) write_carried(step - 1, carried);    // 2% faster than behind the barrier
            }
            find_max(next);
            if (p.stages == 1) wait_for_store();
            sync_role(kBring);
            if (p.stages == 1) {
                if (step > 0) write_carried(step - 1, carried);
                named_barrier_arrive(kStageFree, kThreads);
            }
            split_rows(next, (own == 0 ? p.batches() - 1 : own - 1) * p.rows);
            load(next + 1);
            locate_stages(step + 1);
            own = own + 1 == p.batches() ? 0 : own + 1;
            if (p.stages == 2) wait_for_store();
            __syncthreads();
        }
        store(head().steps - 1);
#ifdef HAS_SM90A
        bulk_wait_group<0>();
#endif
    }

    // The block's outputs.
    __device__ __forceinline__ sweep_direct::Part part(const float* bias, float* out) const {
        const int64_t volume = int64_t(p.s.axis[0].out) * p.s.axis[1].out * p.s.axis[2].out;
        float* const first = out + (int64_t(n) * p.groups * p.group_out + channel0) * volume;
        return {x, w, bias ? bias + channel0 : nullptr, first, p.group_in(), p.group_out, kChannels, d, first_row(0), first_row(head().steps)};
    }

    __device__ __forceinline__ void run(const float* bias, bool apply_relu, float* out) {
        const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
        SharedHead& h = head();
        if (threadIdx.x == 0) {
            h.not_finite = 0;
            h.q0 = segment * p.segment_rows, h.q1 = min(h.q0 + p.segment_rows, ah.positions), h.steps = (h.q1 - h.q0 + p.rows - 1) / p.rows;
        }
        if (threadIdx.x < kStreams) {
            const int plane = d * kPhasesD + thread / kChannels - ad.crop;
            const int64_t channel = (int64_t(n) * p.groups * p.group_out + channel0 + thread % kChannels) * ad.out;
            h.origin[thread] = unsigned(plane) < unsigned(ad.out) ? int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(float)) + (channel + plane) * ah.out * aw.out : -1;
        }
        if (threadIdx.x < kMaxSlots) h.row_shift[threadIdx.x] = scaled_half::kMaxShift;
        if (threadIdx.x < kWarps) {
            const int first = thread * kOctets, row = first / p.octets;
            h.positions[thread] = {row, first - row * p.octets};
        }
        if (threadIdx.x < p.units) {
            const int tw = min(thread / kOcts, aw.taps - 1);    // the last one's weights are zeros where there are no more taps
            h.unit_offset[thread] = thread % kOcts * p.pitch + aw.shift[aw.taps - 1] - aw.shift[tw];
        }
        for (int i = threadIdx.x; i < p.slots() * p.row_units; i += kThreads) slots()[i] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        if (threadIdx.x < kRoleThreads) {
#ifdef HAS_SM90A
            setmaxnreg_inc<kMultiplyRegisters>();
#endif
            run_multiplying(bias, apply_relu);
        } else {
#ifdef HAS_SM90A
            setmaxnreg_dec<kBringRegisters>();
#endif
            run_bringing();
        }
    }
};

// A function by itself, so that nothing that it needs is kept in registers until then.
template <int kOcts, int kPatternD, int kPatternH>
__device__ __noinline__ void compute_directly(const Plan& p, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    sweep_direct::compute(p.s, Block<kOcts, kPatternD, kPatternH>(p, x, w).part(bias, out), apply_relu);
}

template <int kOcts, int kPatternD, int kPatternH>
__global__ void __launch_bounds__(kThreads, kBlocks)
sweep_kernel(const __grid_constant__ Plan p, const float* __restrict__ x, const float* __restrict__ w, const float* __restrict__ bias, bool apply_relu, float* __restrict__ out) {
    using Block = Block<kOcts, kPatternD, kPatternH>;
    wait_for_previous_kernel();
    Block(p, x, w).run(bias, apply_relu, out);
    if (Block::head().not_finite) compute_directly<kOcts, kPatternD, kPatternH>(p, x, w, bias, apply_relu, out);
}

template <int kOcts> int forward(const Plan& p, cudaStream_t stream, const float* x, const float* w, const float* bias, bool apply_relu, float* out) {
    const auto launch = [&](auto pattern) {
        constexpr int kPattern = decltype(pattern)::value;
        const auto kernel = p.s.axis[0].phases == 1 ? sweep_kernel<kOcts, kKernel1, kPattern> : sweep_kernel<kOcts, kPattern, kPattern>;
        return launch_with_shared(kernel, p.blocks(), kThreads, p.shared_bytes(), stream, p, x, w, bias, apply_relu, out);
    };
    switch (pattern_of(p.s.axis[1])) {
        case kKernel2: return launch(std::integral_constant<int, kKernel2>{});
        case kKernel3: return launch(std::integral_constant<int, kKernel3>{});
        case kKernel3Later: return launch(std::integral_constant<int, kKernel3Later>{});
        default: return launch(std::integral_constant<int, kKernel4>{});
    }
}

extern template int forward<2>(const Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);    // conv_transpose3d_sweep_16.cu
extern template int forward<3>(const Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);    // conv_transpose3d_sweep_24.cu

}  // namespace sweep
