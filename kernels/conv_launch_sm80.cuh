// The mma.sync convolution's launch.
#pragma once

#include "conv_plan.cuh"
#include "conv_sm80.cuh"

namespace conv_sm80 {

template <int kBlockN, int kChunk> int launch_conv(const Operands& o, int most_blocks, cudaStream_t stream) {
    const Tiling& t = o.a.p.t;
    return launch_with_shared(conv_kernel<kBlockN, kChunk>, std::min(t.tiles, most_blocks), kThreads, shared_bytes(t, o.a.p.s.axis[2]), stream, o);
}

// The launches of the tensor cores from sm_80 up (conv_plan.cuh).
struct Path {
    static Tiling choose_tiling(const Stencil& s, int64_t samples, int64_t source_channels, int64_t channels, int64_t groups, int multiprocessors, int device) {
        return conv_sm80::choose_tiling(s, samples, source_channels, channels, groups, multiprocessors, block_shared_bytes(device));
    }

    static int normalizing_blocks(const Plan&, const group_norm::Shape&, int, int, const void*, const void*) { return 0; }
    // a.out = the convolution of packed operands, or the parts of it, and its moments where there is room for them.
    static int convolve(const Parameters& a, const scaled_half::Activation& source, const scaled_half::Weight& weight, int multiprocessors, cudaStream_t stream) {
        const Problem& p = a.p;
        const Operands o = {a, source.copy, weight.copy, int(source.phase_channels) * source.phases(), p.t.C_pad * p.t.products};
        int device = 0;
        RETURN_IF_ERROR(cudaGetDevice(&device));
        const int most_blocks = multiprocessors * resident_blocks(p.t, p.s.axis[2], block_shared_bytes(device));
        const auto launch_chunk = [&](auto chunk) {
            constexpr int kChunk = decltype(chunk)::value;
            if constexpr (is_built(128, kChunk))
                if (p.t.block_n == 128) return launch_conv<128, kChunk>(o, most_blocks, stream);
            return p.t.block_n == 256 ? launch_conv<256, kChunk>(o, most_blocks, stream) : launch_conv<192, kChunk>(o, most_blocks, stream);
        };
        return p.t.chunk == 64 ? launch_chunk(std::integral_constant<int, 64>{}) : p.t.chunk == 32 ? launch_chunk(std::integral_constant<int, 32>{}) : launch_chunk(std::integral_constant<int, 16>{});
    }
};

}  // namespace conv_sm80
