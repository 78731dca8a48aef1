#include "conv_transpose3d_sm90.cu"
#include "conv_transpose3d_gradients_sm90.cu"

#define PATH sm90
#include "conv.h"

static bool all_ran() { return normalized_inside > 0 && with_joined_planes > 0 && ran(parts::add_kernel) && ran(dweight_sm90::packing_dweight_kernel) && ran(dweight_taps::add_taps_kernel); }
