// The same in clusters: CTAs that split the channels of a tile of tokens keep larger tiles in shared memory, so that
// the low-rank factor is read less often, and rows that no multiprocessor could hold.
#include "../ptx/cluster.h"
#include "../quantize/launch.cuh"
#include "../quantize/stream_launch.cuh"

namespace nk::cuda::sm90 {
namespace {

struct Cluster {
    static constexpr int kLargest = 8;  // the largest size that every device with clusters can hold

    static __device__ uint32_t size() { return ptx::cluster_size(); }
    static __device__ uint32_t rank() { return ptx::cluster_rank(); }
    static __device__ void arrive() { ptx::cluster_arrive(); }
    static __device__ void arrive_relaxed() { ptx::cluster_arrive_relaxed(); }
    static __device__ void wait() { ptx::cluster_wait(); }
    // In every CTA, so that each finds the result at home.
    static __device__ void raise(uint32_t* word, uint32_t value) {
        for (uint32_t cta = 0; cta < size(); ++cta)
            ptx::raise_in_cluster(ptx::address_in_cta(ptx::shared_address(word), cta), value);
    }
    static __device__ float4 load(const char* address, uint32_t cta) {
        return ptx::load_from_cluster(ptx::address_in_cta(ptx::shared_address(address), cta));
    }
};

}  // namespace

void w4a8_quantize(const QuantizeArguments& arguments, cudaStream_t stream) {
    quantize::run<Cluster>(arguments, stream);
}

bool w4a8_quantize_norm(const QuantizeNormArguments& arguments, cudaStream_t stream) {
    return quantize::run_stream(arguments.quantize, &arguments.modulation, stream);
}

}  // namespace nk::cuda::sm90
