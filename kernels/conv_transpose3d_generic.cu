// Transposed convolution for any parameters and dtype: the launchers of forward and dx.

#include "direct_generic.cuh"
#include "direct_rows_generic.cuh"

extern "C" int64_t conv_transpose3d_forward_generic_workspace(const Geometry* g, int dtype, int) { return direct_rows::supports(*g, dtype) ? direct_rows::workspace_bytes(*g) : 0; }

// bias may be null; apply_relu writes relu(out).
extern "C" int conv_transpose3d_forward_generic(const Geometry* g, int dtype, int device, void* stream, void* workspace,
                                                const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    DeviceGuard guard(device);
    if (direct_rows::supports(*g, dtype)) return direct_rows::forward(*g, stream, workspace, x, w, bias, apply_relu != 0, out);
    return direct_generic::direct<Direction::kForward>(*g, dtype, stream, {}, x, w, bias, apply_relu != 0, out);
}

extern "C" int64_t conv_transpose3d_dinput_generic_workspace(const Geometry*, int, int) { return 0; }

extern "C" int conv_transpose3d_dinput_generic(const Geometry* g, int dtype, int device, void* stream, void*,
                                               const void* dout, const void* w, void* dx) {
    DeviceGuard guard(device);
    return direct_generic::direct<Direction::kDInput>(*g, dtype, stream, {}, dout, w, nullptr, false, dx);
}
