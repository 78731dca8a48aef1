// Where a float32 forward on the tensor cores has split operands (scaled_half.cuh): where cuDNN's is float32-accurate although TF32 is allowed (NOTES.md). Which forwards
// come to the tensor cores at all is up to the table of paths in model_new.py, whose `_terms` and `_has_tf32` are the functions of these names (tests/test_paths.py).
#pragma once

#include <numeric>

#include "geometry.h"

// Several groups: as accurate as float32 where no sum has more products than this; with more, they are computed as one group, with zeros between them.
constexpr int64_t kMostSplitTerms = 128;

// Products of an output, at most.
inline int64_t terms_of(const Geometry& g) {
    int64_t terms = g.C_in / g.groups;
    for (const Axis& a : g.axis) terms *= ceil_div(a.kernel, a.stride / std::gcd(a.stride, a.dilation));    // taps of a phase
    return terms;
}

// Strides with which cuDNN computes a single group in TF32.
inline bool has_tf32(const Geometry& g) {
    bool ones = true, twos = true, up_to_two = true, dilated = false, overlaps = false;
    for (const Axis& a : g.axis) ones &= a.stride == 1, twos &= a.stride == 2, up_to_two &= a.stride <= 2, dilated |= a.dilation > 1, overlaps |= a.kernel > a.stride;
    return ones || (up_to_two && !dilated && (twos || overlaps));
}

inline bool splits_groups(const Geometry& g) { return g.groups > 1 && terms_of(g) <= kMostSplitTerms; }

// Channels of a third of GEMM_K, which is [low, high, high] then; or 0.
inline int third_of(const Geometry& g) { return g.groups == 1 && !has_tf32(g) ? int(ceil_div(g.C_in, 8)) * 8 : 0; }
