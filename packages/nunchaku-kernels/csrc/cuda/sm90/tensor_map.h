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

// Row-major matrices, one or several `plane_bytes` apart. A map of them has three dimensions; without planes, two.
struct Planes {
    const void* data;
    int64_t rows, columns;
    int64_t planes, plane_bytes;
    int64_t row_bytes;  // from one row to the next; 0 where they follow each other
};

// Boxes are `box_rows` rows of 128 or 64 bytes, which arrive in the swizzle of that width, of `box_planes` planes.
inline CUtensorMap make_tensor_map(CUtensorMapDataType type, int element_bytes, const Planes& of, int box_row_bytes,
                                   int box_rows, int box_planes = 1) {
    static const Encode encode = find_encode();
    CUtensorMap map{};
    const cuuint64_t row_bytes =
        of.row_bytes ? static_cast<cuuint64_t>(of.row_bytes) : static_cast<cuuint64_t>(of.columns) * element_bytes;
    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(of.columns), static_cast<cuuint64_t>(of.rows),
                                 static_cast<cuuint64_t>(of.planes)};
    const cuuint64_t strides[2] = {row_bytes, of.plane_bytes ? static_cast<cuuint64_t>(of.plane_bytes)
                                                             : row_bytes * static_cast<cuuint64_t>(of.rows)};
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_row_bytes / element_bytes),
                               static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_planes)};
    const cuuint32_t steps[3] = {1, 1, 1};
    const CUresult result = encode(&map, type, of.planes ? 3 : 2, const_cast<void*>(of.data), sizes, strides, box,
                                   steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   box_row_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(static_cast<int>(result)));
    return map;
}

}  // namespace nk::cuda::sm90
