// How a strided forward of one group and few channels is cut for blocks that sweep down their planes on Hopper (sweep_sm90.cuh).
#pragma once

#include "stencil.h"

namespace sweep_sm90 {

constexpr int kRoleThreads = 128;     // of those that bring rows, and of those that multiply for one output plane
constexpr int kPhasesW = 2, kChannels = 32;    // output channels of a block: with the phases of W they are GEMM_M
constexpr int kWarpChannels = 8;      // of them, that a warp stages
constexpr int kColumns = 128;         // positions of a row: GEMM_N
constexpr int kMaxOcts = 4;           // times 8 input channels
constexpr int kMaxTaps = 2, kMaxPhases = 2;    // of D; taps of W
constexpr int kMaxBatches = 8, kMaxSlots = 32;
constexpr int kThreads = (kMaxPhases + 1 + kMaxPhases) * kRoleThreads;    // that multiply, bring, store
constexpr int kMaxKernel = 64;        // elements of a channel's kernel
constexpr int kLine = 32;             // floats of a line of memory: only whole ones are stored, but for the ends of a sweep
#ifndef SEGMENTS
#define SEGMENTS 2
#endif
constexpr int kSegments = SEGMENTS, kSegmentFloats = kColumns * kPhasesW / kSegments;    // of an output row: what is staged at a time
constexpr int kStageFloats = (24 + kLine - 1 + kSegmentFloats + kLine - 1) / kLine * kLine;    // of a segment: behind a sector's place in a line, and what waits for a line to be whole
constexpr int kHeadBytes = 1024;

// A block has one plane of positions, some of its rows from the first to the last, and 32 output channels. It brings each row of the source
// once for each tap d, in batches of `rows`, a thread for each of their columns, and keeps those that later rows of positions need.
struct Plan {
    Stencil s;
    int N, C_in, C_out, channel_tiles;
    int octs;                         // input channels / 8
    int rows, lead;                   // of a batch; batches that a row of positions reads beside its own
    int pitch;                        // columns of a row in shared memory: column c is column c + first_column of the source
    int first_column, column0, columns;    // those from column0 on are there
    int segment_rows, segments;
    HOST_DEVICE int batches() const { return lead + 2; }    // that are kept: a row's and the next one's
    HOST_DEVICE int row_units() const { return s.axis[0].taps * octs * pitch; }    // of 16 bytes: (tap d, 8 channels, column)
    HOST_DEVICE int tile_units() const { return octs * kPhasesW * kChannels; }    // of 16 bytes, of the weights of kernel elements (d, h) and a tap w: (8 channels, 8 output channels, phase w, output channel)
    HOST_DEVICE int weight_units() const { return s.axis[0].kernel * s.axis[1].kernel * s.axis[2].taps * tile_units(); }
    HOST_DEVICE int stage_floats() const { return kMaxPhases * kChannels * kSegments * kStageFloats; }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + (weight_units() + batches() * rows * row_units()) * 16 + stage_floats() * 4; }
    int64_t blocks() const { return int64_t(N) * channel_tiles * s.axis[0].positions * segments; }
};

// A plan, or one without segments where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {};
    if (!has_stencil(g) || g.groups > 1) return p;
    p.s = make_stencil(Direction::kForward, g);
    const StencilAxis &d = p.s.axis[0], &h = p.s.axis[1], &w = p.s.axis[2];
    if ((g.C_in != 16 && g.C_in != 32) || g.C_out % kWarpChannels != 0 || w.phases != kPhasesW || kernel_volume(g) > kMaxKernel) return p;
    if (d.phases > kMaxPhases || d.taps > kMaxTaps || w.taps > kMaxTaps || d.taps > d.phases || w.positions > kColumns) return p;
    if (g.C_in * in_volume(g) >= int64_t(1) << 31 || g.N >= 1 << 30 || g.C_out >= 1 << 30) return p;
    for (int phase = 0; phase < d.phases; phase++)
        if (d.live[phase] == 0) return p;    // its outputs have no products
    p.N = int(g.N), p.C_in = int(g.C_in), p.C_out = int(g.C_out), p.channel_tiles = int(ceil_div(g.C_out, kChannels));
    p.octs = int(g.C_in / 8);
    const int span_w = w.shift[w.taps - 1] - w.shift[0], span_h = h.shift[h.taps - 1] - h.shift[0];
    p.pitch = kColumns + span_w;
    p.first_column = w.first - w.shift[w.taps - 1];
    p.column0 = p.first_column < 0 ? -p.first_column : 0;
    const int end = w.sources - p.first_column;
    p.columns = (end < p.pitch ? end : p.pitch) - p.column0;
    if (p.columns < 0) p.columns = 0;
    if (p.columns > kRoleThreads) return p;
    p.rows = 1;
    p.lead = int(ceil_div(span_h, p.rows));
    if (p.batches() > kMaxBatches || p.batches() * p.rows > kMaxSlots || p.shared_bytes() > most_shared) return p;
    double best = 0;
    for (int segments = 1; segments <= h.positions; segments++) {    // as many as fill all multiprocessors, a block's start being as long as three rows
        Plan cut = p;
        cut.segment_rows = int(ceil_div(h.positions, segments)), cut.segments = int(ceil_div(h.positions, cut.segment_rows));
        if (segments > 1 && cut.blocks() > 8 * multiprocessors) break;
        const double time = double(ceil_div(cut.blocks(), multiprocessors)) * (cut.segment_rows + 3);
        if (p.segments == 0 || time < best) best = time, p = cut;
    }
    return p;
}

}  // namespace sweep_sm90
