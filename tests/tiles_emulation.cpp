// Carries out the Hopper convolution's tiles on the host, with the kernel's own index arithmetic: random shapes, small integers.
// Usage: tiles_emulation SHAPES SEED; exit code 1 where an output is wrong, written twice or not at all.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../kernels/tiles_sm90.h"

using namespace conv_sm90;

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

static Tensor reference(const Geometry& g, Tensor& x, Tensor& w) {
    const Axis *ad = &g.axis[0], *ah = &g.axis[1], *aw = &g.axis[2];
    Tensor out({g.N, g.C_out, ad->out, ah->out, aw->out}, 0);
    for (int n = 0; n < g.N; n++) for (int c = 0; c < g.C_in; c++)
    for (int d = 0; d < ad->in; d++) for (int h = 0; h < ah->in; h++) for (int v = 0; v < aw->in; v++)
    for (int kd = 0; kd < ad->kernel; kd++) for (int kh = 0; kh < ah->kernel; kh++) for (int kw = 0; kw < aw->kernel; kw++) {
        const int64_t od = d * ad->stride - ad->padding + kd * ad->dilation, oh = h * ah->stride - ah->padding + kh * ah->dilation, ow = v * aw->stride - aw->padding + kw * aw->dilation;
        if (od < 0 || od >= ad->out || oh < 0 || oh >= ah->out || ow < 0 || ow >= aw->out) continue;
        for (int co = 0; co < g.C_out; co++) out.at(n, co, od, oh, ow) += x.at(n, c, d, h, v) * w.at(c, co, kd, kh, kw);
    }
    return out;
}

// The rows of GEMM_M at every tap, as scaled_half::pack_channel lays them out; NaN where nothing is written.
static std::vector<float> pack(const Geometry& g, const Problem& p, Tensor& w) {
    const StencilAxis* axis = p.s.axis;
    const int taps = axis[0].taps * axis[1].taps * axis[2].taps, phases = axis[0].phases * axis[1].phases * axis[2].phases;
    std::vector<float> packed(size_t(taps) * p.t.M_pad * g.C_in, NAN);
    for (int channel = 0; channel < g.C_out; channel++)
    for (int i = 0; i < taps * phases; i++) {
        const int tap = i % taps, phase = i / taps;
        const int k = kernel_index(p.s, tap, phase);
        for (int c = 0; c < g.C_in; c++)
            packed[(size_t(tap) * p.t.M_pad + p.t.rows.row(channel, phase)) * g.C_in + c] = k >= 0 ? w.values[(int64_t(c) * g.C_out + channel) * kernel_volume(g) + k] : 0;
    }
    return packed;
}

static bool emulate(const Geometry& g, const Problem& p) {
    const Tiling& t = p.t;
    const StencilAxis *ad = &p.s.axis[0], *ah = &p.s.axis[1], *aw = &p.s.axis[2];
    std::mt19937 random(1);
    Tensor x({g.N, g.C_in, ad->sources, ah->sources, aw->sources}, 0), w({g.C_in, g.C_out, ad->kernel, ah->kernel, aw->kernel}, 0);
    for (float& v : x.values) v = int(random() % 7) - 3;
    for (float& v : w.values) v = int(random() % 7) - 3;
    Tensor truth = reference(g, x, w), out({g.N, g.C_out, ad->out, ah->out, aw->out}, NAN);
    std::vector<int> written(out.values.size(), 0);
    const std::vector<float> weights = pack(g, p, w);
    const int phases_d = packed_phases(t, p.s, 0), phases_h = packed_phases(t, p.s, 1), C = g.C_in;
    auto put = [&](int64_t at, float v) { out.values[at] = v, written[at]++; };
    for (int64_t index = 0; index < t.tiles; index++)
    for (int warpgroup = 0; warpgroup < 2; warpgroup++) {
        Tile tile;
        locate(p, int(index), tile);
        const Run& run = tile.run[warpgroup];
        std::vector<float> sums(size_t(kRows) * t.block_n, 0), source(C), buffer(t.buffer_bytes / 4, -12345.0f);
        Cursor at(p, tile);
        while (at.next_box()) for (BoxTaps tap(at); tap.next();) {
            if (at.c > 0) continue;    // C_in fits into the first chunk
            for (int item = 0; item < t.items; item++)
            for (int q = 0; q < t.block_n; q++) {
                const int row = run.b_row + q + tap.rows + rows_of_item(p, item);    // of shared memory
                const int h = at.source_row() + row / t.pitch, v = aw->first + tile.w0 - aw->shift[aw->taps - 1] + row % t.pitch;
                const bool loaded = row < t.box_rows * t.pitch, inside = loaded && h >= 0 && h < ah->sources && v >= 0 && v < aw->sources;
                const bool margin = !loaded && int64_t(row + 1) * t.chunk * 2 <= t.input_bytes;
                for (int c = 0; c < C; c++) source[c] = inside ? x.at(tile.n, c, at.plane(), h, v) : loaded || margin ? 0.0f : NAN;
                for (int r = 0; r < kRows; r++)
                    for (int c = 0; c < C; c++) sums[r * t.block_n + q] += source[c] * weights[(size_t(tap.tap + item) * t.M_pad + run.row_tile * kRows + r) * C + c];
            }
        }
        for (int r = 0; r < kRows; r++) {
            const int granule = r / 8, octet = granule / t.rows.packed_phases, phase = granule % t.rows.packed_phases, channel = octet * 8 + r % 8;
            const int phase_w = phase % aw->phases, packed_h = phase / aw->phases % phases_h, packed_d = phase / aw->phases / phases_h, od = run.od0 + packed_d;
            if (octet >= t.rows.octets || run.outer >= outer_phases(p) || run.channel0 + channel >= g.C_out || od < 0 || od >= ad->out) continue;
            const int align = t.contiguous ? int(region_origin(p, tile, run, run.channel0 + channel, od) & 3) : 0;
            for (int q = 0; q < t.block_n; q++) {
                const int place = t.dense ? q : staged_place(p, tile, run, run.q0 + q, packed_h, phase_w);
                REQUIRE(place >= 0 || q > 0 || t.whole_rows || run.count == 0);    // the epilogue relies on the first position
                REQUIRE(place + align < t.region_stride);
                if (place >= 0) buffer[(channel * phases_d + packed_d) * t.region_stride + align + place] = sums[r * t.block_n + q];
            }
        }
        if (t.tensor_store) {
            for (int c = 0; c < kRows && run.count > 0 && run.od0 >= 0 && run.od0 < ad->out && run.channel0 + c < g.C_out; c++)
                for (int k = 0; k < t.run && run.h0 * t.tile_w + run.q0 + k < ah->out * aw->out; k++)
                    put(((tile.n * g.C_out + run.channel0 + c) * ad->out + run.od0) * int64_t(ah->out) * aw->out + run.h0 * t.tile_w + run.q0 + k, buffer[c * t.run + k]);
        } else {
            bool aligned = true;
            for_each_piece(p, tile, run, 0, 1, [&](int64_t first, int staged, int count) {
                aligned = aligned && (!t.bulk || (first - staged) % 4 == 0);
                for (int k = 0; k < count; k++) put(first + k, buffer[staged + k]);
            });
            REQUIRE(aligned);
        }
    }
    for (size_t i = 0; i < written.size(); i++) REQUIRE(written[i] == 1 && out.values[i] == truth.values[i]);
    return true;
}

static bool fits(const Tiling& t) {
    REQUIRE(shared_bytes(t) <= kSharedBytes);
    REQUIRE(t.weight_stages >= 3 && t.weight_rings * t.weight_stages <= kMaxStages && t.norm_stages <= kMaxNormStages);
    REQUIRE(t.pitch <= 256 && t.box_rows <= 256 && (!t.tensor_store || (t.run <= 256 && t.run % 4 == 0)));
    REQUIRE(t.buffer_bytes % 128 == 0 && t.table_bytes % 128 == 0 && t.weight_bytes % 1024 == 0 && t.input_bytes % 1024 == 0);
    return true;
}

int main(int, char** arguments) {
    std::mt19937 random(std::atoi(arguments[2]));
    auto below = [&](int n) { return int(random() % n); };
    int done = 0;
    while (done < std::atoi(arguments[1])) {
        Geometry g = {1 + below(2), 1 + below(2), 1 + below(70), 1, {}};
        const int same = below(3), stride = 1 + below(kMaxStride);    // stride 1, the same everywhere, any
        bool valid = true;
        for (int i = 0; i < 3; i++) {
            Axis& a = g.axis[i];
            a.kernel = 1 + below(i == 0 ? 3 : 5), a.stride = same == 0 ? 1 : same == 1 ? stride : 1 + below(kMaxStride), a.dilation = below(3) ? 1 : 1 + below(4);
            a.in = 1 + below(i == 0 ? 3 : i == 1 ? 20 : below(6) ? 40 : 300), a.padding = below(3) ? below(3) : 0;
            const int output_padding = below(2) ? below(int(a.stride > a.dilation ? a.stride : a.dilation)) : 0;
            a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + output_padding + 1;
            valid = valid && a.out > 0;
        }
        if (!valid || out_volume(g) * g.C_out > 400000) continue;
        Problem p = {g.N, g.C_out, out_volume(g), make_stencil(Direction::kForward, g), {}};
        p.t = choose_tiling(p.s, g.N, g.C_in, g.C_out, 1, below(2), below(4) ? 132 : 1 + below(132));
        done++;
        if (p.t.block_n == 0 || (fits(p.t) && emulate(g, p))) continue;
        std::printf("N %d, channels %d -> %d, block_n %d, strips %d", int(g.N), int(g.C_in), int(g.C_out), p.t.block_n, p.t.strips);
        for (const Axis& a : g.axis) std::printf(", (in %d, out %d, kernel %d, stride %d, padding %d, dilation %d)", int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation));
        std::printf("\n");
        return 1;
    }
    return 0;
}
