// W4A16 with wgmma (sm_90a): Y^T = W X^T, weights rounded as the definition has them.
//
// Pairs of blocks share a token tile: each loads half of it for both. A block has two warpgroups, which multiply 64
// channels each with all tokens of the tile, and a warp that loads. The AWQ order holds a lane's A fragment of 32
// inputs and one channel in one word, so weights go from shared memory through registers into wgmma. Where tiles are
// too few for the GPU, blocks of a larger cluster share out the inputs as well and add up their sums in a fixed order.
#include <algorithm>
#include <array>
#include <cstdint>

#include "../kernels.h"
#include "../ptx/cluster.h"
#include "../ptx/hopper.h"
#include "../ptx/shared.h"
#include "../ptx/wgmma.h"
#include "../w4a16.cuh"
#include "ring.cuh"
#include "tensor_map.h"

namespace nk::cuda::sm90 {
namespace {

constexpr int kPair = 2;       // blocks that share tokens
constexpr int kConsumers = 2;  // warpgroups that multiply
constexpr int kConsumerThreads = 128 * kConsumers, kThreads = kConsumerThreads + 32;
constexpr int kChannels = 64 * kConsumers;  // of a block
constexpr int kWeightBytes = kChannels * kGroup / 2;
constexpr int kFactorBytes = 2 * kConsumers * 128;  // [scales, zeros][warpgroup][channel]
constexpr int kFactorPitch = 1024;
constexpr int kRow = 128;             // bytes of a token in a stage or an output tile, and of four channels' weights
constexpr int kSharedLimit = 230000;  // of stages
constexpr int kFewTokens = 16;        // up to here the portable kernels are the better ones

// Shared memory: stages of 64 inputs: tokens, weights, their scales and zeros. Afterwards the sums that other blocks
// add up, and outputs.
template <int tokens, int splits>
struct Tiling {
    static constexpr int kTokens = tokens, kSplits = splits, kCluster = kPair * splits;
    static constexpr int kTokenBytes = tokens * kRow, kWeights = kTokenBytes;  // in a stage
    static constexpr int kFactors = kWeights + kWeightBytes, kStageBytes = kFactors + kFactorPitch;
    static constexpr int kStages = std::min(8, kSharedLimit / kStageBytes);
    static constexpr int kExchangeBytes = splits > 1 ? tokens / 2 * kConsumerThreads * 4 : 0;
    static constexpr int kOutputTokens = tokens / splits, kOutputBytes = kConsumers * kOutputTokens * kRow;
    static constexpr int kBarriers = kStages * kStageBytes, kBytes = kBarriers + 2 * kStages * 8;
    static_assert(tokens % 16 == 0 && kOutputTokens % 16 == 0 && kExchangeBytes + kOutputBytes <= kBarriers);
};

template <int stages>
struct Barriers {
    uint32_t base;
    __device__ uint32_t full(int stage) const { return base + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return base + 8 * (stages + stage); }
};

struct Maps {
    CUtensorMap x, weights, scales, zeros, out;
};

// What a block computes: its channels, its tokens, and its share of the blocks of 64 inputs.
struct Tile {
    int channel, token, first, last, pair_rank, split;

    template <class T>
    __device__ static Tile of(const W4a16& p) {
        const int rank = ptx::cluster_rank(), split = rank / kPair, pair_rank = rank % kPair;
        const int channel = (static_cast<int>(blockIdx.x) / T::kCluster * kPair + pair_rank) * kChannels;
        return {channel,
                static_cast<int>(blockIdx.y) * T::kTokens,
                p.blocks * split / T::kSplits,
                p.blocks * (split + 1) / T::kSplits,
                pair_rank,
                split};
    }
};

template <class T>
__device__ void load_stages(const W4a16& p, const Maps& maps, const Tile& tile, uint32_t shared,
                            Barriers<T::kStages> barriers) {
    const int half = tile.pair_rank * (T::kTokens / kPair);
    const uint16_t pair = static_cast<uint16_t>(3 << kPair * tile.split);
    Ring<T::kStages> ring;
    for (int block = tile.first; block < tile.last; ++block, ring.advance()) {
        ptx::wait(barriers.empty(ring.stage), ring.parity ^ 1);
        const uint32_t full = barriers.full(ring.stage), stage = shared + ring.stage * T::kStageBytes;
        ptx::arrive_expecting(full, T::kTokenBytes + kWeightBytes + kFactorBytes);
        ptx::tensor_load(stage + T::kWeights, &maps.weights, block * kGroup, tile.channel / 4, full);
        const int group = static_cast<int>(group_of(p, block));
#pragma unroll
        for (int i = 0; i < 2 * kConsumers; ++i)
            ptx::tensor_load(stage + T::kFactors + i * 128, i < kConsumers ? &maps.scales : &maps.zeros,
                             tile.channel + i % kConsumers * 64, group, full);
        ptx::tensor_load_multicast(stage + half * kRow, &maps.x, block * kGroup, tile.token + half, full, pair);
    }
}

// 64 inputs of a lane's two channels, eight apart: the words of both halves, and twice scale and zero.
struct Codes {
    uint32_t words[2][2], scales[2], zeros[2];
};

// The A operands of 64 inputs.
struct Operands {
    uint32_t steps[4][4];

    template <bool is_bf16>
    __device__ __forceinline__ void decode(const Codes& codes) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                steps[step][i] = decode_pair<is_bf16>(codes.words[i % 2][step / 2], step % 2 * 2 + i / 2,
                                                      codes.scales[i % 2], codes.zeros[i % 2]);
    }
};

// Sums over this block's inputs, of a warpgroup's 64 channels and all tokens of the tile.
template <class T, bool is_bf16>
__device__ __forceinline__ void multiply(const Tile& tile, uint32_t shared, int strip, int lane,
                                         Barriers<T::kStages> barriers, float (&sums)[T::kTokens / 2]) {
    // Four channels are a row of 128 swizzled bytes: [channel][half][8 words of 16 bits].
    const int quad = 4 * strip + lane / 16, row_piece = lane / 4 % 4 * 2;
    const uint32_t word = shared + T::kWeights + quad * kRow + lane % 4 * 4;
    // Rows of 64 channels, whose 16-byte pieces the swizzle has moved by the number of the row.
    const auto factor = [&](int stage, int first, int row) {
        const int line = first + strip / 4, piece = strip % 4 * 2 + row;
        return ptx::load_shared_2(shared + stage * T::kStageBytes + T::kFactors + line * 128 + 16 * (piece ^ line) +
                                  lane / 4 * 2) *
               0x10001u;
    };
    const auto codes_of = [&](const Ring<T::kStages>& at) {
        ptx::wait(barriers.full(at.stage), at.parity);
        Codes codes;
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                codes.words[row][half] = ptx::load_shared_4(word + at.stage * T::kStageBytes + row * 2 * kRow +
                                                            16 * ((row_piece + half) ^ ((quad + 2 * row) % 8)));
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            codes.scales[row] = factor(at.stage, 0, row);
            codes.zeros[row] = factor(at.stage, kConsumers, row);
        }
        return codes;
    };
    // Stages are filled by both blocks of the pair: both must know that they are free.
    const auto release = [&](int stage) {
        if (lane < kPair) ptx::arrive_in_cluster(ptx::address_in_cta(barriers.empty(stage), kPair * tile.split + lane));
    };
    const uint64_t tokens_operand = ptx::wgmma_operand<kRow>(shared);
    Ring<T::kStages> ring;
    int block = tile.first, finished = -1;
    const auto issue = [&](const Operands& operands) {
        const uint64_t b = tokens_operand + ring.stage * (T::kStageBytes >> 4);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step)
            ptx::Wgmma<T::kTokens>::template half<is_bf16>(sums, operands.steps[step], b + 2 * step);
        ptx::wgmma_commit();
    };
    // Starts the products of one block of inputs, and decodes the next while they run.
    const auto step = [&](const Operands& current, Operands& next) {
        issue(current);
        const int stage = ring.stage;
        ring.advance();
        const Codes codes = codes_of(ring);
        ptx::wgmma_wait<1>();
        if (finished >= 0) release(finished);
        finished = stage;
        ++block;
        next.template decode<is_bf16>(codes);
    };
    const auto last = [&](const Operands& current) {
        issue(current);
        ptx::wgmma_wait<0>();
    };
    Operands even, odd;
    even.decode<is_bf16>(codes_of(ring));
#pragma unroll 1
    while (block + 2 < tile.last) {
        step(even, odd);
        step(odd, even);
    }
    if (block + 1 < tile.last) {
        step(even, odd);
        last(odd);
    } else {
        last(even);
    }
}

// Adds up what the blocks of the other splits have for a share of the tokens, in the order of the splits.
template <class T>
__device__ __forceinline__ void add_up(const Tile& tile, uint32_t exchange, float (&y)[T::kOutputTokens / 2]) {
#pragma unroll
    for (int split = 0; split < T::kSplits; ++split) {
        const uint32_t source = ptx::address_in_cta(exchange, kPair * split + tile.pair_rank);
#pragma unroll
        for (int block = 0; block < T::kOutputTokens / 8; ++block) {
            const float4 sums = ptx::load_from_cluster(
                source + ((tile.split * (T::kOutputTokens / 8) + block) * kConsumerThreads + threadIdx.x) * 16);
            const float values[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) y[4 * block + i] = split ? y[4 * block + i] + values[i] : values[i];
        }
    }
}

// Adds the bias, rounds, and writes a warpgroup's 64 channels through a tile in shared memory.
template <class T, bool is_bf16>
__device__ __forceinline__ void store(const W4a16& p, const CUtensorMap* out, const Tile& tile, uint32_t outputs,
                                      int strip, int lane, float (&y)[T::kOutputTokens / 2]) {
    const int consumer = threadIdx.x / 128, warp = strip % 4;
    float bias[2] = {};
    if (p.bias) {
#pragma unroll
        for (int row = 0; row < 2; ++row)
            bias[row] =
                load_float(p.bias, p.bias_dtype, min(tile.channel + 16 * strip + lane / 4 + 8 * row, p.outputs - 1));
    }
    const uint32_t output = outputs + consumer * T::kOutputTokens * kRow;
    const uint32_t row = output + (lane / 16 * 8 + lane % 8) * kRow + 16 * ((2 * warp + lane / 8 % 2) ^ lane % 8);
    constexpr DType kDtype = is_bf16 ? DType::bf16 : DType::f16;
#pragma unroll
    for (int pair = 0; pair < T::kOutputTokens / 16; ++pair) {
        uint32_t packed[4];
#pragma unroll
        for (int m = 0; m < 4; ++m)  // matrices of 8 channels x 8 tokens: two of channels, then of the next tokens
            packed[m] = round_to_16_bits(y[8 * pair + 2 * m] + bias[m % 2], kDtype) |
                        round_to_16_bits(y[8 * pair + 2 * m + 1] + bias[m % 2], kDtype) << 16;
        ptx::stmatrix_x4_trans(row + pair * 16 * kRow, packed);
    }
    ptx::fence_async_proxy();
    ptx::sync_threads<128>(2 + consumer);
    if (threadIdx.x % 128 == 0) {
        ptx::tensor_store(out, output, tile.channel + 64 * consumer, tile.token + tile.split * T::kOutputTokens, 0);
        ptx::finish_reading_stores();
    }
}

template <class T, bool is_bf16>
__global__ void __launch_bounds__(kThreads, 1)
    gemm(const __grid_constant__ Maps maps, const __grid_constant__ W4a16 p) {
    extern __shared__ __align__(1024) uint8_t memory[];  // the swizzle counts from multiples of 1024
    const uint32_t shared = ptx::shared_address(memory);
    const Barriers<T::kStages> barriers{shared + T::kBarriers};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < T::kStages; ++stage) {
            ptx::init_barrier(barriers.full(stage), 1);
            ptx::init_barrier(barriers.empty(stage), kPair * 4 * kConsumers);
        }
        ptx::fence_barrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    const Tile tile = Tile::of<T>(p);
    if (warp == 4 * kConsumers) {
        if (lane == 0) load_stages<T>(p, maps, tile, shared, barriers);
        __syncwarp();
        if (T::kSplits > 1) {
            ptx::cluster_arrive();
            ptx::cluster_wait();
        }
    } else {
        float sums[T::kTokens / 2] = {};  // zeros: a product is added to what is there
        multiply<T, is_bf16>(tile, shared, warp, lane, barriers, sums);
        ptx::sync_threads<kConsumerThreads>(1);  // the stages make room
        if constexpr (T::kSplits > 1) {
#pragma unroll
            for (int block = 0; block < T::kTokens / 8; ++block)
                *reinterpret_cast<float4*>(memory + (block * kConsumerThreads + threadIdx.x) * 16) =
                    make_float4(sums[4 * block], sums[4 * block + 1], sums[4 * block + 2], sums[4 * block + 3]);
            ptx::cluster_arrive();
            ptx::cluster_wait();
            float y[T::kOutputTokens / 2];
            add_up<T>(tile, shared, y);
            store<T, is_bf16>(p, &maps.out, tile, shared + T::kExchangeBytes, warp, lane, y);
        } else {
            store<T, is_bf16>(p, &maps.out, tile, shared, warp, lane, sums);
        }
    }
    // The other blocks may still copy into this one's memory, arrive at its barriers or read its sums.
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

template <class T>
dim3 grid_of(const W4a16& p) {
    constexpr int kPairChannels = kPair * kChannels;
    return dim3((p.outputs + kPairChannels - 1) / kPairChannels * T::kCluster,
                (p.tokens + T::kTokens - 1) / T::kTokens);
}

template <class T>
void run(const W4a16& p, cudaStream_t stream) {
    const bool is_bf16 = p.x_dtype == DType::bf16;
    const CUtensorMapDataType type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const auto half_floats = [&](const void* data, int64_t rows, int64_t columns, int box_rows, int64_t planes = 0) {
        return make_tensor_map(type, 2, Planes{data, rows, columns, planes, 0}, kRow, box_rows);
    };
    const int64_t groups = static_cast<int64_t>(group_of(p, p.blocks - 1)) + 1;
    Maps maps;
    maps.x = half_floats(p.x, p.tokens, p.stride, T::kTokens / kPair);              // no box reaches beyond the inputs
    maps.weights = half_floats(p.qweight, p.outputs / 4, p.inputs, kChannels / 4);  // words of 16 bits: only copied
    maps.scales = half_floats(p.scales, groups, p.outputs, 1);
    maps.zeros = half_floats(p.zeros, groups, p.outputs, 1);
    maps.out = half_floats(p.out, p.tokens, p.outputs, T::kOutputTokens, 1);  // tensor_store names a plane
    launch_clusters(T::kCluster, is_bf16 ? gemm<T, true> : gemm<T, false>, grid_of<T>(p), dim3(kThreads), T::kBytes,
                    stream, "w4a16_linear (sm90)", maps, p);
}

// Clocks that a launch should take: rounds of blocks, times what 64 inputs take. Measured on an H100, where clusters of
// four do not find room on all multiprocessors.
template <class T>
double cost(const W4a16& p, int processors) {
    const dim3 grid = grid_of<T>(p);
    const int64_t clusters = static_cast<int64_t>(grid.x / T::kCluster) * grid.y;
    const int64_t slots = processors / T::kCluster * (T::kSplits > 1 ? 7 : 8) / 8;
    const double clocks = p.blocks / T::kSplits * (530 + 2.1 * T::kTokens) + (T::kSplits > 1 ? 9700 : 7000);
    return static_cast<double>((clusters + slots - 1) / slots) * clocks;
}

template <class... Tilings>
void run_cheapest(const W4a16& p, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const std::array costs = {cost<Tilings>(p, processors)...};
    constexpr std::array runs = {&run<Tilings>...};
    runs[std::min_element(costs.begin(), costs.end()) - costs.begin()](p, stream);
}

}  // namespace

bool serves(const AwqArguments& a) {
    const bool types =
        a.x.dtype == a.scales_dtype && a.out_dtype == a.x.dtype && static_cast<DType>(a.x.dtype) != DType::f32;
    constexpr int64_t kLimit = int64_t{1} << 30;
    return types && a.tokens > kFewTokens && a.tokens <= 65535 * 64 && a.out_features < kLimit &&
           a.in_features >= 4 * kGroup && a.in_features <= kMaxInputs && a.out_features % 8 == 0 &&
           a.stride >= a.in_features && a.stride % 8 == 0 && aligned(a.x.data) && aligned(a.qweight) &&
           aligned(a.wscales) && aligned(a.wzeros) && aligned(a.out);
}

void w4a16_linear(const AwqArguments& a, cudaStream_t stream) {
    run_cheapest<Tiling<192, 1>, Tiling<176, 1>, Tiling<128, 1>, Tiling<128, 2>, Tiling<64, 1>, Tiling<64, 2>>(
        make_w4a16(a), stream);
}

}  // namespace nk::cuda::sm90
