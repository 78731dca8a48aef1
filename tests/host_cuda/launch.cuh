// In place of kernels/launch.cuh: what its kernels need, on the host. A block's threads are fibers of one thread, which run until they wait for each other.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static    // the fibers are one thread, and run one block at a time
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#include "geometry.h"

using std::min;
using std::sqrt;

// ---------------------------------------------------------------------------------------------------------- Fibers

struct Index { int x; };
inline Index threadIdx, blockIdx, gridDim;

namespace fibers {

constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
    bool ended = false;
};
struct Barrier {
    int arrived = 0, rounds = 0;
    void wait(int threads);
};
inline std::vector<Fiber> all;
inline Barrier of_block, of_warps[32];
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void Barrier::wait(int threads) {
    const int own = threadIdx.x, round = rounds;
    if (++arrived == threads) arrived = 0, rounds++;
    while (rounds == round) swapcontext(&all[own].context, &scheduler), threadIdx.x = own;
}
inline void start() {
    const int own = threadIdx.x;
    body();
    all[own].ended = true;
    swapcontext(&all[own].context, &scheduler);
}
inline void run_block(int threads) {
    all.resize(threads);
    for (Fiber& f : all) {
        f.ended = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStackBytes, f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    for (bool left = true; left;) {
        left = false;
        for (int i = 0; i < threads; i++)
            if (!all[i].ended) threadIdx.x = i, swapcontext(&scheduler, &all[i].context), left = true;
    }
}

}  // namespace fibers

inline void __syncthreads() { fibers::of_block.wait(int(fibers::all.size())); }
inline void __syncwarp() { fibers::of_warps[threadIdx.x / 32].wait(32); }
inline int __syncthreads_and(int own) {
    static int none;    // of all threads so far
    if (threadIdx.x == 0) none = 0;
    __syncthreads();
    none += !own;
    __syncthreads();
    return none == 0;
}
inline float __shfl_xor_sync(unsigned, float own, int lane) {
    static float values[1024];
    values[threadIdx.x] = own;
    __syncwarp();
    const float other = values[threadIdx.x ^ lane];
    __syncwarp();
    return other;
}

// ------------------------------------------------------------------------------------------------------- Launching

constexpr int64_t kSharedMemoryBytes = 256 << 10;
inline uint8_t* shared_memory = nullptr;    // what the kernel declares as extern, if it does

using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaErrorInvalidConfiguration, cudaErrorNotSupported, cudaErrorIllegalAddress, cudaErrorInvalidValue };
using cudaError_t = int;
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline int multiprocessors_of(int) { return 3; }    // so few that a block has several tiles
struct DeviceGuard { explicit DeviceGuard(int) {} };

#define RETURN_IF_ERROR(expression)          \
    do {                                     \
        const int error_ = (expression);     \
        if (error_ != 0) return error_;      \
    } while (0)

inline void wait_for_previous_kernel() {}

template <typename... Params, typename... Args> int launch_with_shared(void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, void*, Args... args) {
    if (shared_bytes > kSharedMemoryBytes) return cudaErrorInvalidConfiguration;
    fibers::body = [=] { kernel(Params(args)...); };
    gridDim.x = int(blocks);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        if (shared_memory) std::memset(shared_memory, 0xff, kSharedMemoryBytes);    // NaN
        fibers::run_block(threads);
        if (shared_memory && std::any_of(shared_memory + shared_bytes, shared_memory + kSharedMemoryBytes, [](uint8_t byte) { return byte != 0xff; })) return cudaErrorIllegalAddress;    // written beyond its end
    }
    return cudaSuccess;
}
template <typename... Params, typename... Args> int launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    return launch_with_shared(kernel, blocks, threads, 0, stream, args...);
}

// ---------------------------------------------------------------------------------------------------- float32 only

enum DType { kFloat32 = 0 };
template <typename F> int with_dtype(int, F f) { return f(float{}); }
template <typename F> void with_element(int, F f) { f(float{}); }
inline float load_as_float(const void* p, int, int64_t i) { return static_cast<const float*>(p)[i]; }
inline void store_as(void* p, int, int64_t i, float v) { static_cast<float*>(p)[i] = v; }
template <typename T> using Acc = T;
inline float to_acc(float v) { return v; }
inline int64_t acc_bytes(int) { return 4; }
template <typename T> T from_acc(float v) { return v; }
inline float relu(float v) { return v < 0 ? 0 : v; }
template <typename T, int kCount> struct alignas(kCount * sizeof(T)) Vector { T v[kCount]; };
template <typename V> bool holds(const void* p) { return reinterpret_cast<uintptr_t>(p) % alignof(V) == 0; }
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename To, typename From> To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(uint32_t v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
