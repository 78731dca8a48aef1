// The CPU backend: the same operations as the CUDA kernels, over the same phases (geometry.h), compiled by the host
// compiler. float32 and float64; sums are taken in float64 and do not depend on the number of threads.
// Signatures as the CUDA launchers', with a number of threads for device and stream, and no workspace.

#include <math.h>

#include <algorithm>
#include <vector>

#include "geometry.h"

namespace cpu_backend {

constexpr int kChannels = 4;    // destination channels that share a row of the source

// --------------------------------------------------------------------------------------------- Gather (out, dx)

// One row (n, c0 .. c0 + channels, d, h, :) of the destination: dst = epilogue(gather of src), phase by phase along W.
template <typename T>
void gather_row(Direction direction, const Geometry& g, const Phase& pd, int64_t qd, const Phase& ph, int64_t qh, int64_t group, int64_t c0, int channels,
                const T* src, const T* w, const T* bias, bool apply_relu, T* dst, double* sums) {
    const bool forward = direction == Direction::kForward;
    const Axis& aw = g.axis[2];
    const int64_t c_in = g.C_in / g.groups, c_out = g.C_out / g.groups, taps = kernel_volume(g);
    const int64_t src_channels = forward ? c_in : c_out;
    const int64_t src_volume = int64_t(pd.src_size) * ph.src_size * (forward ? aw.in : aw.out);
    const int64_t dst_volume = forward ? out_volume(g) : in_volume(g);
    for (int64_t phase = 0; phase < num_phases(direction, aw); phase++) {
        const Phase pw = make_phase(direction, aw, phase);
        std::fill(sums, sums + kChannels * pw.count, 0.0);
        for (int jd = 0; jd < pd.taps; jd++)
        for (int jh = 0; jh < ph.taps; jh++) {
            const int64_t sd = pd.src + qd * pd.src_step + int64_t(jd) * pd.src_tap_step, sh = ph.src + qh * ph.src_step + int64_t(jh) * ph.src_tap_step;
            if (sd < 0 || sd >= pd.src_size || sh < 0 || sh >= ph.src_size) continue;
            for (int jw = 0; jw < pw.taps; jw++) {
                const int64_t tap = ((pd.k + jd * pd.k_step) * g.axis[1].kernel + ph.k + jh * ph.k_step) * aw.kernel + pw.k + jw * pw.k_step;
                const Range range = valid_range(pw, jw);
                for (int64_t c = 0; c < src_channels; c++) {
                    const T* row = src + c * src_volume + (sd * ph.src_size + sh) * pw.src_size + pw.src + int64_t(jw) * pw.src_tap_step;
                    double weight[kChannels] = {};
                    for (int m = 0; m < channels; m++) {
                        const int64_t ci = forward ? c : c0 + m, co = forward ? c0 + m : c;
                        weight[m] = w[((group * c_in + ci) * c_out + co) * taps + tap];
                    }
                    double *s0 = sums, *s1 = s0 + pw.count, *s2 = s1 + pw.count, *s3 = s2 + pw.count;
#pragma omp simd
                    for (int64_t q = range.begin; q < range.end; q++) {
                        const double v = row[q * pw.src_step];
                        s0[q] += v * weight[0], s1[q] += v * weight[1], s2[q] += v * weight[2], s3[q] += v * weight[3];
                    }
                }
            }
        }
        for (int m = 0; m < channels; m++)
            for (int64_t q = 0; q < pw.count; q++) {
                double v = sums[m * pw.count + q] + (bias ? double(bias[c0 + m]) : 0.0);
                if (apply_relu && v < 0) v = 0;
                dst[m * dst_volume + pw.dst + q * pw.dst_step] = T(v);
            }
    }
}

template <typename T>
int gather(Direction direction, const Geometry& g, int threads, const T* src, const T* w, const T* bias, bool apply_relu, T* dst) {
    static_assert(kChannels == 4, "gather_row names four rows of sums");
    const bool forward = direction == Direction::kForward;
    const int64_t src_channels = (forward ? g.C_in : g.C_out) / g.groups, dst_channels = (forward ? g.C_out : g.C_in) / g.groups;
    const int64_t src_volume = forward ? in_volume(g) : out_volume(g), dst_volume = forward ? out_volume(g) : in_volume(g);
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t dst_d = forward ? ad.out : ad.in, dst_h = forward ? ah.out : ah.in, dst_w = forward ? aw.out : aw.in;
    const int64_t tiles = ceil_div(dst_channels, kChannels);
#pragma omp parallel num_threads(threads)
    {
        std::vector<double> sums(kChannels * dst_w);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t outer = 0; outer < g.N * g.groups * tiles; outer++)
        for (int64_t d = 0; d < dst_d; d++) {
            const int64_t tile = outer % tiles, group = outer / tiles % g.groups, n = outer / tiles / g.groups;
            const int64_t c0 = tile * kChannels;
            const Phase pd = make_phase(direction, ad, d % num_phases(direction, ad));
            for (int64_t h = 0; h < dst_h; h++) {
                const Phase ph = make_phase(direction, ah, h % num_phases(direction, ah));
                gather_row(direction, g, pd, d / num_phases(direction, ad), ph, h / num_phases(direction, ah), group, c0, int(std::min<int64_t>(kChannels, dst_channels - c0)),
                           src + (n * g.groups + group) * src_channels * src_volume, w, bias ? bias + group * dst_channels : nullptr, apply_relu,
                           dst + ((n * g.groups + group) * dst_channels + c0) * dst_volume + (d * dst_h + h) * dst_w, sums.data());
            }
        }
    }
    return 0;
}

// ---------------------------------------------------------------------------------------- Parameters' gradients

template <typename T>
int dweight(const Geometry& g, int threads, const T* x, const T* dout, T* out) {
    const Axis &ad = g.axis[0], &ah = g.axis[1], &aw = g.axis[2];
    const int64_t c_out = g.C_out / g.groups, c_in = g.C_in / g.groups, taps = kernel_volume(g);
    const int64_t src_volume = in_volume(g), dst_volume = out_volume(g);
    // Along an axis, tap k of input i lands on i * stride + (k * dilation - padding): dx's phase, read the other way.
    const Phase pd = make_phase(Direction::kDInput, ad, 0), ph = make_phase(Direction::kDInput, ah, 0), pw = make_phase(Direction::kDInput, aw, 0);
#pragma omp parallel for collapse(2) num_threads(threads) schedule(dynamic)
    for (int64_t ci = 0; ci < g.C_in; ci++)
    for (int64_t co = 0; co < c_out; co++) {
        std::vector<double> sums(taps, 0.0);
        for (int64_t n = 0; n < g.N; n++) {
            const T* x_volume = x + (n * g.C_in + ci) * src_volume;
            const T* dout_volume = dout + (n * g.C_out + ci / c_in * c_out + co) * dst_volume;
            for (int kd = 0; kd < pd.taps; kd++)
            for (int kh = 0; kh < ph.taps; kh++) {
                const Range rd = valid_range(pd, kd), rh = valid_range(ph, kh);
                for (int64_t d = rd.begin; d < rd.end; d++)
                for (int64_t h = rh.begin; h < rh.end; h++) {
                    const T* x_row = x_volume + (d * ah.in + h) * aw.in;
                    const T* dout_row = dout_volume + ((pd.src + d * pd.src_step + int64_t(kd) * pd.src_tap_step) * ah.out + ph.src + h * ph.src_step + int64_t(kh) * ph.src_tap_step) * aw.out;
                    for (int kw = 0; kw < pw.taps; kw++) {
                        const Range rw = valid_range(pw, kw);
                        const T* source = dout_row + pw.src + int64_t(kw) * pw.src_tap_step;
                        double sum = 0;
#pragma omp simd reduction(+ : sum)
                        for (int64_t q = rw.begin; q < rw.end; q++) sum += double(x_row[q]) * double(source[q * pw.src_step]);
                        sums[(kd * ah.kernel + kh) * aw.kernel + kw] += sum;
                    }
                }
            }
        }
        for (int64_t k = 0; k < taps; k++) out[(ci * c_out + co) * taps + k] = T(sums[k]);
    }
    return 0;
}

template <typename T>
int dbias(const Geometry& g, int threads, const T* dout, T* out) {
    const int64_t volume = out_volume(g);
#pragma omp parallel for num_threads(threads)
    for (int64_t c = 0; c < g.C_out; c++) {
        double sum = 0;
        for (int64_t n = 0; n < g.N; n++)
            for (int64_t i = 0; i < volume; i++) sum += dout[(n * g.C_out + c) * volume + i];
        out[c] = T(sum);
    }
    return 0;
}

// ----------------------------------------------------------------------------------------------- ReLU, GroupNorm

struct NormShape { int64_t N, C, S, num_groups; };    // as in relu_group_norm_generic.cu

template <typename T>
int group_norm_forward(const NormShape& s, int threads, const T* r, const T* gamma, const T* beta, double eps, T* y, double* statistics) {
    const int64_t channels = s.C / s.num_groups, count = channels * s.S;
    double *mean = statistics, *rstd = statistics + s.N * s.num_groups;    // (2, N, num_groups)
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < s.N * s.num_groups; group++) {
        const T* values = r + group * count;
        const double shift = values[0];    // sums of shifted values do not cancel
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < count; i++) {
            const double v = values[i] - shift;
            sum += v;
            squares += v * v;
        }
        const double variance = squares / count - sum / count * (sum / count);
        mean[group] = shift + sum / count;
        rstd[group] = 1 / sqrt((variance < 0 ? 0 : variance) + eps);
        for (int64_t i = 0; i < count; i++) {
            const int64_t c = (group * channels + i / s.S) % s.C;
            y[group * count + i] = T((values[i] - mean[group]) * rstd[group] * (gamma ? gamma[c] : T(1)) + (beta ? beta[c] : T(0)));
        }
    }
    return 0;
}

template <typename T>
int relu_group_norm_backward(const NormShape& s, int threads, const T* dy, const T* r, const double* statistics, const T* gamma, T* dz, T* dgamma, T* dbeta, T* dbias) {
    const int64_t channels = s.C / s.num_groups, count = channels * s.S;
    const double *mean = statistics, *rstd = statistics + s.N * s.num_groups;
    std::vector<double> sums(s.N * s.C), products(s.N * s.C), dz_sums(s.N * s.C);    // per (n, c): sums of dy, of dy * xhat and of dz
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < s.N * s.C; row++) {
        const int64_t group = row / channels;
        for (int64_t i = row * s.S; i < (row + 1) * s.S; i++) {
            sums[row] += dy[i];
            products[row] += dy[i] * ((r[i] - mean[group]) * rstd[group]);
        }
    }
    for (int64_t c = 0; c < s.C; c++) {
        double sum = 0, product = 0;
        for (int64_t n = 0; n < s.N; n++) sum += sums[n * s.C + c], product += products[n * s.C + c];
        if (dbeta) dbeta[c] = T(sum);
        if (dgamma) dgamma[c] = T(product);
    }
    if (!dz && !dbias) return 0;
#pragma omp parallel for num_threads(threads)
    for (int64_t group = 0; group < s.N * s.num_groups; group++) {
        double mean1 = 0, mean2 = 0;
        for (int64_t row = group * channels; row < (group + 1) * channels; row++) {
            const double weight = gamma ? gamma[row % s.C] : T(1);
            mean1 += weight * sums[row] / count;
            mean2 += weight * products[row] / count;
        }
        for (int64_t i = group * count; i < (group + 1) * count; i++) {
            const double weight = gamma ? gamma[i / s.S % s.C] : T(1);
            const double dr = rstd[group] * (weight * dy[i] - mean1 - (r[i] - mean[group]) * rstd[group] * mean2);
            const double own = r[i] <= 0 ? 0 : dr;    // NaN keeps its gradient, as in torch
            dz_sums[i / s.S] += own;
            if (dz) dz[i] = T(own);
        }
    }
    for (int64_t c = 0; dbias && c < s.C; c++) {
        double sum = 0;
        for (int64_t n = 0; n < s.N; n++) sum += dz_sums[n * s.C + c];
        dbias[c] = T(sum);
    }
    return 0;
}

template <typename F> int with_dtype(int dtype, F f) {
    if (dtype == 0) return f(float{});
    if (dtype == 1) return f(double{});
    return 1;
}

}  // namespace cpu_backend

// --------------------------------------------------------------------------------------------------- Entry points

using cpu_backend::with_dtype;

extern "C" int conv_transpose3d_forward_cpu(const Geometry* g, int dtype, int threads, const void* x, const void* w, const void* bias, int apply_relu, void* out) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::gather<T>(Direction::kForward, *g, threads, (const T*)x, (const T*)w, (const T*)bias, apply_relu != 0, (T*)out);
    });
}

extern "C" int conv_transpose3d_dinput_cpu(const Geometry* g, int dtype, int threads, const void* dout, const void* w, void* dx) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::gather<T>(Direction::kDInput, *g, threads, (const T*)dout, (const T*)w, nullptr, false, (T*)dx);
    });
}

extern "C" int conv_transpose3d_dweight_cpu(const Geometry* g, int dtype, int threads, const void* x, const void* dout, void* dweight) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::dweight<T>(*g, threads, (const T*)x, (const T*)dout, (T*)dweight);
    });
}

extern "C" int conv_transpose3d_dbias_cpu(const Geometry* g, int dtype, int threads, const void* dout, void* dbias) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::dbias<T>(*g, threads, (const T*)dout, (T*)dbias);
    });
}

extern "C" int group_norm_forward_cpu(const cpu_backend::NormShape* s, int dtype, int threads, const void* r, const void* gamma, const void* beta, double eps, void* y, double* statistics) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::group_norm_forward<T>(*s, threads, (const T*)r, (const T*)gamma, (const T*)beta, eps, (T*)y, statistics);
    });
}

extern "C" int relu_group_norm_backward_cpu(const cpu_backend::NormShape* s, int dtype, int threads, const void* dy, const void* r, const double* statistics,
                                            const void* gamma, void* dz, void* dgamma, void* dbeta, void* dbias) {
    return with_dtype(dtype, [&](auto e) {
        using T = decltype(e);
        return cpu_backend::relu_group_norm_backward<T>(*s, threads, (const T*)dy, (const T*)r, statistics, (const T*)gamma, (T*)dz, (T*)dgamma, (T*)dbeta, (T*)dbias);
    });
}
