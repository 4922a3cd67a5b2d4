// The W4A8 product with mma.sync, for any GPU from sm_80 on: Y^T = W X^T, weights as the 16-row operand.
//
// Where tokens are many the warps of a block decode weights for each other (w4a8_by_block.cuh), else each for itself
// (w4a8_by_warp.cuh); here is chosen between them and the shapes of tiles.
#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "../ptx/shared.h"
#include "w4a8_by_block.cuh"
#include "w4a8_by_warp.cuh"
#include "w4a8_tail.cuh"

namespace nk::cuda::sm80 {
namespace {

constexpr int kReservedBytes = 1024;  // of shared memory, for each block

template <int... parameters>
void run(ByWarp<parameters...> shape, const Arguments& a, cudaStream_t stream) {
    const dim3 grid((a.tokens + shape.kTokens - 1) / shape.kTokens,
                    (a.padded_n + shape.kChannels - 1) / shape.kChannels);
    launch(product_by_warp<decltype(shape)>, grid, dim3(shape.kThreads), shape.kSharedBytes, stream,
           "w4a8_linear (sm80)", a);
}

void run(ByBlock shape, const Arguments& a, cudaStream_t stream) {
    const int64_t tiles =
        static_cast<int64_t>((a.tokens + shape.kTokens - 1) / shape.kTokens) * (a.padded_n / shape.kChannels);
    const int64_t blocks = std::min<int64_t>(tiles, device_attribute(cudaDevAttrMultiProcessorCount));
    launch(product_by_block<ByBlock>, dim3(static_cast<unsigned>(blocks)), dim3(shape.kThreads), shape.kSharedBytes,
           stream, "w4a8_linear (sm80)", a);
}

template <class S>
void run_shape(const Arguments& a, cudaStream_t stream) {
    run(S(), a, stream);
}

// An estimate of the time in nanoseconds, fitted to an H100: blocks, or tiles of blocks that stay, come in waves, and
// in each a chunk takes as long as the multiprocessor needs for it, or as the copies do that are under way.
template <class S>
int64_t cost(const Arguments& a, int processors, int shared_bytes) {
    const int64_t at_once = std::min(S::kBlocks, shared_bytes / (S::kSharedBytes + kReservedBytes));
    if (!at_once || !S::serves(a)) return INT64_MAX;
    const int64_t blocks = static_cast<int64_t>((a.tokens + S::kTokens - 1) / S::kTokens) * (a.padded_n / S::kChannels);
    const int64_t chunks = (a.padded_k / S::kChunk + S::kKWarps - 1) / S::kKWarps;
    const auto wave = [&](int64_t resident) {
        const int64_t work = resident * S::kWork * S::kChunk / 25 + 10, copies = 1500 / (S::kStages - 1);
        return chunks * std::max(work, copies) + 3000 + (a.tail.residual ? S::kResidualTime : 0);
    };
    const int64_t full = blocks / (processors * at_once), rest = blocks % (processors * at_once);
    return full * wave(at_once) + (rest ? wave((rest + processors - 1) / processors) : 0);
}

template <class... Shapes>
void run_cheapest(const Arguments& a, cudaStream_t stream) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int shared_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int64_t costs[] = {cost<Shapes>(a, processors, shared_bytes)...};
    void (*const runs[])(const Arguments&, cudaStream_t) = {run_shape<Shapes>...};
    runs[std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs)](a, stream);
}

void choose_and_run(const Arguments& a, cudaStream_t stream) {
    run_cheapest<ByBlock, ByWarp<128, 1, 2, 128, 3>, ByWarp<128, 1, 2, 64, 4>,  // for 100 KB of shared memory
                 ByWarp<64, 2, 3, 128, 3>, ByWarp<32, 4, 3, 128, 3>, ByWarp<16, 4, 3, 128, 4>>(a, stream);
}

Arguments product_arguments(const ProductArguments& p) {
    if (p.padded_k % 128)
        throw std::invalid_argument("Kp: expected a multiple of 128, given " + std::to_string(p.padded_k));
    if (p.tokens > INT32_MAX - 128 || p.padded_n > INT32_MAX - 256)
        throw std::invalid_argument("M, Np: expected less than 2^31, given " + std::to_string(p.tokens) + " and " +
                                    std::to_string(p.padded_n));
    Arguments a{};
    a.codes = p.codes;
    a.qweight = p.qweight;
    a.multipliers = p.multipliers;
    a.tokens = static_cast<int>(p.tokens);
    a.padded_n = static_cast<int>(p.padded_n);
    a.padded_k = static_cast<int>(p.padded_k);
    return a;
}

}  // namespace

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream) {
    Arguments a = product_arguments(product);
    a.sums = sums;
    choose_and_run(a, stream);
}

void w4a8_linear(const LinearArguments& linear, cudaStream_t stream) {
    Arguments a = product_arguments(linear.product);
    a.rank = linear.proj_up.data ? static_cast<int>(linear.rank) : 0;
    a.up_dtype = static_cast<DType>(linear.proj_up.dtype);
    if (a.rank && a.up_dtype == DType::f32)
        throw std::invalid_argument("proj_up_dtype: expected fp16 or bf16, given fp32");
    a.ascales = linear.ascales;
    a.row_scales = linear.row_scales;
    a.lora_act = linear.lora_act;
    a.rank_scale = linear.rank_scale;
    a.proj_up = linear.proj_up.data;
    a.wcscales = linear.wcscales.data;
    a.bias = linear.bias.data;
    a.wcscales_dtype = static_cast<DType>(linear.wcscales.dtype);
    a.bias_dtype = static_cast<DType>(linear.bias.dtype);
    a.tail = make_tail(linear);
    choose_and_run(a, stream);
}

}  // namespace nk::cuda::sm80
