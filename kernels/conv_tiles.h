// Where a tile of the tensor cores' convolutions reads and writes: the index arithmetic of the kernels, for host and device.
#pragma once

#include "conv_tiling.h"

namespace conv {

// ---------------------------------------------------------------------------------------------------------- Problem

HOST_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
HOST_DEVICE int max_of(int a, int b) { return a > b ? a : b; }

struct Problem {
    int64_t N, C_out;
    int64_t out_volume;
    Stencil s;
    Tiling t;
};

// ---------------------------------------------------------------------------------------------------------- Tiles

// A warpgroup's run of a tile, and where its outputs go. They are staged in regions, one for each (channel, output plane: region_planes()):
// either as one piece, in the order of global memory and aligned as there (staging_unit), or as one piece for each output row.
struct Run {
    int row_tile, channel0, outer;       // first channel of the row tile, phase of the axes that are not packed
    int b_row;                           // of the box
    int count, rows, h0, q0;             // positions of a plane, whole rows of them; the first one's row and column
    int od0, phase_h;                    // first output plane, phase of H where it is not packed
    int live;                            // bit i: there is the i-th of its output planes, and the run has positions
    int oh0, ow0, oh_end, ow_end;        // the outputs of a region
    int first;                           // floats of the region's first row before the run
    int alignment;                       // of the first region, modulo staging_unit
    bool paired;                         // W has two phases, and position q has floats 2 q and 2 q + 1 of its row; only column 0's phase 0 may be missing
    int paired_place;                    // then: where the first row's column 0 has phase 0 in its region, for packed phase 0 of H
};

// Whether a row of GEMM_M of this packed phase of D has an output plane, or some of several.
HOST_DEVICE bool has_outputs(const Tiling& t, const Run& run, int packed_d) { return t.run_planes > 1 ? run.live != 0 : run.live >> packed_d & 1; }

struct Place {
    int n, d, w0, columns;       // sample of the outputs, those of part 0 of GEMM_K first; first plane of the grid; or n = -1: no more. First column of the strip, and how many
    int sample, part_k;          // of the source
    int h0, part;                // first row of the box's positions; index in the sample
    int row_tile, first_run;     // of the first warpgroup
    int source_channel;          // the first of the copy
    int live_d, live_h;          // bit t: some row has a weight at tap t, and tap d reads a plane of the source
    bool empty;                  // no tap reads anything
};

struct Tile : Place {
    Run run[kMaxWarpgroups];     // of the warpgroups
};

// How many phases the axes have that are not packed.
HOST_DEVICE int outer_phases(const Problem& p) { return (p.t.packed[0] ? 1 : p.s.axis[0].phases) * (p.t.packed[1] ? 1 : p.s.axis[1].phases); }    // W is packed

// The phases of D and H, where they are not packed, of outer phase `outer` (but of one that an added row tile has).
struct OuterPhases { int d, h; };
HOST_DEVICE OuterPhases outer_phases_of(const Problem& p, int outer) {
    const Tiling& t = p.t;
    const int phases_h = t.packed[1] ? 1 : p.s.axis[1].phases, d = divide_by_phases(outer, phases_h), phases_d = p.s.axis[0].phases;
    return {t.packed[0] ? 0 : d - divide_by_phases(d, phases_d) * phases_d, outer - d * phases_h};
}

// Sets of moments of a channel: of each run and phase, or of what a block adds.
HOST_DEVICE int parts_of_sample(const Problem& p) {
    const Tiling& t = p.t;
    if (t.k_parts > 1) return int(ceil_div(p.out_volume, kAddedOutputs));
    return t.sample_places() * t.tile_parts() * t.column_warps * p.s.phases();
}

// The index of a run among all runs of all samples that have moments of their own.
HOST_DEVICE int64_t index_of_run(const Problem& p, const Tile& tile, int warpgroup) {
    const Tiling& t = p.t;
    return (int64_t(tile.n) * t.sample_places() + tile.part) * t.tile_parts() + (t.split_m ? 0 : warpgroup);
}

// Where the source has phases: the first one of a part of GEMM_K.
HOST_DEVICE SourcePhase first_phase_of(const Problem& p, int part_k) {
    const int phases_h = p.s.axis[1].source_phases, phases_w = p.s.axis[2].source_phases;
    const int first = part_k * phases_of_part(p.t, p.s), dh = divide_by_phases(first, phases_w), d = divide_by_phases(dh, phases_h);
    return {d, dh - d * phases_h, first - dh * phases_w};
}

// Bit t: tap t has weights in some row of a row tile.
HOST_DEVICE int live_taps(const StencilAxis& a, bool packed, int phase) { return packed || a.phases == 1 ? (1 << a.taps) - 1 : a.live[phase]; }

// A tile's boxes, in the order in which everyone takes them: of every tap d, some taps h, and a chunk of GEMM_K.
struct Cursor {
    const Problem* p;
    int d, h0, c_begin, c_end;
    int tile_live;                      // bits: taps (h) with weights, from bit 8 on taps (d), from bit 16 on the part of GEMM_K: tiles of the same one have the same steps
    int live_h = 0, live_w = 0;         // of the box: bit t tells that tap t has weights
    int td, first, c;                   // tap (d), first tap (h), channel of GEMM_K
    int phase_c = 0;                    // c within the phase of the source: counted, since a division takes a warp 100 cycles
    SourcePhase phase, first_phase;     // of the box, the first one where it has several; of the part

    // Before the first box of a tile.
    HOST_DEVICE Cursor(const Problem& p, const Tile& tile)
        : p(&p), d(tile.d), h0(tile.h0), c_begin(tile.part_k * p.t.part_channels), c_end(min_of(p.t.C_pad, c_begin + p.t.part_channels)), tile_live(tile.live_h | tile.live_d << 8 | tile.part_k << 16),
          td(-1), first(p.s.axis[1].taps), c(c_end) {
        if (tile.part_k > 0 && p.t.phase_channels < p.t.C_pad) first_phase = first_phase_of(p, tile.part_k);
    }
    // Whether there is another box with live taps, which it then is at.
    HOST_DEVICE bool next_box() {
        const StencilAxis &ad = p->s.axis[0], &ah = p->s.axis[1], &aw = p->s.axis[2];
        while (true) {
            c += p->t.chunk, phase_c += p->t.chunk;
            if (phase_c >= p->t.phase_channels) phase_c = 0, phase.advance(p->s, p->t.chunk_phases);
            if (c >= c_end) {
                first += p->t.taps_per_box;
                if (first >= ah.taps) {
                    do {
                        if (++td >= ad.taps) return false;
                    } while (!(tile_live >> (8 + td) & 1));
                    first = 0;
                }
                c = c_begin, phase_c = p->t.phase_channels < p->t.C_pad ? 0 : c_begin, phase = first_phase;    // parts are whole phases, or of the only one
            }
            live_h = tile_live & ((1 << p->t.taps_per_box) - 1) << first, live_w = (1 << aw.taps) - 1;
            if (p->t.phase_channels < p->t.C_pad) {
                if (!(ad.live[phase.d] >> td & 1)) continue;
                live_h &= ah.live[phase.h], live_w = p->t.live_w[phase.w];
            }
            if (live_h == 0 || live_w == 0) continue;
            if (p->t.item_taps > 1) live_w = 1;             // all taps w are one stage,
            if (p->t.item_taps > aw.taps) live_h = 1;       // all taps h too
            return true;
        }
    }

    HOST_DEVICE int last_shift() const { return p->s.axis[1].shift[min_of(first + p->t.taps_per_box, p->s.axis[1].taps) - 1]; }
    HOST_DEVICE int plane() const { return p->s.axis[0].first + d - p->s.axis[0].shift[td]; }    // of the source
    HOST_DEVICE int source_row() const { return p->s.axis[1].first + h0 - last_shift(); }
};

// The taps of the box that a cursor is at, each with its products.
struct BoxTaps {
    struct Tap {
        int rows;                       // of shared memory, by which the tap is shifted in its box
        int tap, column;                // the tap (d, h, w); of the packed weights
    };
    const Problem* p;
    int live_h, live_w, live_taps_w;    // of every tap h; how many
    int td, last_shift, c, products;    // products: that have a stage of their own
    int count;

    HOST_DEVICE BoxTaps(const Cursor& at)
        : p(at.p), live_h(at.live_h), live_w(at.live_w), live_taps_w(count_bits(at.live_w)), td(at.td), last_shift(at.last_shift()), c(at.c), products(p->t.items > 1 ? 1 : p->t.products),
          count(count_bits(live_h) * live_taps_w * products) {}
    HOST_DEVICE Tap operator[](int i) const {
        const StencilAxis &ah = p->s.axis[1], &aw = p->s.axis[2];
        const int product = products == 1 ? 0 : i % 2;
        int bits_h = live_h, rank_w = products == 1 ? i : i / 2;
        for (; rank_w >= live_taps_w; rank_w -= live_taps_w) bits_h &= bits_h - 1;
        const int th = place_of_bit(bits_h, 0), tw = place_of_bit(live_w, rank_w);
        return {(last_shift - ah.shift[th]) * p->t.pitch + aw.shift[aw.taps - 1] - aw.shift[tw], (td * ah.taps + th) * aw.taps + tw, c + product * p->t.C_pad};
    }
};

// Floats from one staged row to the next.
HOST_DEVICE int staged_row(const Problem& p) { return p.t.contiguous ? p.s.axis[2].out : p.t.tile_w * p.s.axis[2].phases; }

// The global index of a region's first float, in arithmetic of type T.
template <typename T> HOST_DEVICE T region_origin(const Problem& p, const Place& place, const Run& run, int channel, int od) {
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    return ((T(place.n) * T(p.C_out) + T(channel)) * T(ad.out) + T(od)) * T(ah.out) * T(aw.out) + T(run.oh0) * T(aw.out) + T(run.ow0) + T(run.first);
}

HOST_DEVICE Place place_of(const Problem& p, int index) {
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    Place place = {};
    place.row_tile = t.by_row_pairs.take(index) * (t.split_m ? 2 : 1);
    const int run = t.by_runs.take(index), strip = t.by_strips.take(index), plane_group = t.by_plane_groups.take(index);
    place.first_run = run * t.tile_runs(), place.w0 = strip * t.tile_w, place.d = plane_group * t.planes, place.n = index;
    place.part = (plane_group * t.strips + strip) * t.runs + run;
    place.part_k = t.k_parts > 1 ? place.n / int(p.N) : 0, place.sample = place.n - place.part_k * int(p.N);
    place.columns = min_of(t.tile_w, aw.positions - place.w0);
    place.h0 = t.by_tile_w.divide(place.first_run * t.run);
    place.source_channel = t.split ? place.row_tile % t.rows.channel_tiles / t.group_tiles * t.phase_channels : 0;
    for (int i = 0; i <= t.split_m; i++) {
        const OuterPhases outer = outer_phases_of(p, t.by_channel_tiles.divide(place.row_tile + i));
        place.live_d |= live_taps(ad, t.packed[0], outer.d), place.live_h |= live_taps(ah, t.packed[1], outer.h);
    }
    for (int td = 0; td < ad.taps; td++) {
        const int plane = ad.first + place.d - ad.shift[td];    // that the first one reads
        if (plane + t.planes <= 0 || plane >= ad.sources) place.live_d &= ~(1 << td);
    }
    place.empty = place.live_d == 0 || place.live_h == 0;
    if (t.k_parts > 1 && t.phase_channels < t.C_pad) {    // the part's phases may have no weights at those taps
        SourcePhase phase = first_phase_of(p, place.part_k);
        bool live = false;
        for (int i = 0; i < phases_of_part(t, p.s); i++, phase.advance(p.s)) live |= (ad.live[phase.d] & place.live_d) && (ah.live[phase.h] & place.live_h) && aw.live[phase.w];
        place.empty = !live;
    }
    return place;
}

HOST_DEVICE Run run_of(const Problem& p, const Place& place, int warpgroup) {
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    Run run = {};
    run.row_tile = place.row_tile + (t.split_m ? warpgroup : 0);
    run.outer = t.by_channel_tiles.divide(run.row_tile), run.channel0 = (run.row_tile - run.outer * t.rows.channel_tiles) * t.rows.octets * 8;
    const OuterPhases outer = outer_phases_of(p, run.outer);
    run.phase_h = outer.h;
    const int plane = t.planes > t.run_planes ? warpgroup * t.run_planes : 0, begin = (place.first_run + (t.tile_runs() > 1 ? warpgroup : 0)) * t.run;
    const bool exists = run.outer < outer_phases(p) && place.d + plane < ad.positions;    // not in an added row tile or plane
    run.count = exists ? max_of(0, min_of(t.run, ah.positions * t.tile_w - begin)) : 0;
    run.h0 = t.by_tile_w.divide(begin), run.q0 = begin - run.h0 * t.tile_w;
    run.b_row = run.count > 0 ? (plane * t.box_rows + run.h0 - place.h0) * t.pitch + run.q0 : 0;
    run.od0 = (place.d + plane) * ad.phases + outer.d - ad.crop;
    for (int i = 0, od = run.od0; i < region_planes(t, p.s); i++, od += region_plane_step(t, p.s)) run.live |= (run.count > 0 && od >= 0 && od < ad.out) << i;
    run.oh0 = run.h0 * ah.phases - ah.crop + run.phase_h, run.ow0 = max_of(0, place.w0 * aw.phases - aw.crop);
    if (t.packed[1]) run.oh0 = max_of(0, run.oh0);
    run.rows = t.by_tile_w.divide(run.count);
    const int oh_end = (run.h0 + run.rows) * ah.phases - ah.crop, ow_end = (place.w0 + place.columns) * aw.phases - aw.crop;
    run.oh_end = min_of(ah.out, oh_end), run.ow_end = min_of(aw.out, ow_end);
    run.first = t.whole_rows ? 0 : run.q0;
    run.paired = t.block_n <= kMostPaired && t.run_planes == 1 && aw.phases == 2 && t.whole_rows && t.tile_w % 8 == 0 && place.columns == t.tile_w && (run.rows == 1 || (run.rows > 1 && t.pitch == t.tile_w)) &&
                 run.h0 * ah.phases >= ah.crop && oh_end <= ah.out && ow_end <= aw.out && (!t.whole_sectors || oh_end == ah.out || run.rows * t.pitch >= t.block_n - 8);
    run.paired_place = (t.packed[1] ? run.h0 * ah.phases - ah.crop - run.oh0 : 0) * staged_row(p) + place.w0 * 2 - aw.crop - run.ow0;
    run.alignment = t.contiguous ? region_origin<unsigned>(p, place, run, run.channel0, run.od0) & (t.staging_unit - 1) : 0;
    return run;
}

HOST_DEVICE void locate(const Problem& p, int index, Tile& tile) {
    static_cast<Place&>(tile) = place_of(p, index);
    for (int i = 0; i < p.t.warpgroups; i++) tile.run[i] = run_of(p, tile, i);
}

// Item i of a stage of weights is tap i % item_taps and product i / item_taps: by how many rows it is shifted against the first.
HOST_DEVICE int rows_of_item(const Problem& p, int i) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int tap = i % p.t.item_taps;
    return (ah.shift[0] - ah.shift[tap / aw.taps]) * p.t.pitch + aw.shift[0] - aw.shift[tap % aw.taps];
}

// -------------------------------------------------------------------------------------------------- Staged outputs

// Where a region begins behind a multiple of region_stride, so that its outputs are staged as they are aligned in memory: the run's alignment + the region's,
// modulo staging_unit. channel and plane from the run's first on. Only where runs are contiguous.
HOST_DEVICE int alignment_of_region(const Problem& p, int channel, int plane) {
    const unsigned area = unsigned(p.s.axis[1].out) * unsigned(p.s.axis[2].out), region = channel * region_planes(p.t, p.s) + plane;
    return p.t.contiguous ? ((unsigned(channel) * unsigned(p.s.axis[0].out) + unsigned(plane * region_plane_step(p.t, p.s))) * area - region * unsigned(p.t.region_stride)) & (p.t.staging_unit - 1) : 0;
}

// Outputs of a region, where they are neighbours in memory.
HOST_DEVICE int contiguous_count(const Problem& p, const Run& run) { return p.t.whole_rows ? (run.oh_end - run.oh0) * p.s.axis[2].out : run.count; }

// Where position q of a phase is in its region, whose rows and planes are so far apart, or, of a run of several planes, behind the channel's first one; or -1; from contiguous_count() on: the next run's.
// Positions count the gaps, from column 0 of the run's first row on.
HOST_DEVICE int place_of_position(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w, int row_stride, int plane_stride) {
    const Tiling& t = p.t;
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    int row = q, region = 0;
    const int column = t.by_pitch.take(row);
    if (t.run_planes > 1) {
        const int plane = row / t.box_rows;
        if (plane >= t.run_planes || !(run.live >> plane & 1)) return -1;
        row -= plane * t.box_rows, region = plane * plane_stride;
    }
    const int oh = (run.h0 + row) * ah.phases + (t.packed[1] ? packed_h : run.phase_h) - ah.crop, ow = (tile.w0 + column) * aw.phases + phase_w - aw.crop;
    if (column >= tile.columns || oh < 0 || oh >= ah.out || ow < 0 || ow >= aw.out) return -1;
    const int place = (t.packed[1] ? oh - run.oh0 : row) * row_stride + ow - run.ow0 - run.first;
    const bool own = row * t.tile_w + column - run.q0 < run.count, of_next = t.whole_sectors && place < contiguous_count(p, run) + kSector - 1;
    return own || of_next ? region + place : -1;
}

// The same where outputs are staged, and in memory.
HOST_DEVICE int staged_place(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w) {
    return place_of_position(p, tile, run, q, packed_h, phase_w, staged_row(p), p.t.region_stride);
}
HOST_DEVICE int place_in_memory(const Problem& p, const Tile& tile, const Run& run, int q, int packed_h, int phase_w) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    return place_of_position(p, tile, run, q, packed_h, phase_w, (p.t.packed[1] ? 1 : ah.phases) * aw.out, region_plane_step(p.t, p.s) * ah.out * aw.out);
}

// The first position of a row of GEMM_M that is an output, given its staged places: columns 0 and 1 or the first row of the grid may be cropped, and the first plane
// of several. Where it has no outputs, any.
HOST_DEVICE int first_output(const Tiling& t, const int* places) {
    if (places[0] >= 0) return 0;
    if (places[1] >= 0) return 1;
    const int next_row = min_of(t.pitch, t.block_n - 2);
    if (t.run_planes == 1 || places[next_row] >= 0 || places[next_row + 1] >= 0) return next_row + (places[next_row] < 0);
    for (int q = t.box_rows * t.pitch; q < t.block_n; q++)
        if (places[q] >= 0) return q;
    return 0;
}

// Floats of a paired run from row to row of the grid.
HOST_DEVICE int paired_row(const Problem& p) { return (p.t.packed[1] ? p.s.axis[1].phases : 1) * staged_row(p); }

// Staged regions of a run: (channel, output plane).
HOST_DEVICE int regions_of(const Problem& p, const Run& run) { return run.count > 0 ? p.t.region_channels * region_planes(p.t, p.s) : 0; }

// Which channel of its run a region is of, and which output plane.
struct RegionPlace { int channel, plane; };
HOST_DEVICE RegionPlace place_of_region(const Problem& p, int region) {
    const int planes = region_planes(p.t, p.s), channel = p.t.run_planes > 1 ? region / planes : divide_by_phases(region, planes);
    return {channel, region - channel * planes};
}

// Calls f(global index, region, float of the region, count) for the pieces of every `step`-th region from `first` to `end`.
template <typename F> HOST_DEVICE void for_each_piece(const Problem& p, const Tile& tile, const Run& run, int first, int end, int step, F f) {
    const StencilAxis &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int plane_step = region_plane_step(p.t, p.s);
    const int rows = p.t.contiguous ? 1 : run.rows * packed_phases(p.t, p.s, 1), row_step = p.t.packed[1] ? 1 : ah.phases;
    const int count = p.t.contiguous ? contiguous_count(p, run) : run.ow_end - run.ow0;
    const int64_t run_origin = region_origin<int64_t>(p, tile, run, run.channel0, run.od0), area = int64_t(ah.out) * aw.out;
    for (int region = first; region < end; region += step) {
        const auto [channel, plane] = place_of_region(p, region);
        if (run.channel0 + channel >= p.C_out || !(run.live >> plane & 1)) continue;
        const int64_t origin = run_origin + (int64_t(channel) * p.s.axis[0].out + plane * plane_step) * area;
        // A sector that two runs share is the first one's.
        const int skipped = p.t.whole_sectors && run.oh0 > 0 ? int(-origin & (kSector - 1)) : 0, added = p.t.whole_sectors && run.oh_end < ah.out ? int(-(origin + count) & (kSector - 1)) : 0;
        for (int row = 0; row < rows; row++) {
            const int oh = run.oh0 + row * row_step;
            if (oh >= 0 && oh < (p.t.packed[1] ? run.oh_end : ah.out))
                f(origin + skipped + int64_t(row) * row_step * aw.out, region, p.t.contiguous ? (int(origin - region * p.t.region_stride) & (p.t.staging_unit - 1)) + skipped : row * staged_row(p), count - skipped + added);
        }
    }
}

}  // namespace conv
