// How the Hopper convolution cuts its work: GEMM_M rows into (channel, phase), GEMM_N into runs of positions.
#pragma once

#include <initializer_list>

#include "stencil.h"

namespace conv_sm90 {

constexpr int kRows = 64;                      // GEMM_M of a warpgroup
constexpr int kMaxStages = 16;                 // of weights, all rings together
constexpr int kMaxInputStages = 6;
constexpr int kMaxItems = 64;
constexpr int kSharedBytes = 227 * 1024;
constexpr int kHeadBytes = 2048;               // barriers and the like
constexpr int kNormBytes = 4096;               // of a piece of a row on its way through the normalizer
constexpr int kMaxNormStages = 8;

// Rows. The phases of the packed axes, of W at least, lie in the same row tile, so that one block has whole output rows.
//
// Positions. One (n, d) plane of the grid, a strip of tile_w columns at a time, in runs of `run` positions for each warpgroup.
// A box of the source, halo included, is copied once for all taps (h, w): rows of `pitch`, so that a tap is a shift of an
// address by whole rows of shared memory. Where the strip is the whole width, neighbouring rows share the zeros of their halos.
struct Tiling {
    int block_n;                               // GEMM_N of a warpgroup: at least the span of its run, gaps between rows included
    int split_m;                               // 1: the two warpgroups have the same positions, other rows; 0: the other way round
    int chunk;                                 // source channels of a stage: 16, 32 or 64
    int phase_channels, C_pad;                 // source channels of GEMM_K: of each phase, of all
    int split, products, group_tiles;          // channels of a group where operands are split (else 0), products of a tap, row tiles of a group
    bool packed[3];                            // axes
    RowMap rows;
    int row_tiles, M_pad;                      // M_pad = 64 * row_tiles
    int tile_w, strips;                        // columns of a strip
    int run, runs;                             // positions of a run, runs of a strip (or pairs of runs, where split_m is 0)
    int pitch, box_rows;
    int taps_per_box;                          // taps h that a box serves: all, or 1
    bool whole_rows;                           // a run is whole rows of the strip
    bool contiguous;                           // the outputs of a run are neighbours in memory
    bool bulk, dense;                          // staged outputs are aligned as in memory; position q is float q of its region
    bool tensor_store;                         // one copy of the whole run
    int region_stride;                         // floats of the staged outputs of a channel
    int buffers, table_bytes;                  // how many warpgroups can stage at a time; what tells a warpgroup where to stage
    int item_taps, items;                      // taps of a stage of weights: 1, all w, or all (h, w); products of those taps, or 1
    int input_bytes, weight_bytes, input_stages, weight_rings, weight_stages, norm_stages;    // stages of each ring; one ring where both warpgroups have the same rows
    int lag;                                   // taps by which the second warpgroup begins later
    int buffer_bytes;
    int row_pairs, sample_tiles, tiles;        // row tiles of a block
    HOST_DEVICE int box_bytes() const { return box_rows * pitch * chunk * 2; }
    HOST_DEVICE int channels() const { return rows.channel_tiles * rows.octets * 8; }
};

// Phases of an axis that lie in the same row tile.
HOST_DEVICE int packed_phases(const Tiling& t, const Stencil& s, int axis) { return t.packed[axis] ? s.axis[axis].phases : 1; }

inline int64_t shared_bytes(const Tiling& t) {
    return kHeadBytes + int64_t(t.input_stages) * t.input_bytes + int64_t(t.weight_rings) * t.weight_stages * t.weight_bytes + int64_t(t.buffers) * t.buffer_bytes + 2 * int64_t(t.table_bytes) + int64_t(t.norm_stages) * kNormBytes;
}

inline int round_up(int64_t v, int64_t to) { return int(ceil_div(v, to) * to); }

// Positions from the first to the last of a run that begins at position `begin` of a strip, gaps included.
inline int span_of(const Tiling& t, int64_t begin, int64_t count) {
    return int(((begin + count - 1) / t.tile_w - begin / t.tile_w) * t.pitch + (begin + count - 1) % t.tile_w - begin % t.tile_w) + 1;
}

// Rows of a box, of `tile_w` positions and their halo. Where a strip is the whole width, rows share their zeros: those right of one
// row are those left of the next.
inline int box_pitch(const StencilAxis& w, int tile_w, int strips) {
    const int halo = w.shift[w.taps - 1], left = halo - w.first, right = w.first + w.positions - w.sources;
    int shared = left < right ? left : right;
    shared = strips > 1 || shared < 0 ? 0 : shared < halo ? shared : halo;
    return tile_w + halo - shared;
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

// Cuts a strip into runs. False where one would not fit.
inline bool cut_runs(Tiling& t, const Stencil& s) {
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    const int64_t strip = int64_t(h.positions) * t.tile_w, group = t.split_m ? 1 : 2;
    t.whole_rows = h.phases * w.phases > 1 || t.strips > 1;
    if (t.whole_rows) {
        if (t.tile_w > t.block_n) return false;
        const int rows = (t.block_n - t.tile_w) / t.pitch + 1;
        t.run = (rows < h.positions ? rows : h.positions) * t.tile_w;
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
    t.box_rows = rows + (t.taps_per_box == 1 ? 0 : h.shift[h.taps - 1]);
    return t.box_rows <= 256;
}

// Lays a run's outputs out for staging: a region for each (channel, packed phase of D).
inline void lay_out_regions(Tiling& t, const Stencil& s) {
    const int out_h = s.axis[1].out, out_w = s.axis[2].out;
    const int phases_h = packed_phases(t, s, 1), phases_w = s.axis[2].phases;
    t.contiguous = t.strips == 1 && (s.axis[1].phases == 1 || t.packed[1]);
    const int rows = ceil_div(t.run, t.tile_w) * phases_h;
    const bool aligned = int64_t(out_h) * out_w % 4 == 0 && (t.whole_rows && t.contiguous ? out_w : t.run) % 4 == 0;
    t.bulk = t.contiguous || (aligned && out_w % 4 == 0 && t.tile_w * phases_w % 4 == 0 && s.axis[2].crop == 0);
    t.dense = t.contiguous && aligned && phases_h * phases_w == 1 && t.pitch == t.tile_w;
    const int floats = t.contiguous ? (t.whole_rows ? rows * out_w : t.run) + (aligned ? 0 : 4) : rows * t.tile_w * phases_w;
    // 8 mod 16: pairs of neighbours go to shared memory without bank conflicts; where the neighbours are phases, 4 mod 8 is better.
    t.region_stride = phases_w == 2 ? round_up(floats - 4, 8) + 4 : round_up((t.dense ? t.block_n : floats) - 8, 16) + 8;
    t.tensor_store = t.contiguous && !t.whole_rows && aligned && t.region_stride == t.run;
    t.table_bytes = t.dense ? 0 : round_up(phases_h * phases_w * t.block_n * 4, 128);
    const int regions = t.rows.octets * 8 * packed_phases(t, s, 0);
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

// The tiling of least estimated time, or one of block_n 0 where none fits into shared memory. groups: of the split, or 1.
inline Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, bool fused, int multiprocessors) {
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    const int halo_w = w.shift[w.taps - 1];
    Tiling best = {};
    double best_time = 0;
    for (int packing = 0; packing < 3; packing++)
    for (int split_m = 0; split_m < 2; split_m++)
    for (int block_n : {232, 224, 192, 160, 128, 64})
    for (int strips = 1; strips <= ceil_div(w.positions, 8) && strips <= 16; strips++)
    for (int taps_per_box : {h.taps, 1})
    for (int input_stages : {2, 3, 4, 6})
    for (int item_taps : {1, w.taps, h.taps * w.taps}) {
        Tiling t = {};
        t.input_stages = input_stages;
        t.block_n = block_n, t.split_m = split_m, t.taps_per_box = taps_per_box;
        t.packed[2] = true, t.packed[1] = packing >= 1, t.packed[0] = packing == 2;
        if ((packing >= 1 && h.phases == 1) || (packing == 2 && d.phases == 1)) continue;
        t.rows.packed_phases = packed_phases(t, s, 0) * packed_phases(t, s, 1) * packed_phases(t, s, 2);
        if (t.rows.packed_phases > 8) continue;
        t.rows.octets = 8 / t.rows.packed_phases;
        t.products = 1;
        t.chunk = chunk_of(source_channels);
        t.phase_channels = padded_channels(source_channels);
        t.rows.channel_tiles = ceil_div(channels, t.rows.octets * 8);
        if (groups > 1) {
            t.split = source_channels / groups, t.products = 2;
            t.phase_channels = t.chunk = 2 * t.split;
            t.group_tiles = channels / groups / (t.rows.octets * 8);
            if (split_m || t.group_tiles * t.rows.octets * 8 * groups != channels) continue;
        }
        t.C_pad = t.phase_channels * s.source_phases();
        const bool many = item_taps > 1;
        t.item_taps = item_taps, t.items = many ? item_taps * t.products : 1;
        if (many && (split_m || t.items > kMaxItems || (item_taps > w.taps && taps_per_box < h.taps) || s.source_phases() > 1)) continue;
        t.row_tiles = round_up(s.phases() / t.rows.packed_phases * t.rows.channel_tiles, split_m ? 2 : 1);
        t.M_pad = kRows * t.row_tiles;
        t.tile_w = ceil_div(w.positions, strips), t.strips = strips;
        t.pitch = box_pitch(w, t.tile_w, strips);
        if (t.pitch > 256 || !cut_runs(t, s)) continue;
        lay_out_regions(t, s);
        const int64_t row_bytes = 2 * t.chunk;
        t.input_bytes = round_up((int64_t(t.box_rows) * t.pitch + halo_w) * row_bytes, 1024);
        t.weight_bytes = t.items * kRows * row_bytes;
        t.weight_rings = split_m ? 2 : 1;
        t.norm_stages = fused ? 4 : 0;
        t.buffers = 2;
        if (kSharedBytes - shared_bytes(t) < (many ? 3 : 10) * t.weight_bytes) t.buffers = 1;
        const int64_t left_bytes = kSharedBytes - shared_bytes(t);    // for weights
        if (left_bytes < (many ? 3 : 6) * t.weight_bytes) continue;
        t.weight_stages = (left_bytes / t.weight_bytes < kMaxStages ? left_bytes / t.weight_bytes : kMaxStages) / t.weight_rings;
        // With one ring, the stages between the two warpgroups are not there to load weights in advance.
        const int advance = int(ceil_div(2000, int64_t(block_n) * t.chunk / 16 * t.items)) + 2;
        t.lag = split_m ? 4 : t.weight_stages > advance ? t.weight_stages - advance : 1;
        if (fused) t.norm_stages += (left_bytes - int64_t(t.weight_rings) * t.weight_stages * t.weight_bytes) / kNormBytes;
        if (t.norm_stages > kMaxNormStages) t.norm_stages = kMaxNormStages;
        t.row_pairs = t.row_tiles / (split_m ? 2 : 1);
        const int64_t sample_tiles = int64_t(d.positions) * strips * t.runs * t.row_pairs;
        if (samples * sample_tiles > 1 << 30) continue;
        t.sample_tiles = int(sample_tiles), t.tiles = int(samples * sample_tiles);
        // Cycles of the busiest multiprocessor: a tile's products, or the traffic of its outputs and boxes where that is more.
        int kernel_taps = 1;    // with a weight, of all source phases
        for (const StencilAxis& a : s.axis)
            if (a.source_phases > 1) kernel_taps *= a.kernel;
            else kernel_taps *= a.taps;
        const double steps = double(kernel_taps) * t.products * t.phase_channels / 16 * (t.packed[0] ? 1.0 : (d.phases + 1.0) / (2.0 * d.phases)) * (t.packed[1] || h.phases == 1 ? 1.0 : 0.75);
        double boxes = t.phase_channels / t.chunk * (taps_per_box == 1 ? h.taps : 1) * w.source_phases * h.source_phases;
        boxes *= d.source_phases > 1 ? d.kernel : d.taps;
        // A step of both warpgroups takes block_n cycles, or what their weights take at the 21 bytes a cycle that come from the L2
        // cache; and longer where the stages that are not in use do not cover that one's latency.
        const double weight_cycles = t.weight_rings * kRows * 16 * 2 / 21.0 + 0.1 * block_n, step = block_n + 20 > weight_cycles ? block_n + 20 : weight_cycles;
        const double lead = (t.weight_stages - (split_m ? 2 : many ? 1.5 : 3)) * step * t.chunk / 16 * t.items, latency = 1800;
        const double box_bytes = t.box_bytes(), box_time = boxes * (latency + box_bytes / 25) / (input_stages - 1);    // loads in flight
        double products = steps * step * (lead < latency ? latency / lead : 1.0) + boxes * (40 + 0.05 * t.box_rows * t.pitch * t.chunk / 16);
        products = products > box_time ? products : box_time;
        // A consumer's instructions, each waiting for the one before: of the taps, the boxes, the epilogue.
        const double instructions = steps / (t.chunk / 16) * (many ? 100 + 600.0 / t.items : 600) + boxes * 600 + block_n * (t.dense ? 15 : 20);
        products = products > instructions ? products : instructions;
        const double loads = (steps * t.weight_rings * kRows * 16 * 2 + boxes * box_bytes) / 21;
        products = products > loads ? products : loads;
        const double out_bytes = 8.0 * kRows * t.run * t.rows.octets * t.rows.packed_phases / 8;
        const double traffic = out_bytes / 17 + boxes * box_bytes / 40 + 300;
        // A warp issues the copies of a run's pieces one after another.
        const double pieces = t.tensor_store ? 1 : t.rows.octets * 8.0 * packed_phases(t, s, 0) * (t.contiguous ? 1 : t.run / t.tile_w * packed_phases(t, s, 1));
        const double store_time = t.bulk ? pieces * 50 * (split_m ? 1 : 2) : 0;
        if (products < store_time) products = store_time;
        const double tile = (products > traffic ? products + 0.2 * traffic : traffic + 0.2 * products) + (t.buffers == 1 ? 0.05 * traffic : 0) + (t.tensor_store ? 0 : t.contiguous ? 0.3 * traffic : t.bulk ? 0.5 * traffic : traffic);
        const double waves = t.tiles < 4 * multiprocessors ? double(ceil_div(t.tiles, multiprocessors)) : double(t.tiles) / multiprocessors + 0.5;
        const double time = waves * (tile + 400);
        if (best.block_n == 0 || time < best_time) best = t, best_time = time;
    }
    return best;
}

}  // namespace conv_sm90
