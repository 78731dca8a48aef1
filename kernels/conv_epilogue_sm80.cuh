// The epilogue of the mma.sync convolution (conv_sm80.cuh). Where neighbouring positions are aligned pairs of outputs, each warp stores its own from its registers; else they are staged where the pipeline's
// stages were, half a row tile at a time, and whole warps store rows of memory. Fused: it leaves the moments of relu(out), a second kernel makes statistics of them.
#pragma once

#include "conv_epilogue.cuh"
#include "tiling_sm80.h"

namespace conv_sm80 {

// What a lane needs of a row of a row tile: its factor and bias, where it is staged, or how many output planes it is behind the run's first in memory (-1: it is nobody's output), and its phase of (H, W).
struct Row { float scale, bias; int region, phase_hw; };
constexpr int kMostPhases = 8;         // of (H, W) in a row tile

struct Epilogue {
    Row rows[kRows];
    int moments[kRows];                // where they go
    float2 counts[kColumnWarps][kMostPhases];    // of a warp's outputs, and 1 / count
    int4 table_key;                    // what the table was made for
};

// Whether outputs are stored from registers.
__device__ __forceinline__ bool stores_pairs(const Parameters& a) { return a.p.t.pairs && a.dtype == kFloat32; }

// Element (granule, j, e) of a lane: row granule * 8 + lane / 4 of the row tile, position j * 8 + lane % 4 * 2 + e of the warp's.
template <int kColumns> struct Sums {
    float v[4][kColumns / 8][4];
    __device__ __forceinline__ float& at(int granule, int j, int e) { return v[granule / 2][j][granule % 2 * 2 + e]; }
};

// The regions of the first and the second half of a row tile's granules, of a run of one plane. Where the halves are phases of D, they take turns.
__device__ __forceinline__ bool halves_are_phases(const Problem& p) { return p.t.rows.octets == 1 && packed_phases(p.t, p.s, 0) == 2; }
__device__ __forceinline__ int slot_of(const Problem& p, int region) { return halves_are_phases(p) ? region / 2 : region & (p.t.rows.octets * 4 * packed_phases(p.t, p.s, 0) - 1); }

// Threads 0 to 63: what their rows are. Phases' numbers are powers of two (choose_tiling).
__device__ __forceinline__ void find_row(const Parameters& a, const Run& run, Epilogue& shared) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const int log_d = __ffs(packed_phases(t, p.s, 0)) - 1, log_phases = __ffs(t.rows.packed_phases) - 1, log_hw = log_phases - log_d, granule = threadIdx.x / 8;
    const int phase = granule & (t.rows.packed_phases - 1), packed_d = phase >> log_hw, channel = (granule >> log_phases) * 8 + threadIdx.x % 8, region = (channel << log_d) + packed_d;
    const bool live = run.channel0 + channel < p.C_out && has_outputs(t, run, packed_d);
    const int slot = t.run_planes > 1 ? channel % (t.rows.octets * 4) * t.run_planes : slot_of(p, region);
    const int alignment = (run.alignment + alignment_of_region(p, channel, packed_d)) & (t.staging_unit - 1);
    shared.rows[threadIdx.x] = {live ? scaled_half::power_of_two(-scaled_half::shift_of(a.weight_max[run.channel0 + channel])) : 0.0f, live && a.bias ? load_as_float(a.bias, a.dtype, run.channel0 + channel) : 0.0f,
                              !live ? -1 : stores_pairs(a) ? channel * p.s.axis[0].out + packed_d : slot * t.region_stride + alignment, phase & ((1 << log_hw) - 1)};
    shared.moments[threadIdx.x] = phase * t.channels() + run.channel0 + channel;
}

// Counts a warp's outputs.
template <int kColumns> __device__ __forceinline__ void count_outputs(const int* table, int phases_hw, float2* counts) {
    const int lane = threadIdx.x % 32;
    for (int phase = 0; phase < phases_hw; phase++, table += kColumns * kColumnWarps) {
        int count = 0;
#pragma unroll
        for (int i = 0; i < kColumns; i += 32) count += __popc(__ballot_sync(~0u, i + lane < kColumns && table[min(i + lane, kColumns - 1)] >= 0));
        if (lane == 0) counts[phase] = make_float2(count, count > 0 ? 1.0f / count : 0.0f);
    }
}

// Calls f(value, place) for the sums of a lane's row `granule`; place: of the staged output, or negative. Some places at a time are loaded in advance: no load moves in front of a
// store to shared memory.
template <int kColumns, typename F> __device__ __forceinline__ void for_each_output(Sums<kColumns>& sums, int granule, const int* table, F f) {
    constexpr int kAtOnce = kColumns / 16;
#pragma unroll
    for (int first = 0; first < kColumns / 8; first += kAtOnce) {
        int2 places[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) places[j] = *reinterpret_cast<const int2*>(table + (first + j) * 8);
#pragma unroll
        for (int j = 0; j < kAtOnce; j++) f(sums.at(granule, first + j, 0), places[j].x), f(sums.at(granule, first + j, 1), places[j].y);
    }
}

// Leaves the moments of a lane's row `granule`, given the sum of its outputs: the mean, and the sum of squared deviations.
template <int kColumns> __device__ __forceinline__ void leave_moments(const Epilogue& shared, const Row& row, int granule, const int* places, float sum, float2* moments, Sums<kColumns>& sums) {
    const int lane = threadIdx.x % 32;
    const float mean = quad_sum(sum) * shared.counts[threadIdx.x / 32][row.phase_hw].y;
    float squares = 0;
    for_each_output(sums, granule, places, [&](float v, int place) {
        if (place >= 0) squares = fmaf(v - mean, v - mean, squares);
    });
    squares = quad_sum(squares);
    if (lane % 4 == 0 && row.region >= 0) moments[shared.moments[granule * 8 + lane / 4]] = make_float2(mean, squares);
}

// Scales half of a lane's rows back, adds the bias, applies ReLU and stages them; moments: of the warp's outputs of each row, or null.
template <int kColumns, int kHalf>
__device__ __forceinline__ void stage(const Epilogue& shared, const int* table, float* staged, float first_scale, float lowest, float2* moments, Sums<kColumns>& sums) {
#pragma unroll
    for (int granule = kHalf * 4; granule < kHalf * 4 + 4; granule++) {
        const Row row = shared.rows[granule * 8 + threadIdx.x % 32 / 4];
        const int* places = table + row.phase_hw * (kColumns * kColumnWarps);
        float* region = staged + row.region;
        float sum = 0;
        for_each_output(sums, granule, places, [&](float& v, int place) {
            v = max_nan(fmaf(v * first_scale, row.scale, row.bias), lowest);
            if (row.region >= 0 && place >= 0) region[place] = v;
            if (place >= 0) sum += v;
        });
        if (moments) leave_moments(shared, row, granule, places, sum, moments, sums);
    }
}

// The same of all rows, which it stores, in pairs. origin: the run's first output.
template <int kColumns>
__device__ __forceinline__ void store_pairs(const Epilogue& shared, const int* table, float* origin, int64_t area, float first_scale, float lowest, float2* moments, Sums<kColumns>& sums) {
#pragma unroll
    for (int granule = 0; granule < 8; granule++) {
        const Row row = shared.rows[granule * 8 + threadIdx.x % 32 / 4];
        const int* places = table + row.phase_hw * (kColumns * kColumnWarps);
        float* const out = origin + row.region * area;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < kColumns / 8; j++) {
            const int place = places[j * 8];
            float &v0 = sums.at(granule, j, 0), &v1 = sums.at(granule, j, 1);
            v0 = max_nan(fmaf(v0 * first_scale, row.scale, row.bias), lowest), v1 = max_nan(fmaf(v1 * first_scale, row.scale, row.bias), lowest);
            if (row.region >= 0 && place >= 0) *reinterpret_cast<float2*>(out + place) = make_float2(v0, v1);
            if (place >= 0) sum += v0 + v1;
        }
        if (moments) leave_moments(shared, row, granule, places, sum, moments, sums);
    }
}

template <typename T> __device__ constexpr int type_of() { return std::is_same_v<T, float> ? kFloat32 : std::is_same_v<T, __half> ? kFloat16 : kBFloat16; }

// A warp: stores `count` neighbours from out on; vectors: four at a time, as they are staged like they are aligned in memory.
template <typename T> __device__ __forceinline__ void store_row(T* out, int alignment, const float* from, int count, bool vectors) {
    const int lane = threadIdx.x % 32;
    if (vectors) {
        const int head = min(count, -alignment & 3), body = (count - head) & ~3, tail = count - head - body;
        const int own = lane < 4 ? lane : head + body + lane - 4;    // the lanes from 4 on store what is behind the vectors
        if (lane < head || unsigned(lane - 4) < unsigned(tail)) out[own] = from_acc<T>(from[own]);
#pragma unroll 2
        for (int k = lane * 4; k < body; k += 128) store_as(out + head + k, type_of<T>(), 0, *reinterpret_cast<const float4*>(from + head + k));
    } else {
#pragma unroll 1
        for (int k = lane; k < count; k += 32) out[k] = from_acc<T>(from[k]);
    }
}

// A warp: stores every fourth of the regions that are staged.
template <typename T> __device__ __forceinline__ void store_half(const Parameters& a, const Tile& tile, const Epilogue& shared, const float* staged, int half) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[0];
    const int warp = threadIdx.x / 32, phases_d = packed_phases(t, p.s, 0), log_d = __ffs(phases_d) - 1, phases_hw = t.rows.packed_phases >> log_d, out_w = p.s.axis[2].out, regions = regions_of(p, run);
    const int plane_step = region_plane_step(t, p.s);
    const bool turns = halves_are_phases(p), several = t.run_planes > 1;
    const int first = turns ? half + 2 * warp : half * regions / 2 + warp, end = turns ? regions : (half + 1) * regions / 2, step = turns ? 8 : 4;
    const int count = t.contiguous ? contiguous_count(p, run) : run.ow_end - run.ow0, rows = t.contiguous ? 1 : run.rows * packed_phases(t, p.s, 1);
    const int row_step = t.packed[1] ? 1 : p.s.axis[1].phases, oh_end = t.packed[1] ? run.oh_end : p.s.axis[1].out, row_pitch = staged_row(p), out_d = p.s.axis[0].out;
    const int64_t area = int64_t(p.s.axis[1].out) * out_w, origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0);
#pragma unroll 1
    for (int region = first; region < end; region += step) {
        const auto [channel, plane] = place_of_region(p, region);
        int place = shared.rows[((channel >> 3 << log_d) + (several ? 0 : plane)) * phases_hw * 8 + channel % 8].region;
        if (place < 0 || !(run.live >> plane & 1)) continue;
        if (several) place += plane * t.region_stride;
        const int64_t at = origin + (channel * out_d + plane * plane_step) * area;
#pragma unroll 1
        for (int row = 0, oh = run.oh0; row < rows; row++, oh += row_step) {
            const int64_t row_at = at + int64_t(row * row_step) * out_w;
            if (oh >= 0 && oh < oh_end) store_row(static_cast<T*>(a.out) + row_at, int(row_at), staged + place + row * row_pitch, count, t.bulk);
        }
    }
}

// All threads, in advance: what finish() needs to know of a tile, when the tile before is finished with. True where the table is the one of the tile before. There must be a barrier between the two.
template <int kColumns> __device__ __forceinline__ bool prepare_finish(const Parameters& a, const Tile& tile, Epilogue& shared, int* table) {
    const Run& run = tile.run[0];
    if (threadIdx.x < kRows) find_row(a, run, shared);
    const bool same = same_key(table_key(a.p, tile, run), shared.table_key);
    if (!same) fill_table<kColumns * kColumnWarps>(a.p, tile, run, [&] { return table; }, stores_pairs(a));
    return same;
}

// Stores a tile's outputs, and leaves the moments where they are wanted.
template <int kColumns> __device__ __forceinline__ void finish(const Parameters& a, const Tile& tile, Epilogue& shared, bool same_table, int* table, float* staged, Sums<kColumns>& sums) {
    const Problem& p = a.p;
    const Tiling& t = p.t;
    const Run& run = tile.run[0];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, phases_hw = packed_phases(t, p.s, 1) * p.s.axis[2].phases;
    const float first_scale = scaled_half::power_of_two(-scaled_half::shift_of(a.activation_max[tile.sample])), lowest = a.apply_relu ? 0.0f : -INFINITY;
    const int* own_table = table + warp * kColumns;
    float2* moments = nullptr;
    if (a.workspace.sets.moments) {
        if (!same_table) count_outputs<kColumns>(own_table, phases_hw, shared.counts[warp]);
        __syncwarp();
        const int64_t set = (index_of_run(p, tile, 0) * kColumnWarps + warp) * p.s.phases() + run.outer * t.rows.packed_phases;
        const int phases_d = packed_phases(t, p.s, 0);
        if (lane < t.rows.packed_phases && has_outputs(t, run, lane * phases_d / t.rows.packed_phases)) a.workspace.sets.counts[set + lane] = shared.counts[warp][lane % phases_hw].x;
        moments = a.workspace.sets.moments + set * t.channels();
    }
    if (threadIdx.x == 0) shared.table_key = table_key(p, tile, run);
    if (stores_pairs(a)) {
        const int64_t origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0);
        store_pairs(shared, own_table + lane % 4 * 2, static_cast<float*>(a.out) + origin, int64_t(p.s.axis[1].out) * p.s.axis[2].out, first_scale, lowest, moments, sums);
        return;
    }
    __syncthreads();    // the stages are not read any more
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
        if (half == 0) stage<kColumns, 0>(shared, own_table + lane % 4 * 2, staged, first_scale, lowest, moments, sums);
        else stage<kColumns, 1>(shared, own_table + lane % 4 * 2, staged, first_scale, lowest, moments, sums);
        __syncthreads();
        if (a.dtype == kFloat32) store_half<float>(a, tile, shared, staged, half);
        else if (a.dtype == kFloat16) store_half<__half>(a, tile, shared, staged, half);
        else store_half<__nv_bfloat16>(a, tile, shared, staged, half);
        __syncthreads();
    }
}

}  // namespace conv_sm80
