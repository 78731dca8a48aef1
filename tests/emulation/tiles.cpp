// Carries out the tiles of the tensor cores' convolutions on the host, with the kernels' own index arithmetic, forward and for dx:
// random shapes, small integers, the tilings of sm_90 and of sm_80.
// Usage: tiles SHAPES SEED; exit code 1 where an output is wrong, written twice or not at all.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "../../kernels/conv_tiles.h"
#include "../../kernels/tiling_sm80.h"
#include "../../kernels/tiling_sm90.h"

using namespace conv;

#define REQUIRE(rule)                                                      \
    do {                                                                   \
        if (!(rule)) { std::printf("does not hold: %s\n", #rule); return false; } \
    } while (0)

struct Tensor {
    std::vector<int64_t> sizes;
    std::vector<float> values;
    Tensor(std::vector<int64_t> sizes, float value) : sizes(sizes) {
        int64_t count = 1;
        for (int64_t size : sizes) count *= size;
        values.assign(count, value);
    }
    float& at(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e) { return values[(((a * sizes[1] + b) * sizes[2] + c) * sizes[3] + d) * sizes[4] + e]; }
};

// Calls f(input position, output position, kernel element) for all that meet.
template <typename F> static void for_each_product(const Geometry& g, F f) {
    const Axis *ad = &g.axis[0], *ah = &g.axis[1], *aw = &g.axis[2];
    for (int d = 0; d < ad->in; d++) for (int h = 0; h < ah->in; h++) for (int v = 0; v < aw->in; v++)
    for (int kd = 0; kd < ad->kernel; kd++) for (int kh = 0; kh < ah->kernel; kh++) for (int kw = 0; kw < aw->kernel; kw++) {
        const int64_t od = d * ad->stride - ad->padding + kd * ad->dilation, oh = h * ah->stride - ah->padding + kh * ah->dilation, ow = v * aw->stride - aw->padding + kw * aw->dilation;
        if (od < 0 || od >= ad->out || oh < 0 || oh >= ah->out || ow < 0 || ow >= aw->out) continue;
        f((int64_t(d) * ah->in + h) * aw->in + v, (od * ah->out + oh) * aw->out + ow, (int64_t(kd) * ah->kernel + kh) * aw->kernel + kw);
    }
}

static Tensor reference(Direction direction, const Geometry& g, Tensor& source, Tensor& w) {
    const bool forward = direction == Direction::kForward;
    const int64_t in = in_volume(g), out = out_volume(g), volume = kernel_volume(g);
    Tensor result({g.N, forward ? g.C_out : g.C_in, forward ? out : in}, 0);
    for_each_product(g, [&](int64_t i, int64_t o, int64_t k) {
        for (int n = 0; n < g.N; n++) for (int ci = 0; ci < g.C_in; ci++) for (int co = 0; co < g.C_out; co++) {
            const float weight = w.values[(ci * g.C_out + co) * volume + k];
            if (forward) result.values[(n * g.C_out + co) * out + o] += source.values[(n * g.C_in + ci) * in + i] * weight;
            else result.values[(n * g.C_in + ci) * in + i] += source.values[(n * g.C_out + co) * out + o] * weight;
        }
    });
    return result;
}

static bool on_sm80(const Tiling& t) { return t.column_warps > 1; }

// The rows of GEMM_M at every tap, as scaled_half::copy_weight_tile lays them out, (taps, rows, source phases, channels); NaN where nothing is written.
static std::vector<float> pack(Direction direction, const Geometry& g, const Problem& p, int C, Tensor& w) {
    const int taps = p.s.taps(), phases = p.s.phases(), source_phases = p.s.source_phases();
    std::vector<float> packed(size_t(taps) * p.t.M_pad * source_phases * C, NAN);
    for (int channel = 0; channel < p.C_out; channel++)
    for (int i = 0; i < taps * phases * source_phases; i++) {
        const int tap = i % taps, phase = i / taps, k = kernel_index(p.s, tap, phase);
        for (int c = 0; c < C; c++) {
            const int64_t kernel = direction == Direction::kForward ? int64_t(c) * g.C_out + channel : int64_t(channel) * g.C_out + c;
            packed[((size_t(tap) * p.t.M_pad + p.t.rows.row(channel, phase / source_phases)) * source_phases + phase % source_phases) * C + c] = k >= 0 ? w.values[kernel * kernel_volume(g) + k] : 0;
        }
    }
    return packed;
}

static bool emulate(Direction direction, const Geometry& g, const Problem& p) {
    const Tiling& t = p.t;
    const StencilAxis *ad = &p.s.axis[0], *ah = &p.s.axis[1], *aw = &p.s.axis[2];
    std::mt19937 random(1);
    const int C = direction == Direction::kForward ? g.C_in : g.C_out, source_phases = p.s.source_phases();
    Tensor x({g.N, C, ad->source_out, ah->source_out, aw->source_out}, 0), w({g.C_in, g.C_out, ad->kernel, ah->kernel, aw->kernel}, 0);
    for (float& v : x.values) v = int(random() % 7) - 3;
    for (float& v : w.values) v = int(random() % 7) - 3;
    Tensor truth = reference(direction, g, x, w), out({g.N * t.k_parts, p.C_out, ad->out, ah->out, aw->out}, NAN);
    std::vector<int> written(out.values.size(), 0);
    std::set<std::pair<int64_t, int>> moments;    // (set, channel) that a row leaves
    const std::vector<float> weights = pack(direction, g, p, C, w);
    const int phases_h = packed_phases(t, p.s, 1);
    const int chunk = t.chunk_phases > 1 ? 0 : int(random() % (t.phase_channels / t.chunk)) * t.chunk;    // of each phase: the one that the channels are in
    auto put = [&](int64_t at, float v) { out.values[at] = v, written[at]++; };
    for (int64_t index = 0; index < t.tiles; index++)
    for (int warpgroup = 0; warpgroup < t.warpgroups; warpgroup++) {
        Tile tile;
        locate(p, int(index), tile);
        const Run& run = tile.run[warpgroup];
        std::vector<float> sums(size_t(kRows) * t.block_n, 0), source(C), buffer(t.buffer_bytes / 4, -12345.0f);
        Cursor at(p, tile);
        REQUIRE(tile.empty == !Cursor(at).next_box());    // consumers wait for the boxes of a tile that is not
        while (at.next_box()) for (int i = 0; i < BoxTaps(at).count; i++) {
            const BoxTaps::Tap tap = BoxTaps(at)[i];
            if (at.c % t.phase_channels != chunk) continue;
            const int first_phase = at.c / t.phase_channels;
            for (int phase = first_phase; phase < first_phase + t.chunk_phases; phase++)
            for (int item = 0; item < t.items; item++)
            for (int q = 0; q < t.block_n; q++) {
                const int phase_d = phase / aw->source_phases / ah->source_phases, phase_h = phase / aw->source_phases % ah->source_phases, phase_w = phase % aw->source_phases;
                const int row = run.b_row + q + tap.rows + rows_of_item(p, item);    // of shared memory
                const int plane = row / (t.box_rows * t.pitch), plane_row = row % (t.box_rows * t.pitch), h = at.source_row() + plane_row / t.pitch, v = aw->first + tile.w0 - aw->shift[aw->taps - 1] + plane_row % t.pitch;
                const bool loaded = row < t.planes * t.box_rows * t.pitch + (on_sm80(t) ? aw->shift[aw->taps - 1] : 0), inside = loaded && h >= 0 && h < ah->sources && v >= 0 && v < aw->sources;
                REQUIRE(!on_sm80(t) || int64_t(row + 1) * t.chunk * 2 <= t.input_bytes);    // reads its own stage only
                const bool margin = !loaded && int64_t(row + 1) * t.chunk * 2 <= t.input_bytes;
                const int od = (at.plane() + (plane < t.planes ? plane : 0)) * ad->source_phases + phase_d - ad->source_crop, oh = h * ah->source_phases + phase_h - ah->source_crop, ow = v * aw->source_phases + phase_w - aw->source_crop;
                const bool is_element = inside && od >= 0 && od < ad->source_out && oh >= 0 && oh < ah->source_out && ow >= 0 && ow < aw->source_out;
                for (int c = 0; c < C; c++) source[c] = is_element ? x.at(tile.sample, c, od, oh, ow) : loaded || margin ? 0.0f : NAN;
                for (int r = 0; r < kRows; r++)
                    for (int c = 0; c < C; c++) sums[r * t.block_n + q] += source[c] * weights[((size_t(tap.tap + item) * t.M_pad + run.row_tile * kRows + r) * source_phases + phase) * C + c];
            }
        }
        for (int r = 0; r < kRows; r++) {
            const int granule = r / 8, octet = granule / t.rows.packed_phases, phase = granule % t.rows.packed_phases, channel = octet * 8 + r % 8;
            const int phase_w = phase % aw->phases, packed_h = phase / aw->phases % phases_h, packed_d = phase / aw->phases / phases_h;
            const bool live = t.run_planes > 1 ? has_outputs(t, run, packed_d) : run.od0 + packed_d >= 0 && run.od0 + packed_d < ad->out;
            if (octet >= t.rows.octets || run.outer >= outer_phases(p) || run.channel0 + channel >= p.C_out || !live) continue;
            if (!on_sm80(t) && t.k_parts == 1 && run.count > 0) {
                const int64_t set = index_of_run(p, tile, warpgroup) * p.s.phases() + run.outer * t.rows.packed_phases + phase;
                REQUIRE(set / parts_of_sample(p) == tile.n && moments.emplace(set, run.channel0 + channel).second);
            }
            const int align = (run.alignment + alignment_of_region(p, channel, packed_d)) % t.staging_unit;
            std::vector<int> places(t.block_n);
            for (int q = 0; q < t.block_n; q++) places[q] = staged_place(p, tile, run, run.q0 + q, packed_h, phase_w);
            const bool outputs = std::any_of(places.begin(), places.end(), [&](int place) { return place >= 0 && (!t.whole_sectors || place < contiguous_count(p, run)); });
            REQUIRE(on_sm80(t) || run.count == 0 || !outputs || places[first_output(t, places.data())] >= 0);
            for (int q = 0; q < t.block_n; q++) {
                const int place = t.dense ? q : places[q];
                if (run.paired) {
                    const int row = q / t.tile_w, column = q - run.rows * t.pitch;
                    int paired = q < run.count ? run.paired_place + packed_h * staged_row(p) + row * paired_row(p) + q % t.tile_w * 2 + phase_w : -1;
                    if (q < run.count && q % t.tile_w == 0 && phase_w == 0 && tile.w0 * 2 < aw->crop) paired = -1;
                    const int next = column * 2 + phase_w - aw->crop;    // output of the next row
                    if (t.whole_sectors && run.oh_end < ah->out && packed_h == 0 && q >= t.block_n - 8 && next >= 0 && next < kSector - 1) paired = contiguous_count(p, run) + next;
                    REQUIRE(place == paired);
                }
                REQUIRE(place >= 0 || q > 0 || t.whole_rows || t.run_planes > 1 || run.count == 0);    // the epilogue relies on the first position
                REQUIRE(place < 0 || (place % t.region_stride + align < t.region_stride && place / t.region_stride < t.run_planes));
                if (place >= 0) buffer[(channel * region_planes(t, p.s) + packed_d) * t.region_stride + align + place] = sums[r * t.block_n + q];
            }
        }
        if (t.tensor_store) {
            for (int c = 0; c < kRows && run.count > 0 && run.od0 >= 0 && run.od0 < ad->out && run.channel0 + c < p.C_out; c++)
                for (int k = 0; k < t.run && run.h0 * t.tile_w + run.q0 + k < ah->out * aw->out; k++)
                    put(((tile.n * p.C_out + run.channel0 + c) * ad->out + run.od0) * int64_t(ah->out) * aw->out + run.h0 * t.tile_w + run.q0 + k, buffer[c * t.run + k]);
        } else {
            bool aligned = true;
            for_each_piece(p, tile, run, 0, regions_of(p, run), 1, [&](int64_t first, int region, int offset, int count) {
                const int staged = region * t.region_stride + offset;
                aligned = aligned && (!t.bulk || on_sm80(t) || (first - staged) % (t.contiguous ? t.staging_unit : 4) == 0);
                aligned = aligned && (!t.whole_sectors || ((first % kSector == 0 || run.h0 == 0) && ((first + count) % kSector == 0 || run.oh_end == ah->out)));
                for (int k = 0; k < count; k++) put(first + k, buffer[staged + k]);
            });
            REQUIRE(aligned);
        }
    }
    for (size_t i = 0; i < truth.values.size(); i++) {
        float sum = 0;
        for (size_t at = i; at < written.size(); at += truth.values.size()) {
            REQUIRE(written[at] == 1);
            sum += out.values[at];
        }
        REQUIRE(sum == truth.values[i]);
    }
    return true;
}

static bool fits(const Tiling& t, const StencilAxis& w, int shared) {
    REQUIRE((on_sm80(t) ? conv_sm80::shared_bytes(t, w) : conv_sm90::shared_bytes(t)) <= shared);
    REQUIRE(on_sm80(t) || (t.weight_stages >= 2 && t.weight_rings * t.weight_stages <= conv_sm90::kMaxStages));
    REQUIRE(on_sm80(t) || (t.pitch <= 256 && t.box_rows <= 256 && (!t.tensor_store || (t.run <= 256 && t.run % 4 == 0))));
    REQUIRE(t.buffer_bytes % 128 == 0 && t.table_bytes % 128 == 0 && t.weight_bytes % 1024 == 0 && t.input_bytes % 1024 == 0);
    return true;
}

static bool divides(std::mt19937& random) {
    for (int i = 0; i < 1000000; i++) {
        const int divisor = 1 + int(random() >> (2 + random() % 30)), most = 0x7fffffff, near = most / divisor * divisor - int(random() % 2);    // a multiple of it, or one less
        for (int n : {int(random() >> (1 + random() % 31)), near, most, divisor, divisor - 1}) REQUIRE(make_divisor(divisor).divide(n) == n / divisor);
        const int phases = 1 + int(random() % kMaxStride), x = int(random() >> 1);
        REQUIRE(divide_by_phases(x, phases) == x / phases);
    }
    return true;
}

// Layers that double sizes have as many positions as inputs, unless that takes another tap.
static bool begins_phases_well() {
    const StencilAxis three = make_forward_axis({16, 32, 3, 2, 1, 1}), four = make_forward_axis({16, 32, 4, 2, 1, 1});
    REQUIRE(three.positions == 16 && three.taps == 2 && three.crop == 0);
    REQUIRE(four.positions == 17 && four.taps == 2);
    return true;
}

int main(int, char** arguments) {
    std::mt19937 random(std::atoi(arguments[2]));
    if (!divides(random) || !begins_phases_well()) return 1;
    auto below = [&](int n) { return int(random() % n); };
    int done = 0, planes = 0, run_planes = 0, parts = 0, joined = 0;
    while (done < std::atoi(arguments[1])) {
        const Direction direction = below(3) ? Direction::kForward : Direction::kDInput;
        Geometry g = {1 + below(2), 1 + below(2), 1 + below(70), 1, {}};
        if (direction == Direction::kDInput) std::swap(g.C_in, g.C_out);
        const int same = below(3), stride = 1 + below(kMaxStride);    // stride 1, the same everywhere, any
        const bool small = below(4) == 0;    // planes
        bool valid = true;
        for (int i = 0; i < 3; i++) {
            Axis& a = g.axis[i];
            a.kernel = 1 + below(i == 0 ? 3 : 5), a.stride = same == 0 ? 1 : same == 1 ? stride : 1 + below(kMaxStride), a.dilation = below(3) ? 1 : 1 + below(4);
            a.in = small ? 1 + below(8) : i == 2 && below(3) == 0 ? 8 * (1 + below(16)) : 1 + below(i == 0 ? (below(2) ? 3 : 9) : i == 1 ? 20 : below(6) ? 40 : 300), a.padding = below(3) ? below(3) : 0;
            const int output_padding = below(2) ? below(int(a.stride > a.dilation ? a.stride : a.dilation)) : 0;
            a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + output_padding + 1;
            valid = valid && a.out > 0;
        }
        const bool forward = direction == Direction::kForward;
        if (!valid || (forward ? out_volume(g) * g.C_out : in_volume(g) * g.C_in * kernel_volume(g) / 8) > 400000) continue;
        Problem p = {g.N, forward ? g.C_out : g.C_in, forward ? out_volume(g) : in_volume(g), make_stencil(direction, g), {}};
        const int multiprocessors = small ? 1 + below(8) : below(4) ? 132 : 1 + below(132), budgets[] = {99, 163, 227}, sm80_bytes = budgets[below(3)] * 1024;
        const bool sm80 = below(2);
        const int channels = int(forward ? g.C_in : g.C_out) + (below(2) ? 0 : below(400));    // as if there were more: work to be divided
        p.t = sm80 ? conv_sm80::choose_tiling(p.s, g.N, channels, p.C_out, 1, multiprocessors, sm80_bytes)
                   : conv_sm90::choose_tiling(p.s, g.N, channels, p.C_out, 1, multiprocessors);
        done++, planes += p.t.planes > 1, run_planes += p.t.run_planes > 1, parts += p.t.k_parts > 1, joined += p.t.chunk_phases > 1;
        if (p.t.block_n == 0 || (fits(p.t, p.s.axis[2], sm80 ? sm80_bytes : conv_sm90::kSharedBytes) && emulate(direction, g, p))) continue;
        std::printf("%s on %s: N %d, channels %d -> %d, block_n %d, strips %d", forward ? "forward" : "dx", sm80 ? "sm_80" : "sm_90", int(g.N), int(g.C_in), int(g.C_out), p.t.block_n, p.t.strips);
        for (const Axis& a : g.axis) std::printf(", (in %d, out %d, kernel %d, stride %d, padding %d, dilation %d)", int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation));
        std::printf("\n");
        return 1;
    }
    std::printf("%d shapes, %d with tiles of several planes, %d with such runs, %d with parts of GEMM_K, %d with joined phases\n", done, planes, run_planes, parts, joined);
    return 0;
}
