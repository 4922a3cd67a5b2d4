// Run-time choice of instruction set.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace nk::cpu {

// Names of the instruction sets this build has and this processor runs, best last.
std::vector<std::string> usable_isas();

// The table for a name from usable_isas(), or the best one for an empty name.
// Throws std::invalid_argument for any other name, listing what is possible.
const Kernels& select_kernels(const std::string& isa);

}  // namespace nk::cpu
