// Gradients of a transposed convolution on Hopper: wgmma, TMA.

#include "conv_transpose3d_gradients.cuh"
#include "dweight_packing_sm90.cuh"
#include "dweight_taps_sm90.cuh"

namespace gradients_sm90 {

struct Path : conv_sm90::Path {
    static constexpr bool kHopper = true;
    static constexpr int kPackingSharedBytes = dweight_sm90::kPackingSharedBytes;
    static int shared_bytes(int) { return conv_sm90::kSharedBytes - dweight_sm90::kTailBytes; }
    static int differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_sm90::differentiate(a, x, dout, dtype, dweight, stream);
    }
    static int differentiate_taps(const dweight_taps::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, int dtype, void* dweight, cudaStream_t stream) {
        return dweight_taps::differentiate(a, x, dout, dtype, dweight, stream);
    }
    static int pack_and_differentiate(const dweight::Parameters& a, const scaled_half::Activation& x, const scaled_half::Activation& dout, const scaled_half::Weight& weight, void* dweight, cudaStream_t stream) {
        return dweight_sm90::pack_and_differentiate(a, x, dout, weight, dweight, stream);
    }
};

}  // namespace gradients_sm90

GRADIENTS_LAUNCHERS(sm90, gradients_sm90::Path)
