// How dweight of small grids and many channels is cut, element by element of the kernel (dweight_taps_sm90.cuh).
#pragma once

#include <algorithm>
#include <initializer_list>

#include "conv_tiling.h"

namespace dweight_taps {

constexpr int kBlock = 64;                 // channels of a box
constexpr int kConsumers = 2;              // warpgroups that multiply
constexpr int kMaxSteps = 7, kMinStages = 3, kMaxStages = 8;
constexpr int kHeadBytes = 1024;

// GEMM_M = input channels, GEMM_N = output channels, GEMM_K = positions, for one element of the kernel. A stage has a box of positions, of x and of dout's phase, in 16 * steps rows; those behind the
// box are zeros. So no positions are wasted on gaps between rows, of which small grids would have many, and every element loads its own boxes.
struct Plan {
    Stencil s;                             // the forward's
    int N, C_in, C_out, dout_phase_channels;
    int x_blocks, dout_blocks;             // channels of x of a consumer, and of dout, in blocks
    int row_tiles, column_tiles;
    int box[3], boxes[3];                  // positions of a box along D, H, W; boxes of a sample
    int steps, stages, splits;             // splits: parts of GEMM_K
    double cycles;                         // estimated, of a multiprocessor; 0: the layer does not fit
    HOST_DEVICE int rows() const { return row_tiles * kConsumers * x_blocks * kBlock; }
    HOST_DEVICE int columns() const { return column_tiles * dout_blocks * kBlock; }
    HOST_DEVICE int sample_boxes() const { return boxes[0] * boxes[1] * boxes[2]; }
    HOST_DEVICE int positions() const { return box[0] * box[1] * box[2]; }
    HOST_DEVICE int block_bytes() const { return steps * 16 * kBlock * 2; }
    HOST_DEVICE int stage_blocks() const { return kConsumers * x_blocks + dout_blocks; }
    HOST_DEVICE int stage_bytes() const { return stage_blocks() * block_bytes(); }
    HOST_DEVICE int shared_bytes() const { return kHeadBytes + stages * stage_bytes(); }
    HOST_DEVICE int tiles() const { return kernel_volume(s) * row_tiles * column_tiles; }
    HOST_DEVICE int begin_of(int split) const { return int(int64_t(N) * sample_boxes() * split / splits); }    // boxes
    HOST_DEVICE int64_t partial_count() const { return cycles > 0 ? int64_t(splits) * kernel_volume(s) * rows() * columns() : 0; }    // (splits, kernel, rows, columns)
};

// A block's tile, and its part of GEMM_K.
struct Tile { int k, row, column, split; };    // element of the kernel; first channels
HOST_DEVICE Tile tile_of(const Plan& p, int index) {
    Tile t;
    t.column = index % p.column_tiles * p.dout_blocks * kBlock, index /= p.column_tiles;
    t.row = index % p.row_tiles * kConsumers * p.x_blocks * kBlock, index /= p.row_tiles;
    t.k = index % kernel_volume(p.s), t.split = index / kernel_volume(p.s);
    return t;
}

// A box: its sample and first position.
struct Box { int n, d, h, w; };
HOST_DEVICE Box box_of(const Plan& p, int index) {
    Box b;
    b.w = index % p.boxes[2] * p.box[2], index /= p.boxes[2];
    b.h = index % p.boxes[1] * p.box[1], index /= p.boxes[1];
    b.d = index % p.boxes[0] * p.box[0], b.n = index / p.boxes[0];
    return b;
}

// The parts of GEMM_K of least estimated time, and that.
inline void split(Plan& p, int multiprocessors) {
    const int64_t boxes = int64_t(p.N) * p.sample_boxes();
    // A stage: its products, or what comes from the L2 cache.
    const double stage = std::max(p.steps * kConsumers * p.x_blocks * p.dout_blocks * kBlock / 2.0, p.stage_blocks() * double(p.positions()) * kBlock * 2 / 20) + 60;
    for (int splits = 1; splits <= 64 && splits <= boxes; splits++) {
        const double added = double(splits + 1) * kernel_volume(p.s) * p.C_in * p.C_out * 4;    // bytes
        const double time = ceil_div(int64_t(p.tiles()) * splits, multiprocessors) * (ceil_div(boxes, splits) * stage + 5000) + added / 1500 + 4000;
        if (p.cycles == 0 || time < p.cycles) p.cycles = time, p.splits = splits;
    }
}

// The plan of least estimated time, of no cycles where the layer does not fit. most_shared: bytes that a block can have.
inline Plan make_plan(const Stencil& s, const Geometry& g, int dout_phase_channels, int most_shared, int multiprocessors) {
    Plan best = {}, p = {};
    if (g.groups > 1 || g.C_in <= kBlock / 2 || g.C_out <= kBlock / 2 || g.N == 0 || g.C_in >= 1 << 20 || g.C_out >= 1 << 20) return best;
    p.s = s, p.N = int(g.N), p.C_in = int(g.C_in), p.C_out = int(g.C_out), p.dout_phase_channels = dout_phase_channels;
    const int d = s.axis[0].positions, h = s.axis[1].positions, w = s.axis[2].positions;
    for (int x_blocks : {2, 1})
    for (int dout_blocks : {2, 1})
    for (int box_w = std::min(w, 16 * kMaxSteps); box_w > 0 && box_w * 2 > std::min(w, 16 * kMaxSteps); box_w--)    // whole rows, or long pieces
    for (int box_h = 1; box_h <= h && box_h * box_w <= 16 * kMaxSteps; box_h++)
    for (int box_d = 1; box_d <= d && box_d * box_h * box_w <= 16 * kMaxSteps; box_d++) {
        p.x_blocks = x_blocks, p.dout_blocks = dout_blocks;
        p.row_tiles = int(ceil_div(p.C_in, kConsumers * x_blocks * kBlock)), p.column_tiles = int(ceil_div(p.C_out, dout_blocks * kBlock));
        p.box[0] = box_d, p.box[1] = box_h, p.box[2] = box_w;
        p.boxes[0] = int(ceil_div(d, box_d)), p.boxes[1] = int(ceil_div(h, box_h)), p.boxes[2] = int(ceil_div(w, box_w));
        if (double(p.N) * p.boxes[0] * p.boxes[1] * p.boxes[2] > 1 << 28) continue;
        p.steps = int(ceil_div(p.positions(), 16));
        p.stages = std::min((most_shared - kHeadBytes) / p.stage_bytes(), kMaxStages);
        if (p.stages < kMinStages || int64_t(p.tiles()) * 64 > 1 << 30) continue;
        p.cycles = 0;
        split(p, multiprocessors);
        if (best.cycles == 0 || p.cycles < best.cycles) best = p;
    }
    return best;
}

}  // namespace dweight_taps
