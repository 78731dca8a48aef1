// What every launcher shares: element types, the device guard, the launch check.
//
// A launcher is `extern "C"`, takes raw pointers, sizes, a device and a stream, and returns a cudaError_t as int
// (0 = success). It never synchronises and never allocates: scratch memory comes from the caller.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "geometry.h"

// ----------------------------------------------------------------------------------------------- Element types

// Mirrored by `_DTYPES` in model_new.py.
enum DType { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using Acc = typename AccOf<T>::type;    // the type a T is accumulated in

// Explicit conversions: torch's build flags switch the implicit ones off.
template <typename T> __device__ __forceinline__ Acc<T> to_acc(T v) { return v; }
template <> __device__ __forceinline__ float to_acc(__half v) { return __half2float(v); }
template <> __device__ __forceinline__ float to_acc(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T> __device__ __forceinline__ T from_acc(Acc<T> v) { return v; }
template <> __device__ __forceinline__ __half from_acc(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_acc(float v) { return __float2bfloat16_rn(v); }

// Calls `f` with a value of the C++ type behind `dtype`.
template <typename F> int with_dtype(int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(float{});
        case kFloat64: return f(double{});
        case kFloat16: return f(__half{});
        case kBFloat16: return f(__nv_bfloat16{});
    }
    return cudaErrorInvalidValue;
}

// Neighbours in memory, loaded and stored at once.
template <typename T, int kCount> struct alignas(kCount * sizeof(T)) Vector { T v[kCount]; };
template <typename V> bool holds(const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(V) == 0; }    // whether a V can stand there

inline int64_t acc_bytes(int dtype) { return dtype == kFloat64 ? 8 : 4; }

// torch's relu: NaN stays NaN.
template <typename A> __device__ __forceinline__ A relu(A v) { return v < A(0) ? A(0) : v; }

// ---------------------------------------------------------------------------------------------------- Launching

// Makes `device` current for the launcher's duration.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        cudaGetDevice(&previous_);
        if (previous_ != device) cudaSetDevice(device);
        else previous_ = -1;
    }
    ~DeviceGuard() { if (previous_ >= 0) cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
private:
    int previous_ = -1;
};

constexpr int64_t kMaxGrid = 0x7fffffff;    // blocks of a one-dimensional grid

#define RETURN_IF_ERROR(expression)          \
    do {                                     \
        const int error_ = (expression);     \
        if (error_ != 0) return error_;      \
    } while (0)

// Launches kernel<<<blocks, threads, 0, stream>>>(args...); an empty grid is a success.
template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
    return cudaGetLastError();
}
