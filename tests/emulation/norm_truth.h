// What GroupNorm of an activation r, and the backward of ReLU and GroupNorm, are to give, in float64.
#pragma once

#include <cmath>
#include <vector>

#include "group_norm.cuh"

struct NormTruth {
    std::vector<double> y, dz, dgamma, dbeta, dbias;
    std::vector<double> dz_sizes;    // of a channel, added up
    double largest_term = 0;         // of dz

    NormTruth(const group_norm::Shape& s, const float* r, const float* dy, const float* gamma, const float* beta) : y(s.N * s.C * s.S), dz(y.size()), dgamma(s.C), dbeta(s.C), dbias(s.C), dz_sizes(s.C) {
        const int64_t count = s.group_count();
        for (int64_t begin = 0; begin < int64_t(y.size()); begin += count) {
            const auto mean_of = [&](auto value) {
                double sum = 0;
                for (int64_t i = begin; i < begin + count; i++) sum += value(i);
                return sum / count;
            };
            const auto weighted_dy = [&](int64_t i) { return double(gamma[i / s.S % s.C]) * dy[i]; };
            const double mean = mean_of([&](int64_t i) { return double(r[i]); }), rstd = 1 / std::sqrt(mean_of([&](int64_t i) { return (r[i] - mean) * (r[i] - mean); }) + 1e-5);
            const auto xhat = [&](int64_t i) { return (r[i] - mean) * rstd; };
            const double mean1 = mean_of(weighted_dy), mean2 = mean_of([&](int64_t i) { return weighted_dy(i) * xhat(i); });
            for (int64_t i = begin; i < begin + count; i++) {
                const int64_t c = i / s.S % s.C;
                y[i] = xhat(i) * gamma[c] + beta[c];
                dz[i] = r[i] <= 0 ? 0 : rstd * (weighted_dy(i) - mean1 - xhat(i) * mean2);
                if (std::isfinite(rstd)) largest_term = std::max(largest_term, std::abs(rstd * weighted_dy(i)));
                dgamma[c] += dy[i] * xhat(i), dbeta[c] += dy[i], dbias[c] += dz[i], dz_sizes[c] += std::abs(dz[i]);
            }
        }
    }
};
