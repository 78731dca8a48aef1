// How a strided forward of one group is cut by the phases of its outputs (polyphase_sm90.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace polyphase {

using conv::kRows;
constexpr int kChunk = 64;                 // source channels of a stage
constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kPhasesW = 2, kMaxTapsW = 4;
constexpr int kMaxPhases = kMaxStride * kMaxStride;    // of (d, h)
constexpr int kMaxBoxes = 4, kMaxWeights = 8, kTileSlots = 4;    // stages
constexpr int kHeadBytes = 1024;

// Outputs stride * j + r of an axis are of phase r, and j is their position (geometry.h, Phase). A tile has one phase of D and of H, both of W, 64 output channels, and for each of two consumers
// so many columns of GEMM_N: `rows` rows of `tile_w` positions, of `run_planes` planes. Rows are `pitch` columns apart, planes box_rows rows: GEMM_N's columns are neighbours in the box of the
// source that a tap of D reads, halo included, and other taps of H and W are shifts of the operand's first row. The second consumer has the next rows, or the next planes.
struct Plan {
    Phase phase_d[kMaxStride], phase_h[kMaxStride];
    int order[kMaxPhases];                 // phases d * strides_h + h, those with the most taps first
    int phases, phases_h;
    int N, C_out, channel_tiles, chunks;
    int D, H, W, in_d;                     // outputs of an axis; planes of the source
    int kernel_h, taps_w;                  // elements of the kernel
    int tap_w[kMaxTapsW], shift_w[kMaxTapsW];    // elements of W in the order in which they are multiplied, of phase 1 and 0 in turns; first rows in the box
    int first_w;                           // column of the source where the box of the first strip begins
    int block_n;                           // GEMM_N of a consumer
    int tile_w, strips, pitch;
    int rows, row_tiles;                   // of a consumer; tiles of all rows
    int run_planes, planes, plane_groups;  // of a consumer, of a tile; tiles of all planes
    int box_rows, span_h, span_w;          // columns and rows by which taps of H and W are apart, at most
    bool consumers_have_planes;            // of their own, not rows
    int boxes, weights;                    // stages
    int places, last_places, tiles;        // tiles of a phase
    double cycles;                         // estimated, of a multiprocessor
    Divisor by_phases, by_last_places, by_channel_tiles, by_strips, by_row_tiles, by_plane_groups, by_pitch, by_box_rows;
    HOST_DEVICE int positions_w() const { return (W + kPhasesW - 1) / kPhasesW; }
    HOST_DEVICE bool stores_vectors() const { return W % 4 == 0; }    // of four outputs; else outputs are staged
    HOST_DEVICE int sample_places() const { return strips * row_tiles * plane_groups; }
    HOST_DEVICE int parts() const { return phases * sample_places() * kConsumers; }    // of a sample, each a consumer's outputs of a tile
    HOST_DEVICE int box_bytes() const { return planes * box_rows * pitch * kChunk * 2; }
    HOST_DEVICE int consumer_row() const { return (consumers_have_planes ? run_planes * box_rows : rows) * pitch; }    // of the box, where the second consumer begins
    HOST_DEVICE int box_stage_bytes() const {    // what is read for columns that are no positions included
        const int rows = (kConsumers - 1) * consumer_row() + span_h * pitch + span_w + block_n, bytes = rows * kChunk * 2;
        return ((bytes > box_bytes() ? bytes : box_bytes()) + 1023) / 1024 * 1024;
    }
    HOST_DEVICE int weight_bytes() const { return taps_w * kRows * kChunk * 2; }
    HOST_DEVICE int staged_row() const { return (tile_w + 1) / 2 * 2 * kPhasesW; }    // outputs, where they are staged
    HOST_DEVICE int staged_channel() const { return (run_planes * rows * staged_row() + 15) / 32 * 32 + 16; }    // without bank conflicts
    HOST_DEVICE int staged_bytes() const { return stores_vectors() ? 0 : kConsumers * kRows / 2 * staged_channel() * 4; }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + boxes * box_stage_bytes() + weights * weight_bytes() + staged_bytes(); }
};

// The rows from which a phase of H reads the source, for position 0.
HOST_DEVICE int first_row(const Phase& h) { return h.src + (h.taps - 1) * h.src_tap_step; }

// A tile, and the taps of D that read a plane of the source: those from first_tap on.
struct Tile {
    int n;                                 // sample, or -1: no more
    int channel0, d, h0, w0;               // first output channel, positions
    int phase_d, phase_h;
    int first_tap, taps_d;
    int part;                              // of the sample and the output channels
};

HOST_DEVICE Tile locate(const Plan& p, int i) {
    Tile t;
    // All phases of a place, one place after the other; in the end the last places' tiles, those with the most taps first.
    int phase;
    if (i < (p.places - p.last_places) * p.phases) {
        phase = p.by_phases.take(i);
    } else {
        i -= (p.places - p.last_places) * p.phases;
        const int place = p.places - p.last_places + p.by_last_places.take(i);
        phase = i, i = place;
    }
    phase = p.order[phase];
    t.channel0 = p.by_channel_tiles.take(i) * kRows;
    const int place = i;
    t.w0 = p.by_strips.take(i) * p.tile_w;
    t.h0 = p.by_row_tiles.take(i) * p.rows * (p.consumers_have_planes ? 1 : kConsumers);
    t.d = p.by_plane_groups.take(i) * p.planes;
    t.n = i;
    t.part = phase * p.sample_places() + place - t.n * p.sample_places();
    t.phase_d = phase / p.phases_h, t.phase_h = phase % p.phases_h;
    const Phase& d = p.phase_d[t.phase_d];
    int tap = 0, end = d.taps;             // later taps read earlier planes
    while (tap < end && t.d + d.src + tap * d.src_tap_step >= p.in_d) tap++;
    while (end > tap && t.d + p.planes - 1 + d.src + (end - 1) * d.src_tap_step < 0) end--;
    if (t.d >= d.count || p.phase_h[t.phase_h].taps == 0) end = tap;
    t.first_tap = tap, t.taps_d = end - tap;
    return t;
}

// Where column c of a consumer is. x is not below tile_w, or y not below p.rows, where that is no position.
struct Column { int plane, y, x; };
HOST_DEVICE Column column_at(const Plan& p, int c) {
    const int row = p.by_pitch.divide(c), plane = p.run_planes > 1 ? p.by_box_rows.divide(row) : 0;
    return {plane, row - plane * p.box_rows, c - row * p.pitch};
}

// Cycles that a consumer takes to store its outputs: by bytes, where vectors begin in the middle of sectors more; or, staged, by rows and requests of up to 32 outputs, channels that there are not included.
inline double store_cycles(const Plan& p) {
    const double rows = double(p.run_planes) * p.rows;
    if (p.stores_vectors()) return double(p.C_out) / p.channel_tiles * rows * p.tile_w * kPhasesW * 4 / (p.pitch % 4 == 0 ? 16 : 14);
    return kRows * rows * (8 + 10 * ceil_div(p.tile_w * kPhasesW, 32));
}

// Estimated cycles of the busiest multiprocessor. The numbers are fitted to 441 times of 33 layers (NOTES.md).
inline double time_of(const Plan& p, int multiprocessors) {
    const double stage = 1.06 * p.taps_w * (kChunk / 16) * kConsumers * p.block_n / 2 + 70, box = (1900 + p.box_bytes() / 60) / (p.boxes - 1);    // its products; its load, others under way
    double all = 0, longest = 0, shortest = 1e30;
    for (int i = 0; i < p.phases; i++) {
        const int taps_d = p.phase_d[p.order[i] / p.phases_h].taps, taps_h = p.phase_h[p.order[i] % p.phases_h].taps;
        const double products = taps_d * p.chunks * std::max(taps_h * stage, box), stores = kConsumers * store_cycles(p);    // one consumer after the other
        const double tile = std::max(products, stores) + 0.46 * std::min(products, stores) + 850;
        all += tile * p.places / multiprocessors, longest = std::max(longest, tile), shortest = std::min(shortest, tile);
    }
    return std::max(longest, all + shortest / 2) + 6900;
}

// The phase of W whose element is multiplied in turn `i`: of three elements, two are of phase 1.
HOST_DEVICE constexpr int phase_of_turn(int taps, int i) { return (i + (taps == 3)) % 2; }

// The layer: the phases of its axes, and which of them elements of the kernel are of.
inline void set_layer(Plan& p, const Geometry& g) {
    const Axis &d = g.axis[0], &h = g.axis[1], &w = g.axis[2];
    p.N = int(g.N), p.C_out = int(g.C_out), p.channel_tiles = int(ceil_div(g.C_out, kRows)), p.chunks = int(ceil_div(g.C_in, kChunk));
    p.D = int(d.out), p.H = int(h.out), p.W = int(w.out), p.in_d = int(d.in);
    p.phases_h = int(h.stride), p.phases = int(d.stride) * p.phases_h;
    for (int r = 0; r < d.stride; r++) p.phase_d[r] = make_phase(Direction::kForward, d, r);
    for (int r = 0; r < h.stride; r++) {
        p.phase_h[r] = make_phase(Direction::kForward, h, r);
        p.span_h = std::max(p.span_h, -(p.phase_h[r].taps - 1) * p.phase_h[r].src_tap_step);
    }
    for (int i = 0; i < p.phases; i++) p.order[i] = i;
    std::stable_sort(p.order, p.order + p.phases, [&](int a, int b) {
        const auto taps = [&](int phase) { return p.phase_d[phase / p.phases_h].taps * p.phase_h[phase % p.phases_h].taps; };
        return taps(a) > taps(b);
    });
    p.kernel_h = int(h.kernel), p.taps_w = int(w.kernel);
    int last = -(1 << 30);    // column of the source that position 0 reads
    p.first_w = 1 << 30;
    for (int i = 0; i < p.taps_w; i++) {
        const int phase = phase_of_turn(p.taps_w, i), k = (i + phase + int(w.padding)) % 2 ? i ^ 1 : i;    // output 2 j + phase reads column j + (phase + padding - k * dilation) / 2
        p.tap_w[i] = k, p.shift_w[i] = int((phase + w.padding - k * w.dilation) / 2);
        p.first_w = std::min(p.first_w, p.shift_w[i]), last = std::max(last, p.shift_w[i]);
    }
    p.span_w = last - p.first_w;
    for (int& shift : p.shift_w) shift -= p.first_w;
}

// Cuts the positions into tiles of `strips` strips, rows apart by a multiple of `unit` columns. False where that does not go.
inline bool cut(Plan& p, const Geometry& g, int strips, int unit) {
    const int positions_d = int(ceil_div(p.D, g.axis[0].stride)), positions_h = int(ceil_div(p.H, g.axis[1].stride)), positions_w = p.positions_w();
    p.tile_w = int(ceil_div(positions_w, strips)), p.strips = strips;
    if (strips > 1) p.tile_w += p.tile_w % 2, p.strips = int(ceil_div(positions_w, p.tile_w));
    p.pitch = conv::round_up(conv::box_pitch(p.span_w, -p.first_w, positions_w + p.first_w + p.span_w - int(g.axis[2].in), p.tile_w, p.strips), unit);
    if (p.tile_w > p.block_n || p.pitch > 256) return false;
    p.rows = (p.block_n - p.tile_w) / p.pitch + 1;
    if (p.consumers_have_planes) {
        if (p.rows < positions_h || positions_d == 1) return false;
        p.rows = positions_h, p.row_tiles = 1, p.box_rows = p.rows + p.span_h;
        p.run_planes = std::min((p.block_n - (p.rows - 1) * p.pitch - p.tile_w) / (p.box_rows * p.pitch) + 1, int(ceil_div(positions_d, kConsumers)));
        p.planes = kConsumers * p.run_planes;
    } else {
        const int tiles = int(ceil_div(positions_h, kConsumers * p.rows));
        p.rows = int(ceil_div(positions_h, kConsumers * tiles)), p.row_tiles = int(ceil_div(positions_h, kConsumers * p.rows));
        p.run_planes = p.planes = 1, p.box_rows = kConsumers * p.rows + p.span_h;
    }
    if (p.box_rows > 256 || p.planes > 256) return false;
    p.plane_groups = int(ceil_div(positions_d, p.planes));
    const int64_t places = int64_t(p.N) * p.plane_groups * p.row_tiles * p.strips * p.channel_tiles;
    if (places * p.phases > 1 << 29) return false;
    p.places = int(places), p.tiles = p.places * p.phases;
    return true;
}

// Boxes of the stages that there is room for, but for those of four stages of weights. False where there is too little.
inline bool lay_out_stages(Plan& p, int64_t most_shared) {
    const auto room = [&] { return most_shared - kHeadBytes - int64_t(p.boxes) * p.box_stage_bytes() - p.staged_bytes(); };
    for (p.boxes = kMaxBoxes; p.boxes > 2 && room() < 4 * p.weight_bytes();) p.boxes--;
    p.weights = int(std::min(room() / p.weight_bytes(), int64_t(kMaxWeights)));
    return p.weights >= 3;
}

// The plan of least estimated time, or one without tiles where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {}, best = {};
    const Axis& w = g.axis[2];
    if (!has_stencil(g) || g.groups > 1 || w.stride != kPhasesW || w.dilation % 2 == 0 || w.kernel < 2 || w.kernel > kMaxTapsW || (w.kernel == 3 && w.padding % 2 == 0)) return best;
    if (g.C_in <= kChunk / 2 || g.C_in >= 1 << 20 || g.C_out >= 1 << 20 || g.N >= 1 << 20) return best;
    set_layer(p, g);
    for (int block_n : {72, 80, 104, 144})
    for (bool consumers_have_planes : {false, true})
    for (int strips = 1; strips <= 16; strips++)
    for (int unit : {2, 4, 8}) {
        p.block_n = block_n, p.consumers_have_planes = consumers_have_planes;
        if (!cut(p, g, strips, unit) || !lay_out_stages(p, most_shared)) continue;
        p.last_places = std::min(p.places, int(ceil_div(2 * multiprocessors, p.phases)));
        p.cycles = time_of(p, multiprocessors);
        if (best.tiles == 0 || p.cycles < best.cycles) best = p;
    }
    if (best.tiles == 0) return best;
    best.by_phases = make_divisor(best.phases), best.by_last_places = make_divisor(best.last_places);
    best.by_channel_tiles = make_divisor(best.channel_tiles), best.by_strips = make_divisor(best.strips), best.by_row_tiles = make_divisor(best.row_tiles), best.by_plane_groups = make_divisor(best.plane_groups);
    best.by_pitch = make_divisor(best.pitch), best.by_box_rows = make_divisor(best.box_rows);
    return best;
}

}  // namespace polyphase
