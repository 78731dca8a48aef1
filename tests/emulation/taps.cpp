// Carries out the sums of taps and the spread of gradients on the host, with the kernels' own index arithmetic: random layers, small integers.
// Usage: taps SHAPES SEED; exit code 1 where an element is wrong.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../kernels/taps.h"

static bool emulate(const Geometry& g, std::mt19937& random) {
    const taps::Layer layer = taps::make_layer(g);
    const bool single = taps::has_single_taps(g);
    if (single && layer.outputs != layer.volume * layer.positions) {
        std::printf("%d outputs are not single products\n", layer.outputs);
        return false;
    }
    std::vector<float> products(size_t(layer.volume) * layer.positions), truth(layer.outputs, 0);
    for (float& v : products) v = int(random() % 7) - 3;
    const Axis *d = g.axis, *h = g.axis + 1, *w = g.axis + 2;
    const auto place = [](const Axis* a, int i, int k) { return i * a->stride - a->padding + k * a->dilation; };
    for (int k = 0; k < layer.volume; k++)
    for (int i = 0; i < layer.positions; i++) {
        const int64_t od = place(d, i / (h->in * w->in), k / (h->kernel * w->kernel)), oh = place(h, i / w->in % h->in, k / w->kernel % h->kernel), ow = place(w, i % w->in, k % w->kernel);
        const bool inside = od >= 0 && od < d->out && oh >= 0 && oh < h->out && ow >= 0 && ow < w->out;
        const int64_t o = inside ? (od * h->out + oh) * w->out + ow : -1;
        if (inside) truth[o] += products[size_t(k) * layer.positions + i];
        if (single) {
            const int64_t expected_d = i / (h->in * w->in) * d->stride + k / (h->kernel * w->kernel), expected_h = i / w->in % h->in * h->stride + k / w->kernel % h->kernel, expected_w = i % w->in * w->stride + k % w->kernel;
            if (od != expected_d || oh != expected_h || ow != expected_w || !inside) {
                std::printf("these taps are not single ones\n");
                return false;
            }
        }
        if (taps::output_of(layer, k, i) != o) {
            std::printf("element %d of the kernel and position %d make output %d, not %d\n", k, i, int(o), taps::output_of(layer, k, i));
            return false;
        }
    }
    const int most = taps::most_taps(layer);
    const auto is_right = [&](int o, float sum) {
        if (sum != truth[o]) std::printf("output %d is %g, not %g\n", o, truth[o], sum);
        return sum == truth[o];
    };
    for (int o = 0; o < layer.outputs; o++) {
        const float* p = products.data();
        if (!is_right(o, taps::sum_of<0>(layer, p, o)) || (most <= 2 && !is_right(o, taps::sum_of<2>(layer, p, o))) || (most <= 3 && !is_right(o, taps::sum_of<3>(layer, p, o)))) return false;
    }
    return true;
}

int main(int, char** arguments) {
    const int shapes = std::atoi(arguments[1]);
    std::mt19937 random(std::atoi(arguments[2]));
    const auto among = [&](int least, int most) { return least + int(random() % (most - least + 1)); };
    for (int done = 0; done < shapes;) {
        Geometry g = {1, 1, 1, 1, {}};
        bool exists = true;
        for (Axis& a : g.axis) {
            a = {among(1, 9), 0, among(1, 9), among(1, 9), among(0, 9), among(1, 5)};
            if (done % 2 == 0) a.kernel = a.stride = among(1, 4), a.padding = among(0, 2), a.dilation = among(1, 2);
            const int64_t most_added = a.stride > a.dilation ? a.stride : a.dilation;
            a.out = (a.in - 1) * a.stride - 2 * a.padding + a.dilation * (a.kernel - 1) + among(0, int(most_added) - 1) + 1;
            exists &= a.out > 0;
        }
        if (!exists) continue;
        done++;
        if (emulate(g, random)) continue;
        for (const Axis& a : g.axis) std::printf("in %d kernel %d stride %d padding %d dilation %d out %d\n", int(a.in), int(a.kernel), int(a.stride), int(a.padding), int(a.dilation), int(a.out));
        return 1;
    }
}
