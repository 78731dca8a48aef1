// Transposed convolution with groups of few channels, depthwise for instance: forward and dx, on the CUDA cores in float32.
//
//   forward  out[n, co, o] = bias[co] + sum over ci of the group, k with i * stride - padding + k * dilation == o of x[n, ci, i] * w[ci, co, k]
//   dx       dx[n, ci, i]  = sum over co of the group, k of dout[n, co, i * stride - padding + k * dilation] * w[ci, co, k]
//
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// There is so little to multiply that memory is the limit. A block brings a box of the source, halo included, and its group's weights to shared memory; a thread
// has some neighbouring rows of one phase of a column (neighbouring lanes, neighbouring outputs), so that a weight serves all of them.
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include <type_traits>

#include "depthwise_tiles.h"
#include "launch.cuh"

namespace depthwise {

constexpr int kThreads = 256;

// Of a phase of W and one of its taps: where it reads, from the thread's column on, and the kernel's index.
struct TapColumn { int offset, kernel; };

// What is known of the phases, in shared memory.
struct Phases {
    Phase d[kMaxStride], h[kMaxStride], w[kMaxStride];
    TapColumn columns[kMaxStride][kMaxKernel];
};

// One thread of each phase of each axis.
__device__ __forceinline__ void find_phases(Phases& phases, Direction direction, const Geometry& g, const Tiling& t) {
    const int axis = threadIdx.x / kMaxStride, i = threadIdx.x % kMaxStride;
    if (axis > 2 || i >= t.axis[axis].phases) return;
    const Phase phase = make_phase(direction, g.axis[axis], i);
    (axis == 0 ? phases.d : axis == 1 ? phases.h : phases.w)[i] = phase;
    for (int j = 0; axis == 2 && j < phase.taps; j++) phases.columns[i][j] = {column_offset(t, phase.src - t.axis[2].first + j * phase.src_tap_step), phase.k + j * phase.k_step};
}

// Brings the box of the tile at `origin` to shared memory, zeros where the source ends: `channels` of the source, (D, H, W) each.
template <typename T> __device__ __forceinline__ void load_box(const Tiling& t, TileOrigin origin, const T* __restrict__ src, int channels, float* box, int threads) {
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];
    const int d0 = ad.first + origin.d * ad.step, h0 = ah.first + origin.h * ah.step, w0 = aw.first + origin.w * aw.step;
    const int count = ad.box * ah.box * aw.box;
    for (int c = 0; c < channels; c++, src += int64_t(ad.src) * ah.src * aw.src, box += t.box_floats()) {
        constexpr int kLoads = 4;    // under way
        for (int first = threadIdx.x; first < count; first += threads * kLoads) {
            float values[kLoads];
            int places[kLoads];
#pragma unroll
            for (int i = 0; i < kLoads; i++) {
                int row = first + i * threads;
                const bool exists = row < count;
                const int w = t.by_box_w.take(row);
                int d = row;
                const int h = t.by_box_h.take(d), source_d = d0 + d, source_h = h0 + h, source_w = w0 + w;
                places[i] = exists ? row * t.pitch + column_offset(t, w) : -1;
                const bool inside = exists && unsigned(source_d) < unsigned(ad.src) && unsigned(source_h) < unsigned(ah.src) && unsigned(source_w) < unsigned(aw.src);
                values[i] = inside ? to_acc(src[(source_d * ah.src + source_h) * aw.src + source_w]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kLoads; i++)
                if (places[i] >= 0) box[places[i]] = values[i];
        }
    }
}

// A thread's destinations in a tile: kRows rows of a column of one phase.
struct Unit {
    int d, row, column;    // of the tile: plane and first row of their phases; along W of all phases
    __device__ __forceinline__ Unit(const Tiling& t, int i) {
        column = t.by_columns.take(i);
        row = t.by_row_groups.take(i) * t.rows;
        d = i;
    }
};

// Grid: (n, group, tile), tiles fastest. dst = epilogue(gather of src); bias may be null.
template <typename T, Direction kDirection, int kRows>
__global__ void __launch_bounds__(kThreads)
gather_kernel(Geometry g, Tiling t, const T* __restrict__ src, const T* __restrict__ w, const T* __restrict__ bias, bool apply_relu, T* __restrict__ dst) {
    wait_for_previous_kernel();
    extern __shared__ __align__(16) uint8_t base[];
    Phases& phases = *reinterpret_cast<Phases*>(base);
    float* const weights = reinterpret_cast<float*>(base + sizeof(Phases));    // of the group, in the order of w
    const int pairs = t.src_channels * t.dst_channels;
    float* const box = weights + pairs * t.volume;
    const TileAxis &ad = t.axis[0], &ah = t.axis[1], &aw = t.axis[2];

    const int64_t tiles = t.tiles, plane = blockIdx.x / tiles;    // of (n, group)
    const int group = int(plane % t.groups);
    const TileOrigin origin = origin_of(t, int(blockIdx.x % tiles));
    find_phases(phases, kDirection, g, t);
    bool finite = true;
    for (int i = threadIdx.x; i < pairs * t.volume; i += kThreads) {
        weights[i] = to_acc(w[int64_t(group) * pairs * t.volume + i]);
        finite &= fabsf(weights[i]) <= 3.4e38f;
    }
    load_box(t, origin, src + plane * t.src_channels * (int64_t(ad.src) * ah.src * aw.src), t.src_channels, box, kThreads);
    const bool all_finite = __syncthreads_and(finite);

    const int64_t dst_volume = int64_t(ad.dst) * ah.dst * aw.dst;
    const int kernel_h = int(g.axis[1].kernel), kernel_w = int(g.axis[2].kernel), row_step = ah.step * t.pitch;
    for (int m = 0; m < t.dst_channels; m++)
    for (int phase_d = 0; phase_d < ad.phases; phase_d++)
    for (int phase_h = 0; phase_h < ah.phases; phase_h++)
    for (int i = threadIdx.x; i < t.units; i += kThreads) {
        const Phase &pd = phases.d[phase_d], &ph = phases.h[phase_h];
        const Unit unit(t, i);
        int q = unit.column;
        const int phase_w = t.by_phases_w.take(q);
        const TapColumn* const columns = phases.columns[phase_w];
        const int taps_w = phases.w[phase_w].taps;
        const int out_d = (origin.d + unit.d) * pd.dst_step + phase_d, out_h = (origin.h + unit.row) * ph.dst_step + phase_h, out_w = (origin.w + q) * aw.phases + phase_w;
        if (out_d >= ad.dst || out_h >= ah.dst || out_w >= aw.dst) continue;
        float sum[kRows] = {};
        // kChecked: a value outside is not multiplied, since the weight may be Inf.
        const auto add = [&](auto checked) {
            constexpr bool kChecked = decltype(checked)::value;
            const int source_w = aw.first + (origin.w + q) * aw.step;
            for (int c = 0; c < t.src_channels; c++) {
                const float* const pair = weights + (kDirection == Direction::kForward ? c * t.dst_channels + m : m * t.src_channels + c) * t.volume;
                for (int jd = 0; jd < pd.taps; jd++)
                for (int jh = 0; jh < ph.taps; jh++) {
                    const int d = unit.d * ad.step + pd.src - ad.first + jd * pd.src_tap_step, h = unit.row * ah.step + ph.src - ah.first + jh * ph.src_tap_step;
                    const float* const kernel = pair + ((pd.k + jd * pd.k_step) * kernel_h + ph.k + jh * ph.k_step) * kernel_w;
                    const float* const row = box + ((c * ad.box + d) * ah.box + h) * t.pitch + q;
                    for (int jw = 0; jw < taps_w; jw++) {
                        const TapColumn column = columns[jw];
                        const float weight = kernel[column.kernel], *at = row + column.offset;
                        if (kChecked) {
                            const int source_d = ad.first + origin.d * ad.step + d, source_h = ah.first + origin.h * ah.step + h;
                            const int own_w = source_w + phases.w[phase_w].src - aw.first + jw * phases.w[phase_w].src_tap_step;
#pragma unroll
                            for (int r = 0; r < kRows; r++)
                                if (unsigned(source_d) < unsigned(ad.src) && unsigned(source_h + r * ah.step) < unsigned(ah.src) && unsigned(own_w) < unsigned(aw.src)) sum[r] += at[r * row_step] * weight;
                        } else {
#pragma unroll
                            for (int r = 0; r < kRows; r++) sum[r] += at[r * row_step] * weight;
                        }
                    }
                }
            }
        };
        if (all_finite) add(std::false_type());
        else add(std::true_type());
        const int channel = group * t.dst_channels + m;
        const float own_bias = bias ? to_acc(bias[channel]) : 0.0f;
        T* to = dst + (plane * t.dst_channels + m) * dst_volume + (int64_t(out_d) * ah.dst + out_h) * aw.dst + out_w;
#pragma unroll
        for (int r = 0; r < kRows; r++, to += ph.dst_step * aw.dst) {
            if (out_h + r * ph.dst_step >= ah.dst) break;
            const float v = sum[r] + own_bias;
            *to = from_acc<T>(apply_relu ? relu(v) : v);
        }
    }
}

inline int64_t shared_bytes(const Tiling& t) { return int64_t(sizeof(Phases)) + (t.src_channels * t.dst_channels * t.volume + t.src_channels * t.box_floats()) * int64_t(sizeof(float)); }

template <typename T, Direction kDirection, int kRows>
int launch_gather(const Geometry& g, const Tiling& t, void* stream, const void* src, const void* w, const void* bias, bool apply_relu, void* dst) {
    return launch_with_shared(gather_kernel<T, kDirection, kRows>, g.N * t.groups * t.tiles, kThreads, shared_bytes(t), stream, g, t, static_cast<const T*>(src), static_cast<const T*>(w), static_cast<const T*>(bias), apply_relu,
                              static_cast<T*>(dst));
}

}  // namespace depthwise
