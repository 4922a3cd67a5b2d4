// When quantize_stream runs, and with which clusters.
#pragma once

#include "stream.cuh"

namespace nk::cuda::quantize {

struct StreamPlan {
    int ctas, warps, blocks, cta_blocks, per_processor, stages;  // stages 0: does not fit
    size_t shared_bytes;
};

inline StreamPlan stream_plan_for(int ctas, const QuantizeArguments& a, bool norm) {
    const int64_t blocks = a.padded_k / kBlockChannels;
    StreamPlan plan{ctas, 0, 0, static_cast<int>((blocks + ctas - 1) / ctas), 0, 0, 0};
    constexpr int kSizes[][2] = {{6, 2}, {6, 4}, {12, 4}, {12, 5}};  // warps, blocks of each
    for (const auto& size : kSizes)
        if (!plan.warps && size[0] * size[1] >= plan.cta_blocks) plan.warps = size[0], plan.blocks = size[1];
    if (!plan.warps) return {};
    const int64_t warp_blocks = plan.blocks * plan.warps;
    const int64_t fixed = kStreamHeadBytes + (a.rank ? warp_blocks * kFactorBytes : 0);
    const int64_t stage_bytes = kStreamTokens * stream_row_bytes(plan.warps, plan.blocks);
    const int held = norm ? 2 : 1;  // tiles that are not finished when the next has to be there
    for (plan.per_processor = stream_ctas_per_processor(plan.warps, plan.blocks, a.rank, norm); plan.per_processor;
         --plan.per_processor) {
        const int64_t room =
            plan.per_processor > 1
                ? device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / plan.per_processor - 1024
                : device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        plan.stages = static_cast<int>(std::min<int64_t>(kStreamStages, (room - fixed) / stage_bytes));
        if (plan.stages <= held) continue;
        plan.shared_bytes = static_cast<size_t>(fixed + plan.stages * stage_bytes);
        return plan;
    }
    return {};
}

// As few CTAs per cluster as hold the channels, more where there are too few tiles.
inline StreamPlan stream_plan(const QuantizeArguments& a, int64_t tiles, bool norm) {
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t blocks = a.padded_k / kBlockChannels;
    StreamPlan best{};
    for (int ctas = 2; ctas <= kStreamCtas; ctas *= 2) {
        if (best.stages && (tiles * ctas > processors || blocks < ctas * 12)) break;
        const StreamPlan plan = stream_plan_for(ctas, a, norm);
        if (plan.stages) best = plan;
    }
    return best;
}

// Whether this is faster than the other kernels, by measurement: it takes a few tiles until all is in flight.
inline bool stream_wins(const StreamPlan& plan, const QuantizeArguments& a, int64_t tiles) {
    const int64_t teams = device_attribute(cudaDevAttrMultiProcessorCount) / plan.ctas;
    return a.padded_k >= 3072 && (tiles * 2 <= teams || tiles >= teams * 8);
}

// How many clusters the device runs at once.
template <class Kernel>
int active_clusters(const StreamPlan& plan, Kernel kernel) {
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    if (plan.ctas <= 2) return std::max(1, processors / plan.ctas * plan.per_processor);
    // Larger ones leave multiprocessors of some devices without a cluster.
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "w4a8_quantize");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.ctas);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(plan.ctas));
    config.blockDim = dim3(static_cast<unsigned>(plan.warps * 32));
    config.dynamicSmemBytes = plan.shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "w4a8_quantize");
    return std::max(1, clusters);
}

template <class Element, int kWarps, int kBlocks, bool low_rank, bool norm>
void launch_stream_kernel(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    const auto kernel = quantize_stream<Element, kWarps, kBlocks, low_rank, norm>;
    const int clusters = std::min(active_clusters(plan, kernel), p.tiles);
    launch_clusters(plan.ctas, kernel, dim3(static_cast<unsigned>(clusters * plan.ctas)), dim3(kWarps * 32),
                    plan.shared_bytes, stream, "w4a8_quantize", p);
}

template <class Element, bool low_rank, bool norm>
void launch_stream_size(const StreamPlan& plan, const StreamParameters& p, cudaStream_t stream) {
    if (plan.warps == 6)
        return plan.blocks == 2 ? launch_stream_kernel<Element, 6, 2, low_rank, norm>(plan, p, stream)
                                : launch_stream_kernel<Element, 6, 4, low_rank, norm>(plan, p, stream);
    plan.blocks == 4 ? launch_stream_kernel<Element, 12, 4, low_rank, norm>(plan, p, stream)
                     : launch_stream_kernel<Element, 12, 5, low_rank, norm>(plan, p, stream);
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
    if (dtype == DType::f32 || !p.common.x_aligned || a.rank > kRankTiles * 16) return false;
    p.row_tokens = a.tokens / (modulation ? modulation->rows : 1);
    const int64_t tiles_per_row = (p.row_tokens + kStreamTokens - 1) / kStreamTokens;
    const int64_t tiles = tiles_per_row * (a.tokens / p.row_tokens);
    if (tiles > INT32_MAX) return false;
    const StreamPlan plan = stream_plan(a, tiles, modulation != nullptr);
    if (!plan.stages || (!modulation && !stream_wins(plan, a, tiles))) return false;
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
