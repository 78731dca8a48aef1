// How a strided forward of split operands is cut for blocks that sweep down their planes (sweep.cuh).
#pragma once

#include <initializer_list>

#include "stencil.h"

namespace sweep {

constexpr int kWarps = 4, kRoleThreads = 32 * kWarps;    // of each role: those that bring and store, those that multiply
constexpr int kThreads = 2 * kRoleThreads, kBlocks = 2;  // of a multiprocessor
constexpr int kChannels = 8;          // output channels of a block
constexpr int kOctets = 4;            // times 8 positions of a row: what a warp has of a step
constexpr int kMaxOcts = 3;           // times 8 input channels of a group
constexpr int kMaxUnits = 16;         // of GEMM_K at a tap (d, h)
constexpr int kMaxSlots = 32;
constexpr int kLine = 32;             // floats of a line of memory: only whole ones are stored, but for the ends of a sweep
constexpr int kHeadBytes = 2048;

constexpr int kWeightBytes = 2 * 2 * kChannels * 16;    // of a unit of GEMM_K and a tap: (high or low, phase w, channel), 8 channels each

// Which taps of an axis have weights in a phase, as the compiler knows it: bit phase * 2 + tap. Of kernels 2, 3 (where phases begin in two ways) and 4 with stride 2, and of 1 with stride 1.
constexpr int kKernel2 = 0b0101, kKernel3 = 0b0111, kKernel3Later = 0b1110, kKernel4 = 0b1111, kKernel1 = 0b10001;
HOST_DEVICE constexpr int live_of(int pattern, int phase) { return pattern >> 2 * phase & 3; }
HOST_DEVICE constexpr int taps_of(int pattern) { return (pattern & 0b1010) != 0 ? 2 : 1; }
HOST_DEVICE constexpr int phases_of(int pattern) { return pattern == kKernel1 ? 1 : 2; }
HOST_DEVICE constexpr int weights_of(int pattern) { return (pattern & 1) + (pattern >> 1 & 1) + (pattern >> 2 & 1) + (pattern >> 3 & 1); }

// 0: another one.
inline int pattern_of(const StencilAxis& a) {
    const int pattern = a.phases == 1 ? (kKernel1 & -16) | a.live[0] : a.live[0] | a.live[1] << 2;
    if (a.phases > 2 || a.taps > 2 || a.taps != taps_of(pattern)) return 0;
    for (int known : {kKernel1, kKernel2, kKernel3, kKernel3Later, kKernel4})
        if (pattern == known) return pattern;
    return 0;
}

// A block has one plane of positions, some of its rows from the first to the last, and 8 output channels of a group. It brings each row of the source
// once for each tap d, in batches of as many rows as a step has rows of positions, a thread for each of their columns, and keeps those that later steps need.
struct Plan {
    Stencil s;
    int N, groups, group_out;
    int octs;                         // input channels of a group / 8
    int units;                        // of GEMM_K at a tap (d, h): (tap w, 8 channels), and zeros if these are odd
    int octets;                       // times 8 positions: a row, of whole warps
    int rows, lead;                   // of a step and a batch; batches that a step reads beside its own
    int pitch;                        // columns of a row in shared memory: column c is column c + first_column of the source
    int first_column, column0, columns;    // those from column0 on are there
    int row_units;                    // of 16 bytes, of a row in shared memory: (tap d, high or low, 8 channels, column)
    int weight_bytes;                 // (tap h, two units of GEMM_K, tap d, phases (d, h) that have weights; high or low, unit, phase w, channel), 8 channels of the unit each
    int stages, stage_stride;         // a step's outputs: 2, if two blocks fit then; floats of a stream
    int segment_rows, segments;
    HOST_DEVICE int group_in() const { return octs * 8; }
    HOST_DEVICE int batches() const { return lead + 2; }    // that are kept: a step's and the next one's
    HOST_DEVICE int slots() const { return batches() * rows; }
    HOST_DEVICE int stage_floats() const { return kChannels * s.axis[0].phases * stage_stride; }    // of a step
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + weight_bytes + slots() * row_units * 16 + stages * stage_floats() * 4; }
    int64_t blocks() const { return int64_t(N) * groups * (group_out / kChannels) * s.axis[0].positions * segments; }
};

// Which columns of a row in shared memory are there: of a plan that has its pitch.
template <typename P> void locate_columns(P& p) {
    const StencilAxis& w = p.s.axis[2];
    p.first_column = w.first - w.shift[w.taps - 1];
    p.column0 = p.first_column < 0 ? -p.first_column : 0;
    const int end = w.sources - p.first_column;
    p.columns = (end < p.pitch ? end : p.pitch) - p.column0;
    if (p.columns < 0) p.columns = 0;
}

// The plan with as many segments as fill the blocks that can be resident, a block's start being as long as three steps of so many rows.
template <typename P> P cut_in_segments(const P& whole, int step_rows, int64_t resident) {
    const int positions = whole.s.axis[1].positions;
    P best = whole;
    double best_time = 0;
    for (int segments = 1; segments <= positions; segments++) {
        const int rows = int(ceil_div(ceil_div(positions, segments), step_rows)) * step_rows;
        P cut = whole;
        cut.segment_rows = rows, cut.segments = int(ceil_div(positions, rows));
        if (segments > 1 && cut.blocks() > 8 * resident) break;
        const double time = double(ceil_div(cut.blocks(), resident)) * (rows / step_rows + 3);
        if (best.segments == 0 || time < best_time) best_time = time, best = cut;
    }
    return best;
}

// A plan, or one without segments where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Geometry& g, int64_t most_shared, int multiprocessors) {
    Plan p = {};
    if (!has_stencil(g)) return p;
    p.s = make_stencil(Direction::kForward, g);
    const StencilAxis &d = p.s.axis[0], &h = p.s.axis[1], &w = p.s.axis[2];
    const int64_t group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
    if (group_in % 8 != 0 || group_in > 8 * kMaxOcts || group_out % kChannels != 0 || w.phases != 2) return p;
    const int pattern_h = pattern_of(h), pattern_d = pattern_of(d);
    if (pattern_h == 0 || h.phases != 2 || (pattern_d != pattern_h && pattern_d != kKernel1)) return p;
    if (group_in * in_volume(g) >= int64_t(1) << 31 || g.N >= 1 << 30 || g.C_out >= 1 << 30) return p;
    p.N = int(g.N), p.groups = int(g.groups), p.group_out = int(group_out);
    p.octs = int(group_in / 8);
    p.units = (w.taps * p.octs + 1) / 2 * 2;
    p.octets = int(ceil_div(w.positions, 8 * kOctets)) * kOctets;
    const int per_step = kWarps * kOctets, span = h.shift[h.taps - 1] - h.shift[0];
    p.pitch = p.octets * 8 + w.shift[w.taps - 1] - w.shift[0];
    locate_columns(p);
    p.rows = p.octets < per_step ? per_step / p.octets : 1;
    if (p.rows > h.positions) p.rows = h.positions;
    while (p.rows > 1 && p.rows * p.columns > kRoleThreads) p.rows--;
    p.lead = int(ceil_div(span, p.rows));
    p.row_units = d.taps * 2 * p.octs * p.pitch, p.weight_bytes = weights_of(pattern_d) * weights_of(pattern_h) * p.units * kWeightBytes;
    p.stage_stride = (p.rows * h.phases * w.out + 2 * kLine + kLine - 1) / kLine * kLine;
    if (p.octets > per_step || p.units > kMaxUnits || p.slots() > kMaxSlots || p.rows * p.columns > kRoleThreads) return p;
    p.stages = 2;
    if (blocks_that_fit(p.shared_bytes(), most_shared) < kBlocks) p.stages = 1;
    const int64_t fitting = blocks_that_fit(p.shared_bytes(), most_shared), resident = multiprocessors * (fitting < kBlocks ? fitting : kBlocks);
    if (fitting < 1) return p;
    return cut_in_segments(p, p.rows, resident);
}

}  // namespace sweep
