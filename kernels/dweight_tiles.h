// How the tensor cores' kernels for dweight cut their work, and which element is where: for host and device. dweight.cuh tells the method.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace dweight {

constexpr int kConsumers = 3;
constexpr int kRows = 64;              // GEMM_M of a consumer
constexpr int kMaxItems = 3;
constexpr int kMaxStages = 6;
constexpr int kHeadBytes = 1024;

// Where a block packs dout itself (dweight_packing_sm90.cuh), it has more warps for that and fewer consumers of more sums.
constexpr int kPackingConsumers = 2, kPackingItems = 5, kPackerWarps = 8;

// --------------------------------------------------------------------------------------------------------- Tiling

struct Tiling {
    int block_n;                       // GEMM_N: 64, 128 or 192
    int chunk, blocks;                 // channels of x in a row of shared memory, and how many such columns of GEMM_N are used
    bool n_over_taps, m_over_taps;     // what GEMM_N and the consumers have neighbours of; or
    bool joint;                        // a block has all row blocks and taps (d, h), whose jobs the consumers take in turns:
    int live_jobs;                     // bit (row block, d, h): it has weights
    bool packs;                        // a block, of one group that has everything, packs dout
    int consumers, items;              // sums of kRows x block_n that a consumer has: 1; joint ones kMaxItems or kPackingItems
    int row_blocks, chunks;            // of GEMM_M, of 64 rows; of x
    int tile_w, strips, rows, row_groups, pitch;    // a stage has `rows` rows of a strip
    int steps, box_rows;               // of 16 positions; rows of x
    int dout_bytes, x_bytes;           // of a box
    int dout_boxes, x_boxes, stage_bytes, stages;
    int groups_m, groups_n, groups_h, groups_w, groups, splits;
    double plane_cycles, cycles;       // estimated, of a plane of a sample in a block, and of a multiprocessor
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
        td = t.joint ? 0 : take(s.axis[0].taps);
    }
};

// What a consumer has sums of, beside the group's taps w and channels of x.
struct Job { int row_block, td, th; };

// Whether some row of the job's block has a weight at its taps (d, h).
HOST_DEVICE bool is_live(const Problem& a, Job job) {
    const StencilAxis &ad = a.s.axis[0], &ah = a.s.axis[1], &aw = a.s.axis[2];
    if (job.th >= ah.taps || job.row_block >= a.t.row_blocks) return false;
    const int channels = int(a.dout_phase_channels);
    for (int c = job.row_block * kRows; c < (job.row_block + 1) * kRows; c += channels - c % channels) {
        const int phase = c / channels;
        if (phase < a.s.phases() && ad.live[phase / aw.phases / ah.phases] >> job.td & 1 && ah.live[phase / aw.phases % ah.phases] >> job.th & 1) return true;
    }
    return false;
}

HOST_DEVICE Job job_of(const Problem& a, const Group& g, int consumer, int item) {
    const Tiling& t = a.t;
    if (!t.joint) return {g.m + (t.m_over_taps ? 0 : consumer), g.td, g.th + (t.m_over_taps ? consumer : 0)};
    const int job = conv::place_of_bit(t.live_jobs, item * t.consumers + consumer), taps_h = a.s.axis[1].taps, row_tap = job / taps_h;
    return {row_tap / a.s.axis[0].taps, row_tap % a.s.axis[0].taps, job % taps_h};
}

// How many jobs a consumer has.
HOST_DEVICE int items_of(const Problem& a, const Group& g, int consumer) {
    return a.t.joint ? (conv::count_bits(a.t.live_jobs) + a.t.consumers - 1 - consumer) / a.t.consumers : is_live(a, job_of(a, g, consumer, 0));
}
HOST_DEVICE bool is_live(const Problem& a, const Group& g) {
    for (int consumer = 0; consumer < a.t.consumers; consumer++)
        if (items_of(a, g, consumer) > 0) return true;
    return false;
}

// The last taps of a group.
HOST_DEVICE int last_tap_h(const Problem& a, const Group& g) {
    const int taps = a.s.axis[1].taps, last = a.t.joint ? taps - 1 : g.th + (a.t.m_over_taps ? kConsumers : 1) - 1;
    return last < taps ? last : taps - 1;
}
// That tap w is the first block of columns, so that the next blocks are further on in x.
HOST_DEVICE int last_tap_w(const Tiling& t, const Stencil& s, int first) {
    const int last = first + (t.n_over_taps ? t.blocks : 1) - 1;
    return last < s.axis[2].taps ? last : s.axis[2].taps - 1;
}

// Boxes of a stage that a group loads.
HOST_DEVICE int dout_boxes_of(const Tiling& t, const Group& g) { return t.dout_boxes < t.row_blocks - g.m ? t.dout_boxes : t.row_blocks - g.m; }
HOST_DEVICE int x_boxes_of(const Tiling& t, const Group& g) { return t.joint ? t.x_boxes : t.n_over_taps ? 1 : t.blocks < t.chunks - g.n ? t.blocks : t.chunks - g.n; }
HOST_DEVICE int x_bytes_of(const Tiling& t, const Group& g) { return x_boxes_of(t, g) * t.box_rows * t.pitch * t.chunk * 2; }

// The boxes of GEMM_K: (sample, plane, strip, rows), for the planes of dout that the tap d connects with one of x, or for all.
struct Boxes {
    int begin_d, planes;
    int count;
    HOST_DEVICE Boxes(const Problem& a, const Group& g) {
        const StencilAxis& ad = a.s.axis[0];
        const int offset = ad.shift[g.td] - ad.first, end = ad.sources + offset < ad.positions ? ad.sources + offset : ad.positions;
        begin_d = offset > 0 ? offset : 0;
        planes = end > begin_d ? end - begin_d : 0;
        if (a.t.joint) begin_d = 0, planes = ad.positions;
        count = int(a.N) * planes * a.t.strips * a.t.row_groups;    // each has many positions
    }
    HOST_DEVICE int begin_of(const Tiling& t, int split) const { return int(int64_t(count) * split / t.splits); }
};

// Rows of x from one block of columns to the next, where they are taps.
HOST_DEVICE int step_w(const Stencil& s) { return s.axis[2].taps > 1 ? s.axis[2].shift[1] - s.axis[2].shift[0] : 0; }

// A block that packs takes dout by units: so many elements of a box's row, of so many channels. A box's units are (phase d, row, phase h, elements, channels).
constexpr int kUnitElements = 64, kUnitChannels = 8, kMostUnits = 32;
HOST_DEVICE int row_elements(const Problem& a) { return a.t.tile_w * a.s.axis[2].phases; }    // of a box
HOST_DEVICE int units_of_box(const Problem& a) {
    return int(ceil_div(a.C_out, kUnitChannels)) * int(ceil_div(row_elements(a), kUnitElements)) * a.t.rows * a.s.axis[0].phases * a.s.axis[1].phases;
}

// How GEMM_M, GEMM_N and the taps are shared out. False where a joint one does not fit.
inline bool cut_products(Problem& p, int64_t phase_channels_x, bool joint, bool packs) {
    const Stencil& s = p.s;
    const StencilAxis &d = s.axis[0], &h = s.axis[1], &w = s.axis[2];
    Tiling& t = p.t = {};
    t.chunk = phase_channels_x % 64 == 0 ? 64 : int(phase_channels_x);
    t.chunks = int(phase_channels_x / t.chunk);
    t.row_blocks = int(ceil_div(p.dout_phase_channels * s.phases(), kRows));
    t.n_over_taps = w.taps > 1, t.m_over_taps = !joint && h.taps > 1, t.joint = joint;
    const int columns = t.n_over_taps ? w.taps : t.chunks, most = 192 / t.chunk;
    t.blocks = int(ceil_div(columns, ceil_div(columns, most)));
    t.block_n = t.blocks * t.chunk <= 64 ? 64 : t.blocks * t.chunk <= 128 ? 128 : 192;
    t.groups_m = int(joint ? 1 : t.m_over_taps ? t.row_blocks : ceil_div(t.row_blocks, kConsumers));
    t.groups_n = int(t.n_over_taps ? t.chunks : ceil_div(t.chunks, t.blocks));
    t.groups_h = int(joint ? 1 : t.m_over_taps ? ceil_div(h.taps, kConsumers) : h.taps);
    t.groups_w = int(t.n_over_taps ? ceil_div(w.taps, t.blocks) : 1);
    t.groups = (joint ? 1 : d.taps) * t.groups_h * t.groups_w * t.groups_n * t.groups_m;
    t.dout_boxes = t.m_over_taps ? 1 : joint || t.row_blocks < kConsumers ? t.row_blocks : kConsumers;
    t.x_boxes = joint ? d.taps : t.n_over_taps ? 1 : t.block_n / t.chunk;
    t.packs = packs, t.consumers = packs ? kPackingConsumers : kConsumers, t.items = 1;
    if (!joint) return true;
    const int jobs = t.row_blocks * d.taps * h.taps;
    if (t.block_n * kMaxItems > 192 || jobs > 31) return false;
    for (int job = 0; job < jobs; job++) t.live_jobs |= int(is_live(p, {job / h.taps / d.taps, job / h.taps % d.taps, job % h.taps})) << job;
    t.items = packs ? kPackingItems : kMaxItems;
    return conv::count_bits(t.live_jobs) > kConsumers && conv::count_bits(t.live_jobs) <= t.consumers * t.items;
}

// The boxes of least estimated time. False where none fit.
inline bool cut_boxes(Problem& p, int shared_bytes) {
    const Stencil& s = p.s;
    const StencilAxis &h = s.axis[1], &w = s.axis[2];
    Tiling& t = p.t;
    const int halo_w = w.shift[w.taps - 1];
    int halo_h = 0;
    for (int i = 0; i < t.groups_h; i++) {
        Group g(t, s, 0);
        g.th = i * kConsumers;
        const int halo = t.m_over_taps || t.joint ? h.shift[last_tap_h(p, g)] - h.shift[g.th] : 0;
        halo_h = halo > halo_h ? halo : halo_h;
    }
    const int row_bytes = t.chunk * 2;
    // Jobs of a block, and the cycles of one: bound by the tensor cores or by shared memory.
    const int jobs = t.joint ? conv::count_bits(t.live_jobs) : t.m_over_taps ? (h.taps < kConsumers ? h.taps : kConsumers) : t.dout_boxes;
    const double product = t.block_n / 2.0, operands = (kRows * 32 + t.block_n * 32) / 128.0;
    Tiling best = {};
    for (int strips = 1; strips <= 16 && strips <= w.positions; strips++)
    for (int rows = 1; rows <= h.positions && rows <= 64; rows++) {
        t.strips = strips, t.rows = rows;
        t.tile_w = int(ceil_div(w.positions, strips));
        t.pitch = conv::box_pitch(w, t.tile_w, strips);
        t.row_groups = int(ceil_div(h.positions, rows));
        t.steps = int(ceil_div(int64_t(rows - 1) * t.pitch + t.tile_w, 16));
        t.box_rows = rows + halo_h;
        if (t.pitch > 256 || t.tile_w > 256 || t.box_rows > 256) continue;
        const int64_t reach = int64_t(halo_h) * t.pitch + t.steps * 16 + halo_w + int64_t(t.block_n / t.chunk) * step_w(s), box = int64_t(t.box_rows) * t.pitch;
        const int64_t dout_bytes = ceil_div(int64_t(t.steps) * 16 * kRows * 2, 1024) * 1024, x_bytes = ceil_div((reach > box ? reach : box) * row_bytes, 1024) * 1024;
        const int64_t stage = t.dout_boxes * dout_bytes + t.x_boxes * x_bytes, stages = (shared_bytes - kHeadBytes) / stage;
        if (stages < 2) break;
        if (t.packs && units_of_box(p) > kMostUnits) continue;
        t.dout_bytes = int(dout_bytes), t.x_bytes = int(x_bytes), t.stage_bytes = int(stage), t.stages = int(stages < kMaxStages ? stages : kMaxStages);
        // Cycles of a stage: the products, or the loads, at 18 bytes a cycle, or packing: a packer takes 1250 for a unit, and loads the ends of rows for nothing.
        const double products = t.steps * jobs * (product > operands ? product : operands);
        const double dout = t.packs ? double(p.C_out) * s.axis[0].phases * h.phases * rows * (row_elements(p) + 16) * 4 : t.dout_boxes * double(rows) * t.tile_w * 128;
        const double loads = (dout + double(x_boxes_of(t, Group(t, s, 0))) * box * row_bytes) / 18, packing = t.packs ? ceil_div(units_of_box(p), kPackerWarps) * 1250.0 : 0;
        const double time = (std::max({products, loads, packing}) + 150) * strips * t.row_groups * (t.stages == 2 ? 1.15 : 1.0);
        if (best.block_n == 0 || time < best.plane_cycles) best = t, best.plane_cycles = time;
    }
    t = best;
    return t.block_n > 0;
}

// Sets the parts of GEMM_K that make full waves of blocks, as few as that takes.
inline void split(Problem& p, int multiprocessors) {
    int64_t live = 0, boxes = 0;
    for (int group = 0; group < p.t.groups; group++) {
        const Group g(p.t, p.s, group);
        const int64_t count = Boxes(p, g).count;
        if (is_live(p, g)) live++, boxes = count > boxes ? count : boxes;
    }
    double best_waste = 1e30;
    int best = 1;
    for (int waves = 1; waves <= 4 && live > 0; waves++) {
        int64_t splits = int64_t(waves) * multiprocessors / live;
        splits = splits < 1 ? 1 : splits > boxes && boxes > 0 ? boxes : splits;
        const double waste = double(ceil_div(splits * live, multiprocessors)) / splits * (1 + 0.02 * waves);
        if (waste < best_waste) best_waste = waste, best = int(splits);
    }
    p.t.splits = best;
    const double planes = double(boxes) / (p.t.strips * p.t.row_groups);
    p.t.cycles = ceil_div(live * best, multiprocessors) * (p.t.plane_cycles * planes / best + 2000.0 * ceil_div(p.N, best) + 3000) + double(best + 1) * p.C_in * p.C_out / p.groups * kernel_volume(p.s) * 4 / 500 + 8000;
}

// Whether a block can pack dout: it reads all of a box, and lanes have the same phase in all of a row's units. Known when products are cut.
inline bool can_pack(const Problem& p) { return p.t.groups == 1 && 32 % p.s.axis[2].phases == 0; }
// Where that is faster than a copy of dout first (NOTES.md): units are not half empty, and there is enough to do for all packers and blocks. Known when boxes are cut.
inline bool pays_to_pack(const Problem& p, int multiprocessors) {
    return row_elements(p) > kUnitElements / 2 && units_of_box(p) >= 2 * kPackerWarps && Boxes(p, Group(p.t, p.s, 0)).count >= 32 * multiprocessors;
}

// The tiling; block_n 0 where none fits. A joint one, where there is one, reads least. packs: one of blocks that pack dout, where that pays.
inline Tiling choose_tiling(Problem p, int64_t phase_channels_x, int multiprocessors, int shared_bytes, bool packs) {
    const StencilAxis& w = p.s.axis[2];
    for (int t = 1; t < w.taps; t++)
        if (w.shift[t] - w.shift[t - 1] != step_w(p.s)) return {};
    for (bool joint : {true, false}) {
        if ((packs && !joint) || !cut_products(p, phase_channels_x, joint, packs) || (packs && !can_pack(p))) continue;
        if (!cut_boxes(p, shared_bytes) || (packs && !pays_to_pack(p, multiprocessors))) continue;
        split(p, multiprocessors);
        return p.t;
    }
    return {};
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

// The next one, but for the last.
HOST_DEVICE void advance(const Problem& a, const Boxes& boxes, Box& b) {
    b.h0 += a.t.rows;
    if (b.h0 < a.t.row_groups * a.t.rows) return;
    b.h0 = 0, b.w0 += a.t.tile_w;
    if (b.w0 < a.t.strips * a.t.tile_w) return;
    b.w0 = 0, b.d++;
    if (b.d == boxes.begin_d + boxes.planes) b.d = boxes.begin_d, b.n++;
}

// Row and column of x that the first row of a group's box has, and the row of the box that the first block of columns of a job begins with.
HOST_DEVICE int first_row(const Problem& a, const Group& g) { return a.s.axis[1].first - a.s.axis[1].shift[last_tap_h(a, g)]; }
HOST_DEVICE int first_column(const Problem& a) { return a.s.axis[2].first - a.s.axis[2].shift[a.s.axis[2].taps - 1]; }
HOST_DEVICE int first_shift(const Problem& a, const Group& g, Job job) {
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    return (ah.shift[last_tap_h(a, g)] - ah.shift[job.th]) * a.t.pitch + aw.shift[aw.taps - 1] - aw.shift[last_tap_w(a.t, a.s, g.tw)];
}
// Which boxes of a stage a job reads, of dout and the first of x; and what the latter has.
HOST_DEVICE int dout_box_of(const Tiling& t, Job job, int consumer) { return t.joint ? job.row_block : t.m_over_taps ? 0 : consumer; }
HOST_DEVICE int x_box_of(const Tiling& t, Job job) { return t.joint ? job.td : 0; }
struct BoxOfX { int chunk, td; };
HOST_DEVICE BoxOfX box_of_x(const Tiling& t, const Group& g, int box) { return t.joint ? BoxOfX{g.n, box} : BoxOfX{g.n + box, g.td}; }
// From one block of columns to the next, where the joint's one block may be half of GEMM_N.
HOST_DEVICE int block_bytes(const Tiling& t, const Stencil& s) { return t.n_over_taps ? step_w(s) * t.chunk * 2 : t.joint ? 0 : t.x_bytes; }

// Where the sum for an element k of the kernel's volume is, whatever the channels: the first of the groups that have its taps; among the jobs of a row block, or the
// consumer; block of columns; first row of GEMM_M.
struct SumOfTap { int group, job, block, first_row; };
HOST_DEVICE SumOfTap sum_of_tap(const Problem& a, int k) {
    const Tiling& t = a.t;
    const StencilAxis &ah = a.s.axis[1], &aw = a.s.axis[2];
    const TapPhase place = place_of_kernel(a.s, k);
    const int tw = place.tap % aw.taps, dh = place.tap / aw.taps, th = dh % ah.taps, td = dh / ah.taps;
    const int group_w = t.n_over_taps ? tw / t.blocks : 0, group_h = t.joint ? 0 : t.m_over_taps ? th / kConsumers : th;
    return {(((t.joint ? 0 : td) * t.groups_h + group_h) * t.groups_w + group_w) * t.groups_n * t.groups_m, t.joint ? dh : th % kConsumers,
            t.n_over_taps ? last_tap_w(t, a.s, group_w * t.blocks) - tw : 0, place.phase * int(a.dout_phase_channels)};
}

// The same of an input channel, whatever the taps: what it adds to the group; block of columns; column.
struct SumOfInput { int group, block, column; };
HOST_DEVICE SumOfInput sum_of_input(const Problem& a, int ci) {
    const Tiling& t = a.t;
    const int chunk = ci / t.chunk, n = t.n_over_taps ? chunk : chunk / t.blocks;
    return {n * t.groups_m, t.n_over_taps ? 0 : chunk - n * t.blocks, ci - chunk * t.chunk};
}

// Of which group, consumer and item, in which row and column the sum for an output channel is.
struct Sum { int group, consumer, item, row, column; };
HOST_DEVICE Sum sum_of(const Problem& a, const SumOfTap& tap, const SumOfInput& input, int co) {
    const Tiling& t = a.t;
    const int m = tap.first_row + co, row_block = m / kRows;
    Sum sum = {tap.group + input.group, 0, 0, m % kRows, (tap.block + input.block) * t.chunk + input.column};
    if (t.joint) {
        const int job = row_block * a.s.axis[0].taps * a.s.axis[1].taps + tap.job, live = conv::count_bits(t.live_jobs & ((1 << job) - 1));
        sum.consumer = live % t.consumers, sum.item = live / t.consumers;
    } else if (t.m_over_taps) {
        sum.group += row_block, sum.consumer = tap.job;
    } else {
        sum.group += row_block / kConsumers, sum.consumer = row_block % kConsumers;
    }
    return sum;
}

}  // namespace dweight
