// Argument checks of the native functions: every size a kernel relies on, as ValueError on the Python side.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "numerics/dtype.h"

namespace nk {

inline void require(bool holds, const char* argument, const char* expected, int64_t given) {
    if (!holds)
        throw std::invalid_argument(std::string(argument) + ": expected " + expected + ", given " +
                                    std::to_string(given));
}

inline DType require_dtype(int code, const char* argument) {
    require(is_dtype(code), argument, "a dtype code 0 (fp32), 1 (fp16) or 2 (bf16)", code);
    return static_cast<DType>(code);
}

inline void require_pointer(const void* pointer, const char* argument) {
    if (!pointer) throw std::invalid_argument(std::string(argument) + ": expected the address of a tensor, given null");
}

}  // namespace nk
