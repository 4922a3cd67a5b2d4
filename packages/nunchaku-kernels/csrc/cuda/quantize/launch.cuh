// Which quantise kernel runs, with which tiles and teams.
#pragma once

#include "general.cuh"
#include "resident.cuh"

namespace nk::cuda::quantize {

// How a device's CTAs share the work: as large a tile of tokens as leaves no multiprocessor idle (each tile reads the
// whole low-rank factor through L2), in clusters large enough that two CTAs per multiprocessor hold all of x.
struct Plan {
    int tokens, team, slots;
    bool resident;
    size_t shared_bytes;
    int64_t ctas;
};

inline Plan plan_for(int tokens_per_tile, int largest_team, const QuantizeArguments& a) {
    constexpr int kReservedBytes = 1024;  // of every CTA
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int element_bytes = static_cast<int>(size_of(static_cast<DType>(a.x.dtype)));
    const int slot_bytes = tokens_per_tile * kGroupSize * element_bytes + kReciprocalBytes;
    const int partial_bytes = a.rank > kRankTiles * 16 ? tokens_per_tile * kRankTiles * 16 * 4 : 0;
    const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - kReservedBytes - kMaximaBytes;
    const int slots = std::max(1, (room / kWarps - partial_bytes) / slot_bytes);
    const int64_t groups = a.padded_k / kGroupSize, tiles = (a.tokens + tokens_per_tile - 1) / tokens_per_tile;
    const auto per_warp = [&](int team) { return static_cast<int>((groups + team * kWarps - 1) / (team * kWarps)); };
    int team = 1;
    while (team < largest_team && team * kWarps < groups && (per_warp(team) > slots || tiles * team < processors))
        team *= 2;
    Plan plan{tokens_per_tile, team, std::min(slots, per_warp(team)), per_warp(team) <= slots, 0, tiles * team};
    plan.shared_bytes = kMaximaBytes + static_cast<size_t>(kWarps) * (plan.slots * slot_bytes + partial_bytes);
    return plan;
}

inline Plan plan(int largest_team, const QuantizeArguments& a) {
    constexpr int kOverlappingSlots = 3;  // copies that run ahead, where x does not fit
    const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
    Plan streamed{};
    for (const int tokens : {32, 24}) {
        const Plan candidate = plan_for(tokens, largest_team, a);
        if (candidate.ctas < processors) continue;
        if (candidate.resident) return candidate;
        // Streaming stalls more often: it needs the second CTA of every multiprocessor.
        if (!streamed.tokens && candidate.slots >= kOverlappingSlots && candidate.ctas >= 2 * processors)
            streamed = candidate;
    }
    return streamed.tokens ? streamed : plan_for(8, largest_team, a);
}

template <class Element, bool low_rank, class Team>
void launch_tile(const Plan& plan, const Parameters& p, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
        launch_clusters(plan.team, kernel, dim3(static_cast<unsigned>(plan.ctas)), dim3(kThreads), plan.shared_bytes,
                        stream, "w4a8_quantize", p);
    };
    switch (plan.tokens) {
        case 32:
            return run(quantize_tokens<Element, 32, low_rank, Team>);
        case 24:
            return run(quantize_tokens<Element, 24, low_rank, Team>);
        default:
            return run(quantize_tokens<Element, 8, low_rank, Team>);
    }
}

struct ResidentPlan {
    int tokens, team, slots;  // tokens 0: does not fit
    int64_t tiles, waves;
    size_t shared_bytes;
};

// Tiles as large as fit, evened out over the waves that this takes.
inline ResidentPlan resident_plan_for(int team, const QuantizeArguments& a) {
    const int ctas_per_processor = team > 1 ? 2 : 1;
    const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / ctas_per_processor - 1024;
    const int64_t groups = a.padded_k / kGroupSize, slots = (groups + team - 1) / team;
    const int64_t largest = std::min<int64_t>(
        kResidentTokens, ((room - kResidentMaximaBytes) / slots - kReciprocalBytes) / (kGroupSize * 2));
    if (largest <= 0) return {};
    // Clusters of 8 leave a few multiprocessors of some devices without one.
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t teams = std::max<int64_t>(1, processors * ctas_per_processor / team - (team > 2 ? 1 : 0));
    const int64_t waves = (a.tokens + teams * largest - 1) / (teams * largest);
    const int64_t tokens = std::max<int64_t>(1, (a.tokens + teams * waves - 1) / (teams * waves));
    return {static_cast<int>(tokens), team, static_cast<int>(slots), (a.tokens + tokens - 1) / tokens, waves, 0};
}

inline int resident_tiles(int tokens) { return (tokens + 7) / 8; }

inline ResidentPlan resident_plan(int largest_team, const QuantizeArguments& a) {
    ResidentPlan best = resident_plan_for(1, a);
    const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount), groups = a.padded_k / kGroupSize;
    const double factor_bytes = 2.0 * a.padded_k * a.rank * best.tiles;
    // Each team reads the whole factor through L2. A CTA that has its multiprocessor to itself overlaps nothing.
    const bool split = !best.tokens || (best.tokens < 16 && (best.waves > 1 || factor_bytes > 40e6)) ||
                       (best.tiles * 4 <= processors && groups >= 32);
    if (split && largest_team > 1) {
        ResidentPlan wide{};
        for (int team = 2; team <= largest_team && team * 2 <= groups; team *= 2) {
            const ResidentPlan candidate = resident_plan_for(team, a);
            if (!candidate.tokens) continue;
            wide = candidate;
            if (candidate.tokens >= 24) break;
        }
        if (wide.tokens) best = wide;
    }
    // Few tokens of long rows would read the factor very often.
    if (a.rank && best.tokens < 4 && best.waves > 1) return {};
    if (!best.tokens) return {};
    const int warps = best.team > 1 ? 8 : 16;
    const size_t partial = a.rank ? size_t(resident_tiles(best.tokens)) * 8 * kRankTiles * 16 * 4 * (warps + 1) : 0;
    best.shared_bytes = kResidentMaximaBytes +
                        std::max(size_t(best.slots) * (best.tokens * kGroupSize * 2 + kReciprocalBytes), partial);
    return best;
}

template <class Element, int kCtaWarps, bool low_rank, class Team>
void launch_resident(const ResidentPlan& plan, const Parameters& p, cudaStream_t stream) {
    const auto run = [&](auto kernel) {
        launch_clusters(plan.team, kernel, dim3(static_cast<unsigned>(plan.tiles * plan.team)), dim3(kCtaWarps * 32),
                        plan.shared_bytes, stream, "w4a8_quantize", p);
    };
    switch (resident_tiles(plan.tokens)) {
        case 1:
            return run(quantize_resident<Element, kCtaWarps, 1, low_rank, Team>);
        case 2:
            return run(quantize_resident<Element, kCtaWarps, 2, low_rank, Team>);
        case 3:
            return run(quantize_resident<Element, kCtaWarps, 3, low_rank, Team>);
        case 4:
            return run(quantize_resident<Element, kCtaWarps, 4, low_rank, Team>);
        default:
            return run(quantize_resident<Element, kCtaWarps, 5, low_rank, Team>);
    }
}

template <class Element, class Team>
void launch_resident_element(const ResidentPlan& plan, Parameters p, cudaStream_t stream) {
    p.tile_tokens = plan.tokens, p.slots = plan.slots;
    if constexpr (Team::kLargest > 1)
        if (plan.team > 1)
            return p.rank ? launch_resident<Element, 8, true, Team>(plan, p, stream)
                          : launch_resident<Element, 8, false, Team>(plan, p, stream);
    p.rank ? launch_resident<Element, 16, true, Alone>(plan, p, stream)
           : launch_resident<Element, 16, false, Alone>(plan, p, stream);
}

template <class Team>
void run(const QuantizeArguments& a, cudaStream_t stream) {
    const DType dtype = static_cast<DType>(a.x.dtype);
    Parameters p = parameters(a);
    if (p.x_aligned && dtype != DType::f32 && a.rank <= kRankTiles * 16) {
        const ResidentPlan resident = resident_plan(Team::kLargest, a);
        if (resident.tokens)
            return dtype == DType::f16 ? launch_resident_element<F16, Team>(resident, p, stream)
                                       : launch_resident_element<BF16, Team>(resident, p, stream);
    }
    const Plan chosen = plan(Team::kLargest, a);
    p.slots = chosen.slots;
    p.partials_separate = p.rank > kRankTiles * 16;
    if (dtype == DType::f32) return launch_tile<float, false, Team>(chosen, p, stream);
    if (dtype == DType::f16)
        return a.rank ? launch_tile<F16, true, Team>(chosen, p, stream)
                      : launch_tile<F16, false, Team>(chosen, p, stream);
    return a.rank ? launch_tile<BF16, true, Team>(chosen, p, stream)
                  : launch_tile<BF16, false, Team>(chosen, p, stream);
}

}  // namespace nk::cuda::quantize
