// Gradients of a transposed convolution on the tensor cores from sm_80 up: mma.sync, cp.async.

#include "conv_launch_sm80.cuh"
#include "conv_transpose3d_gradients.cuh"
#include "dweight_sm80.cuh"

namespace gradients_sm80 {

struct Path : conv_sm80::Path {
    static constexpr bool kHopper = false;
    static int shared_bytes(int device) { return block_shared_bytes(device); }
    static int differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_sm80::differentiate(a, x, dout, dtype, dweight, stream);
    }
};

}  // namespace gradients_sm80

GRADIENTS_LAUNCHERS(sm80, gradients_sm80::Path)
