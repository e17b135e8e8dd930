// Merges two partial results of attention by their softmax denominators, for one head of one token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.h"

namespace kvasir::attention {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

template <class A, class B>
KVASIR_INLINE void merge_head(A* a, const B* b, int64_t dim, float& lse_a, float lse_b) {
  if (lse_b == kNothing) return;
  int64_t d = 0;
  if (lse_a == kNothing) {
    for (; d + kLanes <= dim; d += kLanes) store(a + d, load(b + d));
    if (d < dim) store_n(a + d, load_n(b + d, int(dim - d)), int(dim - d));
    lse_a = lse_b;
    return;
  }
  const float largest = std::max(lse_a, lse_b);
  const float keep = std::exp(lse_a - largest), add = std::exp(lse_b - largest), total = keep + add;
  const vfloat share_a = broadcast(keep / total), share_b = broadcast(add / total);
  for (; d + kLanes <= dim; d += kLanes) store(a + d, fma(load(a + d), share_a, load(b + d) * share_b));
  if (d < dim) {
    const int rest = int(dim - d);
    store_n(a + d, fma(load_n(a + d, rest), share_a, load_n(b + d, rest) * share_b), rest);
  }
  lse_a = largest + std::log(total);
}

}  // namespace kvasir::attention
