// W4A16 for at most sixteen tokens, at the speed of memory: a block has 16 to 64 output channels, and its warps share
// out the inputs. The tokens are the eight columns of an mma, so that one token costs as much as eight; every weight is
// read once, and none is decoded: a group's sum is scale * sum(code * x) + zero * sum(x), in fp32, with codes that an
// integer operation turns into floats. What is in flight waits in shared memory, not in registers: all blocks of a
// layer live at the same time, so that none starts late and none is alone at the end.
#include "../kernels.h"
#include "../ptx/dependent_launch.h"
#include "../w4a16.cuh"

namespace nk::cuda::sm80 {
namespace {

template <int warps, int strips, int blocks, int depth, int resident>
struct Shape {
    static constexpr int kWarps = warps, kThreads = 32 * warps;
    static constexpr int kStrips = strips;      // of 16 channels
    static constexpr int kBlocks = blocks;      // of 8 tokens
    static constexpr int kDepth = depth;        // chunks of a warp in shared memory, one of them in use
    static constexpr int kResident = resident;  // blocks of a multiprocessor that registers must suffice for
    using Weights = WarpWeights<strips>;

    __host__ __device__ static int stage_bytes(const W4a16& p) { return Weights::kBytes + p.tokens * kTokenBytes; }
    static_assert(depth * Weights::kBytes >= strips * blocks * 512);  // a warp's sums
};

// Where a stage keeps 16-byte piece `piece` of a token: lanes that are served together meet different banks.
__device__ __forceinline__ int piece_at(int token, int piece) { return piece ^ token % 4; }

// Two codes as floats, `kOffset` more than they are. In fp16 the offset is too large to be taken off in fp32.
template <bool is_bf16>
constexpr float kOffset = is_bf16 ? 128.0f : 0.0f;

template <bool is_bf16>
__device__ __forceinline__ uint32_t codes_of(uint32_t word, int nibble) {
    uint32_t raised = raise_pair<is_bf16>(word, nibble);
    if constexpr (!is_bf16) {
        const uint32_t power = 0x64006400u;
        const __half2 codes =
            __hsub2(reinterpret_cast<const __half2&>(raised), reinterpret_cast<const __half2&>(power));
        raised = reinterpret_cast<const uint32_t&>(codes);
    }
    return raised;
}

// Adds a group of 64 inputs. Lane q of a quad has inputs 32 (q / 2) + 8j + 4 (q % 2) + 0..3 for j = 0..3: two words
// of a channel, whose j-th nibbles they are, and half of the j-th of four pieces of x.
template <class S, bool is_bf16>
__device__ __forceinline__ void add_group(const W4a16& p, const uint8_t* stage, int group, int lane,
                                          float (&sums)[S::kStrips][S::kBlocks][4]) {
    using Weights = typename S::Weights;
    uint2 words[2 * S::kStrips];
#pragma unroll
    for (int row = 0; row < 2 * S::kStrips; ++row)
        words[row] = reinterpret_cast<const uint2*>(stage)[(row * 2 + group) * 32 + lane];
    float products[S::kStrips][S::kBlocks][4] = {}, totals[S::kBlocks][4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        uint2 x[S::kBlocks];
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
            const int token = 8 * b + lane / 4, piece = 8 * group + lane % 4 / 2 * 4 + j;
            x[b] = token < p.tokens ? reinterpret_cast<const uint2*>(stage + Weights::kBytes + token * kTokenBytes +
                                                                     16 * piece_at(token, piece))[lane % 2]
                                    : uint2{};
        }
        constexpr uint32_t kOnes = is_bf16 ? 0x3f803f80u : 0x3c003c00u;
        const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) ptx::mma_16<is_bf16>(totals[b], ones, x[b].x, x[b].y);
#pragma unroll
        for (int s = 0; s < S::kStrips; ++s) {
            const uint32_t a[4] = {codes_of<is_bf16>(words[2 * s].x, j), codes_of<is_bf16>(words[2 * s + 1].x, j),
                                   codes_of<is_bf16>(words[2 * s].y, j), codes_of<is_bf16>(words[2 * s + 1].y, j)};
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b) ptx::mma_16<is_bf16>(products[s][b], a, x[b].x, x[b].y);
        }
    }
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(stage + Weights::kCodeBytes);
    const auto factor = [&](int index) {
        return is_bf16 ? bf16_to_float(factors[index]) : __half2float(__ushort_as_half(factors[index]));
    };
#pragma unroll
    for (int row = 0; row < 2 * S::kStrips; ++row) {
        const int channel = group * Weights::kChannels + 8 * row + lane / 4;
        const float scale = factor(channel);
        const float zero = factor(channel + 2 * Weights::kChannels) - kOffset<is_bf16> * scale;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& sum = sums[row / 2][b][row % 2 * 2 + i];
                sum = fmaf(scale, products[row / 2][b][row % 2 * 2 + i], fmaf(zero, totals[b][i], sum));
            }
    }
}

// Starts the copies of a chunk of all tokens.
__device__ __forceinline__ void copy_tokens(const W4a16& p, int chunk, uint8_t* target, int lane) {
    const int piece = lane % kPieces, k = chunk * kChunkInputs + 8 * piece;
    const bool valid = k < p.inputs;
    for (int token = lane / kPieces; token < p.tokens; token += 32 / kPieces) {
        const uint16_t* source = static_cast<const uint16_t*>(p.x) + token * p.stride + k;
        uint8_t* place = target + token * kTokenBytes + 16 * piece_at(token, piece);
        if (p.x_vectors)
            ptx::copy_few<16>(ptx::shared_address(place), source, valid);
        else
            *reinterpret_cast<uint4*>(place) = valid ? load_piece(source, false) : uint4{};
    }
}

template <class S, bool is_bf16>
__global__ void __launch_bounds__(S::kThreads, S::kResident) gemv(const __grid_constant__ W4a16 p) {
    extern __shared__ __align__(128) uint8_t shared[];
    using Weights = typename S::Weights;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int channel = blockIdx.x * Weights::kChannels;
    const int chunks = (p.inputs + kChunkInputs - 1) / kChunkInputs;
    const int stage_bytes = S::stage_bytes(p), ring_bytes = S::kDepth * stage_bytes;
    uint8_t* ring = shared + warp * ring_bytes;
    const typename Weights::Source source(p, channel, lane);
    const int place = lane % 4 / 2 * 16 + lane / 4 * 2 + lane % 2;  // [group][channel][half] of a row
    const auto copy_weights = [&](int chunk, int slot) {
        if (chunk < chunks)
            Weights::copy(p, source, chunk, ptx::shared_address(ring + slot * stage_bytes), lane, place);
    };
    const auto copy_x = [&](int chunk, int slot) {
        if (chunk < chunks) copy_tokens(p, chunk, ring + slot * stage_bytes + Weights::kBytes, lane);
        ptx::commit_copies();
    };
    // The kernel before this one may still run, and may have written weights: they are brought near, but not read.
#pragma unroll
    for (int i = 0; i < S::kDepth - 1; ++i)
        if (warp + i * S::kWarps < chunks) Weights::prefetch(p, source, warp + i * S::kWarps);
    ptx::wait_for_kernels_before();
    ptx::allow_next_kernel();
#pragma unroll
    for (int i = 0; i < S::kDepth - 1; ++i) {
        copy_weights(warp + i * S::kWarps, i);
        copy_x(warp + i * S::kWarps, i);
    }

    float sums[S::kStrips][S::kBlocks][4] = {};
    for (int chunk = warp, slot = 0; chunk < chunks; chunk += S::kWarps, slot = slot + 1 == S::kDepth ? 0 : slot + 1) {
        ptx::wait_for_copies<S::kDepth - 2>();
        __syncwarp();  // everybody's copies are here, and everybody is done with the slot filled next
        const int ahead = chunk + (S::kDepth - 1) * S::kWarps, free = slot ? slot - 1 : S::kDepth - 1;
        copy_weights(ahead, free);
        copy_x(ahead, free);
        const uint8_t* stage = ring + slot * stage_bytes;
#pragma unroll
        for (int group = 0; group < 2; ++group) add_group<S, is_bf16>(p, stage, group, lane, sums);
    }

    // Every warp's sums into its own ring, which is empty now, then added in the order of the warps.
    ptx::wait_for_copies<0>();
    __syncwarp();
#pragma unroll
    for (int s = 0; s < S::kStrips; ++s)
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
            reinterpret_cast<float4*>(ring)[(s * S::kBlocks + b) * 32 + lane] =
                make_float4(sums[s][b][0], sums[s][b][1], sums[s][b][2], sums[s][b][3]);
    __syncthreads();
    constexpr int kQuads = Weights::kChannels / 4;
    for (int i = threadIdx.x; i < p.tokens * kQuads; i += S::kThreads) {
        const int token = i / kQuads, n = i % kQuads * 4;
        if (channel + n >= p.outputs) continue;
        float y[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int row = (n + j) % 16, tile = n / 16 * S::kBlocks + token / 8;
            const int fragment = (tile * 32 + row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
            y[j] = p.bias ? load_float(p.bias, p.bias_dtype, channel + n + j) : 0.0f;
#pragma unroll
            for (int w = 0; w < S::kWarps; ++w)
                y[j] += reinterpret_cast<const float*>(shared + w * ring_bytes)[fragment];
        }
        store_quad(p, token, channel + n, y);
    }
}

template <class S>
void run(const W4a16& p, cudaStream_t stream) {
    const dim3 grid((p.outputs + S::Weights::kChannels - 1) / S::Weights::kChannels);
    launch_early(p.x_dtype == DType::bf16 ? gemv<S, true> : gemv<S, false>, grid, dim3(S::kThreads),
                 S::kWarps * S::kDepth * S::stage_bytes(p), stream, "w4a16_linear (gemv)", p);
}

}  // namespace

void w4a16_gemv(const AwqArguments& a, cudaStream_t stream) {
    const W4a16 p = make_w4a16(a);
    // Measured on an H100: wide blocks read x and its sums less often, narrow ones are enough where channels are few.
    const bool wide = p.outputs % 8 == 0 && p.outputs >= 128 * device_attribute(cudaDevAttrMultiProcessorCount);
    if (p.tokens > 8)
        run<Shape<4, 2, 2, 2, 4>>(p, stream);
    else
        wide ? run<Shape<4, 4, 1, 2, 3>>(p, stream) : run<Shape<4, 1, 1, 3, 4>>(p, stream);
}

}  // namespace nk::cuda::sm80
