// The Hopper convolution's choice among the ways to cut its work.
#pragma once

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
        case 32: return block_n == 232 || block_n == 136 || block_n == 64;
        default: return !many || block_n == 160 || block_n == 88 || block_n == 64;
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
    t.queues = t.keeps_weights ? t.row_pairs : 1;
    t.column_warps = 1;
    return true;
}

// Estimated cycles of the busiest multiprocessor: a tile's products, or the traffic of its outputs and boxes where that is more.
inline double time_of(const Tiling& t, const Stencil& s, int64_t samples, int64_t channels, int multiprocessors) {
    const bool many = t.item_taps > 1;
    const int loaded_rings = t.keeps_weights ? 0 : t.weight_rings;
    const double part = double(t.part_channels) / t.C_pad, steps = steps_of(t, s) * part, boxes = boxes_of(t, s) * part;
    // A step of two warpgroups takes block_n cycles, or what their weights take at the 21 bytes a cycle that come from the L2
    // cache; and longer where the stages that are not in use do not cover that one's latency.
    const double weight_cycles = loaded_rings * kRows * 16 * 2 / 21.0 + 0.1 * t.block_n, step_cycles = t.warpgroups * t.block_n / 2 + (many || t.block_n > 128 ? 20 : 95);
    const double step = step_cycles > weight_cycles ? step_cycles : weight_cycles;
    const double lead = (t.weight_stages - (t.split_m ? 2 : many ? 1.5 : 3)) * step * t.chunk / 16 * t.items, latency = 1800;
    const double box_bytes = t.box_bytes(), box_time = boxes * (latency + box_bytes / 25) / (t.input_stages - 1);    // loads in flight
    double products = steps * step * (lead < latency && !t.keeps_weights ? latency / lead : 1.0) + boxes * (40 + 0.05 * t.planes * t.box_rows * t.pitch * t.chunk / 16);
    products = products > box_time ? products : box_time;
    // A consumer's instructions, each waiting for the one before: of the taps, the boxes, the epilogue.
    const double instructions = steps / (t.chunk / 16) * (many ? 60 + 350.0 / t.items : 350) + boxes * 600 + t.block_n * (t.dense ? 15 : 20);
    products = products > instructions ? products : instructions;
    const double loads = (steps * loaded_rings * kRows * 16 * 2 + boxes * box_bytes) / 21;
    products = products > loads ? products : loads;
    const double out_bytes = 4.0 * t.warpgroups * kRows * t.run * t.rows.octets * t.rows.packed_phases / 8;
    const double traffic = out_bytes / 17 + boxes * box_bytes / 40 + 300;
    // Two warps issue the copies of the runs' pieces one after another.
    const double pieces = t.warpgroups * (t.tensor_store ? 1.0 : t.region_channels * packed_phases(t, s, 0) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1)));
    const double store_time = t.bulk ? pieces / 2 * 50 : 0;
    if (products < store_time) products = store_time;
    double tile = products > traffic ? products + 0.2 * traffic : traffic + 0.2 * products;
    if (t.buffers == 1) tile += 0.05 * traffic;
    if (!t.tensor_store && !t.whole_sectors) tile += t.contiguous ? 0.3 * traffic : t.bulk ? 0.4 * traffic + 0.5 * store_time : 1.5 * traffic;
    if (t.warpgroups == 2 && !t.dense) tile += 25 * t.block_n;    // with three, one's epilogue is always beside the others' products
    const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors + 0.5;
    const double added_bytes = 4.0 * t.k_parts * samples * channels * s.axis[0].out * s.axis[1].out * s.axis[2].out;    // of the parts: written, and read once more
    return waves * (tile + (t.keeps_weights ? 400 : 1200)) + (t.k_parts == 1 ? 0 : 6000 + 2 * added_bytes / 2500);
}

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory. groups: of the split, or 1.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    double best_time = 0;
    for (int packing = 0; packing < 3; packing++)
    for (int warpgroups : {2, 3})
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {232, 224, 192, 160, 136, 128, 88, 64})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (bool half_chunk : {false, true})
    for (int planes : {1, warpgroups})
    for (int input_stages : {2, 3, 4, 6})
    for (int item_taps : {h.taps * w.taps, w.taps, 1}) {
        if ((warpgroups == 3) != (block_n == 136) || (warpgroups == 3 && split_m)) continue;    // as many sums as there are registers for
        if (planes > 1 && (split_m || d.positions == 1)) continue;
        Tiling t = {};
        t.input_stages = input_stages, t.warpgroups = warpgroups;
        t.block_n = block_n, t.split_m = split_m, t.planes = planes, t.taps_per_box = taps_per_box;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (t.rows.packed_phases > 8) continue;
        t.rows.octets = 8 / t.rows.packed_phases;
        if (!set_channels(t, s, source_channels, channels, groups)) continue;
        if (half_chunk && (warpgroups == 2 || t.split || t.chunk < 64)) continue;    // where three consumers leave room for no more
        if (half_chunk) t.chunk /= 2;
        const bool many = item_taps > 1;
        if (!is_built(block_n, t.chunk, many)) continue;
        t.item_taps = item_taps, t.items = many ? item_taps * t.products : 1;
        if (many && (split_m || t.items > kMaxItems || (item_taps > w.taps && taps_per_box < h.taps) || s.source_phases() > 1)) continue;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pitch = box_pitch(w, t.tile_w, strips);
        if (t.pitch > 256 || !cut_runs(t, s, true)) continue;
        if (planes > 1 && t.runs > 1) continue;    // whole planes only: neighbouring runs share more of their boxes
        lay_out_regions(t, s, channels, true);
        for (int k_parts : {1, 2, 3, 4, 5, 6, 8}) {    // of one phase, so that a part is a range of channels
            if (!cut_channels(t, k_parts) || !count_tiles(t, s, samples)) continue;
            if (k_parts > 1 && (groups > 1 || s.source_phases() > 1 || t.tiles > 2 * k_parts * multiprocessors)) break;    // there are enough tiles
            if (!lay_out_stages(t, s)) continue;
            const double time = time_of(t, s, samples, channels, multiprocessors);
            if (best.block_n == 0 || time < best_time) best = t, best_time = best.cycles = time;
        }
    }
    return with_divisors(best);
}

}  // namespace conv_sm90
