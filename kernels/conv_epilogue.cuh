// What the tensor cores' convolutions are given and leave behind, on every architecture.
#pragma once

#include "conv_tiles.h"
#include "ptx_sm80.cuh"
#include "scaled_half.cuh"

namespace conv {

// ---------------------------------------------------------------------------------------------------- Parameters

// Scratch of a call.
struct Workspace {
    float* parts;                                  // or null. (k_parts, N, C_out, D_out, H_out, W_out): what is to be added
    unsigned* tile_tickets;                        // (queues): how many tiles have been taken; start at zero
    group_norm::MomentSets sets;                   // of runs and phases
    unsigned *stored, *ready, *groups, *pieces;    // conv_normalizer.cuh: (N), (N), (1), (1); start at zero
};

// GroupNorm in the convolution's kernel (conv_normalizer.cuh).
struct Normalization {
    int blocks;                                    // that do hardly anything else; 0: another kernel normalizes
    group_norm::Shape shape;
    double eps;
    const float *gamma, *beta;                     // (C_out), or null
    float* y;                                      // may be the convolution's output
    double *mean, *rstd;                           // (N, num_groups)
};

struct Parameters {
    Problem p;
    int dtype;
    bool apply_relu;
    const void* bias;                                // (C_out), or null
    void* out;                                       // (k_parts, N, C_out, D_out, H_out, W_out)
    const scaled_half::SampleMax* activation_max;    // (N)
    const unsigned* weight_max;                      // (C_out)
    Workspace workspace;
    Normalization norm;
};

// -------------------------------------------------------------------------------------------------------- Values

// Sum over the four lanes that share a row.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// What the table of a run's staged places depends on: runs of the same form, all but those at the edges, have the same one.
__device__ __forceinline__ int4 table_key(const Problem& p, const Tile& tile, const Run& run) {
    const StencilAxis& ah = p.s.axis[1];
    return make_int4(run.count, p.t.run_planes > 1 ? run.live << 16 : run.q0, tile.w0, ((run.oh_end - run.h0 * ah.phases) * 8 + run.phase_h) * 4 + (run.oh_end == ah.out) * 2 + (run.h0 == 0));
}
__device__ __forceinline__ bool same_key(int4 a, int4 b) { return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w; }

// A warpgroup: table() = (packed phases of H and W, kBlockN positions) places, where outputs are staged or in memory.
template <int kBlockN, typename F> __device__ __forceinline__ void fill_table(const Problem& p, const Tile& tile, const Run& run, F table, bool in_memory = false) {
    const StencilAxis& aw = p.s.axis[2];
    const int phases_hw = packed_phases(p.t, p.s, 1) * aw.phases;
    for (int i = threadIdx.x % 128; i < phases_hw * kBlockN; i += 128) {
        const int phase = i / kBlockN, phase_h = divide_by_phases(phase, aw.phases);
        const int q = run.q0 + i - phase * kBlockN, phase_w = phase - phase_h * aw.phases;
        table()[i] = in_memory ? place_in_memory(p, tile, run, q, phase_h, phase_w) : staged_place(p, tile, run, q, phase_h, phase_w);
    }
}

}  // namespace conv
