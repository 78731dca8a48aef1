// GroupNorm of complete samples while the convolution works on the next ones: one warp combines moments and loads rows into a
// ring, one normalizes them and sends them back. Work is taken from queues, sample after sample, so each waits only for what running
// blocks have taken: blocks that find no multiprocessor yet cannot stop the others.
#pragma once

#include "conv_sm90.cuh"

#ifdef HAS_SM90A

namespace conv_sm90 {

constexpr int kRowPieces = 8;    // pieces of one item of the row queue

// A number that is not the zero of fresh memory: whoever reads zero knows that it is not there yet, and no fence is needed.
constexpr unsigned long long kPresent = 0xfff4c0ffee000001ull;    // a NaN that no arithmetic makes
__device__ __forceinline__ void publish(unsigned long long* p, double v) { *static_cast<volatile unsigned long long*>(p) = __double_as_longlong(v) ^ kPresent; }
__device__ __forceinline__ void wait_for_sample(const Parameters& a, int n) {
    while (ld_acquire_gpu(a.workspace.runs_done + n) < a.p.t.sample_tiles * 2) __nanosleep(100);
}

// One thread: the statistics of a group of a sample, from the sums of its channels.
__device__ __forceinline__ GroupStatistics group_statistics(const Parameters& a, int n, int group) {
    const int channels = a.fusion.group_channels;
    const volatile unsigned long long* sums = a.workspace.channel_sums + n * a.p.C_out + group * channels;
    const int64_t to_squares = a.p.N * a.p.C_out;
    double sum = 0, squares = 0;
    constexpr int kBatch = 4;    // loads at a time
    for (int first = 0; first < channels; first += kBatch) {
        unsigned long long s[kBatch], q[kBatch];
        bool there;
        do {
            there = true;
#pragma unroll
            for (int i = 0; i < kBatch; i++) s[i] = sums[min(first + i, channels - 1)], q[i] = sums[min(first + i, channels - 1) + to_squares];
#pragma unroll
            for (int i = 0; i < kBatch; i++) there = there && s[i] != 0 && q[i] != 0;
        } while (!there);
#pragma unroll
        for (int i = 0; i < kBatch; i++)
            if (first + i < channels) sum += __longlong_as_double(s[i] ^ kPresent), squares += __longlong_as_double(q[i] ^ kPresent);
    }
    return statistics_of(a, {sum, squares});
}

__device__ __forceinline__ void leave_statistics(const Parameters& a, int n, int group) {
    if (threadIdx.x % 32 != 0) return;
    const GroupStatistics s = group_statistics(a, n, group);
    a.fusion.mean[n * a.fusion.num_groups + group] = s.mean;
    a.fusion.rstd[n * a.fusion.num_groups + group] = s.rstd;
}

// Lane 0's number, for all.
__device__ __forceinline__ unsigned take_ticket(unsigned* queue, unsigned count) { return __shfl_sync(~0u, threadIdx.x % 32 == 0 ? atomicAdd(queue, count) : 0, 0); }

// One warp: of a sample, once it is complete, the sums of those channels that nobody has taken, each in a fixed order, and the
// statistics of the groups that begin with them.
__device__ __forceinline__ void combine_sample(const Parameters& a, int n) {
    const Problem& p = a.p;
    const int lane = threadIdx.x % 32, group_channels = a.fusion.group_channels;
    int first = -1;    // a channel that begins a group
    while (true) {
        const int channel = take_ticket(a.workspace.channel_tickets + n, 1);
        if (channel >= p.C_out) break;
        wait_for_sample(a, n);
        const ChannelSums sums = sums_of_channel(a, n, channel);
        if (lane == 0) publish(a.workspace.channel_sums + n * p.C_out + channel, sums.sum), publish(a.workspace.channel_sums + (p.N + n) * p.C_out + channel, sums.squares);
        if (channel % group_channels == 0) {
            if (first >= 0) leave_statistics(a, n, first / group_channels);
            first = channel;
        }
    }
    if (first >= 0) leave_statistics(a, n, first / group_channels);
}

// One warp: loads rows (n, channel) of complete samples that nobody has taken, kRowPieces pieces of a row at a time.
__device__ __forceinline__ void load_rows(const Parameters& a, const SharedParts& shared) {
    SharedHead& head = shared.head;
    const int lane = threadIdx.x % 32, norm_stages = a.p.t.norm_stages;
    const int64_t row_bytes = a.p.out_volume * 4;
    const int row_items = ceil_div(row_bytes, kRowPieces * kNormBytes), channels = a.p.C_out, group_channels = a.fusion.group_channels;
    const int items = channels * row_items, share = min(32, int(ceil_div(items, gridDim.x)));    // of a sample, and how many are taken at a time
    RingPosition stage;
    for (int n = 0; n < a.p.N; n++) {
        combine_sample(a, n);
        bool ready = false;
        while (true) {
            const int batch = take_ticket(a.workspace.item_tickets + n, share);
            if (batch >= items) break;
            if (!ready) {
                wait_for_sample(a, n);
                fence_proxy_async_all();    // what other multiprocessors stored is now visible to the copy engine too
                ready = true;
            }
            // Each lane prepares an item, so that its loads' latencies overlap.
            const int own = batch + lane, end_item = min(batch + share, items);
            NormPiece prepared = {};
            if (own < end_item) {
                const int channel = own / row_items;
                const GroupStatistics statistics = group_statistics(a, n, channel / group_channels);
                const group_norm::Mean<float> mean(statistics.mean);
                prepared.high = mean.high, prepared.low = mean.low;
                prepared.scale = float(statistics.rstd) * (a.fusion.gamma ? a.fusion.gamma[channel] : 1.0f);
                prepared.offset = a.fusion.beta ? a.fusion.beta[channel] : 0.0f;
            }
            for (int item = batch; item < end_item; item++) {
                const int i = item - batch;
                const int64_t row = int64_t(n) * channels + item / row_items;
                // Pieces begin at 128-byte lines, but for a row's first.
                auto boundary = [&](int64_t at) { return at <= 0 ? 0 : at >= row_bytes ? row_bytes : (row * row_bytes + at) / 128 * 128 - row * row_bytes; };
                const int64_t begin = boundary(int64_t(item % row_items) * kRowPieces * kNormBytes), end = boundary(int64_t(item % row_items + 1) * kRowPieces * kNormBytes);
                NormPiece piece;
                piece.high = __shfl_sync(~0u, prepared.high, i), piece.low = __shfl_sync(~0u, prepared.low, i);
                piece.scale = __shfl_sync(~0u, prepared.scale, i), piece.offset = __shfl_sync(~0u, prepared.offset, i);
#pragma unroll 1
                for (int64_t at = begin; at < end; at += piece.bytes) {
                    const int64_t next = boundary(at + kNormBytes);
                    piece.bytes = (next < end ? next : end) - at;
                    piece.y = static_cast<float*>(a.fusion.y) + (row * row_bytes + at) / 4;
                    mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
                    if (lane == 0) {
                        head.pieces[stage.stage] = piece;
                        mbarrier_arrive_expect_tx(head.norm_full + stage.stage, piece.bytes);
                        bulk_load(shared.norm + stage.stage * kNormBytes, static_cast<const uint8_t*>(a.out) + row * row_bytes + at, piece.bytes, head.norm_full + stage.stage);
                    }
                    __syncwarp();
                    stage.advance(norm_stages);
                }
            }
        }
    }
    mbarrier_wait(head.norm_empty + stage.stage, stage.phase ^ 1);
    if (lane == 0) {
        head.pieces[stage.stage].bytes = 0;
        mbarrier_arrive(head.norm_full + stage.stage);
    }
}

// One warp: normalizes the pieces in place and stores them.
__device__ __forceinline__ void normalize_rows(const SharedParts& shared, int norm_stages) {
    SharedHead& head = shared.head;
    const int lane = threadIdx.x % 32;
    RingPosition stage;
    int storing = -1;    // the stage whose store may still read it
    while (true) {
        mbarrier_wait(head.norm_full + stage.stage, stage.phase);
        const NormPiece piece = head.pieces[stage.stage];
        if (piece.bytes == 0) break;
        float4* values = reinterpret_cast<float4*>(shared.norm + stage.stage * kNormBytes);
        auto apply = [&piece](float v) { return fmaf((v - piece.high) - piece.low, piece.scale, piece.offset); };
#pragma unroll 8
        for (int i = lane; i < piece.bytes / 16; i += 32) {
            const float4 v = values[i];
            values[i] = make_float4(apply(v.x), apply(v.y), apply(v.z), apply(v.w));
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) {
            bulk_store(piece.y, values, piece.bytes);
            bulk_commit_group();
            bulk_wait_group_read<1>();
        }
        if (storing >= 0) mbarrier_arrive(head.norm_empty + storing);
        storing = stage.stage;
        stage.advance(norm_stages);
    }
    if (lane == 0) bulk_wait_group_read<0>();
}

}  // namespace conv_sm90

#endif  // HAS_SM90A
