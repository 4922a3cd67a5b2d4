// Host entry points of the kernels, one namespace per kernel set. Arguments are valid and the device is current.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "../ops.h"

namespace nk::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a launch that failed must not be reported again by the next one
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

// Whether vector loads may start there.
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline void allow_shared_bytes(const void* kernel, size_t bytes, const char* name) {
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

// Raises the limit of dynamic shared memory of `kernel` and launches it, with `attribute` if that is given.
template <class... Parameters, class... Arguments>
void launch_with(const cudaLaunchAttribute* attribute, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                 size_t shared_bytes, cudaStream_t stream, const char* name, Arguments&&... arguments) {
    allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, name);
    cudaLaunchAttribute attributes[1] = {attribute ? *attribute : cudaLaunchAttribute{}};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = attribute ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const char* name, Arguments&&... arguments) {
    launch_with(nullptr, kernel, grid, block, shared_bytes, stream, name, std::forward<Arguments>(arguments)...);
}

// In clusters of `cluster` CTAs (sm_90).
template <class... Parameters, class... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                     cudaStream_t stream, const char* name, Arguments&&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    launch_with(cluster > 1 ? &attribute : nullptr, kernel, grid, block, shared_bytes, stream, name,
                std::forward<Arguments>(arguments)...);
}

// The kernel may start while the one before it ends, where the device can (sm_90) and that one allows it: what kernels
// before it may have written is read, and anything is written, only behind ptx::wait_for_kernels_before.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                  const char* name, Arguments&&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    const bool possible = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    launch_with(possible ? &attribute : nullptr, kernel, grid, block, shared_bytes, stream, name,
                std::forward<Arguments>(arguments)...);
}

namespace sm80 {

void w4a8_fold_scales(const FoldArguments& arguments, cudaStream_t stream);
void w4a8_quantize(const QuantizeArguments& arguments, cudaStream_t stream);
void w4a8_linear(const LinearArguments& arguments, cudaStream_t stream);
void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream);
void w4a16_linear(const AwqArguments& arguments, cudaStream_t stream);
void l1_change(const L1ChangeArguments& arguments, cudaStream_t stream);

// What w4a16_linear chooses from. The first two take tokens and scales of one 16-bit type, w4a16_gemv at most 16
// tokens.
void w4a16_gemv(const AwqArguments& arguments, cudaStream_t stream);
void w4a16_gemm(const AwqArguments& arguments, cudaStream_t stream);
void w4a16_fp32(const AwqArguments& arguments, cudaStream_t stream);

}  // namespace sm80

namespace sm90 {

void w4a8_quantize(const QuantizeArguments& arguments, cudaStream_t stream);
// False, and nothing done, where no kernel takes these arguments.
bool w4a8_quantize_norm(const QuantizeNormArguments& arguments, cudaStream_t stream);

// Whether the kernels below take these arguments; the others are for sm80.
bool serves(const ProductArguments& product);
bool serves(const LinearArguments& arguments);
bool serves(const HeadArguments& arguments);
bool serves(const AwqArguments& arguments);

void w4a8_linear(const LinearArguments& arguments, cudaStream_t stream);
void w4a8_linear_heads(const HeadArguments& arguments, cudaStream_t stream);
void w4a8_accumulate(const ProductArguments& product, int32_t* sums, cudaStream_t stream);
void w4a16_linear(const AwqArguments& arguments, cudaStream_t stream);

}  // namespace sm90
}  // namespace nk::cuda
