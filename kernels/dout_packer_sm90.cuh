// dout's packed copy, made on its way to dweight: a block's packers bring its float32 elements to shared memory, and round them into the stages that are multiplied and that the copy
// engine stores, for dx.
//
// The scale is the first one (scaled_half.cuh). Where that does not hold for some sample, all is done again with scales that do.
#pragma once

#include "dweight.cuh"
#include "dweight_units.h"
#include "pipeline_sm90.cuh"
#include "swizzle.h"

namespace dweight_sm90 {

using namespace dweight;

constexpr int kUnitsAhead = 3;         // units that are under way
constexpr int kEach = kUnitElements / 32;    // elements of a lane, 32 apart, of each of a unit's channels
constexpr int kSlots = kUnitsAhead + 1, kSlotBytes = kUnitChannels * kUnitElements * 4, kPackerBytes = kPackerWarps * kSlots * kSlotBytes;

struct Packing {
    const float* dout;
    scaled_half::SampleMax* max;       // (N)
    bool again;                        // with scales that hold, if the first ones do not
    bool stores;                       // the copy is wanted
    int units, row;                    // of a box: units, elements of a row
    Divisor strips, row_groups, planes;
};

inline Packing make_packing(const Problem& p, const scaled_half::Activation& dout, bool stores) {
    return {static_cast<const float*>(dout.x), dout.max, false, stores, units_of_box(p), row_elements(p), make_divisor(p.t.strips), make_divisor(p.t.row_groups), make_divisor(p.s.axis[0].positions)};
}

#ifdef HAS_SM90A

// Boxes are dealt out in turns, so that all blocks read neighbouring ones: those of a row follow each other.
__device__ __forceinline__ Box box_of(const Problem& p, const Packing& packing, int index) {
    const int strip = packing.strips.take(index), row_group = packing.row_groups.take(index), d = packing.planes.take(index);
    return {index, d, strip * p.t.tile_w, row_group * p.t.rows};
}

__device__ __forceinline__ int shift_of(const Packing& packing, int n) { return packing.again ? scaled_half::shift_of(packing.max[n]) : scaled_half::first_shift_of(packing.max[n]); }

// One warp: every kPackerWarps-th unit. A lane reads only what it has brought itself.
class Packer {
public:
    // units: the block's, in shared memory.
    __device__ Packer(const Problem& p, const Packing& packing, const Unit* units, uint8_t* slots, int boxes)
        : p_(p), packing_(packing), units_(units), slots_(shared_address(slots) + threadIdx.x / 32 * kSlots * kSlotBytes + lane() * 4), boxes_(boxes), next_box_(blockIdx.x) {
        locate_next();
#pragma unroll 1
        for (int i = 0; i < kUnitsAhead; i++) load_next();
    }

    // The next box: into `stage`, which is free.
    __device__ void pack(const Box& box, const uint8_t* stage) {
        if (box.n != sample_) {
            report();
            sample_ = box.n, looked_ = packing_.max[box.n].part != 0, scale_ = scaled_half::power_of_two(shift_of(packing_, box.n));
        }
#pragma unroll 1
        for (int unit = first_unit(); unit < packing_.units; unit += kPackerWarps) {
            load_next();
            cp_async_wait_group<kUnitsAhead>();
            convert(units_[unit], shared_address(stage));
        }
    }

    // Behind the last box, and a sample's: the extremes of units that the scale may be too large or too small for.
    __device__ void report() {
        const unsigned finite = __reduce_max_sync(~0u, extremes_.finite), any = __reduce_max_sync(~0u, extremes_.any);
        if (any == 0) return;
        scaled_half::SampleMax& max = packing_.max[sample_];
        if (lane() == 0) atomicMax(&max.all, finite);
        if (any >= scaled_half::kInfinity) max.non_finite = 1;
        extremes_ = {};
    }

private:
    __device__ static int lane() { return threadIdx.x % 32; }
    __device__ static int first_unit() { return threadIdx.x / 32; }
    __device__ __forceinline__ bool in_box(const Unit& unit, int e) const { return unit.u + lane() + e * 32 < packing_.row; }

    __device__ void locate_next() {
        const StencilAxis &ad = p_.s.axis[0], &ah = p_.s.axis[1], &aw = p_.s.axis[2];
        const Box box = box_of(p_, packing_, next_box_);
        next_d_ = box.d * ad.phases - ad.crop, next_h_ = box.h0 * ah.phases - ah.crop, next_w_ = box.w0 * aw.phases - aw.crop + lane();
        next_ = packing_.dout + ((box.n * p_.C_out * ad.out + next_d_) * ah.out + next_h_) * aw.out + next_w_;
    }

    // Starts to bring the next unit to the next slot; with none left, nothing, which counts too.
    __device__ void load_next() {
        if (next_box_ < boxes_ && next_unit_ < packing_.units) load(units_[next_unit_]);
        cp_async_commit_group();
        slot_ = slot_ + 1 == kSlots ? 0 : slot_ + 1, next_unit_ += kPackerWarps;
        if (next_unit_ >= packing_.units && next_box_ < boxes_) {
            next_unit_ = first_unit(), next_box_ += p_.t.splits;
            locate_next();
        }
    }

    __device__ void load(const Unit& unit) const {
        const StencilAxis &ad = p_.s.axis[0], &ah = p_.s.axis[1], &aw = p_.s.axis[2];
        const int64_t volume = int64_t(ad.out) * ah.out * aw.out;
        const bool in_row = unsigned(next_d_ + unit.phase_d) < unsigned(ad.out) && unsigned(next_h_ + unit.row) < unsigned(ah.out);
        const float* next = next_ + unit.channel * volume + unit.from;
        bool inside[kEach];
#pragma unroll
        for (int e = 0; e < kEach; e++) inside[e] = in_row && unsigned(next_w_ + unit.u + e * 32) < unsigned(aw.out) && in_box(unit, e);
        const uint32_t to = slots_ + slot_ * kSlotBytes;
        const auto load_channels = [&](bool all) {
            constexpr int kAtOnce = 4;     // addresses in registers of their own: a copy reads its one late, and the next would wait for that
#pragma unroll
            for (int c0 = 0; c0 < kUnitChannels; c0 += kAtOnce) {
                const float* from[kAtOnce];
#pragma unroll
                for (int c = 0; c < kAtOnce; c++) from[c] = next, next += volume, keep(from[c]);
#pragma unroll
                for (int c = 0; c < kAtOnce; c++)
#pragma unroll
                    for (int e = 0; e < kEach; e++) cp_async_4(to + ((c0 + c) * kUnitElements + e * 32) * 4, from[c] + e * 32, inside[e] && (all || unit.channel + c0 + c < int(p_.C_out)));
            }
        };
        if (unit.channel + kUnitChannels <= int(p_.C_out)) load_channels(true);
        else load_channels(false);
    }
    __device__ static void keep(const float*& p) { asm volatile("" : "+l"(p)); }

    // The unit that was brought first: a vector of eight channels for each of a lane's elements.
    __device__ void convert(const Unit& unit, uint32_t stage) {
        const Tiling& t = p_.t;
        const int phases_w = p_.s.axis[2].phases;
        const uint32_t from = slots_ + converted_ * kSlotBytes;
        float values[kEach][kUnitChannels];    // before anything is stored, since no load moves ahead of that
#pragma unroll
        for (int e = 0; e < kEach; e++)
#pragma unroll
            for (int c = 0; c < kUnitChannels; c++) values[e][c] = shared_load(from + (c * kUnitElements + e * 32) * 4);
        const int column = divide_by_phases(lane(), phases_w), channel = unit.copy_channel + (lane() - column * phases_w) * int(p_.dout_phase_channels);
        const uint32_t block = stage + unsigned(channel) / kRows * t.dout_bytes, piece = unsigned(channel) % kRows / kUnitChannels;
        __half2 most = __float2half2_rn(0.0f);
#pragma unroll
        for (int e = 0; e < kEach; e++) {
            __half2 halves[kUnitChannels / 2];
#pragma unroll
            for (int c = 0; c < kUnitChannels / 2; c++) {
                halves[c] = __floats2half2_rn(values[e][c * 2] * scale_, values[e][c * 2 + 1] * scale_);
                most = __hmax2_nan(most, __habs2(halves[c]));
            }
            shared_store(block + swizzled(unit.position + column + divide_by_phases(e * 32, phases_w), piece, kRows * 2), reinterpret_cast<const uint4&>(halves), in_box(unit, e));
        }
        if (!looked_ || !__hblt2(most, __float2half2_rn(32768.0f))) {    // false with NaN
#pragma unroll 1
            for (int i = 0; i < kUnitChannels * kEach; i++) scaled_half::find_extremes(extremes_, shared_load(from + i * 128));
        }
        converted_ = converted_ + 1 == kSlots ? 0 : converted_ + 1;
    }

    const Problem& p_;
    const Packing& packing_;
    const Unit* const units_;
    const uint32_t slots_;                 // this lane's
    const int boxes_;                      // how many there are
    int next_box_, next_unit_ = first_unit();    // to be loaded
    int next_d_, next_h_, next_w_;         // where its first element would be in dout, and the lane's in its row
    const float* next_;                    // there
    int slot_ = 0, converted_ = 0;         // the next ones to be loaded and converted
    int sample_ = -1;
    bool looked_ = false;                  // whether there is a scale
    float scale_ = 0;
    scaled_half::Extremes extremes_ = {};
};

#endif  // HAS_SM90A

}  // namespace dweight_sm90
