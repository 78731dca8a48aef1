// Transposed convolution whose kernel is its stride, without padding. Each output then has one tap, so that it is a product of matrices, which are read as they lie in
// memory and multiplied on the tensor cores in TF32: one kernel, without copies, scales or scratch memory.
//
//   out[n, co, i * stride + k] = bias[co] + sum over ci of w[ci, co, k] * x[n, ci, i]
//
//   GEMM_M = (co, k) of a group   GEMM_N = the positions i of a sample   GEMM_K = the group's ci
//   x (N, C_in, D_in, H_in, W_in)   out (N, C_out, D_out, H_out, W_out)   w (C_in, C_out / groups, K_d, K_h, K_w)
//
// Where float32 accuracy is wanted, an operand is high + low, both TF32, and high * high + high * low + low * high is added up (precision.h tells where).
// Formula: torch.nn.ConvTranspose3d.
#pragma once

#include "ptx_sm80.cuh"

namespace gemm {

constexpr int kChunk = 16;                     // of GEMM_K: a stage of shared memory
constexpr int kBlockRows = 32, kBlockColumns = 32;    // that a warp multiplies at a time

// Warps of a block, the blocks of rows that a warp has, stages of shared memory, blocks on a multiprocessor.
template <int kWarpsM_, int kWarpsN_, int kBlocks_, int kStages_, int kResident_> struct Cut {
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kRows = kWarpsM * kBlocks * kBlockRows, kColumns = kWarpsN * kBlockColumns;
};

// Outputs that are neighbours in memory: those of two rows, with a kernel of 2 along W, and there of two positions; or those of four positions.
enum class Neighbours { kNone, kPairs, kPairsOfTwo, kFour };

struct Parameters {
    int M, K, positions;                       // GEMM_M and GEMM_K of a group, GEMM_N
    int groups, samples;
    int tiles;
    Divisor by_row_tiles, by_column_tiles, by_groups;    // tiles: (sample, group, columns, rows)
    Divisor by_volume, by_kernel_w, by_kernel_h, by_in_w, by_in_h;
    int64_t out_h, out_w, out_volume, sample_outputs;
    int stride_d, stride_h, stride_w;
    bool aligned_w, aligned_x;                 // whether rows of the operands are whole vectors
    Neighbours neighbours;
    bool apply_relu;
    const void *w, *x, *bias;                  // bias may be null
    void* out;
};

// ------------------------------------------------------------------------------------------------------- Operands

// A stage of an operand: (kChunk, kColumns) elements. Rows begin 8 banks apart, so that the lanes of a fragment read different ones.
template <typename T, int kColumns, int kThreads> struct Operand {
    static constexpr int kVector = 16 / sizeof(T), kPieces = kColumns / kVector, kStep = kThreads / kPieces, kPitch = kColumns + 32 / int(sizeof(T));
    static_assert(kThreads % kPieces == 0 && kChunk % kStep == 0, "every thread has the same columns of some rows");
    const T* source;     // the thread's columns of its first row of the next stage
    int64_t pitch;       // from row to row
    int columns, rows;   // that there are yet, from the thread's on
    bool aligned;

    // first: element of row 0; `columns` and `rows` from there on.
    __device__ __forceinline__ Operand(const void* first, int64_t pitch, int columns, int rows, bool aligned)
        : source(static_cast<const T*>(first) + own_row() * pitch + own_column()), pitch(pitch), columns(columns - own_column()), rows(rows - own_row()), aligned(aligned) {}
    static __device__ __forceinline__ int own_row() { return threadIdx.x / kPieces; }
    static __device__ __forceinline__ int own_column() { return threadIdx.x % kPieces * kVector; }

    __device__ __forceinline__ void load(T* stage) {
        T* const to = stage + own_row() * kPitch + own_column();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kChunk; i += kStep) cp_async_16(shared_address(to + i * kPitch), source + i * pitch, i < rows && columns > 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kChunk; i += kStep)
#pragma unroll
                for (int j = 0; j < kVector; j++) copy_element(to + i * kPitch + j, source + i * pitch + j, i < rows && j < columns);
        }
        source += kChunk * pitch, rows -= kChunk;
    }
    static __device__ __forceinline__ void copy_element(T* to, const T* from, bool inside) {
        if constexpr (sizeof(T) == 4) cp_async_4(shared_address(to), from, inside);
        else *to = inside ? *from : T();
    }
};

// Four neighbouring elements.
template <typename T> __device__ __forceinline__ void load_four(float (&v)[4], const T* p) {
    const auto four = *reinterpret_cast<const Vector<T, 4>*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_acc(four.v[i]);
}

// ------------------------------------------------------------------------------------------------------- Products

// The sums of a warp, in fragments of 16 rows and 8 columns. Rows and columns are dealt to them so that a lane has neighbours: rows lane / 4 * 4 to + 3 are those of two
// fragments, columns lane % 4 * 8 to + 7 those of four.
template <int kBlocks> struct Sums {
    float v[kBlocks * 2][4][4];
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (auto& row : v)
#pragma unroll
            for (auto& fragment : row)
#pragma unroll
                for (float& sum : fragment) sum = 0;
    }
    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (int i = 0; i < kBlocks * 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int k = 0; k < 4; k++) v[i][j][k] += other.v[i][j][k];
    }
};

// What a warp multiplies at a time, 8 of GEMM_K: high parts, or low ones.
template <int kBlocks> struct Fragments {
    uint32_t a[kBlocks * 2][4], b[4][2];
    __device__ __forceinline__ void put_row(int i, int half, uint32_t v) { a[i / 2][half * 2 + i % 2] = v; }
    __device__ __forceinline__ void put_column(int j, int half, uint32_t v) { b[j][half] = v; }
};

template <int kBlocks> __device__ __forceinline__ void multiply(Sums<kBlocks>& sums, const Fragments<kBlocks>& rows, const Fragments<kBlocks>& columns) {
#pragma unroll
    for (int i = 0; i < kBlocks * 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_m16n8k8_tf32(sums.v[i][j], rows.a[i], columns.b[j][0], columns.b[j][1]);
}

// sums += the product of a stage. a and b: the warp's first row and column of it.
template <typename T, bool kSplit, int kBlocks>
__device__ __forceinline__ void multiply_stage(Sums<kBlocks>& sums, const T* a, int a_pitch, const T* b, int b_pitch) {
    const int lane = threadIdx.x % 32;
    a += lane % 4 * a_pitch + lane / 4 * 4, b += lane % 4 * b_pitch + lane / 4 * 4;
#pragma unroll
    for (int k = 0; k < kChunk; k += 8) {
        Fragments<kBlocks> high, low;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[4];
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
                load_four(v, a + (k + half * 4) * a_pitch + block * kBlockRows);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    high.put_row(block * 4 + i, half, to_tf32(v[i]));
                    if (kSplit) low.put_row(block * 4 + i, half, tf32_rest(v[i]));
                }
            }
            load_four(v, b + (k + half * 4) * b_pitch);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                high.put_column(j, half, to_tf32(v[j]));
                if (kSplit) low.put_column(j, half, tf32_rest(v[j]));
            }
        }
        if (kSplit) multiply(sums, low, high), multiply(sums, high, low);
        multiply(sums, high, high);
    }
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// A tile: its first row, column, and its group and sample.
struct Place { int row, column, group, n; };

// Of a row of a tile: its first output in a sample, or -1 where there is none, and its bias.
struct Row {
    int64_t place;
    float bias;
};

template <typename T> __device__ __forceinline__ Row row_of(const Parameters& a, int row, int group) {
    if (row >= a.M) return {-1, 0};
    const int tap = a.by_volume.take(row), channel = group * a.by_volume.divide(a.M) + row;
    int k = tap;
    const int kw = a.by_kernel_w.take(k), kh = a.by_kernel_h.take(k);
    return {channel * a.out_volume + (k * a.out_h + kh) * a.out_w + kw, a.bias ? to_acc(static_cast<const T*>(a.bias)[channel]) : 0.0f};
}

// A sum in float32.
template <typename T> __device__ __noinline__ float sum_again(const Parameters& a, const Place& tile, int row, int column) {
    const T* w = static_cast<const T*>(a.w) + int64_t(tile.group) * a.K * a.M + row;
    const T* x = static_cast<const T*>(a.x) + (int64_t(tile.n) * a.groups + tile.group) * a.K * a.positions + column;
    float sum = 0;
    for (int k = 0; k < a.K; k++) sum = fmaf(to_acc(w[int64_t(k) * a.M]), to_acc(x[int64_t(k) * a.positions]), sum);
    return sum;
}

// A warp's sums go by way of shared memory, 16 rows at a time, (16, kStagingPitch), each two of which are neighbours.
constexpr int kStagedRows = 16, kStagingPitch = kBlockColumns + 4;

// Stores them. A lane has kPositions neighbours along W of kRows neighbouring rows, which are outputs that are neighbours in memory. rows: the warp's.
template <typename T, bool kSplit, int kPositions, int kRows>
__device__ __forceinline__ void store_staged(const Parameters& a, const Place& tile, int first_row, int column, const Row* rows, int first, const float* staging) {
    const int lane = threadIdx.x % 32, position = column + lane * kPositions % 32;
    if (position >= a.positions) return;
    int d = position;
    const int w = a.by_in_w.take(d), h = a.by_in_h.take(d);
    T* const out = static_cast<T*>(a.out) + tile.n * a.sample_outputs + (d * a.stride_d * a.out_h + h * a.stride_h) * a.out_w + w * a.stride_w;
#pragma unroll 2
    for (int staged = lane * kPositions / 32 * kRows; staged < kStagedRows; staged += kPositions * kRows) {
        const int row = first + staged / 2 * 4 + staged % 2;
        const int64_t place = rows[row].place;
        if (place < 0) continue;
        Vector<T, kPositions * kRows> outputs;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const auto sums = *reinterpret_cast<const Vector<float, kPositions>*>(staging + (staged + i) * kStagingPitch + position - column);
#pragma unroll
            for (int j = 0; j < kPositions; j++) {
                float v = sums.v[j];
                // The parts of what is not finite, or rounds to what is not, make NaN of what may be Inf.
                if (kSplit && !(fabsf(v) < __int_as_float(0x7f800000))) v = sum_again<T>(a, tile, first_row + row + i, position + j);
                v += rows[row + i].bias;
                outputs.v[j * kRows + i] = from_acc<T>(a.apply_relu ? relu(v) : v);
            }
        }
        *reinterpret_cast<Vector<T, kPositions * kRows>*>(out + place) = outputs;
    }
}

template <typename T, bool kSplit, int kBlocks>
__device__ __forceinline__ void store(const Parameters& a, const Place& tile, int warp_row, int column, const Row* rows, const Sums<kBlocks>& sums, float* staging) {
    const int lane = threadIdx.x % 32, first_row = tile.row + warp_row;
#pragma unroll 1
    for (int i = 0; i < kBlocks * 2; i++) {
        __syncwarp();
#pragma unroll
        for (int own = 0; own < kBlocks * 2; own++) {
            if (own != i) continue;
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    *reinterpret_cast<float4*>(staging + (lane / 4 * 2 + half) * kStagingPitch + lane % 4 * 8 + k * 4) =
                        make_float4(sums.v[own][0][half * 2 + k], sums.v[own][1][half * 2 + k], sums.v[own][2][half * 2 + k], sums.v[own][3][half * 2 + k]);
        }
        __syncwarp();
        const int first = i / 2 * kBlockRows + i % 2 * 2;
        switch (a.neighbours) {
            case Neighbours::kPairsOfTwo: store_staged<T, kSplit, 2, 2>(a, tile, first_row, column, rows, first, staging); break;
            case Neighbours::kPairs: store_staged<T, kSplit, 1, 2>(a, tile, first_row, column, rows, first, staging); break;
            case Neighbours::kFour: store_staged<T, kSplit, 4, 1>(a, tile, first_row, column, rows, first, staging); break;
            default: store_staged<T, kSplit, 1, 1>(a, tile, first_row, column, rows, first, staging);
        }
    }
}

// --------------------------------------------------------------------------------------------------------- Kernel

template <typename T, typename C> struct Shared {
    struct {
        T rows[kChunk * Operand<T, C::kRows, C::kThreads>::kPitch], columns[kChunk * Operand<T, C::kColumns, C::kThreads>::kPitch];
    } stages[C::kStages];
    float staging[C::kThreads / 32][kStagedRows * kStagingPitch];    // of the warps
    Row rows[2][C::kRows];                                  // of the tile, and of the one before
};

template <typename T, bool kSplit, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) gemm_kernel(const __grid_constant__ Parameters a) {
    wait_for_previous_kernel();
    using Rows = Operand<T, C::kRows, C::kThreads>;
    using Columns = Operand<T, C::kColumns, C::kThreads>;
    extern __shared__ __align__(16) uint8_t base[];
    Shared<T, C>& shared = *reinterpret_cast<Shared<T, C>*>(base);
    const int warp = threadIdx.x / 32, warp_row = warp % C::kWarpsM * C::kBlocks * kBlockRows, warp_column = warp / C::kWarpsM * kBlockColumns;
    const int steps = (a.K + kChunk - 1) / kChunk;

    const auto place_of = [&](int tile) {
        const int row = a.by_row_tiles.take(tile), column = a.by_column_tiles.take(tile), group = a.by_groups.take(tile);
        return Place{row * C::kRows, column * C::kColumns, group, tile};
    };
    // Loads go on from tile to tile, so that the next one's are on their way while outputs are stored.
    const auto rows_of = [&](const Place& p) { return Rows(static_cast<const T*>(a.w) + int64_t(p.group) * a.K * a.M + p.row, a.M, a.M - p.row, a.K, a.aligned_w); };
    const auto columns_of = [&](const Place& p) {
        return Columns(static_cast<const T*>(a.x) + (int64_t(p.n) * a.groups + p.group) * a.K * a.positions + p.column, a.positions, a.positions - p.column, a.K, a.aligned_x);
    };
    int next_tile = blockIdx.x, next_step = 0, next_stage = 0;
    Rows rows = rows_of(place_of(next_tile));
    Columns columns = columns_of(place_of(next_tile));
    const auto load_next = [&] {
        if (next_tile < a.tiles) {
            if (next_step == steps) {
                next_step = 0, next_tile += gridDim.x;
                if (next_tile < a.tiles) {
                    const Place place = place_of(next_tile);
                    rows = rows_of(place), columns = columns_of(place);
                }
            }
            if (next_tile < a.tiles) rows.load(shared.stages[next_stage].rows), columns.load(shared.stages[next_stage].columns), next_step++;
        }
        cp_async_commit_group();
        next_stage = next_stage + 1 == C::kStages ? 0 : next_stage + 1;
    };
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1; i++) load_next();

    int stage = 0;
    bool odd = false;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x, odd = !odd) {
        const Place place = place_of(tile);
        Row* const own_rows = shared.rows[odd];    // some warps may still be at the tile before
#pragma unroll 1
        for (int i = threadIdx.x; i < C::kRows; i += C::kThreads) own_rows[i] = row_of<T>(a, place.row + i, place.group);
        Sums<C::kBlocks> sums;
        sums.clear();
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            cp_async_wait_group<C::kStages - 2>();
            __syncthreads();
            load_next();
            const T *const w = shared.stages[stage].rows + warp_row, *const x = shared.stages[stage].columns + warp_column;
            if constexpr (kSplit) {    // short sums on the tensor cores, which truncate each, and the long one rounded
                Sums<C::kBlocks> part;
                part.clear();
                multiply_stage<T, true>(part, w, Rows::kPitch, x, Columns::kPitch);
                sums.add(part);
            } else {
                multiply_stage<T, false>(sums, w, Rows::kPitch, x, Columns::kPitch);
            }
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
        }
        store<T, kSplit>(a, place, warp_row, place.column + warp_column, own_rows + warp_row, sums, shared.staging[warp]);
    }
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <typename T, bool kSplit, typename C> int launch_cut(Parameters a, int multiprocessors, void* stream) {
    const int64_t row_tiles = ceil_div(a.M, C::kRows), column_tiles = ceil_div(a.positions, C::kColumns), tiles = row_tiles * column_tiles * a.groups * a.samples;
    if (tiles > 1 << 30) return cudaErrorInvalidConfiguration;
    a.by_row_tiles = make_divisor(int(row_tiles)), a.by_column_tiles = make_divisor(int(column_tiles)), a.tiles = int(tiles);
    const int64_t most = int64_t(multiprocessors) * C::kResident;
    return launch_with_shared(gemm_kernel<T, kSplit, C>, tiles < most ? tiles : most, C::kThreads, sizeof(Shared<T, C>), stream, a);
}

// Split operands take more registers, and small tiles were as fast (NOTES.md).
template <typename T, bool kSplit> int multiply(const Parameters& a, int multiprocessors, void* stream) {
    using Small = Cut<2, 2, 1, 8, 2>;
    if constexpr (!kSplit) {
        using Large = Cut<1, 4, 2, 3, 4>;
        const auto time = [&](int rows, int columns, double tile) { return ceil_div(ceil_div(a.M, rows) * ceil_div(a.positions, columns) * a.groups * a.samples, multiprocessors) * tile; };
        if (time(Large::kRows, Large::kColumns, 1.3) <= time(Small::kRows, Small::kColumns, 1)) return launch_cut<T, kSplit, Large>(a, multiprocessors, stream);
    }
    return launch_cut<T, kSplit, Small>(a, multiprocessors, stream);
}

// float32_accurate: more than TF32 is wanted of float32.
inline int forward(const Geometry& g, int dtype, bool float32_accurate, int device, void* stream, const void* x, const void* w, const void* bias, bool apply_relu, void* out) {
    const Axis &d = g.axis[0], &h = g.axis[1], &v = g.axis[2];
    Parameters a = {};
    a.M = int(g.C_out / g.groups * kernel_volume(g)), a.K = int(g.C_in / g.groups), a.positions = int(in_volume(g)), a.groups = int(g.groups), a.samples = int(g.N);
    a.by_groups = make_divisor(a.groups), a.by_volume = make_divisor(int(kernel_volume(g))), a.by_kernel_w = make_divisor(int(v.kernel)), a.by_kernel_h = make_divisor(int(h.kernel));
    a.by_in_w = make_divisor(int(v.in)), a.by_in_h = make_divisor(int(h.in));
    a.out_h = h.out, a.out_w = v.out, a.out_volume = out_volume(g), a.sample_outputs = g.C_out * a.out_volume, a.stride_d = int(d.stride), a.stride_h = int(h.stride), a.stride_w = int(v.stride);
    a.apply_relu = apply_relu, a.w = w, a.x = x, a.bias = bias, a.out = out;
    int multiprocessors = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    return with_dtype(dtype, [&](auto element) -> int {
        using T = decltype(element);
        if constexpr (sizeof(T) == 8) {
            return cudaErrorNotSupported;
        } else {
            a.aligned_w = a.M * sizeof(T) % 16 == 0 && holds<uint4>(w), a.aligned_x = a.positions * sizeof(T) % 16 == 0 && holds<uint4>(x);
            const bool vectors = holds<Vector<T, 4>>(out);
            if (v.kernel == 2 && vectors) a.neighbours = v.in % 2 == 0 ? Neighbours::kPairsOfTwo : Neighbours::kPairs;
            if (v.kernel == 1 && vectors && v.in % 4 == 0) a.neighbours = Neighbours::kFour;
            if (sizeof(T) == 4 && float32_accurate) return multiply<T, sizeof(T) == 4>(a, multiprocessors, stream);
            return multiply<T, false>(a, multiprocessors, stream);
        }
    });
}

}  // namespace gemm
