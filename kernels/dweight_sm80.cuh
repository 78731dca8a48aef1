// dweight.cuh by mma.sync, from sm_80 up.
//
// A block is 3 warpgroups, which share x and dout and the work as in dweight_sm90.cuh. Each of a warpgroup's four warps has all of its 64 rows and a quarter of GEMM_N. A block of the grid is one group of taps and
// channels and one part of GEMM_K. All threads load, by cp.async through a ring of stages; dout has zeros between its rows and behind
// them, where x has its halo or what was there before.
#pragma once

#include "dweight.cuh"
#include "ptx_sm80.cuh"
#include "swizzle.h"

namespace dweight_sm80 {

using namespace dweight;

constexpr int kThreads = 128 * kConsumers;
constexpr int kColumnWarps = 4;

struct Operands {
    Parameters a;
    const __half *x, *dout;         // packed
    int x_pitch, dout_pitch;        // elements of a position
};

// What is loaded of a plane: of positions inside of h_end and w_end, channels from `from` on. width: of the plane; pitch: elements from position to position.
struct Plane { const __half* from; int pitch, width, h_end, w_end; };

// All threads: loads rows of shared memory, row_bytes each, `box_pitch` positions of each row of the plane from (h, w) on; zeros outside.
__device__ __forceinline__ void load_rows(uint32_t to, const Plane& plane, int h, int w, int rows, int box_pitch, int row_bytes) {
    const int pieces = row_bytes / 16, at_once = kThreads / pieces, row = threadIdx.x / pieces, piece = threadIdx.x % pieces, step_h = at_once / box_pitch, step_w = at_once % box_pitch;
    const int w_wrap = w + box_pitch;
    const __half* from = plane.from + piece * 8;
    to += swizzled(row, piece, row_bytes), h += row / box_pitch, w += row % box_pitch;
#pragma unroll 2
    for (int left = rows - row; left > 0; left -= at_once) {
        const bool inside = unsigned(h) < unsigned(plane.h_end) && unsigned(w) < unsigned(plane.w_end);
        cp_async_16(to, from + (inside ? int64_t(h * plane.width + w) * plane.pitch : 0), inside);
        to += kThreads * 16, h += step_h, w += step_w;    // as many rows on, the swizzle is the same
        if (w >= w_wrap) w -= box_pitch, h++;
    }
}

__device__ __forceinline__ void load_stage(const Operands& o, const Group& g, const Box& b, uint32_t stage) {
    const Problem& p = o.a.p;
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    for (int j = 0; j < x_boxes_of(t, g); j++) {
        const BoxOfX box = box_of_x(t, g, j);
        const int d = ad.first + b.d - ad.shift[box.td];    // outside of x, with a joint group: zeros
        const bool inside = d >= 0 && d < ad.sources;
        const __half* x = o.x + (int64_t(b.n) * ad.sources + (inside ? d : 0)) * ah.sources * aw.sources * o.x_pitch + box.chunk * t.chunk;
        load_rows(stage + t.dout_boxes * t.dout_bytes + j * t.x_bytes, {x, o.x_pitch, aw.sources, inside ? ah.sources : 0, aw.sources}, first_row(p, g) + b.h0, first_column(p) + b.w0, t.box_rows * t.pitch, t.pitch, t.chunk * 2);
    }
    const __half* dout = o.dout + (int64_t(b.n) * ad.positions + b.d) * ah.positions * aw.positions * o.dout_pitch;
    for (int j = 0; j < dout_boxes_of(t, g); j++) {
        const int channel = (g.m + j) * kRows, piece = threadIdx.x % (kRows / 8) * 8;
        const int h_end = channel + piece < o.dout_pitch ? min(ah.positions, b.h0 + t.rows) : 0;
        load_rows(stage + j * t.dout_bytes, {dout + channel, o.dout_pitch, aw.positions, h_end, min(aw.positions, b.w0 + t.tile_w)}, b.h0, b.w0, t.steps * 16, t.pitch, kRows * 2);
    }
}

// --------------------------------------------------------------------------------------------------------- Kernel

// Grid: (group, split), groups fastest, so that the blocks which read the same boxes run together.
template <int kBlockN, int kItems> __global__ void __launch_bounds__(kThreads, 1) dweight_kernel(const __grid_constant__ Operands o) {
    wait_for_previous_kernel();
    extern __shared__ __align__(1024) uint8_t stages[];
    const Parameters& a = o.a;
    const Tiling& t = a.p.t;
    const int index = blockIdx.x % t.groups, split = blockIdx.x / t.groups;
    const Group g(t, a.p.s, index);
    if (!is_live(a.p, g)) return;
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
    __syncthreads();

    const Boxes boxes(a.p, g);
    const int begin = boxes.begin_of(t, split), end = boxes.begin_of(t, split + 1);
    const int consumer = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int items = items_of(a.p, g, consumer);

    // Where this lane's rows of 8 x 8 matrices begin in a stage: 8 positions, 8 rows of GEMM_M or columns of GEMM_N.
    constexpr int kColumns = kBlockN / kColumnWarps;
    const int row_bytes = t.chunk * 2, matrix = lane / 8;
    uint32_t dout_at[kItems][4], x_at[kItems][kColumns / 16];
#pragma unroll
    for (int i = 0; i < kItems; i++) {
        const Job job = job_of(a.p, g, consumer, min(i, max(items - 1, 0)));
#pragma unroll
        for (int m = 0; m < 4; m++) dout_at[i][m] = dout_box_of(t, job, consumer) * t.dout_bytes + swizzled(matrix / 2 * 8 + lane % 8, m * 2 + matrix % 2, kRows * 2);
#pragma unroll
        for (int j = 0; j < kColumns / 16; j++) {
            const int column = warp * kColumns + j * 16, block = column / t.chunk, piece = column % t.chunk / 8 + matrix / 2;
            const int row = (items > 0 ? first_shift(a.p, g, job) : 0) + (t.n_over_taps ? block * step_w(a.p.s) : 0) + matrix % 2 * 8 + lane % 8;
            x_at[i][j] = t.dout_boxes * t.dout_bytes + x_box_of(t, job) * t.x_bytes + (t.n_over_taps ? 0 : block * block_bytes(t, a.p.s)) + swizzled(row, piece, row_bytes);
        }
    }

    float d[kItems][4][kColumns / 8][4] = {};
    float4* partial = reinterpret_cast<float4*>(a.partial) + ((int64_t(split) * t.groups + index) * kConsumers + consumer) * t.items * (kBlockN / 8 * 128);
    bool first = true;
    int shift_x = 0, shift_dout = 0, chain = 0;
    // Adds the sums to scratch memory, scaled back, and clears them.
    auto flush = [&] {
        const ScaleBack back(shift_x, shift_dout);
#pragma unroll
        for (int i = 0; i < kItems; i++) {
#pragma unroll
            for (int m = 0; m < 4; m++) {
                float4* sums = partial + (i * (kBlockN / 8) + warp * (kColumns / 8)) * 128 + m * 32 + lane;
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++)
                    if (kItems == 1 || i < items) add_sums(sums[j * 128], first, back, &d[i][m][0][0] + sum_at(j));
#pragma unroll
                for (int j = 0; j < kColumns / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) d[i][m][j][e] = 0.0f;
            }
        }
        first = false, chain = 0;
    };
    const uint32_t base = shared_address(stages);
    Box next = begin < end ? box_of(a.p, boxes, begin) : Box{};    // that is loaded
    for (int i = 0; i < t.stages - 1; i++) {
        if (begin + i < end) load_stage(o, g, next, base + i * t.stage_bytes), advance(a.p, boxes, next);
        cp_async_commit_group();
    }
    const int boxes_of_sample = boxes.planes * t.strips * t.row_groups;
    for (int i = begin, slot = 0, sample_end = begin; i < end; i++, slot = slot + 1 == t.stages ? 0 : slot + 1) {
        if (i == sample_end) {
            const int sample = i / boxes_of_sample, next_x = scaled_half::shift_of(a.x_max[sample]), next_dout = scaled_half::shift_of(a.dout_max[sample]);
            if (i > begin && (next_x != shift_x || next_dout != shift_dout)) flush();
            shift_x = next_x, shift_dout = next_dout, sample_end = (sample + 1) * boxes_of_sample;
        }
        if (chain >= kChain) flush();
        chain += t.steps * 16;
        if (t.stages == 2) cp_async_wait_group<0>();
        else cp_async_wait_group<1>();
        __syncthreads();
        if (i + t.stages - 1 < end) load_stage(o, g, next, base + (slot == 0 ? t.stages - 1 : slot - 1) * t.stage_bytes), advance(a.p, boxes, next);
        cp_async_commit_group();
        const uint32_t stage = base + slot * t.stage_bytes;
#pragma unroll
        for (int item = 0; item < kItems; item++) {
            if (item >= items) break;
#pragma unroll 1
            for (int step = 0; step < t.steps; step++) {
                uint32_t dout[4][4], x[kColumns / 16][4];
#pragma unroll
                for (int j = 0; j < kColumns / 16; j++) ldmatrix_x4_transposed(x[j], stage + x_at[item][j] + step * 16 * row_bytes);
#pragma unroll
                for (int m = 0; m < 4; m++) ldmatrix_x4_transposed(dout[m], stage + dout_at[item][m] + step * 16 * kRows * 2);
#pragma unroll
                for (int m = 0; m < 4; m++)
#pragma unroll
                    for (int j = 0; j < kColumns / 8; j++) mma_m16n8k16_f16(d[item][m][j], dout[m], x[j / 2][j % 2 * 2], x[j / 2][j % 2 * 2 + 1]);
            }
        }
    }
    flush();
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN, int kItems = 1> int launch_dweight(const Operands& o, cudaStream_t stream) {
    const Tiling& t = o.a.p.t;
    const int shared = t.stages * t.stage_bytes;
    return launch_with_shared(dweight_kernel<kBlockN, kItems>, t.groups * t.splits, kThreads, shared, stream, o);
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Operands o = {a, x.copy, dout.copy, int(x.phase_channels), int(dout.phase_channels) * dout.phases()};
    switch (a.p.t.block_n) {
        case 64: RETURN_IF_ERROR((a.p.t.joint ? launch_dweight<64, kMaxItems>(o, stream) : launch_dweight<64>(o, stream))); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(o, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(o, stream)); break;
    }
    return add_parts(a.p, a.partial, dtype, dweight, stream);
}

}  // namespace dweight_sm80
