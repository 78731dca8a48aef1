// Transposed convolution on Hopper: wgmma, TMA.

#include "conv_launch_sm90.cuh"
#include "conv_transpose3d_forward.cuh"

FORWARD_LAUNCHERS(sm90, conv_sm90::Path)
