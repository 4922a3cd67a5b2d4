// Activations to int8 with one scale per token, and the low-rank down projection of the same tokens.
#include <algorithm>
#include <cstring>

#include "../check.h"
#include "../numerics/layout.h"
#include "buffer.h"
#include "isa.h"
#include "lowrank.h"
#include "ops.h"
#include "parallel.h"

namespace nk::cpu {
namespace {

// Tokens that share one pass over the low-rank factor, which for long inputs and adapters is larger than any cache; few
// enough tokens leave a block for each thread.
constexpr size_t kTokenStep = 6, kTokenBlock = 48;

// Bytes of each token, and of each rank, that are multiplied before the next: those of a block of tokens and of a strip
// of 16 ranks stay in the first-level cache.
constexpr size_t kInputBytes = 512;

// Tokens of a block are kept this many bytes further apart than they are long, since lengths are multiples of powers of
// two, and such distances would put all tokens into the same few sets of a cache.
constexpr size_t kGap = 64;

// The low-rank factor in one of three forms, as x and the factor are typed and the processor multiplies:
//   fp32   strips [rank / 16][channels padded to 16][16]
//   pairs  the same in bf16, with pairs of inputs interleaved, [..][16][2]; products are exact either way
//   tiles  pairs in blocks of inputs, [block][rank / 16][inputs of the block / 2][16][2]
class DownFactor {
public:
    enum class Form { none, fp32, pairs, tiles };

    DownFactor(const Kernels& kernels, const QuantizeArguments& a)
        : kernels_(kernels), rank_(a.rank), channels_(a.channels), strip_((channels_ + 15) / 16 * 16 * 16) {
        if (!rank_) return;
        const bool both_bf16 =
            static_cast<DType>(a.proj_down.dtype) == DType::bf16 && static_cast<DType>(a.x.dtype) == DType::bf16;
        if (both_bf16 && kernels.tiles && channels_ % (kTileRowBytes / sizeof(uint16_t)) == 0) {
            form_ = Form::tiles;
            bf16_ = make_buffer<uint16_t>(channels_ * rank_);
            for_each_tile(a.proj_down, rank_, 0, channels_, LowrankSide::down, [&](const void* tile, size_t position) {
                const size_t r = position / strip_ * 16, c = position % strip_ / 16, k = c / kTileInputs * kTileInputs;
                kernels.lowrank_pairs(static_cast<const uint16_t*>(tile),
                                      &bf16_[k * rank_ + r * block_inputs(k) + (c - k) * 16]);
            });
        } else if (both_bf16 && kernels.matmul_bf16 && channels_ % 2 == 0) {
            form_ = Form::pairs;
            bf16_ = make_buffer<uint16_t>(strip_ * rank_ / 16);
            unpack_lowrank_pairs(kernels, a.proj_down, rank_, 0, channels_, LowrankSide::down, bf16_.get());
        } else {
            form_ = Form::fp32;
            fp32_ = make_buffer<float>(strip_ * rank_ / 16);
            unpack_lowrank(kernels, a.proj_down, rank_, 0, channels_, LowrankSide::down, fp32_.get());
        }
    }

    Form form() const { return form_; }

    // lora_act[count, rank] = x[count, channels] down, with the tokens of x `stride` elements apart: in fp32 for that
    // form, else in bf16. Every sum runs over the inputs in order, whatever the blocks are.
    void multiply(const void* x, ptrdiff_t stride, size_t count, float* lora_act) const {
        if (form_ == Form::tiles) return multiply_tiles(static_cast<const uint16_t*>(x), stride, count, lora_act);
        const bool pairs = form_ == Form::pairs;
        if (pairs) std::fill(lora_act, lora_act + count * rank_, 0.0f);
        const size_t block = kInputBytes / (pairs ? sizeof(uint16_t) : sizeof(float));
        for (size_t k = 0; k < channels_; k += block) {
            const size_t inputs = std::min(block, channels_ - k);
            for (size_t r = 0; r < rank_; r += 16) {
                const size_t panel = r / 16 * strip_ + k * 16;
                if (pairs)
                    kernels_.matmul_bf16(static_cast<const uint16_t*>(x) + k, stride, count, bf16_.get() + panel,
                                         inputs, lora_act + r, rank_);
                else
                    kernels_.matmul(static_cast<const float*>(x) + k, stride, count, fp32_.get() + panel, 16, inputs,
                                    16, k > 0, lora_act + r, rank_);
            }
        }
    }

private:
    static constexpr size_t kTileInputs = kTileInputBytes / sizeof(uint16_t);

    size_t block_inputs(size_t k) const { return std::min(kTileInputs, channels_ - k); }

    void multiply_tiles(const uint16_t* x, ptrdiff_t stride, size_t count, float* lora_act) const {
        const size_t token_tiles = (count + kTileTokens - 1) / kTileTokens, rows = token_tiles * kTileTokens;
        const Buffer<uint16_t> tokens = make_buffer<uint16_t>(rows * kTileInputs);
        const Buffer<float> sums = make_buffer<float>(rows * rank_);
        const ptrdiff_t row_bytes = stride * static_cast<ptrdiff_t>(sizeof(uint16_t));
        for (size_t k = 0; k < channels_; k += kTileInputs) {
            const size_t inputs = block_inputs(k), bytes = inputs * sizeof(uint16_t);
            for (size_t m = 0; m < count; m += kTileTokens)
                kernels_.tiles->pack_tokens(reinterpret_cast<const char*>(x + stride * static_cast<ptrdiff_t>(m) + k),
                                            row_bytes, std::min(kTileTokens, count - m), bytes,
                                            reinterpret_cast<char*>(&tokens[m * inputs]));
            kernels_.tiles->multiply_bf16(tokens.get(), kTileTokens * bytes, token_tiles, &bf16_[k * rank_], rank_ / 16,
                                          bytes, k > 0, sums.get(), rank_);
        }
        std::copy_n(sums.get(), count * rank_, lora_act);
    }

    const Kernels& kernels_;
    size_t rank_, channels_, strip_;
    Form form_ = Form::none;
    Buffer<float> fp32_;
    Buffer<uint16_t> bf16_;
};

}  // namespace

void w4a8_quantize(const QuantizeArguments& a, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(a);
    require(threads > 0, "threads", "at least 1", threads);
    const size_t tokens = a.tokens, channels = a.channels, padded_k = a.padded_k, rank = a.rank;
    const DType x_dtype = static_cast<DType>(a.x.dtype);

    Buffer<float> reciprocal;
    if (a.smooth.data) {
        reciprocal = make_buffer<float>(channels);
        for (size_t k = 0; k < channels; ++k)
            reciprocal[k] = 1.0f / load_float(a.smooth.data, static_cast<DType>(a.smooth.dtype), vector_position(k));
    }
    const DownFactor down(kernels, a);

    const auto row_of = [&](size_t m) {
        return static_cast<const char*>(a.x.data) + a.stride * static_cast<int64_t>(m * size_of(x_dtype));
    };

    // An element of the token costs about 64 int8 multiply-adds, one of the fp32 product 4.
    const size_t workers = useful_threads(threads, tokens * channels * (64 + 4 * rank));
    const size_t share = std::max(size_t{1}, (tokens + workers - 1) / workers);
    const size_t token_block = std::min(kTokenBlock, (share + kTokenStep - 1) / kTokenStep * kTokenStep);
    parallel_for(workers, (tokens + token_block - 1) / token_block, [&](WorkQueue& queue) {
        const size_t stride = channels + kGap / sizeof(float), bf16_stride = channels + kGap / sizeof(uint16_t);
        const bool in_fp32 = down.form() == DownFactor::Form::fp32, in_bf16 = down.form() == DownFactor::Form::pairs;
        const Buffer<float> x = make_buffer<float>(in_fp32 ? token_block * stride : channels);
        const Buffer<uint16_t> bf16_x = make_buffer<uint16_t>(in_bf16 ? token_block * bf16_stride : 0);
        const Buffer<float> t = make_buffer<float>(channels);
        for (size_t block; queue.next(block);) {
            const size_t begin = block * token_block, count = std::min(token_block, tokens - begin);
            for (size_t i = 0; i < count; ++i) {
                const size_t m = begin + i;
                float* token = &x[in_fp32 ? i * stride : 0];
                kernels.to_float(row_of(m), x_dtype, channels, token);
                if (in_bf16) std::memcpy(&bf16_x[i * bf16_stride], row_of(m), channels * sizeof(uint16_t));
                int8_t* codes = a.codes + m * padded_k;
                a.ascales[m] = kernels.quantize_token(token, channels, a.shift, reciprocal.get(), t.get(), codes);
                std::fill(codes + channels, codes + padded_k, int8_t{0});
            }
            float* lora_act = static_cast<float*>(a.lora_act) + begin * rank;
            if (in_fp32) down.multiply(x.get(), stride, count, lora_act);
            if (in_bf16) down.multiply(bf16_x.get(), bf16_stride, count, lora_act);
            if (down.form() == DownFactor::Form::tiles) down.multiply(row_of(begin), a.stride, count, lora_act);
        }
    });
}

}  // namespace nk::cpu
