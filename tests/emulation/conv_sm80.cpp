#include "conv_transpose3d_sm80.cu"
#include "conv_transpose3d_gradients_sm80.cu"

#define PATH sm80
#include "conv.h"

static bool all_ran() { return with_joined_planes > 0 && ran(conv::statistics_kernel); }
