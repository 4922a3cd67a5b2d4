// When quantize_stream runs, and with which clusters.
#pragma once

#include "stream.cuh"

namespace nk::cuda::quantize {

struct StreamPlan {
    int ctas, blocks, cta_blocks, stages;
    size_t shared_bytes;
};

// stages 0: does not fit. As few CTAs per cluster as hold the channels, more where there are too few tiles.
inline StreamPlan stream_plan(const QuantizeArguments& a, int64_t tiles, int least_stages) {
    constexpr int kMostStages = 8;
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const size_t room = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    const int64_t blocks = a.padded_k / kBlockChannels;
    StreamPlan best{};
    for (int ctas = 2; ctas <= kStreamCtas; ctas *= 2) {
        if (best.stages && (tiles * ctas > processors || blocks < ctas * kStreamWarps)) break;
        StreamPlan plan{ctas, 0, static_cast<int>((blocks + ctas - 1) / ctas), 0, 0};
        for (const int of_warp : {1, 2, 4, 5})
            if (!plan.blocks && of_warp * kStreamWarps >= plan.cta_blocks) plan.blocks = of_warp;
        if (!plan.blocks) continue;
        const size_t warp_blocks = static_cast<size_t>(plan.blocks * kStreamWarps);
        const size_t fixed = kStreamHeadBytes + (a.rank ? warp_blocks * 2 * kRankTiles * 512 : 0);
        if (fixed >= room) continue;
        plan.stages = static_cast<int>(std::min<size_t>(kMostStages, (room - fixed) / (warp_blocks * kBlockBytes)));
        if (plan.stages < least_stages) continue;
        plan.shared_bytes = fixed + plan.stages * warp_blocks * kBlockBytes;
        best = plan;
    }
    return best;
}

// How many clusters of `ctas` the device runs at once, one CTA per multiprocessor.
template <class Kernel>
int active_clusters(int ctas, Kernel kernel, size_t shared_bytes) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    if (ctas <= 2) return std::max(1, processors / ctas);
    // Larger ones leave multiprocessors of some devices without a cluster.
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, "w4a8_quantize");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(ctas);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(kStreamThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "w4a8_quantize");
    return std::max(1, clusters);
}

template <class Element, int kBlocks, bool low_rank, bool norm>
void launch_stream_kernel(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    const auto kernel = quantize_stream<Element, kBlocks, low_rank, norm>;
    const int most = active_clusters(plan.ctas, kernel, plan.shared_bytes);
    launch_clusters(plan.ctas, kernel, dim3(static_cast<unsigned>(std::min(most, p.tiles) * plan.ctas)),
                    dim3(kStreamThreads), plan.shared_bytes, stream, "w4a8_quantize", p);
}

template <class Element, bool low_rank, bool norm>
void launch_stream_blocks(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    switch (plan.blocks) {
        case 1:
            return launch_stream_kernel<Element, 1, low_rank, norm>(plan, p, stream);
        case 2:
            return launch_stream_kernel<Element, 2, low_rank, norm>(plan, p, stream);
        case 4:
            return launch_stream_kernel<Element, 4, low_rank, norm>(plan, p, stream);
        default:
            return launch_stream_kernel<Element, 5, low_rank, norm>(plan, p, stream);
    }
}

template <class Element, bool norm>
void launch_stream_element(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    p.common.rank ? launch_stream_blocks<Element, true, norm>(plan, p, stream)
                  : launch_stream_blocks<Element, false, norm>(plan, p, stream);
}

// Whether it ran. `modulation` is null where there is none.
inline bool run_stream(const QuantizeArguments& a, const ModulationArguments* modulation, cudaStream_t stream) {
    StreamParameters p{};
    p.common = parameters(a);
    const DType dtype = static_cast<DType>(a.x.dtype);
    if (dtype == DType::f32 || !p.common.x_aligned || a.rank > kRankTiles * 16) return false;
    p.row_tokens = a.tokens / (modulation ? modulation->rows : 1);
    const int64_t tiles_per_row = (p.row_tokens + kStreamTokens - 1) / kStreamTokens;
    const int64_t tiles = tiles_per_row * (a.tokens / p.row_tokens);
    if (tiles > INT32_MAX) return false;
    // A tile is held for two steps, or three, and the next has to be on its way.
    const StreamPlan plan = stream_plan(a, tiles, modulation ? 3 : 2);
    if (!plan.stages) return false;
    p.cta_blocks = plan.cta_blocks, p.stages = plan.stages;
    p.tiles = static_cast<int>(tiles), p.tiles_per_row = static_cast<int>(tiles_per_row);
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
