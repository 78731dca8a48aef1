// In place of kernels/ptx_sm90.cuh: its instructions, on the host.
#pragma once

#include <cuda.h>

#include "ptx_sm80.cuh"

#define HAS_SM90A 1

inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline void named_barrier(int id, int threads) { fibers::named[id].wait(threads); }
inline void named_barrier_arrive(int id, int threads) { fibers::named[id].arrive(threads); }
inline void add_release(unsigned* counter) { ++*counter; }
inline unsigned load_acquire(const unsigned* counter) { return *counter; }

// ------------------------------------------------------------------------------------------------------- mbarrier

struct MBarrier {
    uint16_t count, left;
    int32_t bytes : 31;    // that are still to come
    uint32_t phase : 1;
    void end_phase_if_complete() {
        if (left == 0 && bytes == 0) left = count, phase ^= 1;
    }
};
static_assert(sizeof(MBarrier) == 8, "a barrier");
inline MBarrier& mbarrier_at(uint64_t* barrier) { return *shared_pointer<MBarrier>(shared_address(barrier)); }

inline void mbarrier_init(uint64_t* barrier, int count) { mbarrier_at(barrier) = {uint16_t(count), uint16_t(count), 0, 0}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    MBarrier& b = mbarrier_at(barrier);
    if (b.left == 0) std::printf("more arrivals at a barrier than it counts\n"), std::abort();
    b.left--, b.bytes += bytes;
    b.end_phase_if_complete();
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect_tx(barrier, 0); }
inline void mbarrier_complete_tx(uint64_t* barrier, int64_t bytes) {
    MBarrier& b = mbarrier_at(barrier);
    b.bytes -= bytes;
    b.end_phase_if_complete();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    fibers::wait_until([&] { return mbarrier_at(barrier).phase != parity; });
}

// ------------------------------------------------------------------------------------- Tensor memory access (copy engine)

// Calls f(byte of shared memory, bytes in, byte of the tensor or null where it ends) for every element of a box.
template <typename F> void for_each_of_box(const CUtensorMap& map, const void* shared, const int (&at)[5], F f) {
    const uint32_t begin = shared_address(shared);
    if (begin % 128) std::printf("a box at %u\n", begin), std::abort();
    int64_t count = 1, elements = 0;
    for (int i = 0; i < map.rank; i++) count *= map.box[i];
    for (int64_t index = 0; index < count; index++) {
        uint8_t* element = map.base;
        bool inside = true;
        int64_t rest = index;
        for (int i = 0; i < map.rank; i++) {
            const int64_t place = at[i] + rest % map.box[i];
            rest /= map.box[i], inside &= place >= 0 && place < map.dims[i], element += place * map.strides[i];
        }
        const uint32_t address = begin + uint32_t(elements++ * map.element_bytes);
        f(address ^ ((address >> 7 & ((1 << map.swizzle) - 1)) << 4), inside ? element : nullptr);    // swizzled over 2^swizzle pieces of 16 bytes
    }
}
inline void tma_load(void* destination, const CUtensorMap* map, uint64_t* barrier, const int (&at)[5]) {
    int64_t bytes = 0;
    for_each_of_box(*map, destination, at, [&](uint32_t address, const uint8_t* element) {
        if (element) std::memcpy(fibers::shared_memory + address, element, map->element_bytes);
        else std::memset(fibers::shared_memory + address, 0, map->element_bytes);
        bytes += map->element_bytes;
    });
    mbarrier_complete_tx(barrier, bytes);
}
inline background::Groups stores;
inline const bool stores_are_waited_for = [] {
    fibers::at_exit.push_back([] {
        if (stores.any()) std::printf("a thread ended before its stores had read shared memory\n"), std::abort();
    });
    return true;
}();
inline void tma_store(const CUtensorMap* map, const void* source, const int (&at)[5]) {
    for_each_of_box(*map, source, at, [&](uint32_t address, uint8_t* element) {
        if (element) std::memcpy(element, fibers::shared_memory + address, map->element_bytes);
    });
}
inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
    fibers::loads.push_back([=] { tma_load(to, map, barrier, {c0, c1, c2}); });
}
inline void tma_load_5d(void* to, const CUtensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3, int c4) {
    fibers::loads.push_back([=] { tma_load(to, map, barrier, {c0, c1, c2, c3, c4}); });
}
inline void tma_store_4d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3) {
    stores.add([=] { tma_store(map, source, {c0, c1, c2, c3}); });
}
inline void tma_store_5d(const CUtensorMap* map, const void* source, int c0, int c1, int c2, int c3, int c4) {
    stores.add([=] { tma_store(map, source, {c0, c1, c2, c3, c4}); });
}

inline void bulk_copy(void* to, const void* from, uint32_t bytes) {
    if (!holds<uint4>(to) || !holds<uint4>(from) || bytes % 16 || bytes == 0) std::printf("a bulk copy of %u bytes is not aligned\n", bytes), std::abort();
    std::memcpy(to, from, bytes);
}
inline void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
    fibers::loads.push_back([=] { bulk_copy(to, from, bytes), mbarrier_complete_tx(barrier, bytes); });
}
inline void bulk_store(void* to, const void* from, uint32_t bytes) {
    stores.add([=] { bulk_copy(to, from, bytes); });
}
inline void bulk_commit_group() { stores.commit(); }
template <int kPending> void bulk_wait_group() { stores.wait(kPending); }
template <int kPending> void bulk_wait_group_read() { stores.wait(kPending); }

// --------------------------------------------------------------------------------------------------------- wgmma

template <int kRegisters> void setmaxnreg_dec() {}
template <int kRegisters> void setmaxnreg_inc() {}
inline background::Groups products(true);
inline void wgmma_fence() {}
inline void wgmma_commit_group() { products.commit(); }
template <int kPending> void wgmma_wait_group() {
    products.wait(kPending);
    __syncwarp();    // no lane goes on before all have multiplied
}
inline void keep_after(float&) {}
inline void make_zero(float& v) { v = 0; }
inline void make_undefined(float& v) { v = NAN; }

// An operand as its descriptor tells (PTX ISA, "Shared Memory Matrix Layout"): element `i` of GEMM_M or GEMM_N, `k` of GEMM_K.
struct WgmmaOperand {
    uint32_t begin, row_bytes, block_stride;
    bool transposed, plain;            // plain: not swizzled, in columns of 16 bytes
    WgmmaOperand(uint64_t descriptor, bool transposed)
        : begin((descriptor & 0x3fff) * 16), row_bytes(descriptor >> 62 ? 256 >> (descriptor >> 62) : 16), block_stride((descriptor >> 16 & 0x3fff) * 16), transposed(transposed), plain(descriptor >> 62 == 0) {
        if ((descriptor >> 32 & 0x3fff) * 16 != 8 * row_bytes || (plain && transposed)) std::printf("a descriptor's stride\n"), std::abort();
    }
    float operator()(int i, int k) const {
        if (plain) return __half2float({*shared_pointer<uint16_t>(begin + i * row_bytes + k / 8 * block_stride + k % 8 * 2)});
        const uint32_t elements = row_bytes / 2, at = begin + (transposed ? k * row_bytes + i % elements * 2 + i / elements * block_stride : i * row_bytes + k * 2);
        const uint32_t swizzled_at = at ^ ((at >> 7 & (row_bytes / 16 - 1)) << 4);
        return __half2float({*shared_pointer<uint16_t>(swizzled_at)});
    }
};

// d (64, 2 * kRegisters), of a warpgroup.
template <int kTransposed, int kAccumulate = 1, int kRegisters> void wgmma_m64k16_f16(float (&d)[kRegisters], uint64_t a_descriptor, uint64_t b_descriptor) {
    const WgmmaOperand a(a_descriptor, kTransposed), b(b_descriptor, kTransposed);
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float* const sums = d;
    products.add([=] {
        float rows[2][16];
        for (int k = 0; k < 16; k++) rows[0][k] = a(row, k), rows[1][k] = a(row + 8, k);
        for (int i = 0; i < kRegisters; i++) {
            float sum = kAccumulate ? sums[i] : 0;
            for (int k = 0; k < 16; k++) sum += rows[i / 2 % 2][k] * b(i / 4 * 8 + lane % 4 * 2 + i % 2, k);
            sums[i] = sum;
        }
    });
}
