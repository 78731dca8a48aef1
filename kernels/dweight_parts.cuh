// The parts of dweight's sums that blocks leave in scratch memory (dweight.cuh): where they are, and how dweight is made of them.
#pragma once

#include "dweight_tiles.h"
#include "launch.cuh"

namespace dweight {

// Memory: (splits, groups, consumers, items, block_n / 8, 128, 4), a thread's sums of one item, four by four.
HOST_DEVICE int64_t partial_count(const Tiling& t) { return int64_t(t.splits) * t.groups * t.consumers * t.items * kRows * t.block_n; }

// A thread has rows r and r + 8, two neighbours of every eight columns: sums 4i and 4i + 1 the first row's, 4i + 2 and 4i + 3 the second's. Vector v of scratch memory has
// four sums of one row, which are in two columns' eights, the first at sum_at(v), so that neighbours have 16 columns of a row.
HOST_DEVICE constexpr int sum_at(int v) { return v / 2 * 8 + v % 2 * 2; }
HOST_DEVICE int place_in_partial(const Tiling& t, const Sum& s) {
    const int item = (s.group * t.consumers + s.consumer) * t.items + s.item, vector = s.column / 16 * 2 + s.row / 8 % 2, thread = s.row / 16 * 32 + s.row % 8 * 4 + s.column % 8 / 2;
    return ((item * (t.block_n / 8) + vector) * 128 + thread) * 4 + s.column / 8 % 2 * 2 + s.column % 2;
}

// ---------------------------------------------------------------------------------------------------------- Adding

constexpr int kAddThreads = 256, kAddInputs = 16, kAddFloats = 8192, kAddBlocks = 256;    // kAddBlocks: fewer would leave multiprocessors idle
constexpr int kManyParts = 8;
constexpr int kMostVolume = kMaxTaps * kMaxTaps * kMaxTaps;

// A block has kAddInputs input channels, 2^outputs output channels and `taps` elements of their kernels: all of them, or those of one output channel cut into
// tiles. Each of these sums is made by `shares` threads, which take the parts in turns.
struct AddPlan {
    int outputs, taps, shares;
    HOST_DEVICE int sums() const { return (taps << outputs) * kAddInputs; }
    HOST_DEVICE int row() const { return (taps << outputs) | 1; }    // in shared memory, of an input channel: neighbours begin in different banks
    HOST_DEVICE int tap_tiles(const Problem& p) const { return int(ceil_div(kernel_volume(p.s), taps)); }
    HOST_DEVICE int output_tiles(const Problem& p) const { return int(ceil_div(p.C_out / p.groups, 1 << outputs)); }
    HOST_DEVICE int64_t blocks(const Problem& p) const { return ceil_div(p.C_in, kAddInputs) * output_tiles(p) * tap_tiles(p); }
};

inline AddPlan make_add_plan(const Problem& p) {
    AddPlan plan = {6, kernel_volume(p.s), 1};
    while (plan.outputs > 0 && (plan.row() * kAddInputs > kAddFloats || plan.blocks(p) < kAddBlocks)) plan.outputs--;
    while (plan.taps > 1 && plan.blocks(p) < kAddBlocks) plan.taps = (plan.taps + 1) / 2;    // where an output channel of a block is not few enough
    while (p.t.splits > kManyParts && plan.sums() * plan.shares * 2 <= kAddThreads) plan.shares *= 2;
    return plan;
}

// A thread's share of a block's sums, kEach elements at a time, for each of them kParts parts at a time: so much is under way. `from` tells where an element's
// first part is, `to` takes its sum.
template <int kEach, int kParts, typename F, typename G> __device__ __forceinline__ void gather(const Problem& p, const AddPlan& plan, const float* __restrict__ partial, F from, G to) {
    const int64_t stride = partial_count(p.t) / p.t.splits;
    const int step = kAddThreads / plan.shares, own = threadIdx.x % step, share = threadIdx.x / step;
    for (int first = own; first < plan.sums(); first += kEach * step) {
        const float* parts[kEach];
        double sums[kEach] = {};
#pragma unroll
        for (int e = 0; e < kEach; e++) parts[e] = partial + from(first + e * step);
        for (int split = share; split < p.t.splits; split += kParts * plan.shares) {
            float values[kParts][kEach];
#pragma unroll
            for (int i = 0; i < kParts; i++)
#pragma unroll
                for (int e = 0; e < kEach; e++) values[i][e] = split + i * plan.shares < p.t.splits ? parts[e][(split + i * plan.shares) * stride] : 0.0f;
#pragma unroll
            for (int i = 0; i < kParts; i++)
#pragma unroll
                for (int e = 0; e < kEach; e++) sums[e] += values[i][e];
        }
#pragma unroll
        for (int e = 0; e < kEach; e++) to(first + e * step, sums[e]);
    }
}

// dweight (C_in, C_out / groups, kernel) from the parts. Threads gather sums, neighbouring ones of neighbouring input channels, and put them together in shared memory
// in the order of dweight.
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ Problem p, AddPlan plan, const float* __restrict__ partial, int dtype, void* __restrict__ dweight) {
    __shared__ SumOfTap taps[kMostVolume];
    __shared__ float values[kAddFloats];
    __shared__ double shares[kAddThreads];
    const int volume = kernel_volume(p.s), group_in = int(p.C_in / p.groups), group_out = int(p.C_out / p.groups), output_tiles = plan.output_tiles(p), tap_tiles = plan.tap_tiles(p);
    const int k0 = blockIdx.x % tap_tiles * plan.taps, co0 = blockIdx.x / tap_tiles % output_tiles << plan.outputs, ci0 = blockIdx.x / tap_tiles / output_tiles * kAddInputs;
    const int last_tap = min(plan.taps, volume - k0) - 1, last_output = min(1 << plan.outputs, group_out - co0) - 1, last_input = min(kAddInputs, int(p.C_in) - ci0) - 1;
    for (int k = threadIdx.x; k <= last_tap; k += kAddThreads) taps[k] = sum_of_tap(p, k0 + k);
    wait_for_previous_kernel();
    __syncthreads();
    // Element i: input channel, the thread's own; output channel; k. Where there is none: one of the others.
    const int input = threadIdx.x % kAddInputs, ci = ci0 + min(input, last_input), co = ci / group_in * group_out + co0;
    const SumOfInput sum_input = sum_of_input(p, ci);
    const auto from = [&](int i) {
        const int at = i / kAddInputs, k = at >> plan.outputs, output = at - (k << plan.outputs);
        return place_in_partial(p.t, sum_of(p, taps[min(k, last_tap)], sum_input, co + min(output, last_output)));
    };
    const auto to = [&](int i, double sum) {
        const int at = i / kAddInputs, k = at >> plan.outputs, output = at - (k << plan.outputs);
        if (k < plan.taps) values[input * plan.row() + output * plan.taps + k] = float(sum);
    };
    if (plan.shares > 1) {    // of one sum
        gather<1, 8>(p, plan, partial, from, [&](int, double sum) { shares[threadIdx.x] = sum; });
        __syncthreads();
        if (threadIdx.x < plan.sums()) {
            double sum = 0;
            for (int i = threadIdx.x; i < kAddThreads; i += kAddThreads / plan.shares) sum += shares[i];
            to(threadIdx.x, sum);
        }
    } else if (p.t.splits > kManyParts) {
        gather<1, 16>(p, plan, partial, from, to);
    } else {
        gather<8, 2>(p, plan, partial, from, to);
    }
    __syncthreads();
    const int floats = last_output * plan.taps + last_tap + 1;    // neighbours: the taps are all, or the output channel is one
    for (int i = threadIdx.x / 32; i <= last_input; i += kAddThreads / 32)
        for (int j = threadIdx.x % 32; j < floats; j += 32) store_as(dweight, dtype, (int64_t(ci0 + i) * group_out + co0) * volume + k0 + j, values[i * plan.row() + j]);
}

inline int add_parts(const Problem& p, const float* partial, int dtype, void* dweight, void* stream) {
    const AddPlan plan = make_add_plan(p);
    return launch(add_parts_kernel, plan.blocks(p), kAddThreads, stream, p, plan, partial, dtype, dweight);
}

}  // namespace dweight
