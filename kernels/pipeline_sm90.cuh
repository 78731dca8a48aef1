// What a pipeline through shared memory needs beside the instructions of ptx_sm90.cuh: positions in its rings, and the tensor maps of what the copy engine brings.
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
