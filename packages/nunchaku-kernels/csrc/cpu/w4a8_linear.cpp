// The W4A8 linear: the integer product (w4a8_product.h), and scales, low-rank branch and epilogue in fp32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../check.h"
#include "../numerics/layout.h"
#include "../numerics/w4a8.h"
#include "buffer.h"
#include "isa.h"
#include "lowrank.h"
#include "ops.h"
#include "w4a8_product.h"

namespace nk::cpu {
namespace {

RowOperand operand_row(FloatTensor tensor, size_t offset) {
    if (!tensor.data) return {nullptr, DType::f32};
    const DType dtype = static_cast<DType>(tensor.dtype);
    return {static_cast<const char*>(tensor.data) + offset * size_of(dtype), dtype};
}

// A published vector's channels [begin, begin + channels) in natural order; null for an absent one.
const float* natural_vector(FloatTensor vector, size_t begin, size_t channels, float* dst) {
    if (!vector.data) return nullptr;
    for (size_t n = 0; n < channels; ++n)
        dst[n] = load_float(vector.data, static_cast<DType>(vector.dtype), vector_position(begin + n));
    return dst;
}

// lora_act * rank_scale of all tokens, as the product with the up factor takes it. Where factor and output are bf16 and
// the processor has tiles, as a sum of two bf16 numbers, which has 16 of the 24 bits of fp32: more than the output can
// show. Else in fp32.
class Hidden {
public:
    Hidden(const Kernels& kernels, const LinearArguments& a)
        : rank_(a.proj_up.data ? a.rank : 0), given_(static_cast<const float*>(a.lora_act)) {
        split_ = rank_ && kernels.tiles && static_cast<DType>(a.proj_up.dtype) == DType::bf16 &&
                 static_cast<DType>(a.out_dtype) == DType::bf16;
        const size_t tokens = a.product.tokens, rows = (tokens + kTileTokens - 1) / kTileTokens * kTileTokens;
        if (split_) {
            tiles_ = make_buffer<uint16_t>(rows * rank_ * 2);
            std::fill_n(tiles_.get(), rows * rank_ * 2, uint16_t{0});
        }
        if (!split_ && a.rank_scale) fp32_ = make_buffer<float>(tokens * rank_);
        if (!split_ && !fp32_) return;
        const Buffer<float> row = make_buffer<float>(rank_), rounded = make_buffer<float>(rank_);
        for (size_t m = 0; m < tokens; ++m) {
            float* scaled = split_ ? row.get() : &fp32_[m * rank_];
            for (size_t r = 0; r < rank_; ++r)
                scaled[r] = given_[m * rank_ + r] * (a.rank_scale ? a.rank_scale[r] : 1.0f);
            if (split_) split_token(kernels, m, scaled, rounded.get());
        }
    }

    size_t rank() const { return rank_; }
    const float* fp32(size_t m) const { return (fp32_ ? fp32_.get() : given_) + m * rank_; }

    // Whether the two parts are there, as tiles [tokens / 16][rank / 16][16 tokens][2 parts][16 ranks].
    bool split() const { return split_; }
    const uint16_t* tiles(size_t m, size_t r) const { return &tiles_[m * rank_ * 2 + r * kTileTokens * 2]; }
    size_t bytes_per_tile() const { return kTileTokens * rank_ * 2 * sizeof(uint16_t); }

private:
    void split_token(const Kernels& kernels, size_t m, float* value, float* rounded) {
        uint16_t* token = &tiles_[m / kTileTokens * kTileTokens * rank_ * 2 + m % kTileTokens * 32];
        for (size_t r = 0; r < rank_; r += 16, token += kTileTokens * 32) {
            kernels.from_float(value + r, DType::bf16, 16, token);
            kernels.to_float(token, DType::bf16, 16, rounded);
            for (size_t i = 0; i < 16; ++i) rounded[i] = std::isfinite(rounded[i]) ? value[r + i] - rounded[i] : 0.0f;
            kernels.from_float(rounded, DType::bf16, 16, token + 16);
        }
    }

    size_t rank_;
    const float* given_;
    bool split_;
    Buffer<float> fp32_;
    Buffer<uint16_t> tiles_;
};

// The fp32 tail of one thread.
class Tail {
public:
    Tail(const Kernels& kernels, const LinearArguments& arguments, const Hidden& hidden)
        : kernels_(kernels),
          a_(arguments),
          hidden_(hidden),
          rank_(hidden.rank()),
          up_(make_buffer<float>(hidden.split() ? 0 : rank_ * kPanelChannels)),
          split_up_(make_buffer<uint16_t>(hidden.split() ? 2 * rank_ * kPanelChannels : 0)) {}

    void operator()(size_t m0, size_t tokens, size_t n0, size_t channels, const int32_t* sums, size_t stride) {
        const size_t out_features = a_.out_features;
        if (n0 >= out_features) return;
        const size_t kept = std::min(channels, out_features - n0);
        float wcscales[kPanelChannels], bias[kPanelChannels];
        const float* column_scales = natural_vector(a_.wcscales, n0, channels, wcscales);
        const float* biases = natural_vector(a_.bias, n0, channels, bias);
        if (rank_) {
            find_used_ranks(n0, channels);
            if (hidden_.split())
                unpack_for_split(n0, channels);
            else
                unpack_lowrank(kernels_, a_.proj_up, rank_, n0, channels, LowrankSide::up, up_.get());
        }
        for (size_t m = 0; m < tokens; m += kRows)
            rows(m0 + m, std::min(kRows, tokens - m), n0, channels, kept, sums + m * stride, stride, column_scales,
                 biases);
    }

private:
    struct Range {
        size_t begin, end;
    };

    static constexpr size_t kRows = 48;  // tokens that share one pass over the low-rank factor

    void rows(size_t m0, size_t tokens, size_t n0, size_t channels, size_t kept, const int32_t* sums, size_t stride,
              const float* wcscales, const float* bias) {
        alignas(64) float y[kRows * kPanelChannels];
        for (size_t i = 0; i < tokens; ++i)
            kernels_.dequantize_row(sums + i * stride, a_.ascales[m0 + i], a_.row_scales + n0, wcscales, bias, channels,
                                    y + i * channels);
        for (const Range& ranks : used_) {
            const size_t inner = ranks.end - ranks.begin;
            if (hidden_.split())
                kernels_.tiles->multiply_bf16(hidden_.tiles(m0, ranks.begin), hidden_.bytes_per_tile(),
                                              (tokens + kTileTokens - 1) / kTileTokens,
                                              &split_up_[2 * ranks.begin * channels], channels / kStrip,
                                              inner * 2 * sizeof(uint16_t), true, y, channels);
            else
                for (size_t c = 0; c < channels; c += kStrip)
                    kernels_.matmul(hidden_.fp32(m0) + ranks.begin, rank_, tokens, &up_[c * rank_ + ranks.begin * 16],
                                    16, inner, 16, true, y + c, channels);
        }
        const size_t out_features = a_.out_features;
        const size_t tokens_per_gate = a_.gate.data ? a_.product.tokens / a_.gate_rows : 1;
        const DType out_dtype = static_cast<DType>(a_.out_dtype);
        for (size_t i = 0; i < tokens; ++i) {
            const size_t m = m0 + i, offset = m * out_features + n0;
            kernels_.finish_row(y + i * channels, kept, static_cast<Activation>(a_.activation),
                                operand_row(a_.gate, m / tokens_per_gate * out_features + n0),
                                operand_row(a_.residual, offset),
                                static_cast<char*>(a_.out) + offset * size_of(out_dtype), out_dtype);
        }
    }

    const char* up_tile(size_t n, size_t r) const {
        return static_cast<const char*>(a_.proj_up.data) + (n / 16 * (rank_ / 16) + r / 16) * tile_bytes();
    }
    size_t tile_bytes() const { return 256 * size_of(static_cast<DType>(a_.proj_up.dtype)); }

    // Ranks, in sixteens, whose up factor is not all zero for these channels: adapters of fused linears (q, k, v) have
    // ranks of their own, and each adds to its own rows only.
    void find_used_ranks(size_t n0, size_t channels) {
        used_.clear();
        for (size_t r = 0; r < rank_; r += 16) {
            bool zero = true;
            for (size_t c = n0; c < n0 + channels && zero; c += 16) {
                const char* tile = up_tile(c, r);
                zero = tile[0] == 0 && std::memcmp(tile, tile + 1, tile_bytes() - 1) == 0;  // every byte like the next
            }
            if (zero) continue;
            if (used_.empty() || used_.back().end != r) used_.push_back({r, r});
            used_.back().end = r + 16;
        }
    }

    // The used ranks as panels of tiles; each sixteen twice, once for each part of the hidden states.
    void unpack_for_split(size_t n0, size_t channels) {
        constexpr size_t kHalfTile = 256;
        for (const Range& ranks : used_) {
            uint16_t* panel = &split_up_[2 * ranks.begin * channels];
            for (size_t c = 0; c < channels; c += kStrip)
                for (size_t r = ranks.begin; r < ranks.end; r += 16, panel += 2 * kHalfTile) {
                    kernels_.lowrank_pairs(reinterpret_cast<const uint16_t*>(up_tile(n0 + c, r)), panel);
                    std::copy_n(panel, kHalfTile, panel + kHalfTile);
                }
        }
    }

    const Kernels& kernels_;
    const LinearArguments& a_;
    const Hidden& hidden_;
    size_t rank_;
    Buffer<float> up_;
    Buffer<uint16_t> split_up_;
    std::vector<Range> used_;
};

}  // namespace

void w4a8_accumulate(const ProductArguments& product, int32_t* sums, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(product);
    require(threads > 0, "threads", "at least 1", threads);
    if (product.tokens) require_pointer(sums, "out");
    const size_t padded_n = product.padded_n;
    for_each_block(kernels, product, threads, [&] {
        return [&](size_t m0, size_t tokens, size_t n0, size_t channels, const int32_t* block, size_t stride) {
            for (size_t m = 0; m < tokens; ++m)
                std::copy_n(block + m * stride, channels, sums + (m0 + m) * padded_n + n0);
        };
    });
}

void w4a8_linear(const LinearArguments& arguments, int64_t threads, const std::string& isa) {
    const Kernels& kernels = select_kernels(isa);
    validate(arguments);
    require(threads > 0, "threads", "at least 1", threads);
    const Hidden hidden(kernels, arguments);
    for_each_block(kernels, arguments.product, threads, [&] { return Tail(kernels, arguments, hidden); });
}

}  // namespace nk::cpu
