// The choice of one token, as other kernels call it.
#pragma once

#include <cstdint>

namespace kvasir::sampling {

struct Choice {
  int64_t token;   // -1 where the row holds NaN or +inf, or nothing but -inf
  float log_prob;  // at the temperature; of a greedy choice at 1
};

// What kvasir_sample chooses without filters, and its log-probability.
Choice choose(const float* row, int n, float temperature, uint64_t key);

}  // namespace kvasir::sampling
