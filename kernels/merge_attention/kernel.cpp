// Merges two partial results of attention by their softmax denominators. Threads share the tokens.
#include "dispatch.h"
#include "head.h"
#include "team.h"

namespace {

using namespace kvasir;

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;
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
          attention::merge_head(a + token * a_stride_token + head * a_stride_head,
                                b + token * b_stride_token + head * b_stride_head, dim, lse_a[pair], lse_b[pair]);
        }
      });
    });
  });
}
