// Products of matrices on the tensor cores in TF32, of operands as they lie in memory, which are elements of tensors (sample, channel, position): no copies, no scales.
//
//   out[m, n] = bias[m] + sum over k of rows[m, k] * columns[k, n]
//
// An operand whose neighbours in memory are rows (columns) of equal k is an outer one, one whose neighbours are k of a row (column) an inner one.
// Where float32 accuracy is wanted, an operand is high + low, both TF32, and high * high + high * low + low * high is added up.
// conv_transpose3d_gemm.cu tells what is multiplied.
#pragma once

#include <type_traits>

#include "ptx_sm80.cuh"

namespace gemm {

constexpr int kChunk = 16;                     // of GEMM_K: a stage of shared memory
constexpr int kBlockRows = 32, kBlockColumns = 32;    // that a warp multiplies at a time

// Warps of a block, the blocks of rows that a warp has, stages of shared memory, blocks on a multiprocessor.
template <int kWarpsM_, int kWarpsN_, int kBlocks_, int kStages_, int kResident_> struct Cut {
    static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kBlocks = kBlocks_, kStages = kStages_, kResident = kResident_;
    static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kRows = kWarpsM * kBlocks * kBlockRows, kColumns = kWarpsN * kBlockColumns;
};

// Where an operand lies: element (sample, group, i, j) at sample * sample_pitch + group * group_pitch + i * pitch + j. i is k of an outer one, j of an inner one.
struct Matrix {
    const void* data;
    int64_t sample_pitch, group_pitch, pitch;
    bool aligned;                              // whether neighbours are whole vectors
};

// Outputs that are neighbours in memory: those of two rows, with a kernel of 2 along W, and there of two positions; or those of four positions.
enum class Neighbours { kNone, kPairs, kPairsOfTwo, kFour };

struct Parameters {
    Matrix rows, columns;
    int groups, M, N, K;                       // of a group. N: the positions of all samples, where vectors of them are of one sample, or of one; K: of a sample
    int column_samples, k_samples;             // samples that are not part of N; samples to be summed
    int k_parts, part_steps;                   // the sum in parts, each of so many stages; each part has an output of its own
    int tiles;
    Divisor by_row_tiles, by_column_tiles, by_groups, by_column_samples;    // tiles: (part of the sum, sample, group, columns, rows)
    // Outputs: row m is element k of channel c's kernel, column n position i of its sample, and out[n, c, i * stride + k] the output.
    int positions;                             // of a sample
    Divisor by_positions, by_volume, by_kernel_w, by_kernel_h, by_in_w, by_in_h;
    int out_h, out_w, out_volume, stride_d, stride_h, stride_w;
    int64_t sample_outputs, part_outputs;
    Neighbours neighbours;
    bool apply_relu;
    const void* bias;                          // or null
    void* out;
    __host__ __device__ __forceinline__ int sample_steps() const { return (K + kChunk - 1) / kChunk; }
};

// ------------------------------------------------------------------------------------------------------- Operands
//
// A stage has kChunk of GEMM_K, of which lane % 4 = t multiplies 4 t to 4 t + 3: with the tensor cores' k = t and t + 4 of the first 8 and of the last 8, which are any
// four as long as both operands have the same.

// Four neighbouring elements.
template <typename T> __device__ __forceinline__ void load_four(float (&v)[4], const T* p) {
    const auto four = *reinterpret_cast<const Vector<T, 4>*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = to_acc(four.v[i]);
}

template <typename T> __device__ __forceinline__ void copy_element(T* to, const T* from, bool inside) {
    if constexpr (sizeof(T) == 4) cp_async_4(shared_address(to), from, inside);
    else *to = inside ? *from : T();
}

// A stage: (kChunk, kCount), k = 4 t + i as row 4 i + t. Rows begin 8 banks apart, so that a fragment's lanes read different ones.
template <typename T, int kCount, int kThreads> struct Outer {
    static constexpr int kVector = 16 / sizeof(T), kPieces = kCount / kVector, kStep = kThreads / kPieces, kPitch = kCount + 32 / int(sizeof(T)), kElements = kChunk * kPitch;
    static_assert(kThreads % kPieces == 0 && kChunk % kStep == 0 && kStep % 4 == 0, "every thread has the same neighbours of some k");
    const T* source;     // the thread's neighbours of its first k of the next stage
    int64_t pitch;
    int count, left;     // neighbours and k that there are, from there on
    bool aligned;

    // first: its first neighbour for k = 0, of `count`.
    __device__ __forceinline__ Outer(const Parameters& a, const Matrix& m, const T* first, int count, int step)
        : source(first + (own_k() + step * kChunk) * m.pitch), pitch(m.pitch), count(count), left(a.K - own_k() - step * kChunk), aligned(m.aligned) {}
    static __device__ __forceinline__ int own_k() { return threadIdx.x / kPieces; }
    static __device__ __forceinline__ int own() { return threadIdx.x % kPieces * kVector; }    // neighbours

    __device__ __forceinline__ void load(T* stage) {
        T* const to = stage + (own_k() % 4 * 4 + own_k() / 4) * kPitch + own();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kChunk; i += kStep) cp_async_16(shared_address(to + i / 4 * kPitch), source + i * pitch, i < left && count > 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kChunk; i += kStep)
#pragma unroll
                for (int j = 0; j < kVector; j++) copy_element(to + i / 4 * kPitch + j, source + i * pitch + j, i < left && j < count);
        }
        source += kChunk * pitch, left -= kChunk;
    }
    // v[i][k]: of the lane's rows or columns, four neighbours of each block of 32 from `first` on.
    template <int kBlocks> static __device__ __forceinline__ void fragment(float (&v)[kBlocks * 4][4], const T* stage, int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int block = 0; block < kBlocks; block++) {
                float four[4];
                load_four(four, stage + (k * 4 + lane % 4) * kPitch + first + block * 32 + lane / 4 * 4);
#pragma unroll
                for (int i = 0; i < 4; i++) v[block * 4 + i][k] = four[i];
            }
    }
};

// A stage: (kCount, kChunk). Rows begin 20 banks apart.
template <typename T, int kCount, int kThreads> struct Inner {
    static_assert(sizeof(T) == 4, "a vector has four k");
    static constexpr int kVector = 4, kPieces = kChunk / kVector, kStep = kThreads / kPieces, kPitch = kChunk + 4, kElements = kCount * kPitch;
    static_assert(kCount % kStep == 0, "every thread has the same k of some rows");
    const T* source;     // the thread's k of its first row of the next stage
    int64_t pitch, jump; // jump: to the next sample, at a sample's end
    int count, left;     // rows and k of the sample that there are, from there on
    int K;
    bool aligned;

    // first: the tile's first row of sample 0 for k = 0, of `count`.
    __device__ __forceinline__ Inner(const Parameters& a, const Matrix& m, const T* first, int count, int step)
        : pitch(m.pitch), jump(m.sample_pitch - a.sample_steps() * kChunk), count(count - own_row()), K(a.K - own_k()), aligned(m.aligned) {
        const int sample = step / a.sample_steps(), k = (step - sample * a.sample_steps()) * kChunk;
        source = first + sample * m.sample_pitch + own_row() * pitch + own_k() + k, left = K - k;
    }
    static __device__ __forceinline__ int own_row() { return threadIdx.x / kPieces; }
    static __device__ __forceinline__ int own_k() { return threadIdx.x % kPieces * kVector; }
    static __device__ __forceinline__ int own() { return 0; }

    __device__ __forceinline__ void load(T* stage) {
        T* const to = stage + own_row() * kPitch + own_k();
        if (aligned) {
#pragma unroll
            for (int i = 0; i < kCount; i += kStep) cp_async_16(shared_address(to + i * kPitch), source + i * pitch, i < count && left > 0);
        } else {
#pragma unroll 1
            for (int i = 0; i < kCount; i += kStep)
#pragma unroll
                for (int j = 0; j < kVector; j++) copy_element(to + i * kPitch + j, source + i * pitch + j, i < count && j < left);
        }
        source += kChunk, left -= kChunk;
        if (left + own_k() <= 0) source += jump, left = K;
    }
    template <int kBlocks> static __device__ __forceinline__ void fragment(float (&v)[kBlocks * 4][4], const T* stage, int first) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int block = 0; block < kBlocks; block++)
#pragma unroll
            for (int i = 0; i < 4; i++) load_four(v[block * 4 + i], stage + (first + block * 32 + lane / 4 * 4 + i) * kPitch + lane % 4 * 4);
    }
};

// Which operands are inner ones.
template <bool kInnerRows_, bool kInnerColumns_> struct Layout {
    static constexpr bool kInnerRows = kInnerRows_, kInnerColumns = kInnerColumns_;
};

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

// sums += the product of a stage. rows and columns: the lane's values of it.
template <bool kSplit, int kBlocks> __device__ __forceinline__ void multiply_stage(Sums<kBlocks>& sums, const float (&rows)[kBlocks * 4][4], const float (&columns)[4][4]) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
        Fragments<kBlocks> high, low;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int k = step * 2 + half;
#pragma unroll
            for (int i = 0; i < kBlocks * 4; i++) {
                high.put_row(i, half, to_tf32(rows[i][k]));
                if (kSplit) low.put_row(i, half, tf32_rest(rows[i][k]));
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                high.put_column(j, half, to_tf32(columns[j][k]));
                if (kSplit) low.put_column(j, half, tf32_rest(columns[j][k]));
            }
        }
        if (kSplit) multiply(sums, low, high), multiply(sums, high, low);
        multiply(sums, high, high);
    }
}

// ------------------------------------------------------------------------------------------------------- Epilogue

// A tile: its first row and column, its group, sample and part of the sum.
struct Place { int row, column, group, sample, part; };

// A column of a tile: its sample and position.
struct Column { int n, position; };
__device__ __forceinline__ Column column_of(const Parameters& a, const Place& tile, int column) {
    int n = column;
    const int position = a.by_positions.take(n);
    return {tile.sample + n, position};
}

// Of a row of a tile: its first output in a sample, or -1 where there is none, and its bias.
struct Row {
    int place;
    float bias;
};

template <typename T> __device__ __forceinline__ Row row_of(const Parameters& a, int row, int group) {
    if (row >= a.M) return {-1, 0};
    const int tap = a.by_volume.take(row), channel = group * a.by_volume.divide(a.M) + row;
    int k = tap;
    const int kw = a.by_kernel_w.take(k), kh = a.by_kernel_h.take(k);
    return {channel * a.out_volume + (k * a.out_h + kh) * a.out_w + kw, a.bias ? to_acc(static_cast<const T*>(a.bias)[channel]) : 0.0f};
}

// A sum in float32, of outer operands.
template <typename T> __device__ __noinline__ float sum_again(const Parameters& a, int group, int row, const Column& column) {
    const T* m = static_cast<const T*>(a.rows.data) + group * a.rows.group_pitch + row;
    const T* n = static_cast<const T*>(a.columns.data) + column.n * a.columns.sample_pitch + group * a.columns.group_pitch + column.position;
    float sum = 0;
    for (int k = 0; k < a.K; k++) sum = fmaf(to_acc(m[k * a.rows.pitch]), to_acc(n[k * a.columns.pitch]), sum);
    return sum;
}

// A warp's sums go by way of shared memory, 16 rows at a time, (16, kStagingPitch), each two of which are neighbours.
constexpr int kStagedRows = 16, kStagingPitch = kBlockColumns + 4;

// Stores them. A lane has kPositions neighbours along W of kRows neighbouring rows, which are outputs that are neighbours in memory. rows: the warp's.
template <typename T, bool kSplit, int kPositions, int kRows>
__device__ __forceinline__ void store_staged(const Parameters& a, const Place& tile, int first_row, int column, const Row* rows, int first, const float* staging) {
    const int lane = threadIdx.x % 32, own = lane * kPositions % 32;
    if (column + own >= a.N) return;
    const Column first_column = column_of(a, tile, column + own);
    int d = first_column.position;
    const int w = a.by_in_w.take(d), h = a.by_in_h.take(d);
    T* const out = static_cast<T*>(a.out) + tile.part * a.part_outputs + first_column.n * a.sample_outputs + (d * a.stride_d * a.out_h + h * a.stride_h) * a.out_w + w * a.stride_w;
#pragma unroll 2
    for (int staged = lane * kPositions / 32 * kRows; staged < kStagedRows; staged += kPositions * kRows) {
        const int row = first + staged / 2 * 4 + staged % 2;
        const int place = rows[row].place;
        if (place < 0) continue;
        Vector<T, kPositions * kRows> outputs;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            const auto sums = *reinterpret_cast<const Vector<float, kPositions>*>(staging + (staged + i) * kStagingPitch + own);
#pragma unroll
            for (int j = 0; j < kPositions; j++) {
                float v = sums.v[j];
                // The parts of what is not finite, or rounds to what is not, make NaN of what may be Inf.
                if (kSplit && !(fabsf(v) < __int_as_float(0x7f800000))) v = sum_again<T>(a, tile.group, first_row + row + i, {first_column.n, first_column.position + j});
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

template <typename T, typename L, typename C> struct Shared {
    using Rows = std::conditional_t<L::kInnerRows, Inner<T, C::kRows, C::kThreads>, Outer<T, C::kRows, C::kThreads>>;
    using Columns = std::conditional_t<L::kInnerColumns, Inner<T, C::kColumns, C::kThreads>, Outer<T, C::kColumns, C::kThreads>>;
    struct {
        T rows[Rows::kElements], columns[Columns::kElements];
    } stages[C::kStages];
    float staging[C::kThreads / 32][kStagedRows * kStagingPitch];    // of the warps
    Row rows[2][C::kRows];                                  // of the tile, and of the one before
};

template <typename T, bool kSplit, typename L, typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) gemm_kernel(const __grid_constant__ Parameters a) {
    wait_for_previous_kernel();
    using Memory = Shared<T, L, C>;
    using Rows = typename Memory::Rows;
    using Columns = typename Memory::Columns;
    extern __shared__ __align__(16) uint8_t base[];
    Memory& shared = *reinterpret_cast<Memory*>(base);
    const int warp = threadIdx.x / 32, warp_row = warp % C::kWarpsM * C::kBlocks * kBlockRows, warp_column = warp / C::kWarpsM * kBlockColumns;
    const int all_steps = a.sample_steps() * a.k_samples;

    const auto place_of = [&](int tile) {
        const int row = a.by_row_tiles.take(tile), column = a.by_column_tiles.take(tile), group = a.by_groups.take(tile), sample = a.by_column_samples.take(tile);
        return Place{row * C::kRows, column * C::kColumns, group, sample, tile};
    };
    const auto steps_of = [&](const Place& p) { return min(a.part_steps, all_steps - p.part * a.part_steps); };
    // Loads go on from tile to tile, so that the next one's are on their way while outputs are stored.
    const auto rows_of = [&](const Place& p) {
        const int row = p.row + Rows::own();
        return Rows(a, a.rows, static_cast<const T*>(a.rows.data) + p.group * a.rows.group_pitch + row * (L::kInnerRows ? a.rows.pitch : 1), a.M - row, p.part * a.part_steps);
    };
    const auto columns_of = [&](const Place& p) {
        const int column = p.column + Columns::own();
        const T* const first = static_cast<const T*>(a.columns.data) + p.group * a.columns.group_pitch;
        const Column own = column_of(a, p, column);
        return Columns(a, a.columns, L::kInnerColumns ? first + column * a.columns.pitch : first + own.n * a.columns.sample_pitch + own.position, a.N - column, p.part * a.part_steps);
    };
    int next_tile = blockIdx.x, next_step = 0, next_stage = 0;
    Place next = place_of(next_tile);
    int next_steps = steps_of(next);
    Rows rows = rows_of(next);
    Columns columns = columns_of(next);
    const auto load_next = [&] {
        if (next_tile < a.tiles) {
            if (next_step == next_steps) {
                next_step = 0, next_tile += gridDim.x;
                if (next_tile < a.tiles) {
                    next = place_of(next_tile);
                    next_steps = steps_of(next), rows = rows_of(next), columns = columns_of(next);
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
        const int steps = steps_of(place);
#pragma unroll 1
        for (int step = 0; step < steps; step++) {
            cp_async_wait_group<C::kStages - 2>();
            __syncthreads();
            load_next();
            float row_values[C::kBlocks * 4][4], column_values[4][4];
            Rows::template fragment<C::kBlocks>(row_values, shared.stages[stage].rows, warp_row);
            Columns::template fragment<1>(column_values, shared.stages[stage].columns, warp_column);
            if constexpr (kSplit) {    // short sums on the tensor cores, which truncate each, and the long one rounded
                Sums<C::kBlocks> part;
                part.clear();
                multiply_stage<true>(part, row_values, column_values);
                sums.add(part);
            } else {
                multiply_stage<false>(sums, row_values, column_values);
            }
            stage = stage + 1 == C::kStages ? 0 : stage + 1;
        }
        store<T, kSplit>(a, place, warp_row, place.column + warp_column, own_rows + warp_row, sums, shared.staging[warp]);
    }
}

// ------------------------------------------------------------------------------------------------------- Launcher

template <typename T, bool kSplit, typename L, typename C> int launch_cut(Parameters a, int multiprocessors, void* stream) {
    const int64_t row_tiles = ceil_div(a.M, C::kRows), column_tiles = ceil_div(a.N, C::kColumns), tiles = row_tiles * column_tiles * a.groups * a.column_samples * a.k_parts;
    if (tiles > 1 << 30) return cudaErrorInvalidConfiguration;
    a.by_row_tiles = make_divisor(int(row_tiles)), a.by_column_tiles = make_divisor(int(column_tiles)), a.by_groups = make_divisor(a.groups), a.by_column_samples = make_divisor(a.column_samples);
    a.tiles = int(tiles);
    const int64_t most = int64_t(multiprocessors) * C::kResident;
    return launch_with_shared(gemm_kernel<T, kSplit, L, C>, tiles < most ? tiles : most, C::kThreads, sizeof(Shared<T, L, C>), stream, a);
}

template <typename L> using Large = Cut<1, 4, 2, 3, L::kInnerRows ? 3 : 4>;    // inner operands take more registers
using Small = Cut<2, 2, 1, 8, 2>;

// Tiles that a multiprocessor has, in numbers of small ones.
template <typename C> double time_of(const Parameters& a, int multiprocessors) {
    return double(ceil_div(ceil_div(a.M, C::kRows) * ceil_div(a.N, C::kColumns) * a.groups * a.column_samples * a.k_parts, multiprocessors)) * (C::kBlocks > 1 ? 1.3 : 1);
}

// Split operands take more registers too, and small tiles were as fast (NOTES.md).
template <typename T, bool kSplit, typename L> int multiply(const Parameters& a, int multiprocessors, void* stream) {
    if constexpr (!kSplit)
        if (time_of<Large<L>>(a, multiprocessors) <= time_of<Small>(a, multiprocessors)) return launch_cut<T, kSplit, L, Large<L>>(a, multiprocessors, stream);
    return launch_cut<T, kSplit, L, Small>(a, multiprocessors, stream);
}

}  // namespace gemm
