// Gradients of a transposed convolution's parameters, for any parameters and dtype.
//
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]
//   dbias[co]          = sum over n, o of dout[n, co, o]
//
// dweight is, per group, a matrix product with GEMM_M = input channels, GEMM_N = (output channel, tap) in the order of the
// weight's own memory, GEMM_K = (n, input position). GEMM_K is split over blocks; the partial sums are added in a fixed
// order, so two runs agree bitwise.

#include "group_norm.cuh"
#include "sum_partials.cuh"

namespace parameter_gradients_generic {

constexpr int kBlockK = 16;          // positions of a stage
constexpr int kThreadTile = 4;       // a thread owns kThreadTile x kThreadTile of the block's tile
constexpr int kChainStages = 16;     // stages summed before the sum joins the total: keeps fp32 chains short
constexpr int64_t kTargetBlocks = 1024;
constexpr int64_t kMinSplitPositions = 1024;

struct Sizes {
    int64_t gemm_m, gemm_n, gemm_k;
    int64_t splits, split_positions;
};

template <int kBlockM, int kBlockN> struct Tile {
    static constexpr int kThreads = kBlockM * kBlockN / (kThreadTile * kThreadTile);
    static constexpr int kPadM = kBlockM + 4, kPadN = kBlockN + 4;    // 16-byte rows, two-way bank conflicts at most
    static_assert(kThreads % kBlockK == 0, "a thread loads the same position of every stage");
};

HOST_DEVICE int64_t num_tiles(const Geometry& g, int block_m, int block_n) {
    return g.groups * ceil_div(g.C_in / g.groups, block_m) * ceil_div(g.C_out / g.groups * kernel_volume(g), block_n);
}

HOST_DEVICE Sizes sizes_of(const Geometry& g, int64_t tiles) {
    const int64_t gemm_k = g.N * in_volume(g);
    int64_t splits = kTargetBlocks / tiles;
    const int64_t most = ceil_div(gemm_k, kMinSplitPositions);
    splits = splits < most ? splits : most;
    splits = splits > 1 ? splits : 1;
    const int64_t split_positions = ceil_div(ceil_div(gemm_k, splits), kBlockK) * kBlockK;
    return {g.C_in / g.groups, g.C_out / g.groups * kernel_volume(g), gemm_k, splits, split_positions};
}

// A column of GEMM_N: where output channel and tap read dout.
struct Column { int64_t channel; int offset_d, offset_h, offset_w; };

// ------------------------------------------------------------------------------------------------------ dweight

// partial (splits, groups, gemm_m, gemm_n)
template <typename T, int kBlockM, int kBlockN>
__global__ void __launch_bounds__(Tile<kBlockM, kBlockN>::kThreads)
dweight_kernel(Geometry g, Sizes sizes, const T* __restrict__ x, const T* __restrict__ dout, Acc<T>* __restrict__ partial) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    using Shape = Tile<kBlockM, kBlockN>;
    __shared__ A a_stage[kBlockK][Shape::kPadM];
    __shared__ A b_stage[kBlockK][Shape::kPadN];
    __shared__ Column columns[kBlockN];

    // Prologue: the block's tile and its columns.
    int64_t block = blockIdx.x;
    auto take = [&block](int64_t count) { const int64_t digit = block % count; block /= count; return digit; };
    const int64_t n0 = take(ceil_div(sizes.gemm_n, kBlockN)) * kBlockN;
    const int64_t m0 = take(ceil_div(sizes.gemm_m, kBlockM)) * kBlockM;
    const int64_t group = take(g.groups);
    const int64_t split = block;
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t taps = kernel_volume(g), src_volume = in_volume(g), dst_volume = out_volume(g);
    for (int j = threadIdx.x; j < kBlockN; j += Shape::kThreads) {
        const int64_t tap = (n0 + j) % taps;
        columns[j] = {group * (g.C_out / g.groups) + (n0 + j) / taps, int(tap / (ah.kernel * aw.kernel) * ad.dilation - ad.padding),
                      int(tap / aw.kernel % ah.kernel * ah.dilation - ah.padding), int(tap % aw.kernel * aw.dilation - aw.padding)};
    }
    __syncthreads();

    // Main loop over stages of kBlockK positions.
    const int lane_k = threadIdx.x % kBlockK, row0 = threadIdx.x / kBlockK;
    constexpr int kRowStep = Shape::kThreads / kBlockK;
    const int tile_n = threadIdx.x % (kBlockN / kThreadTile) * kThreadTile, tile_m = threadIdx.x / (kBlockN / kThreadTile) * kThreadTile;
    A total[kThreadTile][kThreadTile] = {}, sum[kThreadTile][kThreadTile] = {};
    const int64_t begin = split * sizes.split_positions;
    const int64_t end = begin + sizes.split_positions < sizes.gemm_k ? begin + sizes.split_positions : sizes.gemm_k;
    int stage = 0;
    for (int64_t k0 = begin; k0 < end; k0 += kBlockK) {
        const int64_t position = k0 + lane_k, n = position / src_volume, i = position % src_volume;
        const int64_t d = i / (ah.in * aw.in) * ad.stride, h = i / aw.in % ah.in * ah.stride, w = i % aw.in * aw.stride;
        const bool live = position < end;
#pragma unroll
        for (int r = row0; r < kBlockM; r += kRowStep) {
            const bool inside = live && m0 + r < sizes.gemm_m;
            a_stage[lane_k][r] = inside ? to_acc(x[(n * g.C_in + group * sizes.gemm_m + m0 + r) * src_volume + i]) : A(0);
        }
#pragma unroll 4
        for (int r = row0; r < kBlockN; r += kRowStep) {
            const Column c = columns[r];
            const int64_t od = d + c.offset_d, oh = h + c.offset_h, ow = w + c.offset_w;
            const bool inside = live && n0 + r < sizes.gemm_n && od >= 0 && od < ad.out && oh >= 0 && oh < ah.out && ow >= 0 && ow < aw.out;
            // Outside, dout counts as zero (an Inf of x there makes NaN, as in torch).
            b_stage[lane_k][r] = inside ? to_acc(dout[(n * g.C_out + c.channel) * dst_volume + (od * ah.out + oh) * aw.out + ow]) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kBlockK; k++) {
            A a[kThreadTile], b[kThreadTile];
#pragma unroll
            for (int m = 0; m < kThreadTile; m++) a[m] = a_stage[k][tile_m + m];
#pragma unroll
            for (int c = 0; c < kThreadTile; c++) b[c] = b_stage[k][tile_n + c];
#pragma unroll
            for (int m = 0; m < kThreadTile; m++)
#pragma unroll
                for (int c = 0; c < kThreadTile; c++) sum[m][c] += a[m] * b[c];
        }
        __syncthreads();
        if (++stage % kChainStages == 0)
#pragma unroll
            for (int m = 0; m < kThreadTile; m++)
#pragma unroll
                for (int c = 0; c < kThreadTile; c++) total[m][c] += sum[m][c], sum[m][c] = A(0);
    }

    // Epilogue.
#pragma unroll
    for (int m = 0; m < kThreadTile; m++)
#pragma unroll
        for (int c = 0; c < kThreadTile; c++)
            if (m0 + tile_m + m < sizes.gemm_m && n0 + tile_n + c < sizes.gemm_n)
                partial[((split * g.groups + group) * sizes.gemm_m + m0 + tile_m + m) * sizes.gemm_n + n0 + tile_n + c] = total[m][c] + sum[m][c];
}

template <typename T, int kBlockM, int kBlockN>
int dweight_tiled(const Geometry& g, void* stream, const void* x, const void* dout, void* dweight, void* workspace) {
    const int64_t tiles = num_tiles(g, kBlockM, kBlockN);
    const Sizes sizes = sizes_of(g, tiles);
    auto* partial = static_cast<Acc<T>*>(workspace);
    RETURN_IF_ERROR(launch(dweight_kernel<T, kBlockM, kBlockN>, tiles * sizes.splits, Tile<kBlockM, kBlockN>::kThreads, stream,
                           g, sizes, static_cast<const T*>(x), static_cast<const T*>(dout), partial));
    return sum_partials<T>(partial, sizes.splits, g.groups * sizes.gemm_m * sizes.gemm_n, stream, dweight);
}

// Few input channels in a group leave a square tile mostly empty.
inline bool narrow(const Geometry& g) { return g.C_in / g.groups <= 8; }
constexpr int kSquare = 64, kNarrowM = 8, kNarrowN = 256;

// -------------------------------------------------------------------------------------------------------- dbias

constexpr int kBiasThreads = 256;
constexpr int64_t kBiasBlocks = 2048;          // wanted
constexpr int64_t kMinBiasElements = 8192;     // of a block

// Blocks of a channel of a sample.
HOST_DEVICE int64_t bias_parts(const Geometry& g) {
    const int64_t wanted = ceil_div(kBiasBlocks, g.N * g.C_out), most = ceil_div(out_volume(g), kMinBiasElements);
    return wanted < most ? wanted : most;
}

// Grid: (sample, part, channel), channels fastest. partial (N * parts, C_out)
template <typename T>
__global__ void __launch_bounds__(kBiasThreads) dbias_kernel(Geometry g, int64_t parts, const T* __restrict__ dout, double* __restrict__ partial) {
    wait_for_previous_kernel();
    using A = Acc<T>;
    constexpr int kWidth = 16 / sizeof(T), kLoads = 8;    // of a vector, and vectors under way
    using V = Vector<T, kWidth>;
    const int64_t channel = blockIdx.x % g.C_out, part = blockIdx.x / g.C_out % parts, n = blockIdx.x / g.C_out / parts, volume = out_volume(g);
    const int64_t begin = volume * part / parts, count = volume * (part + 1) / parts - begin;
    const T* const from = dout + (n * g.C_out + channel) * volume + begin;
    const int64_t unaligned = reinterpret_cast<uintptr_t>(from) % sizeof(V) / sizeof(T), to_vector = (kWidth - unaligned) % kWidth, head = to_vector < count ? to_vector : count;
    const int64_t vectors = (count - head) / kWidth, tail = head + vectors * kWidth;
    const V* const body = reinterpret_cast<const V*>(from + head);
    double sum = 0;
    for (int64_t first = threadIdx.x; first < vectors; first += kBiasThreads * kLoads) {    // short sums in A
        A own = 0;
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
            if (first + i * kBiasThreads >= vectors) continue;
            const V v = body[first + i * kBiasThreads];
#pragma unroll
            for (T element : v.v) own += to_acc(element);
        }
        sum += own;
    }
    if (threadIdx.x < head) sum += to_acc(from[threadIdx.x]);
    if (tail + threadIdx.x < count) sum += to_acc(from[tail + threadIdx.x]);
    sum = group_norm::block_sum<kBiasThreads>({sum, 0}).a;
    if (threadIdx.x == 0) partial[(n * parts + part) * g.C_out + channel] = sum;
}

}  // namespace parameter_gradients_generic

// ---------------------------------------------------------------------------------------------------- Launchers

extern "C" int64_t conv_transpose3d_dweight_generic_workspace(const Geometry* g, int dtype, int) {
    using namespace parameter_gradients_generic;
    const int64_t tiles = narrow(*g) ? num_tiles(*g, kNarrowM, kNarrowN) : num_tiles(*g, kSquare, kSquare);
    const Sizes sizes = sizes_of(*g, tiles);
    return sizes.splits * g->groups * sizes.gemm_m * sizes.gemm_n * acc_bytes(dtype);
}

extern "C" int conv_transpose3d_dweight_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* dout, void* dweight) {
    using namespace parameter_gradients_generic;
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        return narrow(*g) ? dweight_tiled<T, kNarrowM, kNarrowN>(*g, stream, x, dout, dweight, workspace)
                          : dweight_tiled<T, kSquare, kSquare>(*g, stream, x, dout, dweight, workspace);
    });
}

extern "C" int64_t conv_transpose3d_dbias_generic_workspace(const Geometry* g, int, int) { return g->N * parameter_gradients_generic::bias_parts(*g) * g->C_out * int64_t(sizeof(double)); }

extern "C" int conv_transpose3d_dbias_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* dout, void* dbias) {
    using namespace parameter_gradients_generic;
    DeviceGuard guard(device);
    return with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        auto* partial = static_cast<double*>(workspace);
        const int64_t parts = bias_parts(*g);
        RETURN_IF_ERROR(launch(dbias_kernel<T>, g->N * parts * g->C_out, kBiasThreads, stream, *g, parts, static_cast<const T*>(dout), partial));
        return sum_partials<T>(partial, g->N * parts, g->C_out, stream, dbias);
    });
}
