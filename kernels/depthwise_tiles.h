// How the kernels for groups of few channels cut their work, for host and device. The index arithmetic is that of geometry.h's phases, in both directions:
// destination q of a phase gathers tap j from source src + q * src_step + j * src_tap_step.
#pragma once

#include <initializer_list>

#include "geometry.h"

namespace depthwise {

constexpr int kMaxGroupChannels = 4;    // of either side
constexpr int kMaxStride = 4, kMaxKernel = 16;
constexpr int kMaxWeights = 4096;       // of a group

// Kernels that know the size of a kernel and the stride along H and W, K and S, from compilation on; K = 0 for the one of all others.
struct Square { int K, S; };
// Output o of H has u = o + padding + start = S * q + r, as in stencil.h; start makes that S * (q - first) + r without a remainder at the usual padding, which is (K - 1) / 2.
HOST_DEVICE constexpr int start_of(int K, int S) { return S == 1 ? 0 : (S - (K - 1) / 2 % S) % S; }

inline Square square_of(const Geometry& g) {
    const Axis &h = g.axis[1], &w = g.axis[2];
    if (h.kernel != w.kernel || h.stride != w.stride || h.dilation * w.dilation != 1) return {};
    const int K = int(h.kernel), S = int(h.stride);
    const bool built = S == 1 ? K == 3 || K == 5 : S == 2 && K >= 2 && K <= 5, aligned = (h.padding + start_of(K, S)) % S == 0 && (w.padding + start_of(K, S)) % S == 0;
    return built && aligned ? Square{K, S} : Square{};
}

// Floats of a row of a box of 32 destinations, with up to 3 in front of them, that step so far; where the compiler knows.
HOST_DEVICE constexpr int pitch_of(int step) { return 32 * step + 8; }

// Rows of a thread: fewer where boxes are larger than tiles.
HOST_DEVICE constexpr int rows_of(Direction direction, int S) { return direction == Direction::kForward || S == 1 ? 8 : 4; }

constexpr int kMostBytes = 64 * 1024;   // of shared memory, which leave room for three blocks on a multiprocessor (one where it has 99 KB)

// An axis of a tile: `tile` destinations of every phase. They read the `box` source positions from first + step * (the tile's first destination) on.
struct TileAxis {
    int phases, count;                  // destinations of the longest phase
    int step, first;
    int tile, tiles, box;
    int dst, src;                       // sizes of the tensors
};

struct Tiling {
    TileAxis axis[3];                   // D, H, W
    int src_channels, dst_channels, groups, volume;
    int rows, row_groups;               // of a thread, neighbours in their phase of H; how many such threads a column of a tile has
    int columns;                        // destinations along W, of all phases
    int pitch;                          // floats of a row of a box
    int units;                          // (plane, row group, column) of a phase of D and H
    int64_t tiles;                      // of a channel of a sample, of all
    Divisor by_columns, by_row_groups, by_tile_h, by_box_h, by_box_d, by_quads, by_phases_w, by_tiles_w, by_tiles_h;
    HOST_DEVICE int box_floats() const { return axis[0].box * axis[1].box * pitch; }
    HOST_DEVICE int quads() const { return (axis[2].box + 3 + 3) / 4; }    // of neighbours in memory, which a row of a box may need
};

inline TileAxis make_axis(Direction direction, const Axis& a) {
    TileAxis t = {};
    t.phases = int(num_phases(direction, a));
    int last = 0;
    bool any = false;
    for (int i = 0; i < t.phases; i++) {
        const Phase p = make_phase(direction, a, i);
        t.count = p.count > t.count ? p.count : t.count, t.step = p.src_step;
        for (int j = 0; j < p.taps; j++) {
            const int at = p.src + j * p.src_tap_step;
            t.first = !any || at < t.first ? at : t.first, last = !any || at > last ? at : last;
            any = true;
        }
    }
    t.box = last - t.first + 1;    // of one destination; with_tile() makes it the tile's
    const bool forward = direction == Direction::kForward;
    t.dst = int(forward ? a.out : a.in), t.src = int(forward ? a.in : a.out);
    return t;
}

// Equal tiles of at most `most` destinations, a multiple of `unit`.
inline TileAxis with_tile(TileAxis t, int most, int unit) {
    const int64_t tiles = ceil_div(t.count, most);
    t.tile = int(ceil_div(ceil_div(t.count, tiles), unit)) * unit, t.tiles = int(ceil_div(t.count, t.tile));
    t.box += (t.tile - 1) * t.step;
    return t;
}

inline bool can_tile(const Geometry& g) {
    for (const Axis& a : g.axis)
        if (a.kernel > kMaxKernel || a.stride > kMaxStride) return false;
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    return in <= kMaxGroupChannels && out <= kMaxGroupChannels && in * out * kernel_volume(g) <= kMaxWeights && in_volume(g) < 1 << 30 && out_volume(g) < 1 << 30;
}

// Tiles whose boxes fit, of all source channels, or for dweight of one, with its destinations beside them; units 0 where there are none. Of those that fit the one with the fewest
// floats to bring and to leave.
inline Tiling choose_tiling(Direction direction, const Geometry& g, bool for_dweight, int threads, int multiprocessors) {
    const bool forward = direction == Direction::kForward;
    const Square square = square_of(g);
    Tiling t = {};
    const int64_t in = g.C_in / g.groups, out = g.C_out / g.groups;
    t.src_channels = int(forward ? in : out), t.dst_channels = int(forward ? out : in), t.groups = int(g.groups), t.volume = int(kernel_volume(g));
    t.rows = rows_of(direction, square.S);
    if (!can_tile(g)) return t;
    const int rows = t.rows, channels = for_dweight ? 1 : t.src_channels;
    const TileAxis d = make_axis(direction, g.axis[0]), h = make_axis(direction, g.axis[1]), w = make_axis(direction, g.axis[2]);
    Tiling best = t;
    double least = 0;
    for (int columns : {32, 64})
    for (int row_groups : {1, 2, 4, 8})
    for (int planes : {1, 2, 4, 8, 16}) {
        t.axis[0] = with_tile(d, planes, 1), t.axis[1] = with_tile(h, row_groups * rows, rows), t.axis[2] = with_tile(w, columns / w.phases, 1);
        t.row_groups = t.axis[1].tile / rows;
        t.columns = t.axis[2].tile * t.axis[2].phases, t.pitch = square.K > 0 ? pitch_of(t.axis[2].step) : t.quads() * 4;
        if (t.quads() * 4 > t.pitch) continue;
        t.units = t.axis[0].tile * t.row_groups * t.columns;
        const int64_t bytes = (int64_t(channels) * t.box_floats() + (for_dweight ? t.units * rows : 0)) * 4;
        if (bytes > kMostBytes) continue;
        t.tiles = int64_t(t.axis[0].tiles) * t.axis[1].tiles * t.axis[2].tiles;
        // Floats of a tile: of the box, each some 2 outputs' worth, and of the outputs of whole rounds of the threads.
        const double rounds = double(ceil_div(t.units, threads)), box = double(channels) * t.axis[0].box * t.axis[1].box * t.axis[2].box;
        const double work = box + rounds * threads * rows * t.axis[0].phases * t.axis[1].phases * t.dst_channels;
        const double waves = double(g.N) * g.groups * t.tiles / (4 * multiprocessors), cost = work * (waves < 1 ? 1 : waves) * (bytes > kMostBytes / 2 ? 1.1 : 1);
        if (best.units == 0 || cost < least) best = t, least = cost;
    }
    t = best;
    if (t.units == 0) return t;
    t.by_columns = make_divisor(t.columns), t.by_row_groups = make_divisor(t.row_groups), t.by_tile_h = make_divisor(t.axis[1].tile), t.by_box_h = make_divisor(t.axis[1].box), t.by_box_d = make_divisor(t.axis[0].box);
    t.by_quads = make_divisor(t.quads()), t.by_phases_w = make_divisor(t.axis[2].phases), t.by_tiles_w = make_divisor(t.axis[2].tiles), t.by_tiles_h = make_divisor(t.axis[1].tiles);
    return t;
}

// Where a tile begins: its first destination of every phase.
struct TileOrigin { int d, h, w; };
HOST_DEVICE TileOrigin origin_of(const Tiling& t, int tile) {
    const int w = t.by_tiles_w.take(tile), h = t.by_tiles_h.take(tile);
    return {tile * t.axis[0].tile, h * t.axis[1].tile, w * t.axis[2].tile};
}

// A row of a box begins with the multiple of 4 columns at or before its first one, which stands so far behind.
HOST_DEVICE int skew_of(const Tiling& t, TileOrigin origin) { return (t.axis[2].first + origin.w * t.axis[2].step) & 3; }

}  // namespace depthwise
