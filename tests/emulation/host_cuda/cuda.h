// In place of CUDA's header: tensor maps, on the host.
#pragma once

#include "cuda_runtime.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT32 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
    uint8_t* base;
    int64_t dims[5], strides[5];    // elements, bytes; fastest first
    int box[5], rank, element_bytes, swizzle;
};

inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                                  CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    *map = {static_cast<uint8_t*>(base), {}, {}, {}, int(rank), type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 ? 2 : 4, swizzle};
    bool right = reinterpret_cast<uintptr_t>(base) % 16 == 0 && rank <= 5;
    for (unsigned i = 0; i < rank; i++) {
        map->dims[i] = dims[i], map->strides[i] = i == 0 ? map->element_bytes : strides[i - 1], map->box[i] = box[i];
        right &= dims[i] > 0 && box[i] > 0 && box[i] <= 256 && steps[i] == 1 && (i == 0 || map->strides[i] % 16 == 0);
    }
    const int row_bytes = map->box[0] * map->element_bytes;
    right &= row_bytes % 16 == 0 && (swizzle == CU_TENSOR_MAP_SWIZZLE_NONE || row_bytes <= 16 << swizzle);
    return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult*) {
    *function = reinterpret_cast<void*>(encode_tensor_map);
    return cudaSuccess;
}
