// PTX instructions of sm_90a, one per wrapper, named after it. Reference: the PTX ISA's chapters "Asynchronous warpgroup
// level matrix instructions", "mbarrier" and "cp.async.bulk.tensor".
#pragma once

#include <cuda.h>

#include "ptx_sm80.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_SM90A 1
#endif

// -------------------------------------------------------------------------------------------------- Shared memory

// Orders this thread's ordinary shared-memory writes before later accesses by the copy engine and the tensor cores.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// barrier.sync among `threads` threads of the block
__device__ __forceinline__ void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// barrier.arrive: the same, without waiting
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ------------------------------------------------------------------------------------------------- Global memory

// Counters in global memory that blocks wait for: what was written before is seen by whoever reads the count.
__device__ __forceinline__ void add_release(unsigned* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
    return count;
}
// Orders what this thread knows of global memory before later accesses there by the copy engine.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ------------------------------------------------------------------------------------------------------- mbarrier

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ------------------------------------------------------------------------------------- Tensor memory access (copy engine)

__device__ __forceinline__ void tma_load_3d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2) : "memory");
}
__device__ __forceinline__ void tma_load_5d(void* destination, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
                 ::"r"(shared_address(destination)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// What lies outside the tensor is left out.
__device__ __forceinline__ void tma_store_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
                 ::"l"(map), "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void tma_store_5d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
                 ::"l"(map), "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

// These are of 16-byte aligned runs of bytes, without a tensor map.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void bulk_store(void* destination, const void* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(shared_address(source)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until all but kPending of this thread's groups are complete, or have read their source.
template <int kPending> __device__ __forceinline__ void bulk_wait_group() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory"); }
template <int kPending> __device__ __forceinline__ void bulk_wait_group_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory"); }

// --------------------------------------------------------------------------------------------------------- wgmma

#ifdef HAS_SM90A

template <int kRegisters> __device__ __forceinline__ void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)); }
template <int kRegisters> __device__ __forceinline__ void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending> __device__ __forceinline__ void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory"); }

// Keeps the compiler from using a register's value ahead of this point.
__device__ __forceinline__ void keep_after(float& v) { asm volatile("" : "+f"(v)::"memory"); }

// Here and not before, where a zero would not be wanted.
__device__ __forceinline__ void make_zero(float& v) { asm volatile("mov.f32 %0, 0f00000000;" : "=f"(v)); }

// Says that a register's value is not wanted any more.
__device__ __forceinline__ void make_undefined(float& v) { asm volatile("" : "=f"(v)); }

// d (64, 2 * registers) += a * b, or = without kAccumulate; fp16 operands in shared memory, K-major (0) or both transposed (1), fp32 sums in registers:
// element i of lane l in warp w is row 16 * w + l / 4 + (i / 2 % 2) * 8, column i / 4 * 8 + l % 4 * 2 + i % 2.
#define REGS10(t) "%" t "0, %" t "1, %" t "2, %" t "3, %" t "4, %" t "5, %" t "6, %" t "7, %" t "8, %" t "9"
#define ACC10(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7]), "+f"(d[i + 8]), "+f"(d[i + 9])

template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[32], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " "%30, %31" "}, %32, %33, %35, 1, 1, %34, %34;\n"
                 : ACC10(0), ACC10(10), ACC10(20), "+f"(d[30]), "+f"(d[31]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[36], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n72k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " "%30, %31, %32, %33, %34, %35" "}, %36, %37, %39, 1, 1, %38, %38;\n"
                 : ACC10(0), ACC10(10), ACC10(20), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[40], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") "}, %40, %41, %43, 1, 1, %42, %42;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[44], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n88k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " "%40, %41, %42, %43" "}, %44, %45, %47, 1, 1, %46, %46;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[52], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n104k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " "%50, %51" "}, %52, %53, %55, 1, 1, %54, %54;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), "+f"(d[50]), "+f"(d[51]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[64], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " "%60, %61, %62, %63" "}, %64, %65, %67, 1, 1, %66, %66;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[68], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n136k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " "%60, %61, %62, %63, %64, %65, %66, %67" "}, %68, %69, %71, 1, 1, %70, %70;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[72], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n144k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " "%70, %71" "}, %72, %73, %75, 1, 1, %74, %74;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), "+f"(d[70]), "+f"(d[71]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[80], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") "}, %80, %81, %83, 1, 1, %82, %82;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[96], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " "%90, %91, %92, %93, %94, %95" "}, %96, %97, %99, 1, 1, %98, %98;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[100], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n200k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") "}, %100, %101, %103, 1, 1, %102, %102;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[112], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n224k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " "%110, %111" "}, %112, %113, %115, 1, 1, %114, %114;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), "+f"(d[110]), "+f"(d[111]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}
template <int kTransposed, int kAccumulate = 1> __device__ __forceinline__ void wgmma_m64k16_f16(float (&d)[116], uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n232k16.f32.f16.f16 {" REGS10("") ", " REGS10("1") ", " REGS10("2") ", " REGS10("3") ", " REGS10("4") ", " REGS10("5") ", " REGS10("6") ", " REGS10("7") ", " REGS10("8") ", " REGS10("9") ", " REGS10("10") ", " "%110, %111, %112, %113, %114, %115" "}, %116, %117, %119, 1, 1, %118, %118;\n"
                 : ACC10(0), ACC10(10), ACC10(20), ACC10(30), ACC10(40), ACC10(50), ACC10(60), ACC10(70), ACC10(80), ACC10(90), ACC10(100), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]) : "l"(a), "l"(b), "n"(kTransposed), "n"(kAccumulate));
}

#undef REGS10
#undef ACC10

#endif  // HAS_SM90A
