// Strided transposed convolution of groups of few channels: the kernels for groups of 24 input channels.

#include "sweep.cuh"

template int sweep::forward<3>(const sweep::Plan&, cudaStream_t, const float*, const float*, const float*, bool, float*);
