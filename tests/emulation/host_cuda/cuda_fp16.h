// In place of CUDA's header: half precision, on the host.
#pragma once

#include "cuda_runtime.h"

struct __half { uint16_t bits = 0; };
struct __half2 { __half x, y; };

namespace half_tables {
inline float value_of(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY) : exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(1024 + mantissa), exponent - 25);
    return h >> 15 ? -magnitude : magnitude;
}
inline const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int i = 0; i < 1 << 16; i++) all[i] = value_of(uint16_t(i));
    return all;
}();
}  // namespace half_tables

inline float __half2float(__half v) { return half_tables::values[v.bits]; }
// To nearest, ties to even.
inline __half __float2half_rn(float v) {
    const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
    const float magnitude = std::fabs(v);
    if (std::isnan(v)) return {uint16_t(0x7fff)};
    if (magnitude >= 65520) return {uint16_t(sign | 0x7c00)};
    const int exponent = magnitude < std::ldexp(1.0f, -14) ? -14 : std::ilogb(magnitude);
    const int units = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));    // of the last place; 2048 carries into the exponent
    return {uint16_t(sign | (((exponent + 14) << 10) + units))};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half2 __float2half2_rn(float v) { return __floats2half2_rn(v, v); }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline __half __habs(__half v) { return {uint16_t(v.bits & 0x7fff)}; }
inline __half2 __habs2(__half2 v) { return {__habs(v.x), __habs(v.y)}; }
inline __half __hmax_nan(__half a, __half b) { return std::isnan(__half2float(a)) || __half2float(a) > __half2float(b) ? a : b; }
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }
inline bool __hblt2(__half2 a, __half2 b) { return __half2float(a.x) < __half2float(b.x) && __half2float(a.y) < __half2float(b.y); }
