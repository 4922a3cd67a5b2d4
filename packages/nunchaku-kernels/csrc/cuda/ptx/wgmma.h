// Products of a warpgroup (sm_90a): D[64 x N] += A B, A from registers, B [N x K] from shared memory, K contiguous,
// rows of 128 or 64 bytes in the swizzle of that width. D lies in registers like that of m16n8 products, one per 8
// columns of B.
#pragma once

#include <cstdint>

namespace nk::cuda::ptx {

// Orders register accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `pending` groups are unfinished.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Describes B from this address on, with rows of so many bytes; a step of 32 bytes along K adds 2.
template <int row_bytes>
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared_address) {
    static_assert(row_bytes == 128 || row_bytes == 64);
    constexpr uint64_t kSwizzle = uint64_t{row_bytes == 128 ? 1 : 2} << 62, kUnused = uint64_t{1} << 16;
    constexpr uint64_t kEightRows = uint64_t{8 * row_bytes >> 4} << 32;
    return kSwizzle | kEightRows | kUnused | (shared_address >> 4 & 0x3fff);
}

// D[64 x 32] = A B, and D on top if `onto`; 16-bit floats into fp32, A [64 x 16] from shared memory too, described like
// B.
template <bool is_bf16>
__device__ __forceinline__ void wgmma_64x32(float (&d)[16], uint64_t a, uint64_t b, bool onto) {
#define NK_WGMMA_64X32(type)                                                                                          \
    asm volatile(                                                                                                     \
        "{\n"                                                                                                         \
        ".reg .pred onto;\n"                                                                                          \
        "setp.ne.b32 onto, %18, 0;\n"                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type                                                            \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, onto, 1, 1, 0, 0;\n"      \
        "}"                                                                                                           \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                    \
        : "l"(a), "l"(b), "r"(static_cast<uint32_t>(onto)))
    if constexpr (is_bf16)
        NK_WGMMA_64X32("bf16.bf16");
    else
        NK_WGMMA_64X32("f16.f16");
#undef NK_WGMMA_64X32
}

// N columns: `s8` multiplies K = 32 int8, `half` K = 16 of a 16-bit float. With `onto_zero` D = A B, whatever D was.
template <int columns>
struct Wgmma;

// Registers of D in blocks of eight: their names in the instruction, and as operands.
// clang-format off
#define NK_NAMES_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NK_NAMES_2 NK_NAMES_1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NK_NAMES_3 NK_NAMES_2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NK_NAMES_4 NK_NAMES_3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NK_NAMES_5 NK_NAMES_4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NK_NAMES_6 NK_NAMES_5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NK_NAMES_7 NK_NAMES_6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NK_NAMES_8 NK_NAMES_7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NK_NAMES_9 NK_NAMES_8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define NK_NAMES_10 NK_NAMES_9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define NK_NAMES_11 NK_NAMES_10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define NK_NAMES_12 NK_NAMES_11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define NK_NAMES_13 NK_NAMES_12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define NK_NAMES_14 NK_NAMES_13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define NK_NAMES_15 NK_NAMES_14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define NK_NAMES_16 NK_NAMES_15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define NK_EIGHT(type, i) type(d[8 * i]), type(d[8 * i + 1]), type(d[8 * i + 2]), type(d[8 * i + 3]), \
                          type(d[8 * i + 4]), type(d[8 * i + 5]), type(d[8 * i + 6]), type(d[8 * i + 7])
#define NK_OPERANDS_1(type) NK_EIGHT(type, 0)
#define NK_OPERANDS_2(type) NK_OPERANDS_1(type), NK_EIGHT(type, 1)
#define NK_OPERANDS_3(type) NK_OPERANDS_2(type), NK_EIGHT(type, 2)
#define NK_OPERANDS_4(type) NK_OPERANDS_3(type), NK_EIGHT(type, 3)
#define NK_OPERANDS_5(type) NK_OPERANDS_4(type), NK_EIGHT(type, 4)
#define NK_OPERANDS_6(type) NK_OPERANDS_5(type), NK_EIGHT(type, 5)
#define NK_OPERANDS_7(type) NK_OPERANDS_6(type), NK_EIGHT(type, 6)
#define NK_OPERANDS_8(type) NK_OPERANDS_7(type), NK_EIGHT(type, 7)
#define NK_OPERANDS_9(type) NK_OPERANDS_8(type), NK_EIGHT(type, 8)
#define NK_OPERANDS_10(type) NK_OPERANDS_9(type), NK_EIGHT(type, 9)
#define NK_OPERANDS_11(type) NK_OPERANDS_10(type), NK_EIGHT(type, 10)
#define NK_OPERANDS_12(type) NK_OPERANDS_11(type), NK_EIGHT(type, 11)
#define NK_OPERANDS_13(type) NK_OPERANDS_12(type), NK_EIGHT(type, 12)
#define NK_OPERANDS_14(type) NK_OPERANDS_13(type), NK_EIGHT(type, 13)
#define NK_OPERANDS_15(type) NK_OPERANDS_14(type), NK_EIGHT(type, 14)
#define NK_OPERANDS_16(type) NK_OPERANDS_15(type), NK_EIGHT(type, 15)

// `blocks` is columns / 16, and a0 to zero are the numbers of the operands behind D.
#define NK_WGMMA(columns, blocks, a0, a1, a2, a3, b0, zero)                                                       \
    template <>                                                                                                   \
    struct Wgmma<columns> {                                                                                       \
        template <bool onto_zero = false>                                                                         \
        static __device__ __forceinline__ void s8(int32_t (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b) { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k32.s32.s8.s8 {" NK_NAMES_##blocks         \
                         "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", %" #zero ";"                     \
                         : NK_OPERANDS_##blocks("+r")                                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(onto_zero ? 0 : 1));           \
        }                                                                                                         \
        template <bool is_bf16>                                                                                   \
        static __device__ __forceinline__ void half(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b) { \
            if (is_bf16)                                                                                          \
                asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" NK_NAMES_##blocks  \
                             "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, 0;"                 \
                             : NK_OPERANDS_##blocks("+f")                                                         \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
            else                                                                                                  \
                asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 {" NK_NAMES_##blocks   \
                             "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", 1, 1, 1, 0;"                 \
                             : NK_OPERANDS_##blocks("+f")                                                         \
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
        }                                                                                                         \
    }

NK_WGMMA(64, 4, 32, 33, 34, 35, 36, 37);
NK_WGMMA(112, 7, 56, 57, 58, 59, 60, 61);
NK_WGMMA(128, 8, 64, 65, 66, 67, 68, 69);
NK_WGMMA(144, 9, 72, 73, 74, 75, 76, 77);
NK_WGMMA(160, 10, 80, 81, 82, 83, 84, 85);
NK_WGMMA(176, 11, 88, 89, 90, 91, 92, 93);
NK_WGMMA(192, 12, 96, 97, 98, 99, 100, 101);
NK_WGMMA(208, 13, 104, 105, 106, 107, 108, 109);
NK_WGMMA(224, 14, 112, 113, 114, 115, 116, 117);
NK_WGMMA(240, 15, 120, 121, 122, 123, 124, 125);
NK_WGMMA(256, 16, 128, 129, 130, 131, 132, 133);

#undef NK_WGMMA
#undef NK_EIGHT
#undef NK_NAMES_1
#undef NK_OPERANDS_1
#undef NK_NAMES_2
#undef NK_OPERANDS_2
#undef NK_NAMES_3
#undef NK_OPERANDS_3
#undef NK_NAMES_4
#undef NK_OPERANDS_4
#undef NK_NAMES_5
#undef NK_OPERANDS_5
#undef NK_NAMES_6
#undef NK_OPERANDS_6
#undef NK_NAMES_7
#undef NK_OPERANDS_7
#undef NK_NAMES_8
#undef NK_OPERANDS_8
#undef NK_NAMES_9
#undef NK_OPERANDS_9
#undef NK_NAMES_10
#undef NK_OPERANDS_10
#undef NK_NAMES_11
#undef NK_OPERANDS_11
#undef NK_NAMES_12
#undef NK_OPERANDS_12
#undef NK_NAMES_13
#undef NK_OPERANDS_13
#undef NK_NAMES_14
#undef NK_OPERANDS_14
#undef NK_NAMES_15
#undef NK_OPERANDS_15
#undef NK_NAMES_16
#undef NK_OPERANDS_16
// clang-format on

}  // namespace nk::cuda::ptx
