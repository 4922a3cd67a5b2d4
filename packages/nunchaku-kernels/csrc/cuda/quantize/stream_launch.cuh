// When quantize_stream runs, and with which clusters.
#pragma once

#include "../sm90/tensor_map.h"
#include "stream.cuh"

namespace nk::cuda::quantize {

struct StreamPlan {
    int ctas, cta_chunks, chunks, slots;  // of a cluster, of a CTA, of a warp; slots 0: does not fit
    size_t shared_bytes;
};

inline StreamPlan stream_plan_for(int ctas, const QuantizeArguments& a, bool norm) {
    const int64_t groups = a.padded_k / kGroupSize, cta_chunks = (groups + ctas - 1) / ctas;
    StreamPlan plan{ctas, static_cast<int>(cta_chunks + cta_chunks % 2), 0, 0, 0};
    plan.chunks = (plan.cta_chunks + kGroupWarps - 1) / kGroupWarps;
    // Behind a norm the largest kernel spills registers.
    if (plan.chunks > kLargestChunks - (norm && ctas < kStreamCtas ? 1 : 0)) return {};
    const int64_t head = norm ? sizeof(StreamShared<true>) : sizeof(StreamShared<false>);
    const int64_t fixed =
        head + kGroupWarps * plan.chunks * kGroupSize * 4 + (a.rank ? plan.cta_chunks * kFactorChunkBytes : 0);
    const int slice_chunks = plan.chunks * 2, slices = (plan.cta_chunks + slice_chunks - 1) / slice_chunks;
    const int64_t slice_bytes = slice_chunks * kChunkBytes;
    const int64_t fit = (device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - fixed) / slice_bytes;
    // More copies in flight than memory needs only delay everything else that goes to memory, instructions too. With
    // low-rank sums places are freed later, behind a norm still later.
    const int useful = slices + (!a.rank ? 0 : norm ? slices : 2);
    plan.slots = static_cast<int>(std::min<int64_t>({kStreamSlots, useful, fit}));
    if (plan.slots < slices) return {};
    plan.shared_bytes = static_cast<size_t>(fixed + plan.slots * slice_bytes);
    return plan;
}

// As few CTAs per cluster as hold the channels, more where there are too few tiles.
inline StreamPlan stream_plan(const QuantizeArguments& a, bool norm) {
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t groups = a.padded_k / kGroupSize, tiles = (a.tokens + kStreamTokens - 1) / kStreamTokens;
    StreamPlan best{};
    for (int ctas = 2; ctas <= kStreamCtas; ctas *= 2) {
        if (best.slots && (tiles * ctas > processors || groups < ctas * 6)) break;
        const StreamPlan plan = stream_plan_for(ctas, a, norm);
        if (plan.slots) best = plan;
    }
    return best;
}

// Whether this is faster than the other kernels, by measurement at 3072 channels: up to 64 tokens, and from 1024, with
// low-rank sums from 512 tokens on, which leave few of 132 multiprocessors idle.
inline bool stream_wins(const StreamPlan& plan, const QuantizeArguments& a) {
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t tiles = (a.tokens + kStreamTokens - 1) / kStreamTokens;
    const bool few = tiles * 4 <= processors / plan.ctas, many = tiles * (a.rank ? 4 : 2) >= processors * 19 / 20;
    return a.padded_k >= 3072 && (few || many);
}

// How many clusters the device runs at once.
template <class Kernel>
int active_clusters(const StreamPlan& plan, int threads, Kernel kernel) {
    if (plan.ctas <= 2) return std::max(1, device_attribute(cudaDevAttrMultiProcessorCount) / plan.ctas);
    // Larger ones leave multiprocessors of some devices without a cluster.
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "w4a8_quantize");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.ctas);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "w4a8_quantize");
    return std::max(1, clusters);
}

template <class Element, int kChunks, bool low_rank, bool norm>
void launch_stream_kernel(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    constexpr int kThreads = stream_threads(low_rank);
    const auto kernel = quantize_stream<Element, kChunks, low_rank, norm>;
    const int64_t tiles = (p.common.tokens + kStreamTokens - 1) / kStreamTokens;
    const int64_t clusters = std::min<int64_t>(active_clusters(plan, kThreads, kernel), tiles);
    const Parameters& x = p.common;
    const sm90::Planes chunks{x.x,
                              x.tokens,
                              kGroupSize,
                              x.channels / kGroupSize,
                              kGroupSize * 2,
                              x.tokens > 1 ? x.row_bytes : x.channels * 2};
    const CUtensorMap map =
        sm90::make_tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, chunks, kGroupSize * 2, kStreamTokens, p.box_chunks);
    launch_clusters(plan.ctas, kernel, dim3(static_cast<unsigned>(clusters * plan.ctas)), dim3(kThreads),
                    plan.shared_bytes, stream, "w4a8_quantize", map, p);
}

template <class Element, bool low_rank, bool norm>
void launch_stream_size(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    switch (plan.chunks) {
        case 1:
            return launch_stream_kernel<Element, 1, low_rank, norm>(plan, p, stream);
        case 2:
            return launch_stream_kernel<Element, 2, low_rank, norm>(plan, p, stream);
        case 3:
            return launch_stream_kernel<Element, 3, low_rank, norm>(plan, p, stream);
        default:
            return launch_stream_kernel<Element, kLargestChunks, low_rank, norm>(plan, p, stream);
    }
}

template <class Element, bool norm>
void launch_stream_element(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    p.common.rank ? launch_stream_size<Element, true, norm>(plan, p, stream)
                  : launch_stream_size<Element, false, norm>(plan, p, stream);
}

// Whether it ran. `modulation` is null where there is none; where there is one, no other kernel could.
inline bool run_stream(const QuantizeArguments& a, const ModulationArguments* modulation, cudaStream_t stream) {
    StreamParameters p{};
    p.common = parameters(a);
    const DType dtype = static_cast<DType>(a.x.dtype);
    if (dtype == DType::f32 || !p.common.x_aligned || a.rank > kStreamRanks) return false;
    if (a.channels % kGroupSize || a.tokens > INT32_MAX || (a.tokens > 1 && a.stride < a.channels)) return false;
    const StreamPlan plan = stream_plan(a, modulation != nullptr);
    if (!plan.slots || (!modulation && !stream_wins(plan, a))) return false;
    p.row_tokens = static_cast<int>(a.tokens / (modulation ? modulation->rows : 1));
    p.cta_chunks = plan.cta_chunks, p.slots = plan.slots;
    p.box_chunks = plan.cta_chunks % (plan.chunks * 2) ? 2 : plan.chunks * 2;
    if (modulation) {
        if (!aligned(modulation->scale.data) || !aligned(modulation->shift.data)) return false;
        p.scale = static_cast<const char*>(modulation->scale.data);
        p.shift = static_cast<const char*>(modulation->shift.data);
        p.eps = modulation->eps;
        dtype == DType::f16 ? launch_stream_element<F16, true>(plan, p, stream)
                            : launch_stream_element<BF16, true>(plan, p, stream);
    } else {
        dtype == DType::f16 ? launch_stream_element<F16, false>(plan, p, stream)
                            : launch_stream_element<BF16, false>(plan, p, stream);
    }
    return true;
}

}  // namespace nk::cuda::quantize
