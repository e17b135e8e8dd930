// Rotary position embedding in place. Threads share the tokens; small work stays on one.
#include "rotate.h"
#include "team.h"

namespace {

using namespace kvasir;

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;

template <class T>
void run(T* x, int64_t stride_token, int64_t stride_head, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
         const int64_t* positions, const float* cos_sin, int64_t rot_dim, bool interleaved, int64_t num_threads) {
  parallel_for_runs(num_tokens, num_heads * rot_dim, kElementsPerThread, num_threads, [&](int64_t t) {
    const float* row = cos_sin + positions[t] * rot_dim;
    for (int64_t h = 0; h < num_heads; ++h) {
      T* head = x + t * stride_token + h * stride_head;
      rotate(head, head, row, rot_dim / 2, head_dim, interleaved);
    }
  });
}

}  // namespace

// x: [num_tokens, num_heads, head_dim] with the given strides in elements; dtype as DType; cos_sin: rows of rot_dim.
KVASIR_EXPORT void kvasir_apply_rope(void* x, int64_t dtype, int64_t stride_token, int64_t stride_head,
                                     int64_t num_tokens, int64_t num_heads, int64_t head_dim, const int64_t* positions,
                                     const float* cos_sin, int64_t rot_dim, int64_t interleaved, int64_t num_threads) {
  const auto call = [&](auto* typed) {
    run(typed, stride_token, stride_head, num_tokens, num_heads, head_dim, positions, cos_sin, rot_dim,
        interleaved != 0, num_threads);
  };
  if (dtype == kFloat32) call((float*)x);
  if (dtype == kFloat16) call((Half*)x);
  if (dtype == kBFloat16) call((BFloat16*)x);
}
