// Uninitialised, cache-line aligned scratch memory.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace nk::cpu {

constexpr std::align_val_t kCacheLine{64};

struct AlignedDelete {
    template <class T>
    void operator()(T* data) const {
        ::operator delete[](data, kCacheLine);
    }
};

template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete>;

template <class T>
Buffer<T> make_buffer(size_t count) {
    return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), kCacheLine)));
}

}  // namespace nk::cpu
