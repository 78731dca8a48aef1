// In place of CUDA's header: what the kernels and their launchers need of it, on the host. A launch runs its blocks one after another; a block's threads are fibers of one thread,
// each of which runs until it waits for others. The order in which warps run is a matter of chance.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <set>
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

using std::max;
using std::min;

// ---------------------------------------------------------------------------------------------------------- Fibers

struct Index { unsigned x; };
struct dim3 {
    unsigned x;
    dim3(unsigned x = 1) : x(x) {}
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {

constexpr size_t kStackBytes = 128 << 10;
constexpr int64_t kSharedMemoryBytes = 256 << 10;

struct Fiber {
    ucontext_t context;
    jmp_buf place;
    std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
    bool started, ended;
};
inline std::vector<std::unique_ptr<Fiber>> all;
inline int threads;                  // of the block
inline int64_t switches;             // since a fiber did more than wait
inline bool some_are_slow;           // in some blocks some warps seldom run
inline std::set<const void*> launched;    // kernels
inline std::mt19937 chance;
inline std::vector<std::function<void()>> loads;    // that the copy engine has not done yet; they end by themselves
inline std::vector<std::function<void()>> at_exit;    // of a thread
inline ucontext_t scheduler_context;
inline jmp_buf scheduler;
inline std::function<void()> body;
alignas(1024) inline uint8_t shared_memory[kSharedMemoryBytes];    // what the kernel declares as extern

inline void do_some_load() {
    if (loads.empty()) return;
    std::swap(loads[chance() % loads.size()], loads.back());
    const auto load = std::move(loads.back());
    loads.pop_back();
    load();
}

// Lets the other threads run.
inline void yield() {
    const unsigned own = threadIdx.x;
    if (!_setjmp(all[own]->place)) _longjmp(scheduler, 1);
    threadIdx.x = own;
}
template <typename F> void wait_until(F holds) {
    while (!holds()) {
        if (++switches > 100000000) std::printf("all threads wait\n"), std::abort();
        yield();
    }
    switches = 0;
}

struct Barrier {
    int arrived = 0, rounds = 0;
    void arrive(int count) {
        if (++arrived == count) arrived = 0, rounds++;
    }
    void wait(int count) {
        const int round = rounds;
        arrive(count);
        wait_until([&] { return rounds != round; });
    }
};
inline Barrier of_block, of_warps[32], named[16];

inline void start() {
    const unsigned own = threadIdx.x;
    body();
    for (const auto& check : at_exit) check();
    all[own]->ended = true;
    _longjmp(scheduler, 1);
}
inline void run_block(int count) {
    threads = count;
    while (int(all.size()) < count) all.emplace_back(new Fiber);
    for (int i = 0; i < count; i++) {
        Fiber& f = *all[i];
        f.started = f.ended = false;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = kStackBytes, f.context.uc_link = nullptr;
        makecontext(&f.context, start, 0);
    }
    static bool left;
    static int first, turn, i;
    static unsigned waiting, slow;    // warps that do not run this time; that seldom do
    slow = some_are_slow && chance() % 16 == 0 ? chance() : 0;
    do {
        left = false, first = int(chance() % count), waiting = chance() & chance();
        if (chance() % 64 != 0) waiting |= slow;
        if (chance() % 4 == 0) do_some_load();
        for (turn = 0; turn < count; turn++) {
            i = first + turn < count ? first + turn : first + turn - count;
            Fiber& f = *all[i];
            if (f.ended) continue;
            left = true, threadIdx.x = i;
            if (waiting >> i / 32 & 1) continue;
            if (_setjmp(scheduler)) continue;
            if (f.started) _longjmp(f.place, 1);
            f.started = true;
            swapcontext(&scheduler_context, &f.context);    // the first time
        }
    } while (left);
    if (!loads.empty()) std::printf("a block ended before its loads\n"), std::abort();
}

// Of the threads of a warp, each its own value: all of them.
template <typename T> struct Exchange {
    T values[32];
    explicit Exchange(T own) {
        static T all_values[32][32];
        T* const warp = all_values[threadIdx.x / 32];
        warp[threadIdx.x % 32] = own;
        of_warps[threadIdx.x / 32].wait(32);
        std::copy(warp, warp + 32, values);
        of_warps[threadIdx.x / 32].wait(32);
    }
};

}  // namespace fibers

// -------------------------------------------------------------------------------------------------------- Functions

inline void __syncthreads() { fibers::of_block.wait(fibers::threads); }
inline void __syncwarp() { fibers::of_warps[threadIdx.x / 32].wait(32); }
inline int __syncthreads_and(int own) {
    static int none;    // of all threads so far
    if (threadIdx.x == 0) none = 0;
    __syncthreads();
    none += !own;
    __syncthreads();
    const bool all = none == 0;
    __syncthreads();
    return all;
}
template <typename T> T __shfl_sync(unsigned, T own, int lane) { return fibers::Exchange<T>(own).values[lane & 31]; }
template <typename T> T __shfl_xor_sync(unsigned, T own, int lane) { return fibers::Exchange<T>(own).values[(threadIdx.x & 31) ^ lane]; }
inline unsigned __ballot_sync(unsigned, bool own) {
    const fibers::Exchange<bool> all(own);
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= unsigned(all.values[i]) << i;
    return bits;
}
inline bool __any_sync(unsigned mask, bool own) { return __ballot_sync(mask, own) != 0; }
inline bool __all_sync(unsigned mask, bool own) { return __ballot_sync(mask, own) == ~0u; }
inline unsigned __reduce_max_sync(unsigned, unsigned own) {
    const fibers::Exchange<unsigned> all(own);
    return *std::max_element(all.values, all.values + 32);
}

template <typename T> T atomicAdd(T* at, T v) { const T before = *at; *at += v; return before; }
template <typename T> T atomicMax(T* at, T v) { const T before = *at; *at = std::max(*at, v); return before; }
inline void __threadfence() {}
inline void __nanosleep(unsigned) {
    static int64_t naps;
    if (++naps > 10000000) std::printf("a block waits for another one\n"), std::abort();
    fibers::yield();
}
template <typename T> T __ldcg(const T* at) { return *at; }
template <typename T> void __stcs(T* at, T v) { *at = v; }

template <typename To, typename From> To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float __uint_as_float(uint32_t v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned umax(unsigned a, unsigned b) { return std::max(a, b); }

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------------------------------- Runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorNotSupported, cudaErrorIllegalAddress };
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// Devices differ in their shared memory, as architectures do (the last one has what a test says), and have so few multiprocessors that a block has several tiles.
inline int current_device, last_shared_bytes;
inline cudaError_t cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { current_device = device; return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    const int shared_bytes[] = {227 << 10, 163 << 10, 99 << 10, last_shared_bytes};
    *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : shared_bytes[device];
    return cudaSuccess;
}

struct cudaFuncAttributes { int ptxVersion; };
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename F> cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct { int programmaticStreamSerializationAllowed; } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
inline cudaError_t last_error;
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
template <typename... Params, typename... Args> void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
    using namespace fibers;
    if (int64_t(config->dynamicSmemBytes) > kSharedMemoryBytes) return void(last_error = cudaErrorInvalidConfiguration);
    launched.insert(reinterpret_cast<const void*>(kernel));
    body = [=] { kernel(args...); };
    gridDim.x = config->gridDim.x, blockDim.x = config->blockDim.x;
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) {
        std::memset(shared_memory, 0xff, kSharedMemoryBytes);    // NaN
        run_block(int(config->blockDim.x));
        if (std::any_of(shared_memory + config->dynamicSmemBytes, shared_memory + kSharedMemoryBytes, [](uint8_t byte) { return byte != 0xff; })) last_error = cudaErrorIllegalAddress;    // written beyond its end
    }
}
