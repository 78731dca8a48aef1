// What a pipeline through shared memory needs beside the instructions of ptx_sm90.cuh: positions in its rings, descriptors of operands, and the tensor maps of what the copy engine brings.
#pragma once

#include "ptx_sm90.cuh"

// A ring of stages: the position of one of its users.
struct RingPosition {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// An operand in rows of 128, 64 or 32 bytes, swizzled over the row: everything of its descriptor but the address. K-major: a row
// is one of GEMM_M or GEMM_N. Transposed: a row is one of GEMM_K, and where it is shorter than GEMM_M or GEMM_N, the next
// elements are in rows `block_stride` bytes further on.
// The hardware swizzles absolute addresses, so the address may be any row of a tile, not only a multiple of eight.
__device__ __forceinline__ uint64_t wgmma_descriptor_base(int row_bytes, int block_stride = 16) {
    const uint64_t layout = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return layout << 62 | uint64_t(8 * row_bytes / 16) << 32 | uint64_t(block_stride / 16) << 16;
}
// An operand in columns of 16 bytes, K-major: a row's 8 elements of GEMM_K, and `rows` further on its next 8. Not swizzled: neighbouring rows are neighbours in memory.
__device__ __forceinline__ uint64_t wgmma_plain_descriptor_base(int rows) { return uint64_t(8) << 32 | uint64_t(rows) << 16; }
// vector: the address in units of 16 bytes.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint64_t base, uint32_t vector) { return base >> 32 << 32 | (uint32_t(base) + vector); }
__device__ __forceinline__ uint32_t shared_vector(const void* p) { return shared_address(p) / 16; }

// cuTensorMapEncodeTiled, looked up at run time so that nothing links libcuda.
using TensorMapEncode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                     CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

static TensorMapEncode tensor_map_encode() {
    static const TensorMapEncode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        return reinterpret_cast<TensorMapEncode>(function);
    }();
    return encode;
}

// The swizzle whose span is one row of a tile: 128, 64 or 32 bytes.
inline CUtensorMapSwizzle swizzle_of(int row_bytes) {
    return row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_32B;
}

// A map of a dense tensor; dims and box fastest first, zeros outside the tensor.
template <int kRank> int make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes, CUtensorMapSwizzle swizzle, const void* base, const int64_t (&dims)[kRank], const int (&box)[kRank]) {
    cuuint64_t sizes[kRank], strides[kRank];
    cuuint32_t boxes[kRank], steps[kRank];
    cuuint64_t stride = element_bytes;
    for (int i = 0; i < kRank; i++) {
        sizes[i] = dims[i], boxes[i] = box[i], steps[i] = 1;
        stride *= dims[i];
        strides[i] = stride;
    }
    if (!tensor_map_encode()) return cudaErrorNotSupported;
    const CUresult result = tensor_map_encode()(map, type, kRank, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
