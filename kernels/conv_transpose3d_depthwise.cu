// Transposed convolution with groups of few channels: the launchers. For float32, float16 and bfloat16.

#include "depthwise_dweight.cuh"

extern "C" int conv_transpose3d_supports_depthwise(const Geometry* g, int device) {
    using namespace depthwise;
    const int multiprocessors = multiprocessors_of(device);
    return can_tile(*g) && tiling_of(Direction::kForward, *g, multiprocessors).units > 0 && tiling_of(Direction::kDInput, *g, multiprocessors).units > 0 && make_dweight_plan(*g, multiprocessors).t.units > 0;
}

extern "C" int64_t conv_transpose3d_forward_depthwise_workspace(const Geometry*, int, int) { return 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    return depthwise::gather<Direction::kForward>(*g, dtype, device, stream, x, w, bias, apply_relu != 0, out);
}

extern "C" int64_t conv_transpose3d_dinput_depthwise_workspace(const Geometry*, int, int) { return 0; }

extern "C" int conv_transpose3d_dinput_depthwise(const Geometry* g, int dtype, int device, void* stream, void*, const void* dout, const void* w, void* dx) {
    DeviceGuard guard(device);
    return depthwise::gather<Direction::kDInput>(*g, dtype, device, stream, dout, w, nullptr, false, dx);
}

extern "C" int64_t conv_transpose3d_dweight_depthwise_workspace(const Geometry* g, int, int device) {
    const depthwise::DweightPlan p = depthwise::make_dweight_plan(*g, multiprocessors_of(device));
    return p.splits * p.pairs() * p.t.volume * int64_t(sizeof(float));
}

extern "C" int conv_transpose3d_dweight_depthwise(const Geometry* g, int dtype, int device, void* stream, void* workspace, const void* x, const void* dout, void* dweight) {
    DeviceGuard guard(device);
    return depthwise::dweight(*g, dtype, depthwise::make_dweight_plan(*g, multiprocessors_of(device)), stream, workspace, x, dout, dweight);
}
