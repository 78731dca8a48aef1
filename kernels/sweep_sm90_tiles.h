// How a strided forward of one group and few channels is cut for blocks that sweep down their planes on Hopper (sweep_sm90.cuh).
#pragma once

#include "sweep_tiles.h"

namespace sweep_sm90 {

constexpr int kRoleThreads = 128;     // of those that multiply for one output plane, of those that store, of those that bring rows
constexpr int kMaxPhases = 2, kMaxTaps = 2;    // of an axis
constexpr int kThreads = (kMaxPhases + 2) * kRoleThreads;
constexpr int kPhasesW = 2, kChannels = 32;    // output channels of a block: with the phases of W they are GEMM_M
constexpr int kWarpChannels = 8;      // of them, that a warp stages
constexpr int kMaxColumns = 128;      // positions of a row, and what is added to them
constexpr int kMaxBatches = 3;
constexpr int kMaxKernel = 64;        // elements of a channel's kernel
using sweep::kLine;
constexpr int kStageFloats = kMaxColumns * kPhasesW + 2 * kLine;    // of a unit, behind a sector's place in a line and what waits for a line to be whole
constexpr int kHeadBytes = 2048;

// A block has one plane of positions, some of its rows from the first to the last, and 32 output channels. It brings each row of the source
// once for each tap d, in batches of `rows`, a thread for each of their columns, and keeps those that later rows of positions need.
struct Plan {
    Stencil s;
    int N, C_in, C_out, channel_tiles;
    int octs;                         // input channels / 8
    int gemm_n;                       // columns of a tile: 128, or 64 for rows of positions that are so short. A unit, what is staged at a time, is one output row or two
    int rows, span;                   // of a batch; that a row of positions reads behind its first one, at most one
    int pitch;                        // columns of a row in shared memory: column c is column c + first_column of the source
    int first_column, column0, columns;    // those from column0 on are there
    int segment_rows, segments;
    HOST_DEVICE int batches() const { return span + 2; }    // that are kept: those of a row of positions and the next one
    HOST_DEVICE int slots() const { return batches() * rows; }
    HOST_DEVICE int row_units() const { return s.axis[0].taps * octs * pitch; }    // of 16 bytes: (tap d, 8 channels, column)
    HOST_DEVICE int tile_units() const { return octs * kPhasesW * kChannels; }    // of 16 bytes, of the weights of kernel elements (d, h) and a tap w: (8 channels, 8 output channels, phase w, output channel)
    HOST_DEVICE int weight_units() const { return s.axis[0].kernel * s.axis[1].kernel * s.axis[2].taps * tile_units(); }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + (weight_units() + slots() * row_units()) * 16 + kMaxPhases * kChannels * kStageFloats * 4; }
    int64_t blocks() const { return int64_t(N) * channel_tiles * s.axis[0].positions * segments; }
};

// A plan, or one without segments where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {};
    if (!has_stencil(g) || g.groups > 1) return p;
    p.s = make_stencil(Direction::kForward, g);
    const StencilAxis &h = p.s.axis[1], &w = p.s.axis[2];
    for (const StencilAxis& a : p.s.axis) {
        if (a.phases > kMaxPhases || a.taps > a.phases) return p;
        for (int phase = 0; phase < a.phases; phase++)
            if (a.live[phase] == 0) return p;    // its outputs have no products
    }
    if ((g.C_in != 16 && g.C_in != 32) || g.C_out % kWarpChannels != 0 || w.phases != kPhasesW || w.positions > kMaxColumns || kernel_volume(g) > kMaxKernel) return p;
    if (g.C_in * in_volume(g) >= int64_t(1) << 31 || g.N >= 1 << 30 || g.C_out >= 1 << 30) return p;
    p.N = int(g.N), p.C_in = int(g.C_in), p.C_out = int(g.C_out), p.channel_tiles = int(ceil_div(g.C_out, kChannels));
    p.octs = int(g.C_in / 8);
    p.span = h.shift[h.taps - 1] - h.shift[0];
    p.gemm_n = w.positions <= kMaxColumns / 2 ? kMaxColumns / 2 : kMaxColumns;
    p.pitch = p.gemm_n + w.shift[w.taps - 1] - w.shift[0];
    sweep::locate_columns(p);
    if (p.columns > kRoleThreads || p.span > 1) return p;
    p.rows = p.columns > 0 && p.columns <= kRoleThreads / 2 && h.positions > 1 ? 2 : 1;
    if (p.shared_bytes() > most_shared) return p;
    return sweep::cut_in_segments(p, 1, multiprocessors);
}

}  // namespace sweep_sm90
