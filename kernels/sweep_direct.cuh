// What kernels that sweep down their planes do where a value is not finite: all outputs of the block once more, product by product, so that no zero that stands for nothing meets it.
#pragma once

#include "launch.cuh"
#include "stencil.h"

namespace sweep_direct {

// The outputs of a block: of `channels` channels, rows [row0, row1) of the planes of position d.
struct Part {
    const float *x, *w, *bias;         // of the group's input channels; of the first output channel; or null
    float* out;                        // of the first output channel
    int group_in, group_out, channels, d, row0, row1;
};

// A function by itself, so that nothing that it needs is kept in registers until then.
__device__ __noinline__ void compute(const Stencil& s, const Part& part, bool apply_relu) {
    const StencilAxis &ad = s.axis[0], &ah = s.axis[1], &aw = s.axis[2];
    const int rows = part.row1 - part.row0, volume = ad.sources * ah.sources * aw.sources, outputs = ad.phases * part.channels * rows * aw.out;
    __syncthreads();
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
        const int column = i % aw.out, row = part.row0 + i / aw.out % rows, stream = i / aw.out / rows, channel = stream % part.channels, pd = stream / part.channels, plane = part.d * ad.phases + pd - ad.crop;
        if (unsigned(plane) >= unsigned(ad.out)) continue;
        const int uh = row + ah.crop, uw = column + aw.crop;
        float sum = 0;
        for (int ci = 0; ci < part.group_in; ci++)
            for (int td = 0; td < ad.taps; td++) for (int th = 0; th < ah.taps; th++) for (int tw = 0; tw < aw.taps; tw++) {
                const int kd = ad.kernel_of[td][pd], kh = ah.kernel_of[th][uh % ah.phases], kw = aw.kernel_of[tw][uw % aw.phases];
                const int sd = ad.first + part.d - ad.shift[td], sh = ah.first + uh / ah.phases - ah.shift[th], sw = aw.first + uw / aw.phases - aw.shift[tw];
                if (min(kd, min(kh, kw)) < 0 || unsigned(sd) >= unsigned(ad.sources) || unsigned(sh) >= unsigned(ah.sources) || unsigned(sw) >= unsigned(aw.sources)) continue;
                const int64_t kernel = (int64_t(ci) * part.group_out + channel) * kernel_volume(s);
                sum = fmaf(part.x[ci * int64_t(volume) + (sd * ah.sources + sh) * aw.sources + sw], part.w[kernel + (kd * ah.kernel + kh) * aw.kernel + kw], sum);
            }
        if (part.bias) sum += part.bias[channel];
        part.out[((int64_t(channel) * ad.out + plane) * ah.out + row) * aw.out + column] = apply_relu ? relu(sum) : sum;
    }
}

}  // namespace sweep_direct
