// PTX instructions of sm_80 and up, one per wrapper, named after it. Reference: the PTX ISA's chapters "mma.m16n8k16", "ldmatrix" and
// "cp.async".
#pragma once

#include "launch.cuh"

// ----------------------------------------------------------------------------------------------------- Arithmetic

// v as TF32, in the bits of a float32 of which the tensor cores take the upper 19: rounded to nearest, ties away from zero, as cvt.rna.tf32 does, which has no instruction.
__device__ __forceinline__ uint32_t to_tf32(float v) {
    const float magnitude = __uint_as_float(__float_as_uint(v) & 0xff800000);    // a power of two, half of whose TF32 unit is added
    return __float_as_uint(fmaf(magnitude, 1.0f / 2048, v));
}
// What that leaves of v, likewise.
__device__ __forceinline__ uint32_t tf32_rest(float v) { return to_tf32(v - __uint_as_float(to_tf32(v) & 0xffffe000)); }

// max that keeps NaN
__device__ __forceinline__ float max_nan(float a, float b) {
    float v;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
}

// -------------------------------------------------------------------------------------------------- Shared memory

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void shared_store(uint32_t address, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory"); }
// Where `inside` is true.
__device__ __forceinline__ void shared_store(uint32_t address, const uint4& v, bool inside) {
    asm volatile("{\n.reg .pred inside;\nsetp.ne.b32 inside, %5, 0;\n@inside st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n}\n" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(inside)) : "memory");
}
__device__ __forceinline__ float shared_load(uint32_t address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
}

// Copies 16 bytes from global to shared memory in the background, or writes zeros where `inside` is false (`source` is then not read).
__device__ __forceinline__ void cp_async_16(uint32_t destination, const void* source, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(inside ? 16 : 0) : "memory");
}
// The same of 4 bytes.
__device__ __forceinline__ void cp_async_4(uint32_t destination, const void* source, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(inside ? 4 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Waits until all but kPending of this thread's groups are complete.
template <int kPending> __device__ __forceinline__ void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory"); }

// --------------------------------------------------------------------------------------------------- Tensor cores

// Four 8 x 8 matrices of 16-bit elements; lanes 8 i to 8 i + 7 give the rows of matrix i, 16 bytes each. Element (lane / 4, lane % 4 * 2)
// and its neighbour go to a lane; transposed: element (lane % 4 * 2, lane / 4) and the one below it.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(address) : "memory");
}

// d (16, 8) += a (16, 16) * b (16, 8): fp16 operands, fp32 sums. Element i of a lane is row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16, 8) += a (16, 8) * b (8, 8): TF32 operands, fp32 sums. a: rows lane / 4 and 8 further of column lane % 4, then of the one 4 further; b: rows lane % 4 and 4
// further of column lane / 4; d as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
