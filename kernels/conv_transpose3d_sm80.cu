// Transposed convolution on the tensor cores from sm_80 up: mma.sync, cp.async.

#include "conv_launch_sm80.cuh"
#include "conv_transpose3d_forward.cuh"

FORWARD_LAUNCHERS(sm80, conv_sm80::Path)
