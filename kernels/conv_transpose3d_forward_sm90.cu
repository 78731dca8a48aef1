// Transposed convolution of stride 1 on Hopper's tensor cores, alone or with ReLU and GroupNorm behind it.
//
//   out[n, co, o] = bias[co] + sum over ci, k of x[n, ci, o + padding - k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out, K_d, K_h, K_w)
//
// Implicit GEMM on scaled fp16 operands (scaled_half.cuh; TF32-equivalent), channels-last: GEMM_M = output channels, GEMM_N =
// positions of one (n, d) plane of the output, GEMM_K = (tap, input channel).
//
// A block is 1 producer and 2 consumer warpgroups, one block per multiprocessor, taking tiles from a queue. The producer
// copies a box of the input plane, halo included, once for all taps (kh, kw): positions are numbered along rows of `pitch`,
// and a tap is a shift of the wgmma descriptor's start address by whole rows of shared memory. The weights of each tap
// stream through a ring of stages. Where the whole width fits, neighbouring rows share the zeros of their halos.
//
// Fused: the epilogue writes relu(out) and, per tile and channel, the mean and the sum of squared deviations. The other warps
// of the producer's warpgroup combine these and normalize the samples that are complete, from L2, while the tensor cores
// work on the next ones. Formula: torch.nn.ConvTranspose3d, torch.nn.GroupNorm.

#include "group_norm.cuh"
#include "ptx_sm90.cuh"
#include "scaled_half.cuh"

namespace conv_sm90 {

// ---------------------------------------------------------------------------------------------------------- Tiling

constexpr int kWarpgroupM = 64;                // output channels of a warpgroup
constexpr int kMaxStages = 8;
constexpr int kInputStages = 2;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kThreads = 384;
constexpr int kNormStages = 5, kNormBytes = 4096;    // of the ring through which samples are normalized
constexpr int kSlice = 32;                           // positions of a warp's slice (16 channels) of the output on its way through shared memory
constexpr int kSliceFloats = 16 * kSlice;            // rows of 128 bytes, swizzled as the copy engine swizzles them
constexpr int kSliceBytes = 2 * kSliceFloats * 4;    // of one warp: one slice is filled while the other is stored
constexpr int kConstantBytes = 16 * 16;              // of one warp: what its 16 channels need
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 65536, "the register file of a multiprocessor");

// How the output is cut into tiles, and where a tile finds its input. Chosen by choose_tiling.
struct Tiling {
    int block_n;           // positions of a warpgroup
    int split_m;           // 1: the two warpgroups have the same positions, other channels; 0: the other way round
    int chunk;             // input channels of a stage: 16, 32 or 64
    int C_pad, M_pad;      // channels of the scratch copies
    int pitch;             // positions from one output row to the next, in a tile's numbering and in its box
    int tile_w, w_tiles;   // output columns of a tile
    int positions;         // of a block: block_n or 2 * block_n
    int contiguous;        // 1: a tile is one run of the output plane, which the copy engine stores
    int vectors;           // 1: four positions at a multiple of four are neighbours in memory, all inside the output or all outside
    int plane_tiles;       // tiles of one plane of H_out rows
    int box_rows;          // of the input, halo included
    int kh_per_box;        // taps kh that a box serves: all, or 1
    int input_bytes, weight_bytes, weight_stages;    // of a stage; a stage of input ends with a margin of zeros
    int64_t m_tiles, sample_tiles, tiles;
};

struct Problem {
    Geometry g;
    Tiling t;
};

inline int round_up(int64_t v, int64_t to) { return int(ceil_div(v, to) * to); }

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory.
inline Tiling choose_tiling(const Geometry& g, int multiprocessors) {
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t halo_h = (ah.kernel - 1) * ah.dilation, halo_w = (aw.kernel - 1) * aw.dilation;
    Tiling best = {};
    double best_time = 0;
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {256, 232, 192, 160, 128, 64})
    for (int64_t w_tiles = 1; w_tiles <= ceil_div(aw.out, 8) && w_tiles <= 64; w_tiles++)
    for (int kh_per_box : {int(ah.kernel), 1}) {
        Tiling t = {};
        t.block_n = block_n, t.split_m = split_m, t.kh_per_box = kh_per_box;
        t.chunk = g.C_in <= 16 ? 16 : g.C_in <= 32 ? 32 : 64;
        t.C_pad = round_up(g.C_in, t.chunk);
        const int block_m = split_m ? 2 * kWarpgroupM : kWarpgroupM;
        t.M_pad = round_up(g.C_out, block_m);
        t.w_tiles = w_tiles, t.tile_w = ceil_div(aw.out, w_tiles);
        int64_t pitch = t.tile_w + halo_w;
        // Rows share their zeros. Where rows are multiples of four positions, vectors never straddle their ends.
        if (w_tiles == 1) pitch = t.tile_w + (aw.padding < halo_w ? aw.padding : halo_w);
        if (pitch != aw.out && aw.out % 4 == 0 && t.tile_w % 4 == 0) pitch = ceil_div(pitch, 4) * 4;
        t.contiguous = w_tiles == 1 && pitch == aw.out && ah.out * aw.out % 4 == 0;
        t.vectors = t.contiguous || (pitch % 4 == 0 && aw.out % 4 == 0 && t.tile_w % 4 == 0);
        t.positions = split_m ? block_n : 2 * block_n;
        const int64_t row_bytes = 2 * t.chunk;
        const int64_t rows = (pitch + t.positions - 2) / pitch + 1 + (kh_per_box == 1 ? 0 : halo_h);
        if (pitch > 256 || rows > 256) continue;
        t.pitch = pitch, t.box_rows = rows;
        t.plane_tiles = ceil_div(ah.out * pitch, t.positions);
        t.input_bytes = round_up((rows * pitch + halo_w) * row_bytes, 1024);
        t.weight_bytes = block_m * row_bytes;
        const int64_t left = kSharedBytes - 1024 - kNormStages * kNormBytes - 8 * (kSliceBytes + kConstantBytes) - int64_t(kInputStages) * t.input_bytes;
        t.weight_stages = left / t.weight_bytes < kMaxStages ? left / t.weight_bytes : kMaxStages;
        if (left < 0 || t.weight_stages < 3) continue;
        t.m_tiles = t.M_pad / block_m;
        t.sample_tiles = ad.out * t.w_tiles * t.plane_tiles * t.m_tiles;
        t.tiles = g.N * t.sample_tiles;
        // Time of the busiest multiprocessor, in columns of wgmma: the tile's own, and a constant share for what is not overlapped.
        const double boxes = kh_per_box == 1 ? double(ah.kernel) : 1.0;
        const double load = 0.15 * boxes * rows * pitch / (ah.kernel * aw.kernel);
        const double stages = t.weight_stages < 4 ? 1.1 : 1.0;
        const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors + 0.5;
        const double time = waves * (2 * block_n + 24 + load) * stages;
        if (best.block_n == 0 || time < best_time) best = t, best_time = time;
    }
    return best;
}

// ---------------------------------------------------------------------------------------------------- Parameters

// Scratch of a call. Counters start at zero.
struct Workspace {
    unsigned *tile_ticket, *group_ticket, *row_ticket;    // queues
    unsigned *tiles_done, *groups_done;    // (N): warpgroups that finished a tile, groups with final statistics
    float2* moments;                       // (N, parts, M_pad): mean and sum of squared deviations of a tile's channel
    float* counts;                         // (N, parts): how many values they are of
};

struct Fusion {
    int64_t num_groups;                    // 0: convolution alone
    bool in_kernel;                        // normalize while the convolution runs; else only the statistics are computed
    double eps;
    const float *gamma, *beta;             // (C_out), or null
    void* y;                               // (N, C_out, D_out, H_out, W_out); may be `out`
    double *mean, *rstd;                   // (N, num_groups)
};

struct Parameters {
    Problem p;
    int dtype;
    bool apply_relu;
    bool bulk_store;    // by the copy engine: float32, contiguous tiles
    const void* bias;
    void* out;
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (M_pad)
    Workspace workspace;
    Fusion fusion;
};

// A stage of the ring through which samples are normalized.
struct NormPiece {
    float high, low, scale, offset;        // y = ((r - high) - low) * scale + offset
    float* y;
    int bytes;                             // 0: no more
};

struct SharedHead {
    uint64_t input_full[kInputStages], input_empty[kInputStages];
    uint64_t weight_full[kMaxStages], weight_empty[kMaxStages];
    uint64_t tile_full[2], tile_empty[2];
    uint64_t norm_full[kNormStages], norm_empty[kNormStages];
    int tiles[2];
    NormPiece pieces[kNormStages];
};
static_assert(sizeof(SharedHead) <= 1024, "the stages begin 1 KB into shared memory");

// Where a tile is.
struct Tile {
    int64_t n;
    int d, w0, h0, q0, m0, part;    // first row of the box's outputs, position of the tile in it, first channel, part of the statistics
    int64_t p0;                     // first position in the plane
};

__device__ __forceinline__ Tile locate(const Problem& problem, int64_t index) {
    const Tiling& t = problem.t;
    Tile tile;
    tile.m0 = index % t.m_tiles * (t.split_m ? 2 * kWarpgroupM : kWarpgroupM);
    index /= t.m_tiles;
    tile.part = index % (t.sample_tiles / t.m_tiles);
    tile.p0 = index % t.plane_tiles * t.positions;
    index /= t.plane_tiles;
    tile.w0 = index % t.w_tiles * t.tile_w;
    index /= t.w_tiles;
    tile.d = index % problem.g.axis[0].out;
    tile.n = index / problem.g.axis[0].out;
    tile.h0 = tile.p0 / t.pitch;
    tile.q0 = tile.p0 % t.pitch;
    return tile;
}

// The plane of the input that tap kd of output plane d reads, or -1.
__device__ __forceinline__ int source_plane(const Geometry& g, int d, int kd) {
    const int plane = d + int(g.axis[0].padding) - kd * int(g.axis[0].dilation);
    return plane < int(g.axis[0].in) ? plane : -1;
}

#ifdef HAS_SM90A

// ------------------------------------------------------------------------------------------------------- Producer

// One thread: takes tiles from the queue, tells the consumers, loads boxes of input and stages of weights.
__device__ __forceinline__ void produce(const Parameters& a, const CUtensorMap* x_map, const CUtensorMap* w_map, SharedHead& head, uint8_t* input, uint8_t* weights) {
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const Axis &ah = g.axis[1], &aw = g.axis[2];
    const int K_d = g.axis[0].kernel, K_h = ah.kernel, K_w = aw.kernel;
    const int box_bytes = t.box_rows * t.pitch * t.chunk * 2;
    RingPosition in, weight, slot;
    unsigned next = atomicAdd(a.workspace.tile_ticket, 1u);
    while (true) {
        const int64_t index = next;
        mbarrier_wait(head.tile_empty + slot.stage, slot.phase ^ 1);
        head.tiles[slot.stage] = index < t.tiles ? int(index) : -1;
        mbarrier_arrive(head.tile_full + slot.stage);
        slot.advance(2);
        if (index >= t.tiles) return;
        next = atomicAdd(a.workspace.tile_ticket, 1u);
        const Tile tile = locate(a.p, index);
        const int w_start = tile.w0 + int(aw.padding) - (K_w - 1) * int(aw.dilation);
        for (int kd = 0; kd < K_d; kd++) {
            const int plane = source_plane(g, tile.d, kd);
            if (plane < 0) continue;
            for (int kh0 = 0; kh0 < K_h; kh0 += t.kh_per_box)
            for (int c = 0; c < t.C_pad; c += t.chunk) {
                const int h_start = tile.h0 + int(ah.padding) - (kh0 + t.kh_per_box - 1) * int(ah.dilation);
                mbarrier_wait(head.input_empty + in.stage, in.phase ^ 1);
                mbarrier_arrive_expect_tx(head.input_full + in.stage, box_bytes);
                tma_load_5d(input + in.stage * t.input_bytes, x_map, head.input_full + in.stage, c, w_start, h_start, plane, int(tile.n));
                in.advance(kInputStages);
                for (int kh = kh0; kh < kh0 + t.kh_per_box; kh++)
                for (int kw = 0; kw < K_w; kw++) {
                    mbarrier_wait(head.weight_empty + weight.stage, weight.phase ^ 1);
                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, t.weight_bytes);
                    tma_load_3d(weights + weight.stage * t.weight_bytes, w_map, head.weight_full + weight.stage, c, tile.m0, (kd * K_h + kh) * K_w + kw);
                    weight.advance(t.weight_stages);
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------- Consumer

// Tells that this warpgroup's part of a tile of sample n is in global memory.
__device__ __forceinline__ void signal_done(const Parameters& a, int64_t n) {
    if (threadIdx.x % 32 == 0) {
        bulk_wait_group();
        fence_proxy_async_all();
    }
    named_barrier(threadIdx.x / 128, 128);
    if (threadIdx.x % 128 == 0) {
        __threadfence();
        atomicAdd(a.workspace.tiles_done + n, 1u);
    }
}

// The sums of one tile: d (64 channels, kBlockN positions) of this warpgroup. kSteps: chunk / 16; known to the compiler, or
// it would wait for each wgmma by itself.
template <int kBlockN, int kSteps>
__device__ __forceinline__ void multiply(const Parameters& a, const Tile& tile, SharedHead& head, const uint8_t* input, const uint8_t* weights,
                                         RingPosition& in, RingPosition& weight, int64_t& pending, float (&d)[kBlockN / 2]) {
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const int warpgroup = threadIdx.x / 128 - 1;
    const bool elected = threadIdx.x % 128 == 0;
    constexpr int row_bytes = kSteps * 32;
    const int K_d = g.axis[0].kernel, K_h = g.axis[1].kernel, K_w = g.axis[2].kernel;
    const int dilation_h = g.axis[1].dilation, dilation_w = g.axis[2].dilation;
    const uint64_t descriptor = wgmma_descriptor_base(row_bytes);
    const int a_offset = t.split_m ? warpgroup * kWarpgroupM * row_bytes : 0;
    const int b_row = tile.q0 + (t.split_m ? 0 : warpgroup * kBlockN);
#pragma unroll
    for (int i = 0; i < kBlockN / 2; i++) d[i] = 0.0f;
    int done_weight = -1, done_input = -1;    // stages whose last reader is the wgmma group in flight
    for (int kd = 0; kd < K_d; kd++) {
        if (source_plane(g, tile.d, kd) < 0) continue;
        for (int kh0 = 0; kh0 < K_h; kh0 += t.kh_per_box)
        for (int c = 0; c < t.C_pad; c += t.chunk) {
            mbarrier_wait(head.input_full + in.stage, in.phase);
            const uint32_t box = shared_address(input + in.stage * t.input_bytes) + b_row * row_bytes;
            for (int kh = t.kh_per_box - 1; kh >= 0; kh--)
            for (int kw = K_w - 1; kw >= 0; kw--) {
                const uint32_t b = box + (kh * dilation_h * t.pitch + kw * dilation_w) * row_bytes;
                mbarrier_wait(head.weight_full + weight.stage, weight.phase);
                const uint32_t w = shared_address(weights + weight.stage * t.weight_bytes) + a_offset;
                wgmma_fence();
#pragma unroll
                for (int step = 0; step < kSteps; step++) wgmma_m64k16_f16<kBlockN>(d, wgmma_descriptor(descriptor, w + step * 32), wgmma_descriptor(descriptor, b + step * 32));
                wgmma_commit_group();
                if (pending >= 0) {    // by now the previous tile's stores are through: the fence costs little
                    signal_done(a, pending);
                    pending = -1;
                }
                wgmma_wait_group<1>();
                if (elected && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
                if (elected && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
                done_input = -1, done_weight = weight.stage;
                weight.advance(t.weight_stages);
            }
            done_input = in.stage;
            in.advance(kInputStages);
        }
    }
    wgmma_wait_group<0>();
    if (elected && done_weight >= 0) mbarrier_arrive(head.weight_empty + done_weight);
    if (elected && done_input >= 0) mbarrier_arrive(head.input_empty + done_input);
}

__device__ __forceinline__ float load_as_float(const void* p, int dtype, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    return dtype == kFloat16 ? to_acc(static_cast<const __half*>(p)[i]) : to_acc(static_cast<const __nv_bfloat16*>(p)[i]);
}

// kCount neighbours, at a multiple of kCount
template <int kCount> __device__ __forceinline__ void store(void* p, int dtype, int64_t i, const float (&v)[kCount]) {
    if constexpr (kCount == 4) {
        if (dtype == kFloat32) {
            *reinterpret_cast<float4*>(static_cast<float*>(p) + i) = make_float4(v[0], v[1], v[2], v[3]);
        } else if (dtype == kFloat16) {
            reinterpret_cast<__half2*>(static_cast<__half*>(p) + i)[0] = __floats2half2_rn(v[0], v[1]);
            reinterpret_cast<__half2*>(static_cast<__half*>(p) + i)[1] = __floats2half2_rn(v[2], v[3]);
        } else {
            reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p) + i)[0] = __floats2bfloat162_rn(v[0], v[1]);
            reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(p) + i)[1] = __floats2bfloat162_rn(v[2], v[3]);
        }
    } else {
        if (dtype == kFloat32) static_cast<float*>(p)[i] = v[0];
        else if (dtype == kFloat16) static_cast<__half*>(p)[i] = from_acc<__half>(v[0]);
        else static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(v[0]);
    }
}

// The sum over aligned runs of kLanes lanes.
template <int kLanes> __device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
    return v;
}

// Scales back, adds the bias, applies ReLU, stores, and leaves the tile's moments where the fusion wants them. A warp has 16
// channels; it passes kSlice positions at a time through shared memory, from where a lane takes kVector neighbouring ones.
template <int kBlockN, int kVector>
__device__ __forceinline__ void finish(const Parameters& a, const CUtensorMap* out_map, const Tile& tile, float* slices, float4* constants, const float (&d)[kBlockN / 2]) {
    constexpr int kLanes = kSlice / kVector;       // lanes of a row
    constexpr int kRows = 32 / kLanes;             // rows of a step
    constexpr int kSteps = 16 / kRows;
    constexpr int kSlices = (kBlockN + kSlice - 1) / kSlice;
    const Geometry& g = a.p.g;
    const Tiling& t = a.p.t;
    const int warpgroup = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int H = g.axis[1].out, W = g.axis[2].out;
    const int width = min(t.tile_w, W - tile.w0), height = H - tile.h0;
    const int64_t plane = int64_t(H) * W, volume = g.axis[0].out * plane;
    const uint32_t magic = 0xffffffffu / t.pitch + 1;    // p / pitch = p * magic >> 32 for p < 2^16, pitch > 1
    const bool fused = a.fusion.num_groups > 0, bulk = kVector == 4 && a.bulk_store;
    const int block0 = t.split_m ? 0 : warpgroup * kBlockN, first = tile.q0 + block0 + lane % kLanes * kVector;
    const int warp_channel = tile.m0 + (t.split_m ? warpgroup * kWarpgroupM : 0) + warp * 16, channel0 = warp_channel + lane / kLanes;    // of step 0
    const int64_t base = (tile.n * g.C_out + channel0) * volume + tile.d * plane + int64_t(tile.h0) * W + tile.w0;
    const float first_scale = scaled_half::power_of_two(-scaled_half::shift_of(a.activation_max[tile.n]));
    const float lowest = a.apply_relu ? 0.0f : -INFINITY;
    // A channel's scale, its bias, and the shift of its moments: the mean of its first values, which bounds what the variance
    // can cancel.
    __syncwarp();
    if (lane < 16) {
        const int channel = warp_channel + lane;
        constants[lane] = make_float4(scaled_half::power_of_two(-scaled_half::shift_of(a.weight_max[channel])),
                                      a.bias && channel < g.C_out ? load_as_float(a.bias, a.dtype, channel) : 0.0f, 0.0f, 0.0f);
    }
    float sum[kSteps] = {}, squares[kSteps] = {}, count = 0.0f;
    bool shifted = false;

#pragma unroll
    for (int s = 0; s < kSlices; s++) {
        float* slice = slices + s % 2 * kSliceFloats;
        auto at = [slice](int row, int position) { return slice + row * kSlice + ((position / 4 ^ row % 8) * 4 | position % 4); };
        if (bulk && lane == 0) bulk_wait_group_read<1>();    // the store before last has left this slice
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kSlice / 8; j++)
            if (s * kSlice / 8 + j < kBlockN / 8)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int i = (s * kSlice / 8 + j) * 4 + half * 2;
                    *reinterpret_cast<float2*>(at(lane / 4 + half * 8, j * 8 + lane % 4 * 2)) = make_float2(d[i], d[i + 1]);
                }
        __syncwarp();
        const int p = first + s * kSlice;
        const int h = t.pitch == 1 ? p : int(__umulhi(p, magic)), w = p - h * t.pitch;
        const bool inside = w < width && h < height && s * kSlice + lane % kLanes * kVector < kBlockN;
        const bool whole = (s + 1) * kSlice <= kBlockN;      // the last slice may end within the next tile
        const int64_t offset = base + h * W + w;
        float v[kSteps][kVector];
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            const int row = step * kRows + lane / kLanes;
            float* source = at(row, lane % kLanes * kVector);
            if constexpr (kVector == 4) {
                const float4 four = *reinterpret_cast<const float4*>(source);
                v[step][0] = four.x, v[step][1] = four.y, v[step][2] = four.z, v[step][3] = four.w;
            } else {
                v[step][0] = *source;
            }
            const float2 scale_bias = *reinterpret_cast<const float2*>(constants + row);
#pragma unroll
            for (int e = 0; e < kVector; e++) v[step][e] = max_nan(fmaf(v[step][e] * first_scale, scale_bias.x, scale_bias.y), lowest);
            if (bulk && whole) store<kVector>(source, kFloat32, 0, v[step]);
            else if (inside && channel0 + step * kRows < g.C_out) store(a.out, a.dtype, offset + step * kRows * volume, v[step]);
        }
        if (bulk && whole) {
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) {
                tma_store_4d(out_map, slice, int(tile.p0) + block0 + s * kSlice, tile.d, warp_channel, int(tile.n));
                bulk_commit_group();
            }
        }
        if (!fused) continue;
        const float here = inside ? float(kVector) : 0.0f;
        if (!shifted && __any_sync(~0u, inside)) {
            shifted = true;
            const float total = lanes_sum<kLanes>(here);
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                float of_lane = 0.0f;
#pragma unroll
                for (int e = 0; e < kVector; e++) of_lane += v[step][e];
                const float shift = lanes_sum<kLanes>(inside ? of_lane : 0.0f) / total;
                if (lane % kLanes == 0) constants[step * kRows + lane / kLanes].z = shift;
            }
            __syncwarp();
        }
        count += here;
        if (inside)
#pragma unroll
            for (int step = 0; step < kSteps; step++) {
                const float shift = constants[step * kRows + lane / kLanes].z;
#pragma unroll
                for (int e = 0; e < kVector; e++) {
                    const float deviation = v[step][e] - shift;
                    sum[step] += deviation;
                    squares[step] = fmaf(deviation, deviation, squares[step]);
                }
            }
    }
    if (!fused) return;

    const float total = lanes_sum<kLanes>(count), inverse = total > 0 ? 1.0f / total : 0.0f;
    const int64_t parts = t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2);
    const int64_t part = tile.n * parts + (t.split_m ? tile.part : tile.part * 2 + warpgroup);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
        const float row_sum = lanes_sum<kLanes>(sum[step]), row_squares = lanes_sum<kLanes>(squares[step]);
        const float mean = row_sum * inverse;
        if (lane % kLanes == 0) {
            const float shift = constants[step * kRows + lane / kLanes].z;
            a.workspace.moments[part * t.M_pad + channel0 + step * kRows] = make_float2(shift + mean, row_squares - row_sum * mean);
        }
    }
    if (lane == 0 && warp == 0) a.workspace.counts[part] = total;    // the same from every tile of these positions
}

template <int kBlockN>
__device__ __forceinline__ void consume(const Parameters& a, const CUtensorMap* out_map, SharedHead& head, const uint8_t* input, const uint8_t* weights, uint8_t* slices) {
    RingPosition in, weight, slot;
    float d[kBlockN / 2];
    int64_t pending = -1;    // the sample of the tile that is finished but not yet signalled
    const int consumer_warp = threadIdx.x / 32 - 4;
    float* slice = reinterpret_cast<float*>(slices + consumer_warp * kSliceBytes);
    float4* constants = reinterpret_cast<float4*>(slices + 8 * kSliceBytes + consumer_warp * kConstantBytes);
    while (true) {
        mbarrier_wait(head.tile_full + slot.stage, slot.phase);
        const int index = head.tiles[slot.stage];
        mbarrier_arrive(head.tile_empty + slot.stage);
        slot.advance(2);
        if (index < 0) break;
        const Tile tile = locate(a.p, index);
        switch (a.p.t.chunk) {
            case 64: multiply<kBlockN, 4>(a, tile, head, input, weights, in, weight, pending, d); break;
            case 32: multiply<kBlockN, 2>(a, tile, head, input, weights, in, weight, pending, d); break;
            default: multiply<kBlockN, 1>(a, tile, head, input, weights, in, weight, pending, d); break;
        }
        if (a.p.t.vectors) finish<kBlockN, 4>(a, out_map, tile, slice, constants, d);
        else finish<kBlockN, 1>(a, out_map, tile, slice, constants, d);
        if (a.fusion.num_groups > 0) pending = tile.n;
    }
    if (pending >= 0) signal_done(a, pending);
    if (threadIdx.x % 32 == 0) bulk_wait_group();
}

// ----------------------------------------------------------------------------------------------------- Normalizer
//
// Three warps: one combines moments, one loads rows of complete samples into a ring, one normalizes them and sends them back.
// Their queues are taken in order, so each waits only for tiles and groups that running blocks have taken before.

constexpr int kRowPieces = 8;    // pieces of one item of the row queue

// One warp: the statistics of (n, group), in a fixed order. Sums of squares in float64 lose nothing that float32 had.
__device__ __forceinline__ void combine_moments(const Parameters& a) {
    const Tiling& t = a.p.t;
    const int lane = threadIdx.x % 32;
    const int channels = a.p.g.C_out / a.fusion.num_groups, parts = t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2);
    const double values = double(channels) * out_volume(a.p.g);
    while (true) {
        unsigned item = lane == 0 ? atomicAdd(a.workspace.group_ticket, 1u) : 0;
        item = __shfl_sync(~0u, item, 0);
        const int64_t n = item / a.fusion.num_groups, group = item % a.fusion.num_groups;
        if (n >= a.p.g.N) return;
        while (ld_acquire_gpu(a.workspace.tiles_done + n) < t.sample_tiles * 2) __nanosleep(200);
        const float2* moments = a.workspace.moments + n * parts * t.M_pad + group * channels;
        const float* counts = a.workspace.counts + n * parts;
        double sum = 0, squares = 0;
#pragma unroll 8
        for (int i = lane; i < parts * channels; i += 32) {
            const int part = i / channels;
            const float2 m = __ldcg(moments + int64_t(part) * t.M_pad + i % channels);
            const double count = __ldcg(counts + part);
            sum += count * m.x;
            squares += m.y + count * m.x * m.x;
        }
        for (int offset = 16; offset > 0; offset /= 2) {
            sum += __shfl_xor_sync(~0u, sum, offset);
            squares += __shfl_xor_sync(~0u, squares, offset);
        }
        const double mean = sum / values, variance = squares / values - mean * mean;
        if (lane == 0) {
            a.fusion.mean[n * a.fusion.num_groups + group] = mean;
            a.fusion.rstd[n * a.fusion.num_groups + group] = 1 / sqrt((variance < 0 ? 0 : variance) + a.fusion.eps);
            __threadfence();
            atomicAdd(a.workspace.groups_done + n, 1u);
        }
    }
}

// One thread: takes kRowPieces pieces of a (n, channel) row at a time and loads them.
__device__ __forceinline__ void load_rows(const Parameters& a, SharedHead& head, uint8_t* ring) {
    const int64_t row_bytes = out_volume(a.p.g) * 4, row_items = ceil_div(row_bytes, kRowPieces * kNormBytes);
    const int64_t channels = a.p.g.C_out, group_channels = channels / a.fusion.num_groups;
    RingPosition stage;
    unsigned next = atomicAdd(a.workspace.row_ticket, 1u);
    while (true) {
        const int64_t row = next / row_items, n = row / channels, channel = row % channels, group = row / group_channels;
        if (n >= a.p.g.N) break;
        const int64_t begin = next % row_items * kRowPieces * kNormBytes;
        next = atomicAdd(a.workspace.row_ticket, 1u);
        while (ld_acquire_gpu(a.workspace.groups_done + n) < a.fusion.num_groups) __nanosleep(200);
        fence_proxy_async_all();    // what other multiprocessors stored is now visible to the copy engine too
        const double mean = __ldcg(a.fusion.mean + group);
        NormPiece piece;
        piece.high = float(mean), piece.low = float(mean - double(piece.high));    // r - mean without losing the mean's low bits
        piece.scale = float(__ldcg(a.fusion.rstd + group)) * (a.fusion.gamma ? a.fusion.gamma[channel] : 1.0f);
        piece.offset = a.fusion.beta ? a.fusion.beta[channel] : 0.0f;
        const int64_t end = begin + kRowPieces * kNormBytes < row_bytes ? begin + kRowPieces * kNormBytes : row_bytes;
        for (int64_t at = begin; at < end; at += kNormBytes) {
            piece.bytes = end - at < kNormBytes ? end - at : kNormBytes;
            piece.y = static_cast<float*>(a.fusion.y) + (row * row_bytes + at) / 4;
            mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
            head.pieces[stage.stage] = piece;
            mbarrier_arrive_expect_tx(head.norm_full + stage.stage, piece.bytes);
            bulk_load(ring + stage.stage * kNormBytes, static_cast<const uint8_t*>(a.out) + row * row_bytes + at, piece.bytes, head.norm_full + stage.stage);
            stage.advance(kNormStages);
        }
    }
    mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
    head.pieces[stage.stage].bytes = 0;
    mbarrier_arrive(head.norm_full + stage.stage);
}

// One warp: normalizes the pieces in place and stores them.
__device__ __forceinline__ void normalize_rows(SharedHead& head, uint8_t* ring) {
    const int lane = threadIdx.x % 32;
    RingPosition stage;
    int storing = -1;    // the stage whose store may still read it
    while (true) {
        mbarrier_wait(head.norm_full + stage.stage, stage.phase);
        const NormPiece piece = head.pieces[stage.stage];
        if (piece.bytes == 0) break;
        float4* values = reinterpret_cast<float4*>(ring + stage.stage * kNormBytes);
        auto apply = [&piece](float v) { return fmaf((v - piece.high) - piece.low, piece.scale, piece.offset); };
#pragma unroll 8
        for (int i = lane; i < piece.bytes / 16; i += 32) {
            const float4 v = values[i];
            values[i] = make_float4(apply(v.x), apply(v.y), apply(v.z), apply(v.w));
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            bulk_store(piece.y, values, piece.bytes);
            bulk_commit_group();
            bulk_wait_group_read<1>();
            if (storing >= 0) mbarrier_arrive(head.norm_empty + storing);
        }
        storing = stage.stage;
        stage.advance(kNormStages);
    }
    if (lane == 0) bulk_wait_group_read<0>();
}

#endif  // HAS_SM90A

// --------------------------------------------------------------------------------------------------------- Kernel

template <int kBlockN>
__global__ void __launch_bounds__(kThreads, 1)
conv_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap w_map, const __grid_constant__ CUtensorMap out_map, const __grid_constant__ Parameters a) {
#ifdef HAS_SM90A
    extern __shared__ __align__(1024) uint8_t shared[];
    SharedHead& head = *reinterpret_cast<SharedHead*>(shared);
    const Tiling& t = a.p.t;
    uint8_t* input = shared + 1024;                                  // (kInputStages, box_rows, pitch, chunk) fp16 and margins
    uint8_t* weights = input + kInputStages * t.input_bytes;         // (weight_stages, block_m, chunk) fp16
    uint8_t* norm_ring = weights + t.weight_stages * t.weight_bytes; // (kNormStages, kNormBytes), then a slice for each consumer warp

    // Prologue: barriers, and zeros behind each box, where the last row's halo looks.
    if (threadIdx.x == 0) {
        for (int i = 0; i < kInputStages; i++) mbarrier_init(head.input_full + i, 1), mbarrier_init(head.input_empty + i, 2);
        for (int i = 0; i < t.weight_stages; i++) mbarrier_init(head.weight_full + i, 1), mbarrier_init(head.weight_empty + i, 2);
        for (int i = 0; i < 2; i++) mbarrier_init(head.tile_full + i, 1), mbarrier_init(head.tile_empty + i, 256);
        for (int i = 0; i < kNormStages; i++) mbarrier_init(head.norm_full + i, 1), mbarrier_init(head.norm_empty + i, 1);
        fence_mbarrier_init();
    }
    const int box_bytes = t.box_rows * t.pitch * t.chunk * 2;
    for (int stage = 0; stage < kInputStages; stage++)
        for (int i = box_bytes + threadIdx.x * 4; i < t.input_bytes; i += kThreads * 4) *reinterpret_cast<uint32_t*>(input + stage * t.input_bytes + i) = 0;
    fence_proxy_async();
    __syncthreads();

    if (threadIdx.x < 128) {
        setmaxnreg_dec<kProducerRegisters>();
        const int warp = threadIdx.x / 32;
        if (threadIdx.x == 0) produce(a, &x_map, &w_map, head, input, weights);
        if (warp == 1 && a.fusion.num_groups > 0) combine_moments(a);
        if (threadIdx.x == 64 && a.fusion.in_kernel) load_rows(a, head, norm_ring);
        if (warp == 3 && a.fusion.in_kernel) normalize_rows(head, norm_ring);
    } else {
        setmaxnreg_inc<kConsumerRegisters>();
        consume<kBlockN>(a, &out_map, head, input, weights, norm_ring + kNormStages * kNormBytes);
    }
#endif
}

// ------------------------------------------------------------------------------------------------------- Launcher

// Bytes of scratch, or its parts: the same arithmetic for both.
struct Layout {
    int64_t bytes = 0;
    uint8_t* base;
    explicit Layout(void* base) : base(static_cast<uint8_t*>(base)) {}
    template <typename T> T* take(int64_t count) {
        T* p = reinterpret_cast<T*>(base + bytes);
        bytes += ceil_div(count * int64_t(sizeof(T)), 256) * 256;
        return p;
    }
};

struct Plan {
    Problem problem;
    scaled_half::Pack pack;
    Workspace workspace;
    unsigned* counters;
    int64_t counter_bytes, bytes;
};

inline int multiprocessors_of(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

inline Plan make_plan(const Geometry& g, int multiprocessors, bool fused, void* base) {
    Plan plan = {};
    const Tiling t = choose_tiling(g, multiprocessors);
    plan.problem = {g, t};
    scaled_half::Pack& p = plan.pack;
    p.N = g.N, p.C = g.C_in, p.S = in_volume(g), p.C_pad = t.C_pad;
    p.rows = g.C_out, p.M_pad = t.M_pad, p.taps = kernel_volume(g);
    p.row_stride = p.taps, p.column_stride = g.C_out * p.taps, p.flip = false;
    Layout layout(base);
    const int64_t parts = t.m_tiles ? t.sample_tiles / t.m_tiles * (t.split_m ? 1 : 2) : 0;
    plan.counter_bytes = (3 + 4 * g.N) * 4;
    plan.counters = layout.take<unsigned>(3 + 4 * g.N);
    p.activation_max = reinterpret_cast<scaled_half::SampleMax*>(plan.counters);
    Workspace& w = plan.workspace;
    w.tile_ticket = plan.counters + 2 * g.N, w.group_ticket = w.tile_ticket + 1, w.row_ticket = w.tile_ticket + 2;
    w.tiles_done = w.tile_ticket + 3, w.groups_done = w.tiles_done + g.N;
    p.weight_max = layout.take<unsigned>(t.M_pad);
    p.activation = layout.take<__half>(g.N * p.S * t.C_pad);
    p.weight = layout.take<__half>(p.taps * t.M_pad * t.C_pad);
    w.moments = layout.take<float2>(fused ? g.N * parts * t.M_pad : 0);
    w.counts = layout.take<float>(fused ? g.N * parts : 0);
    plan.bytes = layout.bytes;
    return plan;
}

template <int kBlockN>
int launch_conv(const CUtensorMap& x_map, const CUtensorMap& w_map, const CUtensorMap& out_map, const Parameters& a, int multiprocessors, cudaStream_t stream) {
    const Tiling& t = a.p.t;
    const int bytes = 1024 + kInputStages * t.input_bytes + t.weight_stages * t.weight_bytes + kNormStages * kNormBytes + 8 * (kSliceBytes + kConstantBytes);
    RETURN_IF_ERROR(cudaFuncSetAttribute(conv_kernel<kBlockN>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    const int64_t blocks = t.tiles < multiprocessors ? t.tiles : multiprocessors;
    conv_kernel<kBlockN><<<unsigned(blocks), kThreads, bytes, stream>>>(x_map, w_map, out_map, a);
    return cudaGetLastError();
}

inline int run(const Geometry& g, int dtype, int device, void* stream_pointer, void* workspace, const void* x, const void* w, const void* bias, bool apply_relu, void* out, const Fusion& fusion) {
    const auto stream = static_cast<cudaStream_t>(stream_pointer);
    const int multiprocessors = multiprocessors_of(device);
    Plan plan = make_plan(g, multiprocessors, fusion.num_groups > 0, workspace);
    const Tiling& t = plan.problem.t;
    if (t.block_n == 0) return cudaErrorNotSupported;
    plan.pack.x = x, plan.pack.w = w;
    RETURN_IF_ERROR(cudaMemsetAsync(plan.counters, 0, plan.counter_bytes, stream));
    switch (dtype) {
        case kFloat32: RETURN_IF_ERROR(scaled_half::pack<float>(plan.pack, multiprocessors, stream)); break;
        case kFloat16: RETURN_IF_ERROR(scaled_half::pack<__half>(plan.pack, multiprocessors, stream)); break;
        case kBFloat16: RETURN_IF_ERROR(scaled_half::pack<__nv_bfloat16>(plan.pack, multiprocessors, stream)); break;
        default: return cudaErrorInvalidValue;
    }
    CUtensorMap x_map, w_map, out_map = {};
    const bool bulk_store = t.contiguous && dtype == kFloat32;
    RETURN_IF_ERROR(make_tensor_map<5>(&x_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, plan.pack.activation, {t.C_pad, g.axis[2].in, g.axis[1].in, g.axis[0].in, g.N}, {t.chunk, t.pitch, t.box_rows, 1, 1}));
    RETURN_IF_ERROR(make_tensor_map<3>(&w_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, plan.pack.weight, {t.C_pad, t.M_pad, plan.pack.taps}, {t.chunk, t.split_m ? 2 * kWarpgroupM : kWarpgroupM, 1}));
    if (bulk_store)
        RETURN_IF_ERROR(make_tensor_map<4>(&out_map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, out, {g.axis[1].out * g.axis[2].out, g.axis[0].out, g.C_out, g.N}, {kSlice, 1, 16, 1}));
    const Parameters a = {plan.problem, dtype, apply_relu, bulk_store, bias, out, plan.pack.activation_max, plan.pack.weight_max, plan.workspace, fusion};
    switch (t.block_n) {
        case 256: return launch_conv<256>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 232: return launch_conv<232>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 192: return launch_conv<192>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 160: return launch_conv<160>(x_map, w_map, out_map, a, multiprocessors, stream);
        case 128: return launch_conv<128>(x_map, w_map, out_map, a, multiprocessors, stream);
        default: return launch_conv<64>(x_map, w_map, out_map, a, multiprocessors, stream);
    }
}

}  // namespace conv_sm90

// Whether a tiling fits: 1 or 0.
extern "C" int conv_transpose3d_sm90_supports(const Geometry* g, int device) {
    return conv_sm90::choose_tiling(*g, conv_sm90::multiprocessors_of(device)).block_n > 0;
}

extern "C" int64_t conv_transpose3d_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::make_plan(*g, conv_sm90::multiprocessors_of(device), false, nullptr).bytes;
}

extern "C" int conv_transpose3d_forward_sm90(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                             const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, apply_relu != 0, out, conv_sm90::Fusion{});
}

extern "C" int64_t conv_transpose3d_relu_group_norm_forward_sm90_workspace(const Geometry* g, int, int device) {
    return conv_sm90::make_plan(*g, conv_sm90::multiprocessors_of(device), true, nullptr).bytes;
}

// activation = relu(conv), y = its group norm (may be activation), statistics (2, N, num_groups): mean, rstd.
extern "C" int conv_transpose3d_relu_group_norm_forward_sm90(const Geometry* g, int dtype, int y_dtype, int device, void* stream, void* workspace,
                                                             const void* x, const void* w, const void* bias, const void* gamma, const void* beta, int num_groups, double eps,
                                                             void* activation, void* y, double* statistics) {
    DeviceGuard guard(device);
    // The copy engine moves float32 rows whose length is a multiple of 16 bytes; the rest is normalized by a kernel of its own.
    const bool in_kernel = dtype == kFloat32 && out_volume(*g) % 4 == 0;
    double* rstd = statistics + g->N * num_groups;
    const conv_sm90::Fusion fusion = {num_groups, in_kernel, eps, static_cast<const float*>(gamma), static_cast<const float*>(beta), y, statistics, rstd};
    RETURN_IF_ERROR(conv_sm90::run(*g, dtype, device, stream, workspace, x, w, bias, true, activation, fusion));
    if (in_kernel) return cudaSuccess;
    const group_norm::Shape shape = {g->N, g->C_out, out_volume(*g), num_groups};
    return group_norm::with_dtypes(dtype, y_dtype, [&](auto r_element, auto y_element) {
        return group_norm::normalize<decltype(r_element), decltype(y_element)>(shape, stream, activation, statistics, rstd, gamma, beta, y);
    });
}
