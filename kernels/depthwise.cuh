// Transposed convolution with groups of few channels, depthwise for instance: forward and dx, on the CUDA cores in float32.
//
//   forward  out[n, co, o] = bias[co] + sum over ci of the group, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co of the group, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// There is so little to multiply that memory is the limit. A block brings a box of the source, halo included, and its group's weights to shared memory; a thread
// has some neighbouring rows of a column (neighbouring lanes, neighbouring destinations). Where the kernel's size and stride are known to the compiler (Square), weights are
// in registers, and a source element that a thread reads serves all the taps h that it has; elsewhere a weight that it reads serves all its rows.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "depthwise_tiles.h"
#include "ptx_sm80.cuh"

namespace depthwise {

constexpr int kThreads = 256;

// Of a phase of W and one of its taps: where it reads, from the thread's column on, and the kernel's index.
struct TapColumn { int offset, kernel; };

HOST_DEVICE int round_up_to_quads(int floats) { return (floats + 3) & ~3; }

// What is known of the phases, in shared memory.
struct alignas(16) Phases {
    Phase d[kMaxStride], h[kMaxStride], w[kMaxStride];
    TapColumn columns[kMaxStride][kMaxKernel];
};

// One thread of each phase of each axis.
__device__ __forceinline__ void find_phases(Phases& phases, Direction direction, const Geometry& g, const Tiling& t) {
    const int axis = threadIdx.x / kMaxStride, i = threadIdx.x % kMaxStride;
    if (axis > 2 || i >= t.axis[axis].phases) return;
    const Phase phase = make_phase(direction, g.axis[axis], i);
    (axis == 0 ? phases.d : axis == 1 ? phases.h : phases.w)[i] = phase;
    for (int j = 0; axis == 2 && j < phase.taps; j++) phases.columns[i][j] = {phase.src - t.axis[2].first + j * phase.src_tap_step, phase.k + j * phase.k_step};
}

// Brings the box of the tile at `origin` to shared memory, zeros where the source ends: `channels` of the source, (D, H, W) each, from the `first`-th element on. Four
// neighbours at a time, as they are aligned in memory where rows are. Some may still be under way afterwards (cp_async_wait_all).
__device__ __forceinline__ void load_box(const Tiling& t, TileOrigin origin, const void* src, int dtype, int64_t first, int channels, float* box, int threads) {
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int d0 = ad.first + origin.d * ad.step, h0 = ah.first + origin.h * ah.step, w0 = (aw.first + origin.w * aw.step) & ~3;
    const int64_t volume = int64_t(ad.src) * ah.src * aw.src;
    with_element(dtype, [&](auto element) {
        using T = decltype(element);
        using Quad = Vector<T, 4>;
        const T* const from = static_cast<const T*>(src) + first;
        const bool aligned = aw.src % 4 == 0 && reinterpret_cast<uintptr_t>(from) % sizeof(Quad) == 0;
        const int count = channels * ad.box * ah.box * t.quads();
#pragma unroll 4
        for (int i = threadIdx.x; i < count; i += threads) {
            int row = i;
            const int w = w0 + t.by_quads.take(row) * 4;
            float* const to = box + row * t.pitch + w - w0;
            int c = row;
            const int h = h0 + t.by_box_h.take(c), d = d0 + t.by_box_d.take(c);
            const bool inside = unsigned(d) < unsigned(ad.src) && unsigned(h) < unsigned(ah.src);
            const T* const at = from + (inside ? c * volume + (d * ah.src + h) * aw.src + w : 0);
            if (aligned) {
                const bool exists = inside && unsigned(w) < unsigned(aw.src);
                if constexpr (std::is_same<T, float>::value) {
                    cp_async_16(shared_address(to), exists ? at : from, exists);
                } else {
                    const Quad quad = exists ? *reinterpret_cast<const Quad*>(at) : Quad{};
                    *reinterpret_cast<float4*>(to) = make_float4(to_acc(quad.v[0]), to_acc(quad.v[1]), to_acc(quad.v[2]), to_acc(quad.v[3]));
                }
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const bool exists = inside && unsigned(w + k) < unsigned(aw.src);
                    if constexpr (std::is_same<T, float>::value) cp_async_4(shared_address(to + k), exists ? at + k : from, exists);
                    else to[k] = exists ? to_acc(at[k]) : 0.0f;
                }
            }
        }
    });
}

// A thread's destinations in a tile: rows of a column of one phase.
struct Unit {
    int d, row, column;    // of the tile: plane and first row of their phases; along W of all phases
    __device__ __forceinline__ Unit(const Tiling& t, int i) {
        column = t.by_columns.take(i);
        row = t.by_row_groups.take(i) * t.rows;
        d = i;
    }
};

// What a block multiplies.
struct Block {
    const Geometry& g;
    const Tiling& t;
    const Phases& phases;
    const float *weights, *box;    // (channels of x, channels of out, kernel); (source channels, planes, rows, pitch), from the first column on
    TileOrigin origin;
};

// sum[r] += the gather of a unit's row r, of destination channel m, in a phase of D and of H. kChecked: a value outside is not multiplied, since the weight may be Inf.
template <Direction kDirection, bool kChecked, int kRows>
__device__ __forceinline__ void gather_rows(const Block& b, const Unit& unit, int m, const Phase& pd, const Phase& ph, float (&sum)[kRows]) {
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int kernel_h = int(b.g.axis[1].kernel), kernel_w = int(b.g.axis[2].kernel), row_step = ah.step * t.pitch;
    int q = unit.column;
    const int phase_w = t.by_phases_w.take(q);
    const Phase& pw = b.phases.w[phase_w];
    const int taps_w = pw.taps;
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++) {
        const float* const pair = b.weights + (kDirection == Direction::kForward ? c * t.dst_channels + m : m * t.src_channels + c) * t.volume;
#pragma unroll 1
        for (int jd = 0; jd < pd.taps; jd++)
#pragma unroll 1
        for (int jh = 0; jh < ph.taps; jh++) {
            const int d = unit.d * ad.step + pd.src - ad.first + jd * pd.src_tap_step, h = unit.row * ah.step + ph.src - ah.first + jh * ph.src_tap_step;
            const float* const kernel = pair + ((pd.k + jd * pd.k_step) * kernel_h + ph.k + jh * ph.k_step) * kernel_w;
            const float* const row = b.box + ((c * ad.box + d) * ah.box + h) * t.pitch + q * aw.step;
#pragma unroll 2
            for (int jw = 0; jw < taps_w; jw++) {
                const TapColumn column = b.phases.columns[phase_w][jw];
                const float weight = kernel[column.kernel], *at = row + column.offset;
                const int source_d = ad.first + b.origin.d * ad.step + d, source_h = ah.first + b.origin.h * ah.step + h, source_w = pw.src + (b.origin.w + q) * aw.step + jw * pw.src_tap_step;
#pragma unroll
                for (int r = 0; r < kRows; r++)
                    if (!kChecked || (unsigned(source_d) < unsigned(ad.src) && unsigned(source_h + r * ah.step) < unsigned(ah.src) && unsigned(source_w) < unsigned(aw.src))) sum[r] += at[r * row_step] * weight;
            }
        }
    }
}

// The same forward, of all phases of H: row r of phase p is sum[r * S + p].
template <int K, int S, int kRows>
__device__ __forceinline__ void gather_forward(const Block& b, const Unit& unit, int m, const Phase& pd, float (&sum)[kRows * S]) {
    constexpr int kStart = start_of(K, S), kTapsH = (K - 1 + kStart) / S + 1, kTapsW = (K + S - 1) / S, kPitch = pitch_of(1);
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int q = unit.column / S;
    const Phase& pw = b.phases.w[unit.column % S];
    const bool has_last = K % S == 0 || pw.taps == kTapsW;    // of the taps w
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++)
#pragma unroll 1
    for (int jd = 0; jd < pd.taps; jd++) {
        const float* const kernel = b.weights + ((c * t.dst_channels + m) * int(b.g.axis[0].kernel) + pd.k + jd * pd.k_step) * K * K + pw.k;
        const float* const plane = b.box + ((c * ad.box + unit.d * ad.step + pd.src - ad.first + jd * pd.src_tap_step) * ah.box + unit.row) * kPitch + q + pw.src - aw.first;
        float weights[K][kTapsW];
#pragma unroll
        for (int kh = 0; kh < K; kh++)
#pragma unroll
            for (int j = 0; j < kTapsW; j++)
                if (j < kTapsW - 1 || has_last) weights[kh][j] = kernel[kh * K + j * S];
#pragma unroll
        for (int i = 0; i < kRows + kTapsH - 1; i++)    // source rows
#pragma unroll
            for (int j = 0; j < kTapsW; j++) {
                if (j == kTapsW - 1 && !has_last) continue;
                const float value = plane[i * kPitch - j];
#pragma unroll
                for (int kh = 0; kh < K; kh++) {
                    const int row = i - (kTapsH - 1) + (kh + kStart) / S;
                    if (row >= 0 && row < kRows) sum[row * S + (kh + kStart) % S] += value * weights[kh][j];
                }
            }
    }
}

// What the taps of a column read in a row of dout: those from the start_of()-th on. With stride 2 pairs are aligned.
template <int K, int S> struct Window {
    static constexpr int kStart = start_of(K, S), kCount = S == 1 ? K : (K + kStart + 1) / 2 * 2;
    float values[kCount];
    __device__ __forceinline__ explicit Window(const float* at) {    // at tap 0
        if constexpr (S == 1)
#pragma unroll
            for (int i = 0; i < kCount; i++) values[i] = at[i];
        else
#pragma unroll
            for (int i = 0; i < kCount; i += 2) {
                const float2 pair = *reinterpret_cast<const float2*>(at - kStart + i);
                values[i] = pair.x, values[i + 1] = pair.y;
            }
    }
    __device__ __forceinline__ float operator[](int kw) const { return values[kw + (S == 1 ? 0 : kStart)]; }
};

// The same of dx.
template <int K, int S, int kRows>
__device__ __forceinline__ void gather_dinput(const Block& b, const Unit& unit, int m, float (&sum)[kRows]) {
    constexpr int kPitch = pitch_of(S);
    const Tiling& t = b.t;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1];
    const int kernel_d = int(b.g.axis[0].kernel);
#pragma unroll 1
    for (int c = 0; c < t.src_channels; c++)
#pragma unroll 1
    for (int kd = 0; kd < kernel_d; kd++) {
        const float* const kernel = b.weights + ((m * t.src_channels + c) * kernel_d + kd) * K * K;
        const float* const plane = b.box + ((c * ad.box + unit.d * ad.step + kd * int(b.g.axis[0].dilation)) * ah.box + unit.row * S) * kPitch + unit.column * S;
        float weights[K][K];
#pragma unroll
        for (int i = 0; i < K * K; i++) weights[i / K][i % K] = kernel[i];
#pragma unroll
        for (int i = 0; i < (kRows - 1) * S + K; i++) {    // rows of dout
            const Window<K, S> window(plane + i * kPitch);
#pragma unroll
            for (int kw = 0; kw < K; kw++)
#pragma unroll
                for (int r = 0; r < kRows; r++)
                    if (i - r * S >= 0 && i - r * S < K) sum[r] += window[kw] * weights[i - r * S][kw];
        }
    }
}

// Grid: (n, group, tile), tiles fastest. dst = epilogue(gather of src); bias may be null. K, S: square_of(g).
template <Direction kDirection, int K, int S>
__global__ void __launch_bounds__(kThreads, 3)
gather_kernel(Geometry g, Tiling t, int dtype, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    wait_for_previous_kernel();
    extern __shared__ __align__(16) uint8_t base[];
    Phases& phases = *reinterpret_cast<Phases*>(base);
    float* const weights = reinterpret_cast<float*>(base + sizeof(Phases));    // of the group, in the order of w
    const int pairs = t.src_channels * t.dst_channels;
    float* const box = weights + round_up_to_quads(pairs * t.volume);
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];

    const int64_t tiles = t.tiles, plane = blockIdx.x / tiles;    // of (n, group)
    const int group = int(plane % t.groups);
    const TileOrigin origin = origin_of(t, int(blockIdx.x % tiles));
    load_box(t, origin, src, dtype, plane * t.src_channels * (int64_t(ad.src) * ah.src * aw.src), t.src_channels, box, kThreads);
    find_phases(phases, kDirection, g, t);
    bool finite = true;
    for (int i = threadIdx.x; i < pairs * t.volume; i += kThreads) {
        weights[i] = load_as_float(w, dtype, int64_t(group) * pairs * t.volume + i);
        finite &= fabsf(weights[i]) <= 3.4e38f;
    }
    cp_async_wait_all();
    const bool all_finite = __syncthreads_and(finite);

    constexpr int kRows = rows_of(kDirection, S), kPhases = kDirection == Direction::kForward && K > 0 ? S : 1;    // of H, that a thread has
    const Block b = {g, t, phases, weights, box + skew_of(t, origin), origin};
    const int64_t dst_volume = int64_t(ad.dst) * ah.dst * aw.dst;
    for (int m = 0; m < t.dst_channels; m++)
    for (int phase_d = 0; phase_d < ad.phases; phase_d++)
    for (int phase_h = 0; phase_h < ah.phases; phase_h += kPhases)
    for (int i = threadIdx.x; i < t.units; i += kThreads) {
        const Unit unit(t, i);
        const Phase& pd = phases.d[phase_d];
        const int out_d = (origin.d + unit.d) * ad.phases + phase_d, out_h = (origin.h + unit.row) * ah.phases + phase_h, out_w = origin.w * aw.phases + unit.column;
        if (out_d >= ad.dst || out_h >= ah.dst || out_w >= aw.dst) continue;
        float sum[kRows * kPhases] = {};
        if (K > 0 && all_finite) {
            if constexpr (K > 0 && kDirection == Direction::kForward) gather_forward<K, S, kRows>(b, unit, m, pd, sum);
            else if constexpr (K > 0) gather_dinput<K, S, kRows>(b, unit, m, sum);
        } else {
#pragma unroll
            for (int p = 0; p < kPhases; p++) {
                float own[kRows] = {};
                if (all_finite) gather_rows<kDirection, false>(b, unit, m, pd, phases.h[phase_h + p], own);
                else gather_rows<kDirection, true>(b, unit, m, pd, phases.h[phase_h + p], own);
#pragma unroll
                for (int r = 0; r < kRows; r++) sum[r * kPhases + p] = own[r];
            }
        }
        const int channel = group * t.dst_channels + m, row_step = kPhases > 1 ? 1 : ah.phases;
        const float own_bias = bias ? load_as_float(bias, dtype, channel) : 0.0f;
        const int64_t first = (plane * t.dst_channels + m) * dst_volume + (int64_t(out_d) * ah.dst + out_h) * aw.dst + out_w;
        with_element(dtype, [&](auto element) {
            using T = decltype(element);
            T* to = static_cast<T*>(dst) + first;
#pragma unroll
            for (int r = 0; r < kRows * kPhases; r++, to += row_step * aw.dst) {
                if (out_h + r * row_step >= ah.dst) break;
                const float v = sum[r] + own_bias;
                *to = from_acc<T>(apply_relu ? relu(v) : v);
            }
        });
    }
}

inline int64_t shared_bytes(const Tiling& t) { return int64_t(sizeof(Phases)) + (round_up_to_quads(t.src_channels * t.dst_channels * t.volume) + t.src_channels * t.box_floats()) * int64_t(sizeof(float)); }

inline Tiling tiling_of(Direction direction, const Geometry& g, int multiprocessors) {
    return choose_tiling(direction, g, false, kThreads, multiprocessors);
}

// Calls f(K, S) with what the compiler knows of the kernel and the stride.
template <int kNumber> using Number = std::integral_constant<int, kNumber>;
template <typename F> int with_square(Square square, F f) {
    switch (square.S * 10 + square.K) {
        case 13: return f(Number<3>(), Number<1>());
        case 15: return f(Number<5>(), Number<1>());
        case 22: return f(Number<2>(), Number<2>());
        case 23: return f(Number<3>(), Number<2>());
        case 24: return f(Number<4>(), Number<2>());
        case 25: return f(Number<5>(), Number<2>());
        default: return f(Number<0>(), Number<0>());
    }
}

// dst = epilogue(gather of src); bias may be null.
template <Direction kDirection> int gather(const Geometry& g, int dtype, int device, void* stream, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    const Tiling t = tiling_of(kDirection, g, multiprocessors_of(device));
    return with_square(square_of(g), [&](auto K, auto S) {
        return launch_with_shared(gather_kernel<kDirection, decltype(K)::value, decltype(S)::value>, g.N * t.groups * t.tiles, kThreads, shared_bytes(t), stream, g, t, dtype, src, w, bias, apply_relu, dst);
    });
}

}  // namespace depthwise
