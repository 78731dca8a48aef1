// How the tensor cores' kernels for dweight cut their work, and which element is where: for host and device. dweight.cuh tells the method.
#pragma once

#include "conv_tiling.h"

namespace dweight {

constexpr int kConsumers = 3;
constexpr int kRows = 64;              // GEMM_M of a consumer
constexpr int kMaxStages = 6;
constexpr int kHeadBytes = 1024;

// --------------------------------------------------------------------------------------------------------- Tiling

struct Tiling {
    int block_n;                       // GEMM_N: 64, 128 or 192
    int chunk, blocks;                 // channels of x in a row of shared memory, and how many such columns of GEMM_N are used
    bool n_over_taps, m_over_taps;     // what GEMM_N and the consumers have neighbours of
    int row_blocks, chunks;            // of GEMM_M, of 64 rows; of x
    int tile_w, strips, rows, row_groups, pitch;    // a stage has `rows` rows of a strip
    int steps, box_rows;               // of 16 positions; rows of x
    int dout_bytes, x_bytes;           // of a box
    int dout_boxes, x_boxes, stage_bytes, stages;
    int groups_m, groups_n, groups_h, groups_w, groups, splits;
};

struct Problem {
    Stencil s;                         // the forward's
    Tiling t;
    int64_t N, C_in, C_out, groups, dout_phase_channels;
};

// What a group has, by its index.
struct Group {
    int m, n, td, th, tw;              // first row block, first chunk of x, taps; the first of several
    HOST_DEVICE Group(const Tiling& t, const Stencil& s, int index) {
        auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
        m = take(t.groups_m) * (t.m_over_taps ? 1 : kConsumers);
        n = take(t.groups_n) * (t.n_over_taps ? 1 : t.blocks);
        tw = take(t.groups_w) * t.blocks * (t.n_over_taps ? 1 : 0);
        th = take(t.groups_h) * (t.m_over_taps ? kConsumers : 1);
        td = take(s.axis[0].taps);
    }
};

// What a consumer of a group has.
HOST_DEVICE int row_block(const Tiling& t, const Group& g, int consumer) { return g.m + (t.m_over_taps ? 0 : consumer); }
HOST_DEVICE int tap_h(const Tiling& t, const Group& g, int consumer) { return g.th + (t.m_over_taps ? consumer : 0); }
// The last tap w of a group is its first block of columns, so that the next blocks are further on in x.
HOST_DEVICE int last_tap_w(const Tiling& t, const Stencil& s, const Group& g) {
    const int last = g.tw + (t.n_over_taps ? t.blocks : 1) - 1;
    return last < s.axis[2].taps ? last : s.axis[2].taps - 1;
}

// Whether some row of the consumer's block has a weight at its taps (d, h).
HOST_DEVICE bool is_live(const Problem& a, const Group& g, int consumer) {
    const StencilAxis &ad = a.s.axis[0], &ah = a.s.axis[1], &aw = a.s.axis[2];
    const int th = tap_h(a.t, g, consumer), block = row_block(a.t, g, consumer);
    if (th >= ah.taps || block >= a.t.row_blocks) return false;
    for (int64_t c = int64_t(block) * kRows; c < int64_t(block + 1) * kRows; c += a.dout_phase_channels - c % a.dout_phase_channels) {
        const int phase = int(c / a.dout_phase_channels);
        if (phase < a.s.phases() && ad.live[phase / aw.phases / ah.phases] >> g.td & 1 && ah.live[phase / aw.phases % ah.phases] >> th & 1) return true;
    }
    return false;
}
HOST_DEVICE bool is_live(const Problem& a, const Group& g) {
    for (int consumer = 0; consumer < kConsumers; consumer++)
        if (is_live(a, g, consumer)) return true;
    return false;
}

// The boxes of GEMM_K: (sample, plane, strip, rows), for the planes of dout that a tap d connects with one of x.
struct Boxes {
    int begin_d, planes;
    int count;
    HOST_DEVICE Boxes(const Problem& a, int td) {
        const StencilAxis& ad = a.s.axis[0];
        const int offset = ad.shift[td] - ad.first, end = ad.sources + offset < ad.positions ? ad.sources + offset : ad.positions;
        begin_d = offset > 0 ? offset : 0;
        planes = end > begin_d ? end - begin_d : 0;
        count = int(a.N) * planes * a.t.strips * a.t.row_groups;    // each has many positions
    }
};

// Rows of x from one block of columns to the next, where they are taps.
HOST_DEVICE int step_w(const Stencil& s) { return s.axis[2].taps > 1 ? s.axis[2].shift[1] - s.axis[2].shift[0] : 0; }

// The tiling of least estimated time; block_n 0 where none fits.
inline Tiling choose_tiling(const Problem& problem, int64_t phase_channels_x, int multiprocessors, int shared_bytes) {
    const Stencil& s = problem.s;
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    Tiling best = {};
    double best_time = 0;
    const int halo_w = w.shift[w.taps - 1];
    for (int t = 1; t < w.taps; t++)
        if (w.shift[t] - w.shift[t - 1] != step_w(s)) return best;
    Tiling t = {};
    t.chunk = phase_channels_x % 64 == 0 ? 64 : int(phase_channels_x);
    t.chunks = int(phase_channels_x / t.chunk);
    t.row_blocks = int(ceil_div(problem.dout_phase_channels * s.phases(), kRows));
    t.n_over_taps = w.taps > 1, t.m_over_taps = h.taps > 1;
    const int columns = t.n_over_taps ? w.taps : t.chunks, most = 192 / t.chunk;
    t.blocks = int(ceil_div(columns, ceil_div(columns, most)));
    t.block_n = t.blocks * t.chunk <= 64 ? 64 : t.blocks * t.chunk <= 128 ? 128 : 192;
    t.groups_m = int(t.m_over_taps ? t.row_blocks : ceil_div(t.row_blocks, kConsumers));
    t.groups_n = int(t.n_over_taps ? t.chunks : ceil_div(t.chunks, t.blocks));
    t.groups_h = int(t.m_over_taps ? ceil_div(h.taps, kConsumers) : h.taps);
    t.groups_w = int(t.n_over_taps ? ceil_div(w.taps, t.blocks) : 1);
    t.groups = s.axis[0].taps * t.groups_h * t.groups_w * t.groups_n * t.groups_m;
    t.dout_boxes = t.m_over_taps ? 1 : kConsumers < t.row_blocks ? kConsumers : t.row_blocks;
    t.x_boxes = t.n_over_taps ? 1 : t.block_n / t.chunk;
    int halo_h = 0;
    for (int th = 0; t.m_over_taps && th < h.taps; th += kConsumers) {
        const int last = th + kConsumers <= h.taps ? th + kConsumers - 1 : h.taps - 1, halo = h.shift[last] - h.shift[th];
        halo_h = halo > halo_h ? halo : halo_h;
    }
    const int row_bytes = t.chunk * 2;
    for (int strips = 1; strips <= 16 && strips <= w.positions; strips++)
    for (int rows = 1; rows <= h.positions && rows <= 64; rows++) {
        t.strips = strips, t.rows = rows;
        t.tile_w = int(ceil_div(w.positions, strips));
        t.pitch = conv::box_pitch(w, t.tile_w, strips);
        t.row_groups = int(ceil_div(h.positions, rows));
        t.steps = int(ceil_div(int64_t(rows) * t.pitch, 16));
        t.box_rows = rows + halo_h;
        if (t.pitch > 256 || t.tile_w > 256 || t.box_rows > 256) continue;
        const int64_t reach = int64_t(halo_h) * t.pitch + t.steps * 16 + halo_w + int64_t(t.block_n / t.chunk) * step_w(s), box = int64_t(t.box_rows) * t.pitch;
        const int64_t dout_bytes = ceil_div(int64_t(t.steps) * 16 * kRows * 2, 1024) * 1024, x_bytes = ceil_div((reach > box ? reach : box) * row_bytes, 1024) * 1024;
        const int64_t stage = t.dout_boxes * dout_bytes + t.x_boxes * x_bytes, stages = (shared_bytes - kHeadBytes) / stage;
        if (stages < 2) break;
        t.dout_bytes = int(dout_bytes), t.x_bytes = int(x_bytes), t.stage_bytes = int(stage), t.stages = int(stages < kMaxStages ? stages : kMaxStages);
        // Cycles of a stage: the products, bound by the tensor cores or by shared memory, or the loads, at 18 bytes a cycle.
        const int live = t.m_over_taps ? (h.taps < kConsumers ? h.taps : kConsumers) : t.dout_boxes;
        const double product = t.block_n / 2.0, operands = (kRows * 32 + t.block_n * 32) / 128.0;
        const double products = t.steps * live * (product > operands ? product : operands);
        const double loads = (t.dout_boxes * double(rows) * t.tile_w * 128 + double(t.n_over_taps ? 1 : t.blocks) * box * row_bytes) / 18;
        const double time = ((products > loads ? products : loads) + 150) * strips * t.row_groups * (t.stages == 2 ? 1.15 : 1.0);
        if (best.block_n == 0 || time < best_time) best = t, best_time = time;
    }
    if (best.block_n == 0) return best;
    // Parts of GEMM_K that make full waves of blocks, as few as that takes.
    Problem a = problem;
    a.t = best;
    int64_t live = 0, boxes = 0;
    for (int group = 0; group < best.groups; group++) {
        const Group g(best, s, group);
        const int64_t count = Boxes(a, g.td).count;
        if (is_live(a, g)) live++, boxes = count > boxes ? count : boxes;
    }
    double best_waste = 1e30;
    best.splits = 1;
    for (int waves = 1; waves <= 4 && live > 0; waves++) {
        int64_t splits = int64_t(waves) * multiprocessors / live;
        splits = splits < 1 ? 1 : splits > boxes && boxes > 0 ? boxes : splits;
        const double waste = double(ceil_div(splits * live, multiprocessors)) / splits * (1 + 0.02 * waves);
        if (waste < best_waste) best_waste = waste, best.splits = int(splits);
    }
    return best;
}

// --------------------------------------------------------------------------------------------------------- Places

struct Box { int n, d, w0, h0; };

HOST_DEVICE Box box_of(const Problem& a, const Boxes& boxes, int index) {
    Box b;
    b.h0 = index % a.t.row_groups * a.t.rows, index /= a.t.row_groups;
    b.w0 = index % a.t.strips * a.t.tile_w, index /= a.t.strips;
    b.d = boxes.begin_d + index % boxes.planes, b.n = index / boxes.planes;
    return b;
}

HOST_DEVICE int last_tap_h(const Problem& a, const Group& g) {    // of the group
    const int last = tap_h(a.t, g, kConsumers - 1);
    return last < a.s.axis[1].taps ? last : a.s.axis[1].taps - 1;
}
// Row and column of x that the first row of a group's box has, and the row of the box that a consumer's first block of columns begins with.
HOST_DEVICE int first_row(const Problem& a, const Group& g) { return a.s.axis[1].first - a.s.axis[1].shift[last_tap_h(a, g)]; }
HOST_DEVICE int first_column(const Problem& a) { return a.s.axis[2].first - a.s.axis[2].shift[a.s.axis[2].taps - 1]; }
HOST_DEVICE int first_shift(const Problem& a, const Group& g, int consumer) {
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    return (ah.shift[last_tap_h(a, g)] - ah.shift[tap_h(a.t, g, consumer)]) * a.t.pitch + aw.shift[aw.taps - 1] - aw.shift[last_tap_w(a.t, a.s, g)];
}

// The element of dweight (C_in, C_out / groups, kernel) that a row and a column of a consumer have the sum of, or -1.
HOST_DEVICE int64_t element_of(const Problem& a, const Group& g, int consumer, int row, int column) {
    const Tiling& t = a.t;
    const int m = row_block(t, g, consumer) * kRows + row, phase = m / int(a.dout_phase_channels), co = m % int(a.dout_phase_channels), block = column / t.chunk;
    const int tw = t.n_over_taps ? last_tap_w(t, a.s, g) - block : 0, ci = (g.n + (t.n_over_taps ? 0 : block)) * t.chunk + column % t.chunk;
    if (phase >= a.s.phases() || co >= a.C_out || ci >= a.C_in || tw < g.tw || block >= t.blocks) return -1;
    const int k = kernel_index(a.s, (g.td * a.s.axis[1].taps + tap_h(t, g, consumer)) * a.s.axis[2].taps + tw, phase);
    const int group_in = int(a.C_in / a.groups), group_out = int(a.C_out / a.groups);
    return k >= 0 && ci / group_in == co / group_out ? (int64_t(ci) * group_out + co % group_out) * kernel_volume(a.s) + k : -1;
}

}  // namespace dweight
