// The weight's gradient of a transposed convolution with groups of few channels, on the CUDA cores in float32.
//
//   dweight[ci, co, k] = sum over n, i of x[n, ci, i] * dout[n, co, i * stride - padding + k * dilation]    (ci and co of one group)
//
// A block has a pair of channels: it takes tiles of input positions, one after another, and brings x and the box of dout that they reach to shared memory. A set of taps, one kd where the
// kernel is square (depthwise_tiles.h), is a warp's or some warps', each of which sums them over a part of the positions. Blocks leave sums over a part of all tiles, which are added in a fixed order.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <algorithm>

#include "depthwise.cuh"
#include "sum_partials.cuh"

namespace depthwise {

HOST_DEVICE constexpr int set_taps(int K) { return K > 0 ? K * K : 9; }
constexpr int kMaxWarps = 6;

// How dweight is cut: taps into sets, sets into blocks, whose warps take `shares` of the positions for each of them.
struct DweightPlan {
    Tiling t;                         // of dx, whose box it is
    int taps_of_set, sets, sets_of_block, blocks_of_pair, shares, splits;
    Divisor by_shares;
    HOST_DEVICE int threads() const { return sets_of_block * shares * 32; }
    HOST_DEVICE int x_floats() const { return t.axis[0].tile * t.axis[1].tile * t.axis[2].tile; }
    HOST_DEVICE int64_t pairs() const { return int64_t(t.groups) * t.src_channels * t.dst_channels; }
    HOST_DEVICE int sum_floats() const { return shares * sets_of_block * taps_of_set; }    // of its warps, where box and x were
    int64_t shared_bytes() const { return int64_t(sizeof(float)) * std::max(t.box_floats() + x_floats(), sum_floats()); }
};

constexpr int64_t kWantedBlocks = 8;    // for each multiprocessor

inline DweightPlan make_dweight_plan(const Geometry& g, int multiprocessors) {
    DweightPlan p = {};
    p.taps_of_set = set_taps(square_of(g).K), p.sets = int(ceil_div(kernel_volume(g), p.taps_of_set));
    p.blocks_of_pair = int(ceil_div(p.sets, kMaxWarps)), p.sets_of_block = int(ceil_div(p.sets, p.blocks_of_pair)), p.shares = kMaxWarps / p.sets_of_block;
    p.t = choose_tiling(Direction::kDInput, g, true, p.shares * 32, multiprocessors);
    if (p.t.units == 0) return p;
    const int64_t blocks = p.pairs() * p.blocks_of_pair, tiles = g.N * p.t.tiles, splits = ceil_div(kWantedBlocks * multiprocessors, blocks);
    p.splits = int(splits < tiles ? splits : tiles), p.by_shares = make_divisor(p.shares);
    return p;
}

// Grid: (split, pair of channels, sets of taps), splits fastest. partial (splits, C_in, C_out / groups, kernel volume)
template <int K, int S>
__global__ void __launch_bounds__(kMaxWarps * 32, 4)
dweight_kernel(Geometry g, DweightPlan p, int dtype, const void* x, const void* dout, float* __restrict__ partial) {
    wait_for_previous_kernel();
    constexpr int kTaps = set_taps(K), kRows = rows_of(Direction::kDInput, S);
    extern __shared__ __align__(16) uint8_t base[];
    float *const box = reinterpret_cast<float*>(base), *const own_x = box + p.t.box_floats();    // own_x (D, H, W) of the tile
    const Tiling& t = p.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];

    int block = blockIdx.x;
    const auto take = [&block](int count) { const int digit = block % count; block /= count; return digit; };
    const int split = take(p.splits), dst_channel = take(t.dst_channels), src_channel = take(t.src_channels), group = take(t.groups), first_set = block * p.sets_of_block;    // dx's, so dst is x's
    const int ci = group * t.dst_channels + dst_channel, co = group * t.src_channels + src_channel;

    // A thread's taps: where the first one is in the box, from its position on, and the others from there.
    int set = threadIdx.x / 32;
    const int share = p.by_shares.take(set), first_tap = (first_set + set) * kTaps;
    const auto place_of = [&](int k) {
        const int kernel_h = int(g.axis[1].kernel), kernel_w = int(g.axis[2].kernel), kw = k % kernel_w, kh = k / kernel_w % kernel_h, kd = k / kernel_w / kernel_h;
        return (kd * int(g.axis[0].dilation) * ah.box + kh * int(g.axis[1].dilation)) * t.pitch + kw * int(g.axis[2].dilation);
    };
    const int first_place = place_of(min(first_tap, t.volume - 1));
    int places[kTaps];
    if constexpr (K == 0)
#pragma unroll
        for (int i = 0; i < kTaps; i++) places[i] = place_of(min(first_tap + i, t.volume - 1)) - first_place;
    else
#pragma unroll
        for (int i = 0; i < kTaps; i++) places[i] = i / K * pitch_of(S) + i % K;
    const int row_step = K > 0 ? S * pitch_of(S) : ah.step * t.pitch;

    float total[kTaps] = {};
    const int64_t tiles = g.N * t.tiles;
    for (int64_t i = split; i < tiles; i += p.splits) {
        const int64_t n = i / t.tiles, first_x = (n * g.C_in + ci) * (int64_t(ad.dst) * ah.dst * aw.dst);
        const TileOrigin origin = origin_of(t, int(i % t.tiles));
        __syncthreads();    // the tile before is done
        load_box(t, origin, dout, dtype, (n * g.C_out + co) * (int64_t(ad.src) * ah.src * aw.src), 1, box, p.threads());
        for (int k = threadIdx.x; k < p.x_floats(); k += p.threads()) {
            int row = k;
            const int column = t.by_columns.take(row), d = t.by_tile_h.divide(row), h = row - d * ah.tile;
            const bool exists = origin.d + d < ad.dst && origin.h + h < ah.dst && origin.w + column < aw.dst;
            own_x[k] = exists ? load_as_float(x, dtype, first_x + ((origin.d + d) * ah.dst + origin.h + h) * aw.dst + origin.w + column) : 0.0f;
        }
        cp_async_wait_all();
        __syncthreads();
        float sum[kTaps] = {};
        for (int k = share * 32 + threadIdx.x % 32; k < t.units; k += p.shares * 32) {
            const Unit unit(t, k);
            const int rows = origin.d + unit.d < ad.dst && origin.w + unit.column < aw.dst ? min(kRows, ah.dst - origin.h - unit.row) : 0;    // that there are
            const float* const from_x = own_x + (unit.d * ah.tile + unit.row) * aw.tile + unit.column;
            const float* const from = box + (unit.d * ad.step * ah.box + unit.row * ah.step) * t.pitch + unit.column * aw.step + skew_of(t, origin) + first_place;
            if (rows == kRows) {
                float values[kRows];
#pragma unroll
                for (int r = 0; r < kRows; r++) values[r] = from_x[r * aw.tile];
                if constexpr (K > 0) {
#pragma unroll
                    for (int j = 0; j < (kRows - 1) * S + K; j++) {    // rows of dout
                        const Window<K, S> window(from + j * pitch_of(S));
#pragma unroll
                        for (int kw = 0; kw < K; kw++)
#pragma unroll
                            for (int r = 0; r < kRows; r++)
                                if (j - r * S >= 0 && j - r * S < K) sum[(j - r * S) * K + kw] += values[r] * window[kw];
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < kTaps; j++)
#pragma unroll
                        for (int r = 0; r < kRows; r++) sum[j] += values[r] * from[places[j] + r * row_step];
                }
            } else {    // one that is not there is not multiplied, since dout may be Inf
#pragma unroll 1
                for (int r = 0; r < rows; r++)
#pragma unroll
                    for (int j = 0; j < kTaps; j++) sum[j] += from_x[r * aw.tile] * from[places[j] + r * row_step];
            }
        }
#pragma unroll
        for (int j = 0; j < kTaps; j++) total[j] += sum[j];
    }

    // The sums of a set's warps, in their order.
    __syncthreads();
    float* const sums = box;    // (shares, sets_of_block * kTaps)
#pragma unroll
    for (int j = 0; j < kTaps; j++) {
#pragma unroll
        for (int lane = 16; lane > 0; lane /= 2) total[j] += __shfl_xor_sync(~0u, total[j], lane);
        if (threadIdx.x % 32 == 0) sums[share * p.sets_of_block * kTaps + set * kTaps + j] = total[j];
    }
    __syncthreads();
    const int first = first_set * kTaps, count = min(p.sets_of_block * kTaps, t.volume - first);
    float* const to = partial + ((int64_t(split) * g.C_in + ci) * t.src_channels + src_channel) * t.volume + first;
    for (int k = threadIdx.x; k < count; k += p.threads()) {
        float sum = 0;
        for (int i = 0; i < p.shares; i++) sum += sums[i * p.sets_of_block * kTaps + k];
        to[k] = sum;
    }
}

inline int dweight(const Geometry& g, int dtype, const DweightPlan& p, void* stream, void* workspace, const void* x, const void* dout, void* dweight) {
    auto* partial = static_cast<float*>(workspace);
    RETURN_IF_ERROR(with_square(square_of(g), [&](auto K, auto S) {
        return launch_with_shared(dweight_kernel<decltype(K)::value, decltype(S)::value>, p.pairs() * p.blocks_of_pair * p.splits, p.threads(), p.shared_bytes(), stream, g, p, dtype, x, dout, partial);
    }));
    return with_dtype(dtype, [&](auto element) { return sum_partials<decltype(element)>(partial, p.splits, p.pairs() * p.t.volume, stream, dweight); });
}

}  // namespace depthwise
