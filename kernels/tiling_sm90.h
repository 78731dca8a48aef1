// The Hopper convolution's choice among the ways to cut its work.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace conv_sm90 {

using namespace conv;

constexpr int kSharedBytes = 227 * 1024;
constexpr int kMaxStages = 16;                 // of weights, all rings together
constexpr int kMaxInputStages = 6;
constexpr int kMaxItems = 64;
constexpr int kHeadBytes = 2560;               // barriers and the like

// Whether there is a kernel of these columns for stages of such a chunk, with several products or one. Each costs nvcc seconds, so those that hardly any
// shape is best with are left out (NOTES.md).
HOST_DEVICE constexpr bool is_built(int block_n, int chunk, bool many) {
    switch (chunk) {
        case 16: return block_n == 136;
        case 32: return block_n == 232 || block_n == 200 || block_n == 136 || block_n == 64;
        default: return (!many && block_n != 200) || block_n == 160 || block_n == 88 || block_n == 64;
    }
}

inline int64_t shared_bytes(const Tiling& t) {
    return kHeadBytes + int64_t(t.input_stages) * t.input_bytes + int64_t(t.weight_rings) * t.weight_stages * t.weight_bytes + int64_t(t.buffers) * t.buffer_bytes + t.warpgroups * int64_t(t.table_bytes);
}

// The stages that shared memory has room for, and what becomes of the weights. False where there are too few of them.
inline bool lay_out_stages(Tiling& t, const Stencil& s) {
    const bool many = t.item_taps > 1;
    const int halo_w = s.axis[2].shift[s.axis[2].taps - 1], row_bytes = 2 * t.chunk;
    t.input_bytes = round_up((int64_t(t.planes) * t.box_rows * t.pitch + halo_w) * row_bytes, 1024);
    t.weight_bytes = t.items * kRows * row_bytes;
    t.weight_rings = t.split_m ? 2 : 1;
    t.buffers = t.warpgroups;
    if (t.warpgroups == 2 && kSharedBytes - shared_bytes(t) < (many ? 3 : 10) * t.weight_bytes) t.buffers = 1;
    const int64_t left_bytes = kSharedBytes - shared_bytes(t);    // for weights
    t.weight_stages = (left_bytes / t.weight_bytes < kMaxStages ? left_bytes / t.weight_bytes : kMaxStages) / t.weight_rings;
    // A tile's weights stay in shared memory for the next tile, where the ring has as many stages as they fill or a multiple.
    const int tile_stages = s.taps() / t.item_taps * (t.C_pad / t.chunk) * (many ? 1 : t.products);
    t.keeps_weights = t.k_parts == 1 && t.weight_rings == 1 && t.weight_stages >= 2 && tile_stages <= t.weight_stages;
    if (t.keeps_weights) t.weight_stages -= t.weight_stages % tile_stages;
    else if (t.weight_stages * t.weight_rings < (many ? 3 : 6)) return false;
    // With one ring, the stages between the two warpgroups are not there to load weights in advance.
    const int advance = int(ceil_div(2000, int64_t(t.block_n) * t.chunk / 16 * t.items)) + 2;
    t.lag = t.split_m ? 4 : t.weight_stages > advance ? t.weight_stages - advance : 1;
    // One warp is enough for boxes and weights that are kept; otherwise each ring has one, or boxes and the one ring.
    t.loaders = t.keeps_weights ? 1 : 2, t.box_loader = t.keeps_weights || t.weight_rings == 2 ? 0 : 1;
    t.queues = t.keeps_weights ? t.row_pairs : 1;
    t.column_warps = 1;
    return true;
}

// Estimated cycles of the busiest multiprocessor. The numbers are fitted to the times of 170 layers (NOTES.md).
inline double time_of(const Tiling& t, const Stencil& s, int64_t samples, int64_t channels, int multiprocessors) {
    const double chunk_steps = t.chunk / 16, part = largest_part(t, s), steps = steps_of(t, s) * part, boxes = boxes_of(t, s) * part, stages = steps / chunk_steps / t.items;
    // The tensor cores: a step of all consumers, longer where the weights' stages that are not in use do not cover the latency of loads.
    const double step = t.warpgroups * t.block_n / 2 + 20 / chunk_steps, latency = 2050;
    const double free_stages = t.weight_stages - (t.split_m ? 2 : t.item_taps > 1 ? 1.5 : 3), lead = std::max(100.0, free_stages * step * chunk_steps * t.items);
    double products = steps * step * (t.keeps_weights ? 1 : std::max(1.0, latency / lead)) + (t.warpgroups == 3 ? 300 * stages : 0) + 0.68 * boxes * t.planes * t.box_rows * t.pitch * chunk_steps;
    const auto at_least = [&](double cycles) { products = std::max(products, cycles); };
    at_least(boxes * (2150 + t.box_bytes() / 73) / (t.input_stages - 1));    // loads in flight
    // A consumer's instructions, each waiting for the one before; and, where these are few and boxes have a loader of their own, what comes from the L2 cache.
    if (t.box_loader == 1 && t.chunk == 32 && t.items == 1) at_least(stages * 620 + boxes * 300), at_least(boxes * t.box_bytes() / 21.5);
    else at_least(stages * (700 + 100 * t.items) + boxes * 400);
    // Two warps issue the copies of the runs' pieces one after another.
    const double pieces = t.warpgroups * (t.tensor_store ? 1.0 : t.region_channels * region_planes(t, s) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1)));
    const double copies = t.bulk ? pieces * 28 : 0;
    at_least(copies);
    const double outputs = out_bytes_of(t) / 34;
    double tile = std::max(products, outputs) + 0.1 * std::min(products, outputs);
    if (t.buffers == 1) tile += 1.8 * outputs;
    if (!t.tensor_store && !t.whole_sectors) tile += t.contiguous ? 0.58 * outputs : t.bulk ? 0.68 * copies : 9.5 * outputs;
    if (t.warpgroups == 2 && !t.dense) tile += 9.6 * t.block_n;    // with three, one's epilogue is always beside the others' products
    const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors;
    const double added_bytes = 4.0 * t.k_parts * samples * channels * s.axis[0].out * s.axis[1].out * s.axis[2].out;    // of the parts
    return waves * (tile + (t.keeps_weights ? 2450 : 1250)) + (t.k_parts == 1 ? 0 : 2400 + added_bytes / 4000);
}

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory. groups: of the split, or 1.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    for (int packing = 0; packing < 3; packing++)
    for (int warpgroups : {2, 3})
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {232, 224, 200, 192, 160, 136, 128, 88, 64})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (int chunk_phases : {1, 2, 4})
    for (bool half_chunk : {false, true})
    for (int planes : {1, warpgroups})
    for (bool joins_planes : {false, true})
    for (int input_stages : {2, 3, 4, 6})
    for (int item_taps : {h.taps * w.taps, w.taps, 1}) {
        if (w.source_phases % chunk_phases != 0) continue;
        if ((warpgroups == 3) != (block_n == 136) || (warpgroups == 3 && split_m)) continue;    // as many sums as there are registers for
        if (planes > 1 && (split_m || d.positions == 1)) continue;
        Tiling t = {};
        t.input_stages = input_stages, t.warpgroups = warpgroups;
        t.block_n = block_n, t.split_m = split_m, t.planes = planes, t.run_planes = 1, t.taps_per_box = taps_per_box;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (t.rows.packed_phases > 8) continue;
        t.rows.octets = 8 / t.rows.packed_phases;
        if (!set_channels(t, s, source_channels, channels, groups)) continue;
        if (chunk_phases > 1 && !join_phases(t, w, chunk_phases)) continue;
        if (half_chunk && (warpgroups == 2 || chunk_phases > 1 || t.split || t.chunk < 64)) continue;    // where three consumers leave room for no more
        if (half_chunk) t.chunk /= 2;
        const bool many = item_taps > 1;
        if (!is_built(block_n, t.chunk, many)) continue;
        t.item_taps = item_taps, t.items = many ? item_taps * t.products : 1;
        if (many && (split_m || t.items > kMaxItems || (item_taps > w.taps && taps_per_box < h.taps) || s.source_phases() > 1)) continue;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pitch = box_pitch(w, t.tile_w, strips);
        if (t.pitch > 256 || !cut_runs(t, s, true)) continue;
        if (planes > 1 && t.runs > 1) continue;    // whole planes only: neighbouring runs share more of their boxes
        if (joins_planes && ((planes == 1 && !split_m) || !join_planes(t, s, planes))) continue;
        lay_out_regions(t, s, channels, true);
        for (int k_parts : {1, 2, 3, 4, 5, 6, 8}) {
            if (!cut_channels(t, s, k_parts) || !count_tiles(t, s, samples)) continue;
            if (k_parts > 1 && (groups > 1 || t.tiles > 2 * k_parts * multiprocessors)) break;    // there are enough tiles
            if (!lay_out_stages(t, s)) continue;
            const double time = time_of(t, s, samples, channels, multiprocessors);
            if (best.block_n == 0 || time < best.cycles) best = t, best.cycles = time;
        }
    }
    return with_divisors(best);
}

}  // namespace conv_sm90
