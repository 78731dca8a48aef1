// Transposed convolution on Hopper: wgmma, TMA.

#include "conv_launch_sm90.cuh"
#include "conv_transpose3d_forward.cuh"

FORWARD_LAUNCHERS(sm90, conv_sm90::Path)

// Estimated, of a multiprocessor; infinite where no tiling fits.
extern "C" double conv_transpose3d_forward_cycles_sm90(const Geometry* g, int device) {
    const conv::Tiling& t = conv::plan_of<conv_sm90::Path>(*g, Direction::kForward, device).problem.t;
    return t.block_n > 0 ? t.cycles : INFINITY;
}
