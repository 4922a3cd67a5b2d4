// What the roles of quantize_stream share: its arguments, the order of tiles, barriers and where things lie in shared
// memory.
#pragma once

#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "common.cuh"

namespace nk::cuda::quantize {

constexpr int kStreamTokens = 16, kHalfTokens = 8, kGroupWarps = 8;
constexpr int kStreamCtas = 8;    // the largest cluster that every device with clusters can hold
constexpr int kStreamSlots = 16;  // slices in shared memory, at most
constexpr int kStreamRanks = kRankTiles * 16;
constexpr int kLargestChunks = 4;                             // of a warp
constexpr int kRowBytes = kGroupSize * 2;                     // of a chunk
constexpr int kChunkBytes = kStreamTokens * kRowBytes;        // of x
constexpr int kFactorChunkBytes = kStreamRanks * kRowBytes;   // of the factor
constexpr int kSumValues = 2 * kStreamTokens * kStreamRanks;  // parts of a tile's sums that a CTA gets
static_assert(kGroupWarps == kStreamCtas);                    // weights of both are filled by the same threads

struct StreamParameters {
    Parameters common;
    int cta_chunks;  // of 64 channels, even: two of them are multiplied at once
    int box_chunks;  // of a copy, even
    int slots;
    int row_tokens;  // that share a row of the modulation; no tile has tokens of two rows
    const char *scale, *shift;
    float eps;
};

// CTAs share a multiprocessor with no other. Roles are whole warpgroups, whose registers differ.
constexpr int kQuantizingThreads = 2 * kGroupWarps * 32, kSummingThreads = 128, kCopyingThreads = 128;
__host__ __device__ constexpr int stream_threads(bool low_rank) {
    return kQuantizingThreads + (low_rank ? kSummingThreads : 0) + kCopyingThreads;
}

// A team's tiles, one after the other: neighbouring tokens of one row of the modulation.
struct StreamTiles {
    int first, tokens, row;
    int end, row_end, row_tokens;

    __device__ StreamTiles(const StreamParameters& stream, int team, int teams) : row_tokens(stream.row_tokens) {
        first = static_cast<int>(stream.common.tokens * team / teams);
        end = static_cast<int>(stream.common.tokens * (team + 1) / teams);
        row = first / row_tokens, row_end = (row + 1) * row_tokens;
        measure();
    }
    __device__ void measure() { tokens = min(kStreamTokens, min(end, row_end) - first); }
    __device__ bool left() const { return first < end; }
    __device__ void advance() {
        first += tokens;
        if (first == row_end) ++row, row_end += row_tokens;
        measure();
    }
};

// A place in a ring of so many slots, and the parity of its phase.
struct StreamSlot {
    int index, parity, slots;

    __device__ void advance(int by) {  // by no more than there are
        index += by;
        if (index >= slots) index -= slots, parity ^= 1;
    }
};

// [2] counts halves of a tile, or turns.
template <bool norm>
struct StreamShared {
    uint64_t arrived[kStreamSlots], modulated[kStreamSlots], freed[kStreamSlots];  // barriers
    uint64_t factor_arrived, sums_received[2], maxima_received[2][2], moments_received[2][2];
    float cta_weights[kStreamCtas], warp_weights[kGroupWarps];  // of means
    alignas(16) uint32_t warp_maxima[2][kGroupWarps][kHalfTokens];
    alignas(16) uint32_t maxima[2][2][kStreamCtas][kHalfTokens];  // of each CTA; zeros of those that are not there
    alignas(16) float2 warp_moments[norm ? 2 : 1][kGroupWarps][kHalfTokens];  // mean, part of the variance
    alignas(16) float2 moments[norm ? 2 : 1][2][kStreamCtas][kHalfTokens];
    alignas(16) float sums[2][kSumValues];
};

// Where a thread finds everything; the same for all roles.
template <int kChunks, bool low_rank, bool norm>
struct StreamPlace {
    static constexpr int kSliceChunks = 2 * kChunks, kSliceBytes = kSliceChunks * kChunkBytes;
    static constexpr int kReciprocalsBytes = kGroupWarps * kChunks * kGroupSize * 4;

    const StreamParameters& stream;
    StreamShared<norm>& shared;
    uint32_t ring, factors, reciprocals;
    int cta, ctas, team, teams, slices;

    __device__ StreamPlace(const StreamParameters& stream, char* memory)
        : stream(stream),
          shared(*reinterpret_cast<StreamShared<norm>*>(memory + stream.slots * kSliceBytes +
                                                        (low_rank ? stream.cta_chunks * kFactorChunkBytes : 0) +
                                                        kReciprocalsBytes)),
          ring(ptx::shared_address(memory)),
          factors(ring + stream.slots * kSliceBytes),
          reciprocals(factors + (low_rank ? stream.cta_chunks * kFactorChunkBytes : 0)),
          cta(static_cast<int>(ptx::cluster_rank())),
          ctas(static_cast<int>(ptx::cluster_size())),
          team(blockIdx.x / ctas),
          teams(gridDim.x / ctas),
          slices((stream.cta_chunks + kSliceChunks - 1) / kSliceChunks) {}

    // A barrier, by its index in an array of them.
    static __device__ uint32_t barrier(const uint64_t* first, int index) {
        return ptx::shared_address(first) + index * 8;
    }
    __device__ int slice_chunks(int slice) const {  // even
        return min(kSliceChunks, stream.cta_chunks - slice * kSliceChunks);
    }
    __device__ int factor_chunks() const {  // that exist
        return max(0, min(stream.cta_chunks, stream.common.groups - cta * stream.cta_chunks));
    }
    __device__ StreamTiles tiles() const { return {stream, team, teams}; }
};

}  // namespace nk::cuda::quantize
