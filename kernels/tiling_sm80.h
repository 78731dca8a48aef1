// The mma.sync convolution's choice among the ways to cut its work (conv_sm80.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace conv_sm80 {

using namespace conv;

constexpr int kSharedHeadBytes = 2560;
constexpr int kMostTapsOfStage = 16, kStageSlots = 3;    // a stage is multiplied, the next one loaded, the one behind it found out
constexpr int kColumnWarps = 4;    // of a block, each with a quarter of the positions
constexpr int kThreads = 32 * kColumnWarps, kBytesAtOnce = 16 * kThreads;    // of a block; that it loads at a time

// Blocks of a multiprocessor, as many as its registers hold.
HOST_DEVICE constexpr int blocks_of(int block_n) { return block_n == 128 ? 4 : block_n == 192 ? 3 : 2; }

// Four blocks on a multiprocessor have too few registers for chunks of 64.
HOST_DEVICE constexpr bool is_built(int block_n, int chunk) { return block_n > 128 || chunk < 64; }

// Rows of a box with the zeros behind it, which rows share, and the bytes of the table that tells where each comes from.
HOST_DEVICE int loaded_rows(const Tiling& t, const StencilAxis& w) { return t.planes * t.box_rows * t.pitch + w.shift[w.taps - 1]; }
HOST_DEVICE int places_bytes(const Tiling& t, const StencilAxis& w) {
    const int at_once = kBytesAtOnce / 2 / t.chunk, rows = (loaded_rows(t, w) + at_once - 1) / at_once * at_once;
    return (rows * 4 + 127) / 128 * 128;
}

// Where the pipeline's stages begin in shared memory, behind the head and the tables.
HOST_DEVICE int stages_begin(const Tiling& t, const StencilAxis& w) { return kSharedHeadBytes + t.table_bytes + places_bytes(t, w); }

// Shared memory of a block: the boxes, and behind the last product, in their place, half of the staged outputs.
inline int64_t shared_bytes(const Tiling& t, const StencilAxis& w) {
    const int64_t boxes = int64_t(t.input_stages) * t.input_bytes, staged = t.buffer_bytes / 2;
    return stages_begin(t, w) + (boxes > staged ? boxes : staged);
}

// Blocks of a multiprocessor.
inline int resident_blocks(const Tiling& t, const StencilAxis& w, int64_t most_shared) { return int(std::min<int64_t>(blocks_of(t.block_n), blocks_that_fit(shared_bytes(t, w), most_shared))); }

// Cycles, fitted to the times of 21 layers and 558 tilings (NOTES.md): of a tile from begin to end, what a block takes by itself for products, taps, boxes, less where another one
// is being multiplied, and pieces of outputs that are staged; and what the blocks of a multiprocessor share, the ways of weights and boxes.
inline double time_of(const Tiling& t, const Stencil& s, int64_t samples, int64_t channels, int blocks, int multiprocessors) {
    const double part = largest_part(t, s), steps = steps_of(t, s) * part, boxes = boxes_of(t, s) * part;
    const double pieces = t.pairs ? 0 : t.rows.octets * 8.0 * region_planes(t, s) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1));
    const double by_itself = 0.32 * steps * t.block_n + 147 * steps / (t.chunk / 16) + 305 * boxes / t.input_stages + (t.contiguous ? 48 : 71) * pieces + 16200;
    const double shared_units = 55 * steps + 0.015 * boxes * t.box_bytes();
    const int64_t at_once = int64_t(multiprocessors) * blocks;
    const double waves = t.tiles < 4 * at_once ? double(ceil_div(t.tiles, at_once)) : double(t.tiles) / at_once + 0.5;
    const double added_bytes = 4.0 * t.k_parts * samples * channels * s.axis[0].out * s.axis[1].out * s.axis[2].out;    // of the parts
    return (by_itself + blocks * shared_units) * waves + (t.k_parts == 1 ? 0 : 2400 + added_bytes / 4000);
}

// The tiling of least estimated time, or one of block_n 0 where none fits. groups: of the split, or 1. most_shared: bytes that a block can have.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int64_t most_shared) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    for (int packing = 0; packing < 3; packing++)
    for (int block_n : {256, 192, 128})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (int chunk : {64, 32, 16})
    for (int input_stages : {1, 2})
    for (bool joins_planes : {false, true}) {
        if (!is_built(block_n, chunk)) continue;
        Tiling t = {};
        t.warpgroups = 1, t.queues = 1, t.planes = t.run_planes = 1;
        t.block_n = block_n, t.taps_per_box = taps_per_box, t.input_stages = input_stages, t.column_warps = kColumnWarps;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (8 % t.rows.packed_phases != 0 || (t.rows.packed_phases == 8 && packed_phases(t, s, 0) != 2)) continue;    // half a row tile has whole regions
        t.rows.octets = 8 / t.rows.packed_phases;
        if (!set_channels(t, s, source_channels, channels, groups) || t.phase_channels % chunk != 0) continue;
        t.chunk = chunk;
        t.item_taps = t.items = 1;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pairs = w.phases == 1 && w.out % 2 == 0 && t.tile_w % 2 == 0;
        t.pitch = round_up(box_pitch(w, t.tile_w, strips), t.pairs ? 2 : 1);
        if (!cut_runs(t, s, false) || (joins_planes && !join_planes(t, s, 1))) continue;
        lay_out_regions(t, s, t.rows.octets * 8, false);    // halves of all rows take turns
        const int halo_w = w.shift[w.taps - 1], halo_h = taps_per_box == 1 ? 0 : h.shift[h.taps - 1], row_bytes = 2 * chunk;
        // Rows of shared memory that a box's stage has: positions that are no outputs read beyond the box.
        int64_t first = 0;    // of a run, at most
        for (int64_t begin = 0, group = int64_t(t.tile_runs()) * t.run; begin < int64_t(t.tile_w) * h.positions; begin += group) {
            const int64_t last = begin + group - t.run, row = (last / t.tile_w - begin / t.tile_w) * t.pitch + last % t.tile_w;
            first = std::max({first, begin % t.tile_w, row});
        }
        const int64_t reach = first + block_n + halo_h * t.pitch + halo_w;
        const int64_t loaded = loaded_rows(t, w);
        t.input_bytes = round_up((reach > loaded ? reach : loaded) * row_bytes, kBytesAtOnce);
        t.fragments = true;
        const int blocks = resident_blocks(t, w, most_shared);
        for (int k_parts : {1, 2, 3, 4, 5, 6, 8}) {
            if (blocks < 1 || !cut_channels(t, s, k_parts) || !count_tiles(t, s, samples)) continue;
            if (k_parts > 1 && (groups > 1 || t.tiles > 2 * k_parts * blocks * multiprocessors)) break;    // there are enough tiles
            const double time = time_of(t, s, samples, channels, blocks, multiprocessors);
            if (best.block_n == 0 || time < best.cycles) best = t, best.cycles = time;
        }
    }
    return with_divisors(best);
}

}  // namespace conv_sm80
