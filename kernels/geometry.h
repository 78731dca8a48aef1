// The index arithmetic of a transposed convolution, for host and device. Every kernel and the CPU backend use it.
//
// Tap k of input position i lands on output position o = i * stride - padding + k * dilation (per axis).
// Read backwards, output o gathers i = (o + padding - k * dilation) / stride, only where that divides exactly.
// The outputs o that share o mod stride (a phase) share their taps, and then nothing needs a divisibility test:
// source positions, taps and destinations are all arithmetic progressions. `Phase` holds them.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

// ---------------------------------------------------------------------------------------------------- Geometry

struct Axis {
    int64_t in;       // positions of the input
    int64_t out;      // (in - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1
    int64_t kernel, stride, padding, dilation;
};

// Mirrored field by field by `Geometry` in model_new.py, which sees to it that what belongs to one axis is below 2^30;
// products of axes need 64 bits.
struct Geometry {
    int64_t N, C_in, C_out, groups;
    Axis axis[3];     // D, H, W
};

HOST_DEVICE int64_t in_volume(const Geometry& g) { return g.axis[0].in * g.axis[1].in * g.axis[2].in; }
HOST_DEVICE int64_t out_volume(const Geometry& g) { return g.axis[0].out * g.axis[1].out * g.axis[2].out; }
HOST_DEVICE int64_t kernel_volume(const Geometry& g) { return g.axis[0].kernel * g.axis[1].kernel * g.axis[2].kernel; }

HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of so many bytes that a multiprocessor's shared memory has room for: it has a kilobyte more than a block can have, and keeps one for each block.
inline int64_t blocks_that_fit(int64_t shared_bytes, int64_t most_shared) { return (most_shared + 1024) / (shared_bytes + 1024); }

constexpr int kAddedOutputs = 1024;    // of a channel, that a block adds the parts of (add_parts.cuh)

// The upper half of the product.
HOST_DEVICE unsigned multiply_high(unsigned a, unsigned b) {
#ifdef __CUDA_ARCH__
    return __umulhi(a, b);
#else
    return unsigned(uint64_t(a) * b >> 32);
#endif
}

// The last digit of i, which is below `count`; i becomes what is left.
HOST_DEVICE int take_digit(int& i, int count) {
    const int digit = i % count;
    i /= count;
    return digit;
}

// Division by what is known when a plan is made, of numbers from 0 to 2^31 - 1: n / d = (n + n * magic / 2^32) / 2^shift (Granlund, Montgomery: "Division by Invariant
// Integers using Multiplication"). A division takes a warp 100 cycles, and locating a tile is a chain of a dozen.
struct Divisor {
    unsigned magic;
    int shift, value;
    HOST_DEVICE int divide(int n) const { return int((multiply_high(unsigned(n), magic) + unsigned(n)) >> shift); }
    // The remainder; n becomes the quotient.
    HOST_DEVICE int take(int& n) const {
        const int quotient = divide(n), rest = n - quotient * value;
        n = quotient;
        return rest;
    }
};
inline Divisor make_divisor(int value) {
    int shift = 0;
    while (int64_t(1) << shift < value) shift++;
    return {unsigned((uint64_t(1) << 32) * ((uint64_t(1) << shift) - value) / value + 1), shift, value};
}

// ------------------------------------------------------------------------------------------------------ Phases

enum class Direction {
    kForward,    // gather x into out
    kDInput,     // gather dout into dx
};

// One residue class of the destination positions along an axis. For 0 <= q < count and 0 <= j < taps:
// destination dst + q * dst_step gathers tap k + j * k_step from source src + q * src_step + j * src_tap_step,
// and there is nothing to gather where that source is outside [0, src_size).
struct Phase {
    int dst, dst_step, count;
    int k, k_step, taps;
    int src, src_step, src_tap_step, src_size;
};

HOST_DEVICE int64_t gcd(int64_t a, int64_t b) {
    while (b) { int64_t r = a % b; a = b; b = r; }
    return a;
}

// The taps k, k + period, ... of a kernel share their outputs' residue.
HOST_DEVICE int64_t tap_period(const Axis& a) { return a.stride / gcd(a.stride, a.dilation); }

HOST_DEVICE int64_t num_phases(Direction direction, const Axis& a) { return direction == Direction::kForward ? a.stride : 1; }

HOST_DEVICE Phase make_phase(Direction direction, const Axis& a, int64_t phase) {
    if (direction == Direction::kDInput)
        return {0, 1, int(a.in), 0, 1, int(a.kernel), int(-a.padding), int(a.stride), int(a.dilation), int(a.out)};
    // Taps of the outputs o = phase + q * stride are those with (phase + padding - k * dilation) mod stride == 0.
    int64_t period = tap_period(a);
    int64_t k = 0;
    while (k < period && (phase + a.padding - k * a.dilation) % a.stride != 0) k++;
    int64_t taps = k < period && k < a.kernel ? ceil_div(a.kernel - k, period) : 0;
    int64_t count = a.out > phase ? ceil_div(a.out - phase, a.stride) : 0;
    return {int(phase), int(a.stride), int(count), int(k), int(period), int(taps),
            int((phase + a.padding - k * a.dilation) / a.stride), 1, int(-(period * a.dilation / a.stride)), int(a.in)};
}

// The half-open range of q whose source for tap j lies inside the source: [begin, end).
struct Range { int64_t begin, end; };

HOST_DEVICE Range valid_range(const Phase& p, int64_t j) {
    int64_t src = p.src + j * p.src_tap_step;    // the source of q = 0
    int64_t begin = src < 0 ? ceil_div(-src, p.src_step) : 0;
    int64_t end = src < p.src_size ? ceil_div(p.src_size - src, p.src_step) : 0;
    end = end < p.count ? end : p.count;
    return {begin, end > begin ? end : begin};
}
