// Transposed convolution with groups of few channels: the launchers. For float32, float16 and bfloat16.

#include "depthwise_dweight.cuh"

namespace depthwise {

// Rows of a thread: fewer where a stride makes boxes large.
inline int rows_of(Direction direction, const Geometry& g) { return direction == Direction::kDInput && g.axis[1].stride > 1 ? 4 : kMaxRows; }

inline Tiling tiling_of(Direction direction, const Geometry& g, int device) {
    const int64_t channels = (direction == Direction::kForward ? g.C_in : g.C_out) / g.groups;
    return choose_tiling(direction, g, int(channels), rows_of(direction, g), kThreads, multiprocessors_of(device));
}

}  // namespace depthwise

extern "C" int conv_transpose3d_supports_depthwise(const Geometry* g, int device) {
    using namespace depthwise;
    return can_tile(*g) && tiling_of(Direction::kForward, *g, device).units > 0 && tiling_of(Direction::kDInput, *g, device).units > 0 && make_dweight_plan(*g, multiprocessors_of(device)).t.units > 0;
}

extern "C" int64_t conv_transpose3d_forward_depthwise_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    using namespace depthwise;
    DeviceGuard guard(device);
    const Tiling t = tiling_of(Direction::kForward, *g, device);
    return with_float_dtype(dtype, [&](auto element) { return launch_gather<decltype(element), Direction::kForward, kMaxRows>(*g, t, stream, x, w, bias, apply_relu != 0, out); });
}

extern "C" int64_t conv_transpose3d_dinput_depthwise_workspace(const Geometry*, int, int) { return 0; }

extern "C" int conv_transpose3d_dinput_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* dout, const void* w, void* dx) {
    using namespace depthwise;
    DeviceGuard guard(device);
    const Tiling t = tiling_of(Direction::kDInput, *g, device);
    return with_float_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        return t.rows == kMaxRows ? launch_gather<T, Direction::kDInput, kMaxRows>(*g, t, stream, dout, w, nullptr, false, dx) : launch_gather<T, Direction::kDInput, 4>(*g, t, stream, dout, w, nullptr, false, dx);
    });
}

extern "C" int64_t conv_transpose3d_dweight_depthwise_workspace(const Geometry* g, int, int device) {
    const depthwise::DweightPlan p = depthwise::make_dweight_plan(*g, multiprocessors_of(device));
    return p.splits * p.pairs() * p.t.volume * int64_t(sizeof(float));
}

extern "C" int conv_transpose3d_dweight_depthwise(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* x, const void* dout, void* dweight) {
    using namespace depthwise;
    DeviceGuard guard(device);
    const DweightPlan p = make_dweight_plan(*g, multiprocessors_of(device));
    return with_float_dtype(dtype, [&](auto element) { return launch_dweight<decltype(element)>(*g, p, stream, workspace, x, dout, dweight); });
}
