// In place of kernels/ptx_sm80.cuh: its instructions, on the host. TF32 keeps all bits here.
#pragma once

#include "background.h"
#include "launch.cuh"

inline uint32_t to_tf32(float v) { return __float_as_uint(v); }
inline uint32_t tf32_rest(float v) { return __float_as_uint(v - v); }
inline float max_nan(float a, float b) { return std::isnan(a) || a > b ? a : b; }

inline uint32_t shared_address(const void* p) {
    const int64_t address = static_cast<const uint8_t*>(p) - fibers::shared_memory;
    if (address < 0 || address >= fibers::kSharedMemoryBytes) std::printf("no shared memory\n"), std::abort();
    return uint32_t(address);
}
template <typename T> T* shared_pointer(uint32_t address) {
    if (address % sizeof(T) || address + sizeof(T) > fibers::kSharedMemoryBytes) std::printf("shared memory: address %u of %zu bytes\n", address, sizeof(T)), std::abort();
    return reinterpret_cast<T*>(fibers::shared_memory + address);
}
inline void shared_store(uint32_t address, float v) { *shared_pointer<float>(address) = v; }
inline void shared_store(uint32_t address, const uint4& v, bool inside) {
    if (inside) *shared_pointer<uint4>(address) = v;
}
inline float shared_load(uint32_t address) { return *shared_pointer<float>(address); }

inline background::Groups copies;
template <typename T> void copy_to_shared(uint32_t destination, const void* source, bool inside) {
    if (inside && !holds<T>(source)) std::printf("a copy of %zu bytes is not aligned\n", sizeof(T)), std::abort();
    copies.add([=] { *shared_pointer<T>(destination) = inside ? *static_cast<const T*>(source) : T{}; });
}
inline void cp_async_16(uint32_t destination, const void* source, bool inside) { copy_to_shared<uint4>(destination, source, inside); }
inline void cp_async_4(uint32_t destination, const void* source, bool inside) { copy_to_shared<float>(destination, source, inside); }
inline void cp_async_commit_group() { copies.commit(); }
inline void cp_async_wait_all() { copies.wait_all(); }
template <int kPending> void cp_async_wait_group() { copies.wait(kPending); }

// Two neighbours of a row of one of four 8 x 8 matrices; transposed: of a column.
inline void ldmatrix(uint32_t (&v)[4], uint32_t address, bool transposed) {
    const fibers::Exchange<uint32_t> rows(address);
    const int lane = threadIdx.x % 32;
    for (int matrix = 0; matrix < 4; matrix++) {
        uint16_t two[2];
        for (int e = 0; e < 2; e++) {
            const int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
            two[e] = reinterpret_cast<const uint16_t*>(shared_pointer<uint4>(rows.values[matrix * 8 + row]))[column];
        }
        v[matrix] = two[0] | uint32_t(two[1]) << 16;
    }
}
inline void ldmatrix_x4(uint32_t (&v)[4], uint32_t address) { ldmatrix(v, address, false); }
inline void ldmatrix_x4_transposed(uint32_t (&v)[4], uint32_t address) { ldmatrix(v, address, true); }

// d (16, 8) += a (16, K) * b (K, 8), of a warp's fragments: a_at(i) is (row, k) of a lane's i-th element of a, b_at(i) its k of column lane / 4 of b (PTX ISA, "mma.m16n8k8", "mma.m16n8k16").
template <int K, typename AtA, typename AtB> void mma(float (&d)[4], const float (&a)[K / 2], const float (&b)[K / 4], AtA a_at, AtB b_at) {
    static float rows[32][16][K], columns[32][8][K];    // of the warps
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4;
    for (int i = 0; i < K / 2; i++) rows[warp][a_at(i).x][a_at(i).y] = a[i];
    for (int i = 0; i < K / 4; i++) columns[warp][group][b_at(i)] = b[i];
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < K; k++) d[i] += rows[warp][group + i / 2 * 8][k] * columns[warp][threadIdx.x % 4 * 2 + i % 2][k];
    __syncwarp();
}
inline float half_of(uint32_t two, int i) { return __half2float({uint16_t(two >> i * 16)}); }

inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4 * 2;
    float a_values[8], b_values[4];
    for (int i = 0; i < 8; i++) a_values[i] = half_of(a[i / 2], i % 2);
    for (int i = 0; i < 4; i++) b_values[i] = half_of(i < 2 ? b0 : b1, i % 2);
    mma<16>(d, a_values, b_values, [=](int i) { return make_int2(group + i / 2 % 2 * 8, place + i % 2 + i / 4 * 8); }, [=](int i) { return place + i % 2 + i / 2 * 8; });
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const int group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
    const float a_values[4] = {__uint_as_float(a[0]), __uint_as_float(a[1]), __uint_as_float(a[2]), __uint_as_float(a[3])}, b_values[2] = {__uint_as_float(b0), __uint_as_float(b1)};
    mma<8>(d, a_values, b_values, [=](int i) { return make_int2(group + i % 2 * 8, place + i / 2 * 4); }, [=](int i) { return place + i * 4; });
}
