// Strided transposed convolution of one group of few channels on Hopper: the launchers. For float32.

#include "conv_plan.cuh"
#include "sweep_sm90.cuh"

namespace sweep_sm90 {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

}  // namespace sweep_sm90

extern "C" int conv_transpose3d_supports_sweep_sm90(const Geometry* g, int device) { return sweep_sm90::plan_of(*g, device).segments > 0; }

extern "C" int64_t conv_transpose3d_forward_sweep_sm90_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_sweep_sm90(const Geometry* g, int, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const sweep_sm90::Plan& plan = sweep_sm90::plan_of(*g, device);
    if (plan.segments == 0) return cudaErrorNotSupported;
    const auto forward = plan.octs == 2 ? sweep_sm90::forward<2> : sweep_sm90::forward<4>;
    return forward(plan, static_cast<cudaStream_t>(stream), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<const float*>(bias), apply_relu != 0, static_cast<float*>(out));
}
