// Carries out the tensor cores' dweight on the host, with the kernels' own index arithmetic: random shapes, small integers. The kernel that adds the parts runs itself (host_cuda/).
// Usage: dweight SHAPES SEED; exit code 1 where an element is wrong.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "dweight_parts.cuh"
#include "dweight_units.h"

using namespace dweight;

#define REQUIRE(rule)                                                      \
    do {                                                                   \
        if (!(rule)) { std::printf("does not hold: %s\n", #rule); return false; } \
    } while (0)

// The one that is made, or a random one.
static AddPlan some_plan(const Problem& p, std::mt19937& random) {
    const auto below = [&](int n) { return int(random() % n); };
    if (below(3) == 0) return make_add_plan(p);
    AddPlan plan = {below(4), kernel_volume(p.s), 1};
    if (plan.outputs == 0) plan.taps = 1 + below(plan.taps);
    while (plan.sums() * plan.shares * 2 <= kAddThreads && below(4)) plan.shares *= 2;
    return plan.row() * kAddInputs > kAddFloats ? make_add_plan(p) : plan;
}

// Cuts sums, each an item's (kRows, block_n), into parts of small integers, and has the kernel add them.
static int shared = 0, cut = 0, several = 0;    // plans of each kind
static bool adds_parts(const Problem& p, const std::vector<std::vector<float>>& all_sums, const std::vector<float>& truth) {
    static std::mt19937 random(1);
    const Tiling& t = p.t;
    const int64_t part = partial_count(t) / t.splits;
    std::vector<float> partial(part * t.splits, NAN), dweight(truth.size() + 1, NAN);
    for (int index = 0; index < int(all_sums.size()); index++)
    for (int i = 0; i < int(all_sums[index].size()); i++) {
        const int consumer = index / t.items;
        const int place = place_in_partial(t, {consumer / t.consumers, consumer % t.consumers, index % t.items, i / t.block_n, i % t.block_n});
        REQUIRE(place >= 0 && place < part && std::isnan(partial[place]));
        float left = all_sums[index][i];
        for (int split = 1; split < t.splits; split++) {
            const int own = int(random() % 7) - 3;
            partial[split * part + place] = own, left -= own;
        }
        partial[place] = left;
    }
    const AddPlan plan = some_plan(p, random);
    REQUIRE(launch(add_parts_kernel, plan.blocks(p), kAddThreads, nullptr, p, plan, partial.data(), kFloat32, dweight.data()) == cudaSuccess);
    for (size_t i = 0; i < truth.size(); i++) REQUIRE(dweight[i] == truth[i]);
    REQUIRE(std::isnan(dweight.back()));
    shared += plan.shares > 1, cut += plan.tap_tiles(p) > 1, several += plan.outputs > 0;
    return true;
}

static bool emulate(const Geometry& g, const Problem& p, bool adds) {
    const Tiling& t = p.t;
    const StencilAxis *ad = &p.s.axis[0], *ah = &p.s.axis[1], *aw = &p.s.axis[2];
    const Axis* axis = g.axis;
    const int64_t in = in_volume(g), out = out_volume(g), volume = kernel_volume(g), group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
    std::mt19937 random(1);
    std::vector<float> x(g.N * g.C_in * in), dout(g.N * g.C_out * out), truth(g.C_in * group_out * volume, 0);
    for (float& v : x) v = int(random() % 7) - 3;
    for (float& v : dout) v = int(random() % 7) - 3;
    for (int n = 0; n < g.N; n++)
    for (int d = 0; d < axis[0].in; d++) for (int h = 0; h < axis[1].in; h++) for (int w = 0; w < axis[2].in; w++)
    for (int kd = 0; kd < axis[0].kernel; kd++) for (int kh = 0; kh < axis[1].kernel; kh++) for (int kw = 0; kw < axis[2].kernel; kw++) {
        const int64_t od = d * axis[0].stride - axis[0].padding + kd * axis[0].dilation, oh = h * axis[1].stride - axis[1].padding + kh * axis[1].dilation, ow = w * axis[2].stride - axis[2].padding + kw * axis[2].dilation;
        if (od < 0 || od >= axis[0].out || oh < 0 || oh >= axis[1].out || ow < 0 || ow >= axis[2].out) continue;
        const int64_t i = (int64_t(d) * axis[1].in + h) * axis[2].in + w, o = (od * axis[1].out + oh) * axis[2].out + ow, k = (int64_t(kd) * axis[1].kernel + kh) * axis[2].kernel + kw;
        for (int ci = 0; ci < g.C_in; ci++) for (int c = 0; c < group_out; c++)
            truth[(ci * group_out + c) * volume + k] += x[(n * g.C_in + ci) * in + i] * dout[(n * g.C_out + ci / group_in * group_out + c) * out + o];
    }
    std::vector<std::vector<float>> all_sums(size_t(t.groups) * t.consumers * t.items);    // empty: idle
    for (int index = 0; index < t.groups; index++)
    for (int consumer = 0; consumer < t.consumers; consumer++)
    for (int item = 0; item < items_of(p, Group(t, p.s, index), consumer); item++) {
        const Group group(t, p.s, index);
        const Job job = job_of(p, group, consumer, item);
        REQUIRE(item < t.items && is_live(p, job) && dout_box_of(t, job, consumer) < dout_boxes_of(t, group) && x_box_of(t, job) < x_boxes_of(t, group));
        REQUIRE((t.joint ? dout_box_of(t, job, consumer) : group.m + dout_box_of(t, job, consumer)) == job.row_block && box_of_x(t, group, x_box_of(t, job)).td == job.td);
        std::vector<float>& sums = all_sums[(size_t(index) * t.consumers + consumer) * t.items + item];
        sums.assign(kRows * t.block_n, 0);
        const Boxes boxes(p, group);
        Box next = {};
        for (int i = 0; i < boxes.count; i++) {
            const Box b = box_of(p, boxes, i);
            REQUIRE(b.n < g.N && b.d >= 0 && b.d < ad->positions);
            REQUIRE(i == 0 || (next.n == b.n && next.d == b.d && next.w0 == b.w0 && next.h0 == b.h0));
            next = b, advance(p, boxes, next);
            const int plane = ad->first + b.d - ad->shift[job.td];
            if (plane < 0 || plane >= ad->sources) {    // zeros
                REQUIRE(t.joint);
                continue;
            }
            for (int q = 0; q < t.steps * 16; q++) {
                // dout's position, and zeros behind and between its rows.
                const int row = q / t.pitch, column = q % t.pitch, ph = b.h0 + row, pw = b.w0 + column;
                const bool position = row < t.rows && column < t.tile_w && ph < ah->positions && pw < aw->positions;
                float a[kRows];
                for (int r = 0; r < kRows; r++) {
                    const int m = job.row_block * kRows + r, phase = m / int(p.dout_phase_channels), co = m % int(p.dout_phase_channels);
                    const int od = b.d * ad->phases + phase / aw->phases / ah->phases - ad->crop, oh = ph * ah->phases + phase / aw->phases % ah->phases - ah->crop, ow = pw * aw->phases + phase % aw->phases - aw->crop;
                    const bool inside = position && phase < p.s.phases() && co < g.C_out && od >= 0 && od < ad->out && oh >= 0 && oh < ah->out && ow >= 0 && ow < aw->out;
                    a[r] = inside ? dout[(b.n * g.C_out + co) * out + (int64_t(od) * ah->out + oh) * aw->out + ow] : 0;
                }
                for (int n = 0; n < t.block_n; n++) {
                    const int block = n / t.chunk, ci = (group.n + (t.n_over_taps ? 0 : block)) * t.chunk + n % t.chunk;    // a joint one's are one box
                    const int at = q + first_shift(p, group, job) + (t.n_over_taps ? block * step_w(p.s) : 0);    // row of shared memory
                    REQUIRE(int64_t(at + 1) * t.chunk * 2 <= t.x_bytes);
                    if (block >= t.blocks || ci >= g.C_in || at >= t.box_rows * t.pitch) continue;    // columns that are not used, channels and rows that are zero
                    const int h = first_row(p, group) + b.h0 + at / t.pitch, w = first_column(p) + b.w0 + at % t.pitch;
                    if (h < 0 || h >= ah->sources || w < 0 || w >= aw->sources) continue;
                    const float value = x[(b.n * g.C_in + ci) * in + (int64_t(plane) * ah->sources + h) * aw->sources + w];
                    for (int r = 0; r < kRows; r++) sums[r * t.block_n + n] += a[r] * value;
                }
            }
        }
    }
    for (int ci = 0; ci < g.C_in; ci++) for (int c = 0; c < group_out; c++) for (int k = 0; k < volume; k++) {
        const Sum sum = sum_of(p, sum_of_tap(p, k), sum_of_input(p, ci), ci / group_in * group_out + c);
        REQUIRE(sum.group < t.groups && sum.consumer < t.consumers && sum.item < t.items);
        const std::vector<float>& sums = all_sums[(size_t(sum.group) * t.consumers + sum.consumer) * t.items + sum.item];
        REQUIRE(!sums.empty() && sums[sum.row * t.block_n + sum.column] == truth[(ci * group_out + c) * volume + k]);
    }
    return !adds || adds_parts(p, all_sums, truth);
}

// Every element of a box of dout, C_out rounded up to whole units, is in one place of one unit, and goes where the products look for it.
static bool packs_all(const Problem& p) {
    const Tiling& t = p.t;
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int units = units_of_box(p), octets = int(ceil_div(p.C_out, kUnitChannels)), channels = int(p.dout_phase_channels);
    REQUIRE(units <= kMostUnits);
    std::set<std::pair<int, int>> places;
    for (int i = 0; i < units; i++)
    for (int e = 0; e < kUnitElements; e++) {
        const Unit unit = unit_of(p, i);
        const int row = unit.row, u = unit.u + e;    // of the box, phases included
        if (u >= row_elements(p)) continue;
        REQUIRE(unit.from + e == (unit.phase_d * ah.out + row) * aw.out + u);
        const int position = unit.position + e / aw.phases, channel = unit.copy_channel + e % aw.phases * channels;
        REQUIRE(position == row / ah.phases * t.pitch + u / aw.phases && position < t.steps * 16 && channel / kRows < t.dout_boxes);
        REQUIRE(channel == ((unit.phase_d * ah.phases + row % ah.phases) * aw.phases + u % aw.phases) * channels + unit.channel && unit.channel < p.C_out);
        REQUIRE(places.insert({position, channel}).second);
    }
    REQUIRE(int(places.size()) == octets * ad.phases * t.rows * ah.phases * row_elements(p));
    return true;
}

static bool fits(const Tiling& t, int shared_bytes) {
    REQUIRE(kHeadBytes + t.stages * t.stage_bytes <= shared_bytes && t.stages >= 2 && t.stages <= kMaxStages);
    REQUIRE(t.dout_bytes % 1024 == 0 && t.x_bytes % 1024 == 0 && t.pitch <= 256 && t.tile_w <= 256 && t.box_rows <= 256 && t.pitch >= t.tile_w);
    REQUIRE(t.stage_bytes == t.dout_boxes * t.dout_bytes + t.x_boxes * t.x_bytes && t.blocks * t.chunk <= t.block_n);
    return true;
}

int main(int, char** arguments) {
    std::mt19937 random(std::atoi(arguments[2]));
    auto below = [&](int n) { return int(random() % n); };
    int done = 0, joint = 0, packing = 0;
    while (done < std::atoi(arguments[1])) {
        const int groups = below(4) ? 1 : 2;
        Geometry g = {1 + below(2), groups * (1 + below(below(3) ? 3 : 80)), groups * (1 + below(below(3) ? 3 : 80)), groups, {}};
        const int same = below(3), stride = 1 + below(kMaxStride);    // stride 1, the same everywhere, any
        bool valid = true;
        double products = double(g.N) * g.C_in * g.C_out;
        for (int i = 0; i < 3; i++) {
            Axis& a = g.axis[i];
            a.kernel = 1 + below(i == 0 ? 3 : 5), a.stride = same == 0 ? 1 : same == 1 ? stride : 1 + below(kMaxStride), a.dilation = below(3) ? 1 : 1 + below(4);
            a.in = 1 + below(i == 0 ? 3 : i == 1 ? 9 : below(6) ? 12 : 300), a.padding = below(3) ? below(3) : 0;
            const int output_padding = below(2) ? below(int(a.stride > a.dilation ? a.stride : a.dilation)) : 0;
            a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + output_padding + 1;
            valid = valid && a.out > 0;
            products *= double(a.in) * a.kernel;
        }
        if (!valid || products > 1e6) continue;
        Problem p = {make_stencil(Direction::kForward, g), {}, g.N, g.C_in, g.C_out, g.groups, conv::padded_channels(g.C_out)};
        const int budgets[] = {99, 163, 227}, shared_bytes = budgets[below(3)] * 1024;
        const int multiprocessors = below(4) ? 132 : 1 + below(132);
        p.t = choose_tiling(p, conv::padded_channels(g.C_in), multiprocessors, shared_bytes, false);
        done++;
        joint += p.t.joint;
        if (p.t.block_n == 0) continue;
        bool right = fits(p.t, shared_bytes) && emulate(g, p, done % 4 == 0);
        if (right && cut_products(p, conv::padded_channels(g.C_in), true, true) && can_pack(p) && cut_boxes(p, shared_bytes)) {    // whether it pays or not
            split(p, multiprocessors);
            right = fits(p.t, shared_bytes) && packs_all(p) && emulate(g, p, done % 4 == 0);
            packing++;
        }
        if (right) continue;
        std::printf("N %d, channels %d -> %d, groups %d, block_n %d, strips %d, rows %d", int(g.N), int(g.C_in), int(g.C_out), groups, p.t.block_n, p.t.strips, p.t.rows);
        for (const Axis& a : g.axis) std::printf(", (in %d, out %d, kernel %d, stride %d, padding %d, dilation %d)", int(a.in), int(a.out), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation));
        std::printf("\n");
        return 1;
    }
    return std::min({joint, packing, 4 * shared, 4 * cut, 4 * several}) > done / 50 ? 0 : 1;    // some of each kind
}
