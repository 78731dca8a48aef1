// The units by which a block packs dout for dweight (dweight_tiles.h), which element is where: for host and device.
#pragma once

#include "dweight_tiles.h"

namespace dweight {

constexpr int kEach = kUnitElements / 32;    // elements of a lane, of each of the unit's channels

// Row (phases h included) and element u of a box that a unit begins with, and its first channel. What comes between the box's first element and that one in dout, channels
// left out; phase d. Position of a stage, and channel of dout's copy, of its first element.
struct alignas(16) Unit { int row, u, channel, from, phase_d, position, copy_channel; };

HOST_DEVICE Unit unit_of(const Problem& p, const UnitShape& shape, int index) {
    const auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int channel = take(int(ceil_div(p.C_out, kUnitChannels))) * kUnitChannels, u = take(shape.columns) * shape.unit_columns(), row = take(shape.rows) * shape.unit_rows();
    const int phase_h = take(ah.phases), phase_d = take(ad.phases), source_row = row * ah.phases + phase_h;
    return {source_row, u, channel, (phase_d * ah.out + source_row) * aw.out + u, phase_d, row * p.t.pitch + u / aw.phases, (phase_d * ah.phases + phase_h) * aw.phases * int(p.dout_phase_channels) + channel};
}

// A lane's elements: from element `lane` of a unit on, counted as there.
struct LaneElements { int row[kEach], u[kEach], from[kEach], position[kEach]; };

inline LaneElements lane_elements_of(const Problem& p, const UnitShape& shape) {
    LaneElements lane = {};
    for (int e = 0; e < kEach; e++) {
        const int columns = shape.unit_columns() / 32, row = e / columns;
        lane.row[e] = row * p.s.axis[1].phases, lane.u[e] = e % columns * 32;
        lane.from[e] = lane.row[e] * p.s.axis[2].out + lane.u[e], lane.position[e] = row * p.t.pitch + lane.u[e] / p.s.axis[2].phases;
    }
    return lane;
}

// Whether the box has that element; units may have more.
HOST_DEVICE bool in_box(const Problem& p, const UnitShape& shape, const LaneElements& elements, const Unit& unit, int lane, int e) {
    return unit.row + elements.row[e] < p.t.rows * p.s.axis[1].phases && unit.u + lane + elements.u[e] < shape.row;
}

}  // namespace dweight
