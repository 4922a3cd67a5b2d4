// Descriptions of matrices for the tensor copies of sm_90, made on the host.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace nk::cuda::sm90 {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the module must load where there is no driver.
inline Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
    return reinterpret_cast<Encode>(function);
}

// A matrix of `rows` x `columns` elements in boxes of `box_rows` rows of 128 or 64 bytes, which arrive in the swizzle
// of that width.
inline CUtensorMap make_tensor_map(const void* data, CUtensorMapDataType type, int element_bytes, int64_t rows,
                                   int64_t columns, int box_row_bytes, int box_rows) {
    static const Encode encode = find_encode();
    CUtensorMap map{};
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * element_bytes};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_row_bytes / element_bytes),
                               static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    const CUresult result =
        encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box_row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    return map;
}

}  // namespace nk::cuda::sm90
