// A layer whose kernels are run on the host (host_cuda/): its tensors, of small integers, and what is to come out.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <random>

#include "launch.cuh"
#include "taps.h"

// Bytes that nobody has written yet (NaN), in front of a page that must not be touched. They begin `offset` floats behind a multiple of 16 bytes.
class Memory {
public:
    explicit Memory(int64_t bytes, int offset = 0) {
        const int64_t page = sysconf(_SC_PAGESIZE), padded = (bytes + offset * 4 + 15) / 16 * 16;
        size_ = (padded + page - 1) / page * page + page;
        base_ = static_cast<uint8_t*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(base_ + size_ - page, page, PROT_NONE);
        std::memset(base_, 0xff, size_ - page);
        data_ = base_ + size_ - page - padded + offset * 4;
    }
    ~Memory() { munmap(base_, size_); }
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    void* data() { return data_; }

private:
    uint8_t *base_, *data_;
    int64_t size_;
};

// An array of T; made from one of float, it has what T makes of its values.
template <typename T> struct ArrayOf : Memory {
    size_t count;
    ArrayOf(size_t count, int offset) : Memory(count * sizeof(T), offset), count(count) {}
    ArrayOf(ArrayOf<float>& from, int offset) : ArrayOf(from.count, offset) {
        for (size_t i = 0; i < count; i++) data()[i] = from_acc<T>(from.data()[i]);
    }
    T* data() { return static_cast<T*>(Memory::data()); }
};
using Array = ArrayOf<float>;

// A small integer is what T makes of it.
template <typename T> bool equal(const char* what, ArrayOf<T>& ours, const std::vector<float>& truth) {
    for (size_t i = 0; i < truth.size(); i++)
        if (!(to_acc(ours.data()[i]) == to_acc(from_acc<T>(truth[i])))) {
            std::printf("%s: element %zu is %g, not %g\n", what, i, double(to_acc(ours.data()[i])), truth[i]);
            return false;
        }
    return true;
}

using Doubles = std::vector<double>;

// But for rounding: the relative error is at most so large. sizes: of what is added up, where that may cancel.
template <typename T> bool close(const char* what, ArrayOf<T>& ours, const Doubles& truth, double most, const Doubles& sizes) {
    double squares = 0, errors = 0;
    for (size_t i = 0; i < truth.size(); i++) squares += sizes[i] * sizes[i], errors += (to_acc(ours.data()[i]) - truth[i]) * (to_acc(ours.data()[i]) - truth[i]);
    if (errors <= most * most * squares + 1e-20) return true;
    std::printf("%s: relative error %g, more than %g\n", what, std::sqrt(errors / squares), most);
    return false;
}

template <typename T> bool close(const char* what, ArrayOf<T>& ours, const Doubles& truth, double most) { return close(what, ours, truth, most, truth); }

// Calls f with the elements of x, of w and of y of every product of the layer.
template <typename F> void for_each_product(const Geometry& g, F f) {
    const int64_t in = in_volume(g), out = out_volume(g), volume = kernel_volume(g), group_in = g.C_in / g.groups, group_out = g.C_out / g.groups;
    const taps::Layer layer = taps::make_layer(g);
    for (int k = 0; k < volume; k++) for (int i = 0; i < in; i++) {
        const int o = taps::output_of(layer, k, i);    // which taps.cpp proves
        for (int n = 0; n < g.N && o >= 0; n++) for (int ci = 0; ci < g.C_in; ci++) for (int c = 0; c < group_out; c++)
            f((n * g.C_in + ci) * in + i, (ci * group_out + c) * volume + k, (n * g.C_out + ci / group_in * group_out + c) * out + o);
    }
}
inline double products_of(const Geometry& g) { return double(in_volume(g)) * kernel_volume(g) * g.C_in * g.C_out / g.groups * g.N; }

struct EmulatedLayer {
    Array x, w, dout, bias;
    std::vector<float> y, dx, dw;    // the truth

    // most_x: of the magnitudes of x.
    EmulatedLayer(const Geometry& g, bool biased, bool relu, int offset, std::mt19937& random, int most_x = 2)
        : x(g.N * g.C_in * in_volume(g), offset), w(g.C_in * (g.C_out / g.groups) * kernel_volume(g), offset), dout(g.N * g.C_out * out_volume(g), offset), bias(g.C_out, 0), y(dout.count), dx(x.count, 0), dw(w.count, 0) {
        for (Array* a : {&x, &w, &dout, &bias})
            for (size_t i = 0, most = a == &x ? most_x : 2; i < a->count; i++) a->data()[i] = int(random() % (2 * most + 1)) - int(most);
        for (size_t i = 0; i < y.size(); i++) y[i] = biased ? bias.data()[i / out_volume(g) % g.C_out] : 0;
        for_each_product(g, [&](int64_t at_x, int64_t at_w, int64_t at_y) { y[at_y] += x.data()[at_x] * w.data()[at_w], dx[at_x] += dout.data()[at_y] * w.data()[at_w], dw[at_w] += dout.data()[at_y] * x.data()[at_x]; });
        if (relu) for (float& v : y) v = v < 0 ? 0 : v;
    }
};

// Between least and most.
struct Among {
    std::mt19937& random;
    int operator()(int least, int most) { return least + int(random() % (most - least + 1)); }
};

// A random axis; out <= 0: there is no such layer.
inline Axis random_axis(Among& among, int most_in, int most_kernel, int most_stride, bool single) {
    Axis a = {among(1, most_in), 0, among(1, most_kernel), among(1, most_stride), among(0, 2), among(1, 2)};
    if (single) a.kernel = a.stride, a.padding = 0, a.dilation = 1;
    const int64_t most_added = single ? 1 : a.stride > a.dilation ? a.stride : a.dilation;
    a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + among(0, int(most_added) - 1) + 1;
    return a;
}

inline void print(const Geometry& g) {
    std::printf("N %d C_in %d C_out %d groups %d\n", int(g.N), int(g.C_in), int(g.C_out), int(g.groups));
    for (const Axis& a : g.axis) std::printf("in %d kernel %d stride %d padding %d dilation %d out %d\n", int(a.in), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(a.out));
}

// What is drawn for one emulation; offset: of the tensors, in floats.
struct Drawn {
    Geometry g;
    int dtype, offset;
};

// main(LAYERS SEED): draw(among, done) makes a layer, or none that is wanted; emulate(element, drawn, biased, relu, random), with a value of its dtype, tells whether it is right.
template <typename Draw, typename Emulate> int emulate_layers(char** arguments, Draw draw, Emulate emulate) {
    std::mt19937 random(std::atoi(arguments[2]));
    Among among = {random};
    for (int done = 0; done < std::atoi(arguments[1]);) {
        const std::optional<Drawn> drawn = draw(among, done);
        if (!drawn) continue;
        done++;
        const bool biased = random() % 2, relu = random() % 2;
        if (with_dtype(drawn->dtype, [&](auto element) { return emulate(element, *drawn, biased, relu, random); })) continue;
        std::printf("dtype %d\n", drawn->dtype);
        print(drawn->g);
        return 1;
    }
    return 0;
}
