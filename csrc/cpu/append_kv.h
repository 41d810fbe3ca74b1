// Writing new tokens into a paged cache on the CPU, without torch.
#pragma once

#include <cstdint>

#include "core/params.h"

namespace art::cpu {

// Copies rows [begin, end) of the new tokens.
void append_rows(const AppendParams& params, int64_t begin, int64_t end);

}  // namespace art::cpu
