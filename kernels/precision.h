// Where a float32 forward on the tensor cores has split operands: where cuDNN's is float32-accurate although TF32 is allowed (NOTES.md). Which forwards come to the
// tensor cores at all is up to the table of paths in model_new.py, which has functions of the same names (tests/test_paths.py).
#pragma once

#include "geometry.h"

// Several groups: as accurate as float32 where no sum has more products than this; with more, they are computed as one group, with zeros between them.
constexpr int64_t kMostSplitTerms = 128;

// Products of an output, at most.
inline int64_t terms_of(const Geometry& g) {
    int64_t terms = g.C_in / g.groups;
    for (const Axis& a : g.axis) terms *= ceil_div(a.kernel, tap_period(a));    // taps of a phase
    return terms;
}

// Strides with which cuDNN computes a single group in TF32.
inline bool has_tf32(const Geometry& g) {
    bool ones = true, twos = true, up_to_two = true, dilated = false, overlaps = false;
    for (const Axis& a : g.axis) ones &= a.stride == 1, twos &= a.stride == 2, up_to_two &= a.stride <= 2, dilated |= a.dilation > 1, overlaps |= a.kernel > a.stride;
    return ones || (up_to_two && !dilated && (twos || overlaps));
}

// Channels so few that cuDNN computes float32 in float32.
inline bool has_few_channels(const Geometry& g) {
    bool overlaps = false;
    for (const Axis& a : g.axis) overlaps |= a.kernel > a.stride && a.stride > 1;
    return g.groups == 1 && !overlaps && (g.C_out <= 8 || (g.C_in <= 4 && g.C_out < 64));
}

// Groups of many channels, which cuDNN computes in TF32.
inline bool merges_groups(const Geometry& g) {
    bool ones = true;
    for (const Axis& a : g.axis) ones &= a.stride == 1;
    return g.groups > 1 && ones && (g.C_in < g.C_out ? g.C_in : g.C_out) / g.groups >= 32 && terms_of(g) > kMostSplitTerms;
}

// Multiplications in all, those by inserted zeros included. Where they are few, cuDNN computes in float32.
constexpr int64_t kFewMultiplyAdds = 1 << 24;
inline double multiply_adds(const Geometry& g) {
    double count = double(g.N) * g.C_in * g.C_out / g.groups;
    for (const Axis& a : g.axis) count *= double(a.out) * a.kernel;
    return count;
}

inline bool forward_in_float32(const Geometry& g) { return multiply_adds(g) < kFewMultiplyAdds || (g.groups > 1 ? !merges_groups(g) : has_few_channels(g) || !has_tf32(g)); }

inline bool splits_groups(const Geometry& g) { return g.groups > 1 && terms_of(g) <= kMostSplitTerms; }

// Channels of a third of GEMM_K, which is [low, high, high] then; or 0.
inline int third_of(const Geometry& g) { return g.groups == 1 && !has_tf32(g) ? int(ceil_div(g.C_in, 8)) * 8 : 0; }
