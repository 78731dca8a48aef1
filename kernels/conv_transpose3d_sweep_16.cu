// Strided transposed convolution of groups of few channels: the kernels for groups of 16 input channels.

#include "sweep.cuh"

template int sweep::forward<2>(const sweep::Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);
