// In place of kernels/ptx_sm80.cuh: the instructions that gemm.cuh uses, on the host. TF32 keeps all bits here, and copies arrive at once.
#pragma once

#include "launch.cuh"

inline uint32_t to_tf32(float v) { return __float_as_uint(v); }
inline uint32_t tf32_rest(float v) { return __float_as_uint(v - v); }

inline uint32_t shared_address(const void* p) { return uint32_t(static_cast<const uint8_t*>(p) - shared_memory); }
template <int kBytes> void copy(uint32_t destination, const void* source, bool inside) {
    if (inside) std::memcpy(shared_memory + destination, source, kBytes);
    else std::memset(shared_memory + destination, 0, kBytes);
}
inline void cp_async_16(uint32_t destination, const void* source, bool inside) {
    if (inside && !holds<uint4>(source)) std::abort();
    copy<16>(destination, source, inside);
}
inline void cp_async_4(uint32_t destination, const void* source, bool inside) { copy<4>(destination, source, inside); }
inline void cp_async_commit_group() {}
inline void cp_async_wait_all() {}
template <int kPending> void cp_async_wait_group() {}

// d (16, 8) += a (16, 8) * b (8, 8), of a warp's fragments (PTX ISA, "mma.m16n8k8").
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static float rows[32][16][8], columns[32][8][8];    // of the warps
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) rows[warp][group + i % 2 * 8][place + i / 2 * 4] = __uint_as_float(a[i]);
    columns[warp][place][group] = __uint_as_float(b0), columns[warp][place + 4][group] = __uint_as_float(b1);
    __syncwarp();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8; k++) d[i] += rows[warp][group + i / 2 * 8][k] * columns[warp][k][place * 2 + i % 2];
    __syncwarp();
}
