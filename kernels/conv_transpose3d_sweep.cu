// Strided transposed convolution of groups of few channels, as accurate as float32: the launchers. For float32.

#include "conv_plan.cuh"
#include "sweep.cuh"

namespace sweep {

static const Plan& plan_of(const Geometry& g, int device) {
    static conv::Memo<Plan> plans;
    return plans.get(g, Direction::kForward, device, [&] { return make_plan(g, block_shared_bytes(device), multiprocessors_of(device)); });
}

}  // namespace sweep

extern "C" int conv_transpose3d_supports_sweep(const Geometry* g, int device) { return sweep::plan_of(*g, device).segments > 0; }

extern "C" int64_t conv_transpose3d_forward_sweep_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_sweep(const Geometry* g, int, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    const sweep::Plan& plan = sweep::plan_of(*g, device);
    if (plan.segments == 0) return cudaErrorNotSupported;
    constexpr decltype(&sweep::forward<1>) kForwards[sweep::kMaxOcts] = {sweep::forward<1>, sweep::forward<2>, sweep::forward<3>};
    return kForwards[plan.octs - 1](plan, static_cast<cudaStream_t>(stream), static_cast<const float*>(x), static_cast<const float*>(w), static_cast<const float*>(bias), apply_relu != 0, static_cast<float*>(out));
}
