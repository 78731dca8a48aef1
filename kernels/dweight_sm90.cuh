// Gradient of a transposed convolution's weight on Hopper's tensor cores, any stride as in stencil.h.
//
//   dweight[ci, co, k] = sum over n, p of dout[n, p, (phase, co)] * x[n, first + p - shift, ci],   k = kernel_index(shift, phase)
//
// A matrix product on the scaled fp16 copies that dx and the forward read (scaled_half.cuh), channels-last: GEMM_M = (phase, output
// channel), GEMM_N = (neighbouring taps w, input channel), GEMM_K = positions p. Both operands are transposed ones, a row of shared
// memory for each position; a tap is a shift of x by whole rows. Where there is one tap w, GEMM_N is several chunks of channels.
//
// A block is 1 producer and 3 consumer warpgroups. The consumers share x and dout and have neighbouring taps h, or, where there
// is one tap h, neighbouring 64 rows of GEMM_M. A block of the grid is one group of taps and channels and one part of GEMM_K; the
// parts' sums go to scratch memory and are added in a fixed order. dout has zeros between its rows, where x has its halo.
//
// Samples have scales of their own: where the scale changes, and after kChain positions, which keeps the tensor cores' chains of
// additions short, the sums are scaled back and added to those in scratch memory.
#pragma once

#include "conv_launch_sm90.cuh"

namespace dweight_sm90 {

using conv_sm90::kSharedBytes;
using conv_sm90::round_up;

constexpr int kConsumers = 3, kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 40, kConsumerRegisters = 152;
static_assert(128 * kProducerRegisters + 128 * kConsumers * kConsumerRegisters <= 65536, "the register file of a multiprocessor");
constexpr int kRows = 64;              // GEMM_M of a consumer
constexpr int kMaxStages = 6;
constexpr int kHeadBytes = 1024;
constexpr int64_t kChain = 32768;

// --------------------------------------------------------------------------------------------------------- Tiling

struct Tiling {
    int block_n;                       // GEMM_N: 64, 128 or 192
    int chunk, blocks;                 // channels of x in a row of shared memory, and how many such columns of GEMM_N are used
    bool n_over_taps, m_over_taps;     // what GEMM_N and the consumers have neighbours of
    int row_blocks, chunks;            // of GEMM_M, of 64 rows; of x
    int tile_w, strips, rows, row_groups, pitch;    // a stage has `rows` rows of a strip
    int steps, box_rows;               // of 16 positions; rows of x
    int dout_bytes, x_bytes;           // of a box
    int dout_boxes, x_boxes, stage_bytes, stages;
    int groups_m, groups_n, groups_h, groups_w, groups, splits;
};

struct Parameters {
    Stencil s;
    Tiling t;
    int64_t N, C_in, C_out, groups, dout_phase_channels;
    const scaled_half::SampleMax *x_max, *dout_max;    // (N)
    float* partial;                    // (splits, groups, kConsumers, block_n / 8, 128, 4): a thread's sums, four by four
};

// What a group has, by its index.
struct Group {
    int m, n, td, th, tw;              // first row block, first chunk of x, taps; the first of several
    HOST_DEVICE Group(const Tiling& t, const Stencil& s, int index) {
        auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
        m = take(t.groups_m) * (t.m_over_taps ? 1 : kConsumers);
        n = take(t.groups_n) * (t.n_over_taps ? 1 : t.blocks);
        tw = take(t.groups_w) * t.blocks * (t.n_over_taps ? 1 : 0);
        th = take(t.groups_h) * (t.m_over_taps ? kConsumers : 1);
        td = take(s.axis[0].taps);
    }
};

// What a consumer of a group has.
HOST_DEVICE int row_block(const Tiling& t, const Group& g, int consumer) { return g.m + (t.m_over_taps ? 0 : consumer); }
HOST_DEVICE int tap_h(const Tiling& t, const Group& g, int consumer) { return g.th + (t.m_over_taps ? consumer : 0); }
// The last tap w of a group is its first block of columns, so that the next blocks are further on in x.
HOST_DEVICE int last_tap_w(const Tiling& t, const Stencil& s, const Group& g) {
    const int last = g.tw + (t.n_over_taps ? t.blocks : 1) - 1;
    return last < s.axis[2].taps ? last : s.axis[2].taps - 1;
}

// Whether some row of the consumer's block has a weight at its taps (d, h).
HOST_DEVICE bool is_live(const Parameters& a, const Group& g, int consumer) {
    const StencilAxis &ad = a.s.axis[0], &ah = a.s.axis[1], &aw = a.s.axis[2];
    const int th = tap_h(a.t, g, consumer), block = row_block(a.t, g, consumer);
    if (th >= ah.taps || block >= a.t.row_blocks) return false;
    for (int64_t c = int64_t(block) * kRows; c < int64_t(block + 1) * kRows; c += a.dout_phase_channels - c % a.dout_phase_channels) {
        const int phase = int(c / a.dout_phase_channels);
        if (phase < a.s.phases() && ad.live[phase / aw.phases / ah.phases] >> g.td & 1 && ah.live[phase / aw.phases % ah.phases] >> th & 1) return true;
    }
    return false;
}
HOST_DEVICE bool is_live(const Parameters& a, const Group& g) {
    for (int consumer = 0; consumer < kConsumers; consumer++)
        if (is_live(a, g, consumer)) return true;
    return false;
}

// The boxes of GEMM_K: (sample, plane, strip, rows), for the planes of dout that a tap d connects with one of x.
struct Boxes {
    int begin_d, planes;
    int64_t count;
    HOST_DEVICE Boxes(const Parameters& a, int td) {
        const StencilAxis& ad = a.s.axis[0];
        const int offset = ad.shift[td] - ad.first, end = ad.sources + offset < ad.positions ? ad.sources + offset : ad.positions;
        begin_d = offset > 0 ? offset : 0;
        planes = end > begin_d ? end - begin_d : 0;
        count = a.N * planes * a.t.strips * a.t.row_groups;
    }
};

// The tiling of least estimated time; block_n 0 where none fits.
inline Tiling choose_tiling(const Parameters& problem, int64_t phase_channels_x, int multiprocessors) {
    const Stencil& s = problem.s;
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    double best_time = 0;
    const int halo_w = w.shift[w.taps - 1], step_w = w.taps > 1 ? w.shift[1] - w.shift[0] : 0;
    for (int t = 1; t < w.taps; t++)
        if (w.shift[t] - w.shift[t - 1] != step_w) return best;
    Tiling t = {};
    t.chunk = phase_channels_x % 64 == 0 ? 64 : int(phase_channels_x);
    t.chunks = int(phase_channels_x / t.chunk);
    t.row_blocks = int(ceil_div(problem.dout_phase_channels * s.phases(), kRows));
    t.n_over_taps = w.taps > 1, t.m_over_taps = h.taps > 1;
    const int columns = t.n_over_taps ? w.taps : t.chunks, most = 192 / t.chunk;
    t.blocks = int(ceil_div(columns, ceil_div(columns, most)));
    t.block_n = t.blocks * t.chunk <= 64 ? 64 : t.blocks * t.chunk <= 128 ? 128 : 192;
    t.groups_m = int(t.m_over_taps ? t.row_blocks : ceil_div(t.row_blocks, kConsumers));
    t.groups_n = int(t.n_over_taps ? t.chunks : ceil_div(t.chunks, t.blocks));
    t.groups_h = int(t.m_over_taps ? ceil_div(h.taps, kConsumers) : h.taps);
    t.groups_w = int(t.n_over_taps ? ceil_div(w.taps, t.blocks) : 1);
    t.groups = s.axis[0].taps * t.groups_h * t.groups_w * t.groups_n * t.groups_m;
    t.dout_boxes = t.m_over_taps ? 1 : kConsumers < t.row_blocks ? kConsumers : t.row_blocks;
    t.x_boxes = t.n_over_taps ? 1 : t.block_n / t.chunk;
    int halo_h = 0;
    for (int th = 0; t.m_over_taps && th < h.taps; th += kConsumers) {
        const int last = th + kConsumers <= h.taps ? th + kConsumers - 1 : h.taps - 1, halo = h.shift[last] - h.shift[th];
        halo_h = halo > halo_h ? halo : halo_h;
    }
    const int row_bytes = t.chunk * 2;
    for (int strips = 1; strips <= 16 && strips <= w.positions; strips++)
    for (int rows = 1; rows <= h.positions && rows <= 64; rows++) {
        t.strips = strips, t.rows = rows;
        t.tile_w = int(ceil_div(w.positions, strips));
        t.pitch = conv_sm90::box_pitch(w, t.tile_w, strips);
        t.row_groups = int(ceil_div(h.positions, rows));
        t.steps = int(ceil_div(int64_t(rows) * t.pitch, 16));
        t.box_rows = rows + halo_h;
        if (t.pitch > 256 || t.tile_w > 256 || t.box_rows > 256) continue;
        const int64_t reach = int64_t(halo_h) * t.pitch + t.steps * 16 + halo_w + int64_t(t.block_n / t.chunk) * step_w, box = int64_t(t.box_rows) * t.pitch;
        const int64_t dout_bytes = ceil_div(int64_t(t.steps) * 16 * kRows * 2, 1024) * 1024, x_bytes = ceil_div((reach > box ? reach : box) * row_bytes, 1024) * 1024;
        const int64_t stage = t.dout_boxes * dout_bytes + t.x_boxes * x_bytes, stages = (kSharedBytes - kHeadBytes) / stage;
        if (stages < 2) break;
        t.dout_bytes = int(dout_bytes), t.x_bytes = int(x_bytes), t.stage_bytes = int(stage), t.stages = int(stages < kMaxStages ? stages : kMaxStages);
        // Cycles of a stage: the products, bound by the tensor cores or by shared memory, or the loads, at 18 bytes a cycle.
        const int live = t.m_over_taps ? (h.taps < kConsumers ? h.taps : kConsumers) : t.dout_boxes;
        const double product = t.block_n / 2.0, operands = (kRows * 32 + t.block_n * 32) / 128.0;
        const double products = t.steps * live * (product > operands ? product : operands);
        const double loads = (t.dout_boxes * double(rows) * t.tile_w * 128 + double(t.n_over_taps ? 1 : t.blocks) * box * row_bytes) / 18;
        const double time = ((products > loads ? products : loads) + 150) * strips * t.row_groups * (t.stages == 2 ? 1.15 : 1.0);
        if (best.block_n == 0 || time < best_time) best = t, best_time = time;
    }
    if (best.block_n == 0) return best;
    // Parts of GEMM_K that make full waves of blocks, as few as that takes.
    Parameters a = problem;
    a.t = best;
    int64_t live = 0, boxes = 0;
    for (int group = 0; group < best.groups; group++) {
        const Group g(best, s, group);
        const int64_t count = Boxes(a, g.td).count;
        if (is_live(a, g)) live++, boxes = count > boxes ? count : boxes;
    }
    double best_waste = 1e30;
    best.splits = 1;
    for (int waves = 1; waves <= 4 && live > 0; waves++) {
        int64_t splits = int64_t(waves) * multiprocessors / live;
        splits = splits < 1 ? 1 : splits > boxes && boxes > 0 ? boxes : splits;
        const double waste = double(ceil_div(splits * live, multiprocessors)) / splits * (1 + 0.02 * waves);
        if (waste < best_waste) best_waste = waste, best.splits = int(splits);
    }
    return best;
}

inline int64_t partial_count(const Tiling& t) { return int64_t(t.splits) * t.groups * kConsumers * kRows * t.block_n; }

// --------------------------------------------------------------------------------------------------------- Kernel

struct SharedHead { uint64_t full[kMaxStages], empty[kMaxStages]; };

#ifdef HAS_SM90A

struct Box { int n, d, w0, h0; };

__device__ __forceinline__ Box box_of(const Parameters& a, const Boxes& boxes, int64_t index) {
    Box b;
    b.h0 = int(index % a.t.row_groups) * a.t.rows, index /= a.t.row_groups;
    b.w0 = int(index % a.t.strips) * a.t.tile_w, index /= a.t.strips;
    b.d = boxes.begin_d + int(index % boxes.planes), b.n = int(index / boxes.planes);
    return b;
}

// One thread: loads the boxes from `begin` to `end`.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap& x_map, const CUtensorMap& dout_map, SharedHead& head, uint8_t* stages, const Group& g, const Boxes& boxes, int64_t begin, int64_t end) {
    const Tiling& t = a.t;
    const StencilAxis &ad = a.s.axis[0], &ah = a.s.axis[1], &aw = a.s.axis[2];
    const int last_h = tap_h(t, g, kConsumers - 1) < ah.taps ? tap_h(t, g, kConsumers - 1) : ah.taps - 1;    // of the group
    const int first_row = ah.first - ah.shift[last_h], first_column = aw.first - aw.shift[aw.taps - 1];
    const int dout_boxes = min(t.dout_boxes, t.row_blocks - g.m), x_boxes = t.n_over_taps ? 1 : min(t.blocks, t.chunks - g.n);
    const int bytes = dout_boxes * t.rows * t.tile_w * kRows * 2 + x_boxes * t.box_rows * t.pitch * t.chunk * 2;
    RingPosition stage;
    for (int64_t i = begin; i < end; i++) {
        const Box b = box_of(a, boxes, i);
        uint8_t* base = stages + stage.stage * t.stage_bytes;
        uint64_t* full = head.full + stage.stage;
        mbarrier_wait(head.empty + stage.stage, stage.phase ^ 1);
        mbarrier_arrive_expect_tx(full, bytes);
        for (int j = 0; j < x_boxes; j++)
            tma_load_5d(base + t.dout_boxes * t.dout_bytes + j * t.x_bytes, &x_map, full, (g.n + j) * t.chunk, first_column + b.w0, first_row + b.h0, ad.first + b.d - ad.shift[g.td], b.n);
        for (int j = 0; j < dout_boxes; j++)
            for (int row = 0; row < t.rows; row++)
                tma_load_5d(base + j * t.dout_bytes + row * t.pitch * kRows * 2, &dout_map, full, (g.m + j) * kRows, b.w0, b.h0 + row, b.d, b.n);
        stage.advance(t.stages);
    }
}

// Adds a thread's sums to scratch memory, scaled back by 2^-shift_a and 2^-shift_b, and clears them.
template <int kBlockN> __device__ __forceinline__ void flush(float (&d)[kBlockN / 2], float4* partial, bool first, int shift_a, int shift_b) {
    const float small = scaled_half::power_of_two(-max(shift_a, shift_b)), large = scaled_half::power_of_two(-min(shift_a, shift_b));    // in this order nothing overflows
#pragma unroll
    for (int i = 0; i < kBlockN / 8; i++) {
        const float4 before = first ? make_float4(0, 0, 0, 0) : partial[i * 128];
        partial[i * 128] = make_float4(before.x + d[i * 4] * small * large, before.y + d[i * 4 + 1] * small * large, before.z + d[i * 4 + 2] * small * large, before.w + d[i * 4 + 3] * small * large);
    }
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
}

template <int kBlockN>
__device__ __forceinline__ void consume(const Parameters& a, SharedHead& head, uint8_t* stages, const Group& g, const Boxes& boxes, int64_t begin, int64_t end, float4* partial, int consumer) {
    const Tiling& t = a.t;
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    const bool live = is_live(a, g, consumer);
    const int th = tap_h(t, g, consumer), last_h = min(tap_h(t, g, kConsumers - 1), ah.taps - 1), row_bytes = t.chunk * 2;
    const int step_w = aw.taps > 1 ? aw.shift[1] - aw.shift[0] : 0;
    const uint64_t dout_descriptor = wgmma_descriptor_base(kRows * 2), x_descriptor = wgmma_descriptor_base(row_bytes, t.n_over_taps ? step_w * row_bytes : t.x_bytes);
    const uint32_t dout_base = shared_address(stages) + (t.m_over_taps ? 0 : consumer) * t.dout_bytes;
    const uint32_t x_base = live ? shared_address(stages) + t.dout_boxes * t.dout_bytes + ((ah.shift[last_h] - ah.shift[th]) * t.pitch + aw.shift[aw.taps - 1] - aw.shift[last_tap_w(t, a.s, g)]) * row_bytes : 0;
    const bool elected = threadIdx.x % 32 == 0;
    float d[kBlockN / 2];
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
    RingPosition stage;
    int sample = -1, shift_x = 0, shift_dout = 0, reading = -1;    // the stage that wgmma groups in flight read
    int64_t chain = 0;
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
    for (int64_t i = begin; i < end; i++) {
        const int n = box_of(a, boxes, i).n;
        if (n != sample) {
            const int next_x = scaled_half::shift_of(a.x_max[n]), next_dout = scaled_half::shift_of(a.dout_max[n]);
            if (sample >= 0 && (next_x != shift_x || next_dout != shift_dout)) finish();
            sample = n, shift_x = next_x, shift_dout = next_dout;
        }
        if (chain >= kChain) finish();
        chain += t.steps * 16;
        mbarrier_wait(head.full + stage.stage, stage.phase);
        if (live) {
            const uint32_t dout = dout_base + stage.stage * t.stage_bytes, x = x_base + stage.stage * t.stage_bytes;
            wgmma_fence();
#pragma unroll 1
            for (int step = 0; step < t.steps; step++)
                wgmma_m64k16_f16<1>(d, wgmma_descriptor(dout_descriptor, dout + step * 16 * kRows * 2), wgmma_descriptor(x_descriptor, x + step * 16 * row_bytes));
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
    const Tiling& t = a.t;
    const int index = blockIdx.x % t.groups, split = blockIdx.x / t.groups;
    const Group g(t, a.s, index);
    if (!is_live(a, g)) return;

    // Prologue: barriers, and zeros wherever the copies leave gaps.
    if (threadIdx.x == 0) {
        for (int i = 0; i < t.stages; i++) mbarrier_init(head.full + i, 1), mbarrier_init(head.empty + i, kConsumers * 4);
        fence_mbarrier_init();
    }
    for (int i = threadIdx.x * 16; i < t.stages * t.stage_bytes; i += kThreads * 16) *reinterpret_cast<uint4*>(stages + i) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    __syncthreads();

    const Boxes boxes(a, g.td);
    const int64_t begin = boxes.count * split / t.splits, end = boxes.count * (split + 1) / t.splits;
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

// dweight (C_in, C_out / groups, kernel) from the parts' sums. A thread has the four that one of the kernel above had.
template <typename T> __global__ void __launch_bounds__(128) add_parts_kernel(const __grid_constant__ Parameters a, T* __restrict__ dweight) {
    const Tiling& t = a.t;
    const int quads = t.block_n / 8, quad = blockIdx.x % quads, consumer = blockIdx.x / quads % kConsumers, index = blockIdx.x / quads / kConsumers;
    const Group g(t, a.s, index);
    if (!is_live(a, g, consumer)) return;
    const float4* partial = reinterpret_cast<const float4*>(a.partial) + ((int64_t(index) * kConsumers + consumer) * quads + quad) * 128 + threadIdx.x;
    const int64_t stride = int64_t(t.groups) * kConsumers * quads * 128;
    double sums[4] = {};
#pragma unroll 4
    for (int split = 0; split < t.splits; split++) {
        const float4 v = partial[split * stride];
        sums[0] += v.x, sums[1] += v.y, sums[2] += v.z, sums[3] += v.w;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, volume = kernel_volume(a.s);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const int row = row_block(t, g, consumer) * kRows + warp * 16 + lane / 4 + e / 2 * 8, column = quad * 8 + lane % 4 * 2 + e % 2;
        const int phase = row / int(a.dout_phase_channels), co = row % int(a.dout_phase_channels), block = column / t.chunk;
        const int tw = t.n_over_taps ? last_tap_w(t, a.s, g) - block : 0, ci = (g.n + (t.n_over_taps ? 0 : block)) * t.chunk + column % t.chunk;
        if (phase >= a.s.phases() || co >= a.C_out || ci >= a.C_in || tw < g.tw || block >= t.blocks) continue;
        const int k = kernel_index(a.s, (g.td * a.s.axis[1].taps + tap_h(t, g, consumer)) * a.s.axis[2].taps + tw, phase);
        const int group_in = int(a.C_in / a.groups), group_out = int(a.C_out / a.groups);
        if (k >= 0 && ci / group_in == co / group_out) dweight[(int64_t(ci) * group_out + co % group_out) * volume + k] = from_acc<T>(float(sums[e]));
    }
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <int kBlockN> int launch_dweight(const CUtensorMap& x_map, const CUtensorMap& dout_map, const Parameters& a, cudaStream_t stream) {
    const int shared = kHeadBytes + a.t.stages * a.t.stage_bytes;
    RETURN_IF_ERROR(cudaFuncSetAttribute(dweight_kernel<kBlockN>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
    dweight_kernel<kBlockN><<<unsigned(a.t.groups * a.t.splits), kThreads, shared, stream>>>(x_map, dout_map, a);
    return cudaGetLastError();
}

// dweight from packed x and dout.
inline int differentiate(const Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
    const Tiling& t = a.t;
    const StencilAxis* axis = a.s.axis;
    CUtensorMap x_map, dout_map;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(t.chunk * 2), x.copy, {x.phase_channels, axis[2].sources, axis[1].sources, axis[0].sources, a.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<5>(&dout_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, swizzle_of(kRows * 2), dout.copy, {dout.phase_channels * dout.phases(), axis[2].positions, axis[1].positions, axis[0].positions, a.N}, {kRows, t.tile_w, 1, 1, 1}));
    switch (t.block_n) {
        case 64: RETURN_IF_ERROR(launch_dweight<64>(x_map, dout_map, a, stream)); break;
        case 128: RETURN_IF_ERROR(launch_dweight<128>(x_map, dout_map, a, stream)); break;
        default: RETURN_IF_ERROR(launch_dweight<192>(x_map, dout_map, a, stream)); break;
    }
    const int64_t blocks = int64_t(t.groups) * kConsumers * (t.block_n / 8);
    switch (dtype) {
        case kFloat32: return launch(add_parts_kernel<float>, blocks, 128, stream, a, static_cast<float*>(dweight));
        case kFloat16: return launch(add_parts_kernel<__half>, blocks, 128, stream, a, static_cast<__half*>(dweight));
        case kBFloat16: return launch(add_parts_kernel<__nv_bfloat16>, blocks, 128, stream, a, static_cast<__nv_bfloat16*>(dweight));
    }
    return cudaErrorInvalidValue;
}

}  // namespace dweight_sm90
