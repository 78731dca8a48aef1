// How the tensor cores' convolutions cut their work: GEMM_M rows into (channel, phase), GEMM_N into runs of positions.
#pragma once

#include "stencil.h"

namespace conv {

constexpr int kRows = 64;                      // GEMM_M of a warpgroup
constexpr int kMaxWarpgroups = 3;              // that multiply
constexpr int kMostRunPlanes = 15;             // as many as Run::live has bits for in table_key()
constexpr int kMostPaired = 136;               // the largest block_n whose epilogue knows paired runs, and runs with outputs of the next one (conv_tiles.h)
constexpr int kSector = 8, kLine = 32;         // floats of memory that are written at once, and requested at once: parts of a sector cost more than all of it

// Rows. The phases of the packed axes, of W at least, lie in the same row tile, so that one block has whole output rows.
//
// Positions. A strip of tile_w columns of an (n, d) plane of the grid at a time, in runs of `run` positions for each warpgroup: neighbouring runs of one
// plane, or the same run of neighbouring planes, which small planes are too few positions without. Of the smallest a run has several, `run_planes` whole ones.
// A box of the source, halo included, is copied once for all taps (h, w): rows of `pitch`, so that a tap is a shift of an
// address by whole rows of shared memory. Where the strip is the whole width, neighbouring rows share the zeros of their halos.
struct Tiling {
    int warpgroups;                            // that multiply
    int block_n;                               // GEMM_N of a warpgroup: at least the span of its run, gaps between rows included
    int split_m;                               // 1: the warpgroups, two of them, have the same positions, other rows; 0: the other way round
    int chunk, chunk_phases;                   // source channels of a stage: 16, 32 or 64; neighbouring phases of W that they are of
    int live_w[kMaxStride];                    // of a phase, bit t: it or another of its stage has a weight at tap t
    int phase_channels, C_pad;                 // source channels of GEMM_K: of each phase, of all
    int k_parts, part_channels;                // parts of GEMM_K, which are added in the end; source channels of each
    int split, products, group_tiles;          // channels of a group where operands are split (else 0), products of a tap, row tiles of a group
    bool packed[3];                            // axes
    RowMap rows;
    int row_tiles, M_pad;                      // M_pad = 64 * row_tiles
    int tile_w, strips;                        // columns of a strip
    int run, runs;                             // positions of a run, runs of a strip, in groups of tile_runs()
    int run_planes;                            // of the grid in a run: 1, or several whole ones
    int planes, plane_groups;                  // of the grid in a tile: of one run, or of one for each warpgroup; tiles for all planes
    int pitch, box_rows;                       // of a plane of a box
    int taps_per_box;                          // taps h that a box serves: all, or 1
    bool whole_rows;                           // a run is whole rows of the strip
    bool whole_sectors;                        // of memory are stored: a run has the first outputs of the next one too, to the end of its last sector
    bool contiguous;                           // the outputs of a run are neighbours in memory
    bool bulk, dense, vectors;                 // staged outputs are aligned as in memory; position q is float q of its region; with two phases of W, pairs of positions are aligned vectors
    bool tensor_store;                         // one copy of the whole run
    bool pairs;                                // positions 2 i and 2 i + 1 are aligned pairs of outputs, or none, which float32 is stored by, not staged (mma.sync)
    int staging_unit;                          // contiguous outputs are staged as they are aligned to so many floats in memory
    int region_channels, region_stride;        // channels of a row tile that are staged; floats of the staged outputs of a channel
    int buffers, table_bytes;                  // one for each warpgroup, or one for all; what tells a warpgroup where to stage
    bool fragments;                            // packed weights lie as mma.sync takes them (swizzle.h), else in rows
    int item_taps, items;                      // taps of a stage of weights: 1, all w, or all (h, w); products of those taps, or 1
    int input_bytes, weight_bytes, input_stages, weight_rings, weight_stages;    // stages of each ring; one ring where all warpgroups have the same rows
    int lag;                                   // taps by which the second warpgroup begins later
    int buffer_bytes;
    int row_pairs, tiles;                      // row tiles of a block
    bool keeps_weights;                        // from tile to tile
    int loaders, box_loader;                   // warps; which of them loads boxes
    int queues;                                // of tiles: one, or one for each row pair, whose weights a block keeps
    int column_warps;                          // warps that share a row's positions
    double cycles;                             // estimated, of a multiprocessor
    Divisor by_row_pairs, by_runs, by_strips, by_plane_groups, by_tile_w, by_pitch, by_channel_tiles;
    HOST_DEVICE int sample_places() const { return plane_groups * strips * runs; }    // of tiles, on the grid
    HOST_DEVICE int tile_runs() const { return split_m || planes > 1 ? 1 : warpgroups; }    // of a plane
    HOST_DEVICE int tile_parts() const { return split_m ? 1 : warpgroups; }                  // runs of all its planes
    HOST_DEVICE int box_bytes() const { return planes * box_rows * pitch * chunk * 2; }
    HOST_DEVICE int channels() const { return rows.channel_tiles * rows.octets * 8; }
};

// Phases of an axis that lie in the same row tile.
HOST_DEVICE int packed_phases(const Tiling& t, const Stencil& s, int axis) { return t.packed[axis] ? s.axis[axis].phases : 1; }

// Output planes of a channel that a run has, each staged in a region of its own: the packed phases of D, or, where a run has several planes of the grid, one of each;
// and how far they are apart.
HOST_DEVICE int region_planes(const Tiling& t, const Stencil& s) { return t.run_planes > 1 ? t.run_planes : packed_phases(t, s, 0); }
HOST_DEVICE int region_plane_step(const Tiling& t, const Stencil& s) { return t.run_planes > 1 ? s.axis[0].phases : 1; }

inline int round_up(int64_t v, int64_t to) { return int(ceil_div(v, to) * to); }

// Positions from the first to the last of a run that begins at position `begin` of a strip, gaps included.
inline int span_of(const Tiling& t, int64_t begin, int64_t count) {
    return int(((begin + count - 1) / t.tile_w - begin / t.tile_w) * t.pitch + (begin + count - 1) % t.tile_w - begin % t.tile_w) + 1;
}

// Rows of a box, of `tile_w` positions and their halo. Where a strip is the whole width, rows share their zeros: those right of one
// row are those left of the next. halo: columns by which taps are apart; left, right: those of zeros.
inline int box_pitch(int halo, int left, int right, int tile_w, int strips) {
    int shared = left < right ? left : right;
    shared = strips > 1 || shared < 0 ? 0 : shared < halo ? shared : halo;
    return tile_w + halo - shared;
}
inline int box_pitch(const StencilAxis& w, int tile_w, int strips) {
    const int halo = w.shift[w.taps - 1];
    return box_pitch(halo, halo - w.first, w.first + w.positions - w.sources, tile_w, strips);
}

inline bool runs_fit(const Tiling& t, int64_t strip, int64_t run) {
    for (int64_t begin = 0; begin < strip; begin += run)
        if (span_of(t, begin, run < strip - begin ? run : strip - begin) > t.block_n) return false;
    return true;
}

// The length of the fewest equal runs of a strip that fit, 8 mod 16 or a multiple of 4; 0 where there is none.
inline int longest_run(const Tiling& t, int64_t strip, int step) {
    for (int64_t count = ceil_div(strip, t.block_n);; count++) {
        const int64_t run = ceil_div(strip, count), length = step == 16 ? round_up(run + 8, 16) - 8 : round_up(run, 4);
        if (runs_fit(t, strip, length)) return int(length);
        if (run <= 4) return 0;
    }
}

// Cuts a strip into runs. False where one would not fit. may_share: runs may have outputs of the next one too.
inline bool cut_runs(Tiling& t, const Stencil& s, bool may_share) {
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    const int64_t strip = int64_t(h.positions) * t.tile_w, group = t.tile_runs();
    t.whole_rows = h.phases * w.phases > 1 || t.strips > 1;
    if (t.whole_rows) {
        if (t.tile_w > t.block_n) return false;
        const int rows = (t.block_n - t.tile_w) / t.pitch + 1;
        t.run = (rows < h.positions ? rows : h.positions) * t.tile_w;
        const int shared = ceil_div(kSector - 1 + w.crop, w.phases);    // positions of the next row
        t.whole_sectors = may_share && t.block_n <= kMostPaired && t.strips == 1 && (h.phases == 1 || t.packed[1]) && rows < h.positions && w.out > kSector && w.out % kSector != 0 && rows * t.pitch + shared <= t.block_n;
    } else {
        // Runs of 8 mod 16 positions, which suits lay_out_regions, if that makes hardly more of them.
        const int suited = longest_run(t, strip, 16), other = longest_run(t, strip, 4);
        if (suited <= 0 && other <= 0) return false;
        t.run = suited > 0 && ceil_div(strip, suited) * 16 <= ceil_div(strip, other) * 17 ? suited : other;
    }
    t.runs = ceil_div(ceil_div(strip, t.run), group);
    int rows = 0;    // of the grid, from a group's first to its last
    for (int64_t i = 0; i < t.runs; i++) {
        const int64_t begin = i * group * t.run, end = begin + group * t.run < strip ? begin + group * t.run : strip;
        const int span = int((end - 1) / t.tile_w - begin / t.tile_w) + 1;
        rows = span > rows ? span : rows;
        if (i > 64) { rows++; break; }
    }
    t.box_rows = rows + t.whole_sectors + (t.taps_per_box == 1 ? 0 : h.shift[h.taps - 1]);
    return t.box_rows <= 256;
}

// Gives a run of a whole plane as many planes as there are columns for, `warpgroups` such runs a tile. False where that is one.
inline bool join_planes(Tiling& t, const Stencil& s, int warpgroups) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1];
    if (t.runs > 1 || t.strips > 1 || t.packed[0] || (h.phases > 1 && !t.packed[1])) return false;
    const int64_t most = (t.block_n - span_of(t, 0, int64_t(h.positions) * t.tile_w)) / (t.box_rows * t.pitch) + 1, tiles = ceil_div(d.positions, (most < kMostRunPlanes ? most : kMostRunPlanes) * warpgroups);
    t.run_planes = int(ceil_div(d.positions, tiles * warpgroups)), t.planes = t.run_planes * warpgroups;
    return t.run_planes > 1;
}

// Lays a run's outputs out for staging: a region for each (channel, output plane). bulk_copies: what stores them; then the epilogue
// also knows runs without a table.
inline void lay_out_regions(Tiling& t, const Stencil& s, int64_t channels, bool bulk_copies) {
    const int out_h = s.axis[1].out, out_w = s.axis[2].out;
    const int phases_h = packed_phases(t, s, 1), phases_w = s.axis[2].phases;
    t.contiguous = t.strips == 1 && (s.axis[1].phases == 1 || t.packed[1]);
    const int rows = ceil_div(t.run, t.tile_w) * phases_h;
    const bool aligned = int64_t(out_h) * out_w % 4 == 0 && (t.whole_rows && t.contiguous ? out_w : t.run) % 4 == 0;
    t.bulk = t.contiguous || (aligned && out_w % 4 == 0 && t.tile_w * phases_w % 4 == 0 && s.axis[2].crop == 0);
    t.dense = bulk_copies && t.contiguous && aligned && phases_h * phases_w == 1 && t.pitch == t.tile_w && t.run_planes == 1;
    t.vectors = aligned && t.contiguous && t.whole_rows && phases_w == 2 && s.axis[2].crop == 0 && t.run_planes == 1;
    // 8 mod 16: pairs of neighbours go to shared memory without bank conflicts; where the neighbours are phases, 4 mod 8 is better, or 16 mod 32 for vectors.
    const auto stride_of = [&](int floats) { return t.vectors ? round_up(floats - 16, 32) + 16 : phases_w == 2 ? round_up(floats - 4, 8) + 4 : round_up(floats - 8, 16) + 8; };
    const int outputs = !t.contiguous ? rows * t.tile_w * phases_w : t.whole_rows ? rows * out_w : t.dense ? t.block_n : t.run;
    t.tensor_store = t.run_planes == 1 && t.contiguous && !t.whole_rows && aligned && stride_of(outputs) == t.run;
    t.staging_unit = t.whole_sectors ? kLine : 4;
    t.region_stride = stride_of(outputs + (t.contiguous ? t.staging_unit - (aligned ? 4 : 1) : 0) + (t.whole_sectors ? kSector - 1 : 0));
    if (t.run_planes > 1)    // a channel's planes are staged as far apart as in memory, modulo 4
        while ((int64_t(out_h) * out_w * region_plane_step(t, s) - t.region_stride) % 4 != 0) t.region_stride++;
    t.table_bytes = t.dense ? 0 : round_up(phases_h * phases_w * t.block_n * 4, 128);
    t.region_channels = round_up(channels, 8) < t.rows.octets * 8 ? round_up(channels, 8) : t.rows.octets * 8;
    const int regions = t.region_channels * region_planes(t, s);
    t.buffer_bytes = round_up(int64_t(regions) * t.region_stride * 4, 128);
}

// Source channels of a stage, and what the channels of a phase are padded to.
inline int chunk_of(int64_t channels) { return channels <= 16 ? 16 : channels <= 32 ? 32 : 64; }
inline int padded_channels(int64_t channels) { return round_up(channels, chunk_of(channels)); }

// With several groups, the operands are split into high and low halves, x = high + low: as accurate as float32. A row tile has rows
// of one group, GEMM_K is that group's [high, low], and each tap has two products: with the weight's [high, high] and [low, 0].
inline bool can_split(const Geometry& g) {
    const int64_t group_in = g.C_in / g.groups;
    return (group_in == 8 || group_in == 16 || group_in == 32) && g.C_out / g.groups % 8 == 0;
}

// Makes a stage of all channels of so many phases of W, which divide them, at all taps of any of them: some products are with zeros, but stages are fewer, and rows of memory longer.
inline bool join_phases(Tiling& t, const StencilAxis& w, int count) {
    if (count > 1 && (t.chunk < t.phase_channels || t.chunk * count > 64)) return false;
    t.chunk_phases = count, t.chunk *= count;
    for (int phase = 0; phase < w.source_phases; phase++) {
        t.live_w[phase] = 0;
        for (int i = 0; i < count; i++) t.live_w[phase] |= w.live[phase / count * count + i];
    }
    return true;
}

// What the channels are padded to and how many row tiles that makes; needs the packing and split_m. False where groups do not fit.
inline bool set_channels(Tiling& t, const Stencil& s, int64_t source_channels, int64_t channels, int64_t groups) {
    t.products = 1;
    t.chunk = chunk_of(source_channels);
    t.phase_channels = padded_channels(source_channels);
    t.rows.channel_tiles = ceil_div(channels, t.rows.octets * 8);
    if (groups > 1) {
        t.split = source_channels / groups, t.products = 2;
        t.phase_channels = t.chunk = 2 * t.split;
        t.group_tiles = channels / groups / (t.rows.octets * 8);
        if (t.split_m || t.group_tiles * t.rows.octets * 8 * groups != channels) return false;
    }
    join_phases(t, s.axis[2], 1);
    t.C_pad = t.phase_channels * s.source_phases();
    t.k_parts = 1, t.part_channels = t.C_pad;
    t.row_tiles = round_up(s.phases() / t.rows.packed_phases * t.rows.channel_tiles, t.split_m ? 2 : 1);
    t.M_pad = kRows * t.row_tiles;
    t.row_pairs = t.row_tiles / (t.split_m ? 2 : 1);
    return true;
}

// Cuts GEMM_K into `parts` of whole stages, and of whole phases of the source where it has several. False where that does not go.
inline bool cut_channels(Tiling& t, const Stencil& s, int parts) {
    if (parts > 1 && s.source_phases() > 1 && s.source_phases() % (parts * t.chunk_phases) != 0) return false;
    t.k_parts = parts, t.part_channels = int(ceil_div(t.C_pad / t.chunk, parts)) * t.chunk;
    return int64_t(t.part_channels) * (parts - 1) < t.C_pad;
}

inline bool count_tiles(Tiling& t, const Stencil& s, int64_t samples) {
    t.plane_groups = int(ceil_div(s.axis[0].positions, t.planes));
    const int64_t tiles = samples * t.plane_groups * t.strips * t.runs * t.row_pairs * t.k_parts;
    if (tiles > 1 << 30) return false;
    t.tiles = int(tiles);
    return true;
}

// The chosen tiling, complete.
inline Tiling with_divisors(Tiling t) {
    if (t.block_n == 0) return t;
    t.by_row_pairs = make_divisor(t.row_pairs), t.by_runs = make_divisor(t.runs), t.by_strips = make_divisor(t.strips), t.by_plane_groups = make_divisor(t.plane_groups);
    t.by_tile_w = make_divisor(t.tile_w), t.by_pitch = make_divisor(t.pitch), t.by_channel_tiles = make_divisor(t.rows.channel_tiles);
    return t;
}

HOST_DEVICE int count_bits(int bits) {
#ifdef __CUDA_ARCH__
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
}

// The place of the bit that has `rank` lower ones.
HOST_DEVICE int place_of_bit(int bits, int rank) {
    for (; rank > 0; rank--) bits &= bits - 1;
    return count_bits((bits & -bits) - 1);
}

// A phase of the source, of each axis.
struct SourcePhase {
    int d = 0, h = 0, w = 0;
    HOST_DEVICE void advance(const Stencil& s, int count = 1) {    // of W, which that divides
        if ((w += count) == s.axis[2].source_phases) w = 0, h++;
        if (h == s.axis[1].source_phases) h = 0, d++;
    }
};

// Where the source has phases, a part of GEMM_K is so many of them.
HOST_DEVICE int phases_of_part(const Tiling& t, const Stencil& s) { return t.k_parts == 1 ? s.source_phases() : s.source_phases() / t.k_parts; }

// How much of a tile's steps its largest part has.
inline double largest_part(const Tiling& t, const Stencil& s) {
    if (s.source_phases() == 1 || t.k_parts == 1) return double(t.part_channels) / t.C_pad;
    SourcePhase phase;
    int all = 0, largest = 0;
    for (int part = 0; part < t.k_parts; part++) {
        int taps = 0;
        for (int i = 0; i < phases_of_part(t, s); i++, phase.advance(s)) taps += count_bits(s.axis[0].live[phase.d]) * count_bits(s.axis[1].live[phase.h]) * count_bits(s.axis[2].live[phase.w]);
        all += taps, largest = taps > largest ? taps : largest;
    }
    return double(largest) / all;
}

// The taps w of all source phases, those included at which only one has a weight that it is joined with.
inline int taps_w_of_phases(const Tiling& t, const StencilAxis& w) {
    int taps = 0;
    for (int phase = 0; phase < w.source_phases; phase++) taps += count_bits(t.live_w[phase]);
    return taps;
}

// What a tile has on average: steps of 16 source channels at a tap, bytes of outputs, and boxes.
inline double steps_of(const Tiling& t, const Stencil& s) {
    int kernel_taps = 1;    // with a weight, of all source phases, and those that are joined with them
    for (const StencilAxis& a : s.axis) kernel_taps *= a.source_phases == 1 ? a.taps : &a == s.axis + 2 ? taps_w_of_phases(t, a) : a.kernel;
    const int phases_d = s.axis[0].phases;
    return double(kernel_taps) * t.products * t.phase_channels / 16 * (t.packed[0] ? 1.0 : (phases_d + 1.0) / (2.0 * phases_d)) * (t.packed[1] || s.axis[1].phases == 1 ? 1.0 : 0.75);
}
inline double out_bytes_of(const Tiling& t) { return 4.0 * t.warpgroups * kRows * t.run * t.run_planes * t.rows.octets * t.rows.packed_phases / 8; }
inline double boxes_of(const Tiling& t, const Stencil& s) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1];
    return double(t.C_pad / t.chunk / d.source_phases) * (t.taps_per_box == 1 ? h.taps : 1) * (d.source_phases > 1 ? d.kernel : d.taps);
}

}  // namespace conv
