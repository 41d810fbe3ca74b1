// The cases that all SIMD targets are checked with.
#pragma once

#include <vector>

#include "problem.h"

namespace checks {

std::vector<Case> all_cases();

}  // namespace checks
