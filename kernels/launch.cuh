// What every launcher shares: element types, the device guard, the launch check.
//
// A launcher is `extern "C"`, takes raw pointers, sizes, a device and a stream, and returns a cudaError_t as int
// (0 = success). It never synchronises and never allocates: scratch memory comes from the caller.
#pragma once

#include <atomic>

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

// One element of an array of dtype kFloat32, kFloat16 or kBFloat16.
__device__ __forceinline__ float load_as_float(const void* p, int dtype, int64_t i) {
    if (dtype == kFloat32) return static_cast<const float*>(p)[i];
    return dtype == kFloat16 ? to_acc(static_cast<const __half*>(p)[i]) : to_acc(static_cast<const __nv_bfloat16*>(p)[i]);
}

__device__ __forceinline__ void store_as(void* p, int dtype, int64_t i, float v) {
    if (dtype == kFloat32) static_cast<float*>(p)[i] = v;
    else if (dtype == kFloat16) static_cast<__half*>(p)[i] = from_acc<__half>(v);
    else static_cast<__nv_bfloat16*>(p)[i] = from_acc<__nv_bfloat16>(v);
}

// Calls f with a value of the type behind one of these dtypes.
template <typename F> __device__ __forceinline__ void with_element(int dtype, F f) {
    if (dtype == kFloat32) f(float{});
    else if (dtype == kFloat16) f(__half{});
    else f(__nv_bfloat16{});
}

// Four neighbours, the i-th ones.
__device__ __forceinline__ void store_as(void* p, int dtype, int64_t i, float4 v) {
    if (dtype == kFloat32) {
        static_cast<float4*>(p)[i] = v;
        return;
    }
    const bool half = dtype == kFloat16;
    const __half2 h[2] = {__floats2half2_rn(v.x, v.y), __floats2half2_rn(v.z, v.w)};
    const __nv_bfloat162 b[2] = {__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
    static_cast<uint2*>(p)[i] = half ? *reinterpret_cast<const uint2*>(h) : *reinterpret_cast<const uint2*>(b);
}

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

inline int multiprocessors_of(int device) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// Shared memory that a block can have. SHARED_BYTES: of the architecture that this one is to be taken for.
inline int block_shared_bytes([[maybe_unused]] int device) {
#ifdef SHARED_BYTES
    return SHARED_BYTES;
#else
    int bytes = 0;
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
#endif
}

constexpr int64_t kMaxGrid = 0x7fffffff;    // blocks of a one-dimensional grid
constexpr int64_t kOverlappedBlocks = 1024;    // more of them start one after another, and waiting costs each a microsecond

#define RETURN_IF_ERROR(expression)          \
    do {                                     \
        const int error_ = (expression);     \
        if (error_ != 0) return error_;      \
    } while (0)

// On Hopper and later, a kernel's blocks are brought to the multiprocessors while the last ones of the kernel before it still run ("programmatic dependent launch"): as soon as all
// blocks of that one let them come, or have ended.
__device__ __forceinline__ void let_next_kernel_come() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_end_of_previous_kernel() {    // its writes included
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Every kernel starts with this, or
__device__ __forceinline__ void wait_for_previous_kernel() { let_next_kernel_come(), wait_for_end_of_previous_kernel(); }
// with this, if the next kernel runs beside it: that one needs what this one has waited for, nothing that it writes, and waits at its own end, so that who waits for that has waited for both.
__device__ __forceinline__ void wait_before_next_kernel() { wait_for_end_of_previous_kernel(), let_next_kernel_come(); }

// Whether that is what the kernels for the current device do; not where they were built for an earlier architecture.
static bool kernels_wait(const void* kernel) {
    constexpr int kDevices = 64;
    enum : int { kUnknown, kNo, kYes };
    static std::atomic<int> known[kDevices];
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
    if (known[device] == kUnknown) {
        cudaFuncAttributes attributes = {};
        known[device] = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 ? kYes : kNo;
    }
    return known[device] == kYes;
}

// Launches kernel<<<blocks, threads, shared_bytes, stream>>>(args...); an empty grid is a success. overlaps: its blocks, unless they are many, come while the kernel before runs.
template <typename... Params, typename... Args>
int launch_kernel(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, bool overlaps, void* stream, Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
    if (shared_bytes > 0) RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes), config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap, config.numAttrs = overlaps && blocks <= kOverlappedBlocks && kernels_wait(reinterpret_cast<const void*>(kernel));
    cudaLaunchKernelEx(&config, kernel, Params(args)...);
    return cudaGetLastError();    // which then is forgotten
}

template <typename... Params, typename... Args>
int launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, void* stream, Args... args) {
    return launch_kernel(kernel, blocks, threads, shared_bytes, true, stream, args...);
}

template <typename... Params, typename... Args> int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    return launch_with_shared(kernel, blocks, threads, 0, stream, args...);
}
