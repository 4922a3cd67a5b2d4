#include "isa.h"

#if defined(NK_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>

namespace nk::cpu {

extern const Kernels portable_kernels;
#ifdef NK_X86
extern const Kernels avx2_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels avx512bf16_kernels;
extern const Kernels amx_kernels;
#endif

namespace {

#ifdef NK_X86
// Whether the processor has AMX tiles and the operating system lends them to this process; Linux does so on request,
// to all threads and for good.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25,
                       kBf16 = 1u << 22;  // in EDX of leaf 7: not every compiler knows the names
    static const bool granted = [] {
        unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
        return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kTiles) && (edx & kInt8) && (edx & kBf16) &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
#else
    return false;
#endif
}
#endif

std::vector<const Kernels*> usable_kernels() {
    std::vector<const Kernels*> tables{&portable_kernels};
#ifdef NK_X86
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) tables.push_back(&avx2_kernels);
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    if (vnni) tables.push_back(&avx512vnni_kernels);
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (bf16) tables.push_back(&avx512bf16_kernels);
    if (bf16 && tiles_granted()) tables.push_back(&amx_kernels);
#endif
    return tables;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : usable_kernels()) names.emplace_back(table->name);
    return names;
}

const Kernels& select_kernels(const std::string& isa) {
    const std::vector<const Kernels*> tables = usable_kernels();
    if (isa.empty()) return *tables.back();
    std::string possible;
    for (const Kernels* table : tables) {
        if (isa == table->name) return *table;
        possible += possible.empty() ? "" : ", ";
        possible += table->name;
    }
    throw std::invalid_argument("isa: this machine runs " + possible + ", given '" + isa + "'");
}

}  // namespace nk::cpu
