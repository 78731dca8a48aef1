// In place of kernels/add_parts.cuh: the sum of parts, on the host.
#pragma once

#include "launch.cuh"

namespace parts {

struct Parts {
    const float* values;
    int count;
    int64_t N;
    int C, volume;
};
struct Moments {};

inline int add(const Parts& p, int, const void*, bool, void* out, const Moments&, void*) {
    const int64_t size = p.N * p.C * p.volume;
    for (int64_t i = 0; i < size; i++) {
        float sum = 0;
        for (int part = 0; part < p.count; part++) sum += p.values[part * size + i];
        static_cast<float*>(out)[i] = sum;
    }
    return cudaSuccess;
}

}  // namespace parts
