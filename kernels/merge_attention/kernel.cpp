// Merges two partial results of attention by their softmax denominators. Threads share the tokens.
#include <algorithm>
#include <cmath>

#include "dispatch.h"
#include "team.h"

namespace {

using namespace kvasir;

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;
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

}  // namespace

// out_a, out_b: [T, H, dim], strides in elements; lse_a, lse_b: [T, H].
KVASIR_EXPORT void kvasir_merge_attention(void* out_a, int64_t dtype_a, int64_t a_stride_token, int64_t a_stride_head,
                                          const void* out_b, int64_t dtype_b, int64_t b_stride_token,
                                          int64_t b_stride_head, float* lse_a, const float* lse_b, int64_t num_tokens,
                                          int64_t num_heads, int64_t dim, int64_t num_threads) {
  with_dtype(dtype_a, [&](auto type_a) {
    with_dtype(dtype_b, [&](auto type_b) {
      auto* a = static_cast<decltype(type_a)*>(out_a);
      const auto* b = static_cast<const decltype(type_b)*>(out_b);
      parallel_for_runs(num_tokens, num_heads * dim, kElementsPerThread, num_threads, [&](int64_t token) {
        for (int64_t head = 0; head < num_heads; ++head) {
          const int64_t pair = token * num_heads + head;
          merge_head(a + token * a_stride_token + head * a_stride_head, b + token * b_stride_token + head * b_stride_head,
                     dim, lse_a[pair], lse_b[pair]);
        }
      });
    });
  });
}
