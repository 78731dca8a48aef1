// The units by which a block packs dout for dweight (dweight_tiles.h), which element is where: for host and device.
#pragma once

#include "dweight_tiles.h"

namespace dweight {

// A unit of every box. Of its first element: row (phases h included) and element u of the box; phase d; first channel; what comes between the box's first element and it in dout,
// channels left out; position of a stage; channel of dout's copy.
struct alignas(16) Unit { int row, u, phase_d, channel, from, position, copy_channel; };

HOST_DEVICE Unit unit_of(const Problem& p, int index) {
    const auto take = [&index](int count) { const int digit = index % count; index /= count; return digit; };
    const StencilAxis &ad = p.s.axis[0], &ah = p.s.axis[1], &aw = p.s.axis[2];
    const int channel = take(int(ceil_div(p.C_out, kUnitChannels))) * kUnitChannels, u = take(int(ceil_div(row_elements(p), kUnitElements))) * kUnitElements;
    const int row = take(p.t.rows * ah.phases), phase_d = take(ad.phases), phase_h = row % ah.phases;
    return {row, u, phase_d, channel, (phase_d * ah.out + row) * aw.out + u, row / ah.phases * p.t.pitch + u / aw.phases, (phase_d * ah.phases + phase_h) * aw.phases * int(p.dout_phase_channels) + channel};
}

}  // namespace dweight
