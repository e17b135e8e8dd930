// Logits of queries over the slots that they see, over all channels of keys or some. Threads share (token, kv head)s.
//
// A logit over all channels is summed in the order of attention's own (tile.h), so it has the same bits.
#include <algorithm>

#include "../paged_attention/cache_rows.h"
#include "arena.h"
#include "dispatch.h"
#include "team.h"

namespace {

using namespace kvasir;
using attention::copy_row;
using attention::kInfinity;
using attention::round_up;

// Multiply-adds that are worth waking a thread.
constexpr int64_t kWorkPerThread = 65536;

thread_local Arena arena;

// q, key: padded with zeros to vectors.
float product(const float* q, const float* key, int64_t dim) {
  vfloat sum[kLanes] = {};
  for (int64_t d = 0; d < dim; d += kLanes) sum[0] = fma(load(q + d), load(key + d), sum[0]);
  return sum_each(sum)[0];
}

// The chosen elements of a row, or all of it; then zeros up to `padded`.
template <class T>
void take(const T* from, const int64_t* channels, int64_t count, int64_t padded, float* to) {
  if (channels == nullptr) {
    copy_row(from, count, padded, to);
    return;
  }
  for (int64_t c = 0; c < count; ++c) to[c] = to_float(from[channels[c]]);
  std::fill(to + count, to + padded, 0.0f);
}

}  // namespace

// q: [T, H, D]; k_cache: [NB, H_kv, BS, D]; strides in elements. rows, visible: [T]. channels: [H_kv, count], or null
// and count = D. out: [T, H, num_slots].
KVASIR_EXPORT void kvasir_attention_logits(const void* q, int64_t q_stride_token, int64_t q_stride_head,
                                           int64_t q_dtype, const void* k_cache, int64_t k_stride_block,
                                           int64_t k_stride_head, int64_t k_dtype, const int32_t* table,
                                           int64_t table_stride, const int32_t* rows, const int32_t* visible,
                                           const int64_t* channels, int64_t count, float* out, int64_t num_tokens,
                                           int64_t num_heads, int64_t num_kv_heads, int64_t block_size,
                                           int64_t head_dim, int64_t num_slots, int64_t num_threads, float scale,
                                           float soft_cap) {
  const int64_t group = num_heads / num_kv_heads, padded = round_up(count, kLanes);
  const auto score = [&](auto query_type, auto key_type, int64_t token, int64_t kv_head) {
    using Key = decltype(key_type);
    const int64_t* chosen = channels == nullptr ? nullptr : channels + kv_head * count;
    float* queries = arena.reserve((group + 1) * padded);
    float* key = queries + group * padded;
    for (int64_t g = 0; g < group; ++g)
      take((const decltype(query_type)*)q + token * q_stride_token + (kv_head * group + g) * q_stride_head, chosen, count,
           padded, queries + g * padded);
    const Key* keys = (const Key*)k_cache + kv_head * k_stride_head;
    const int32_t* blocks = table + rows[token] * table_stride;
    float* to = out + (token * num_heads + kv_head * group) * num_slots;
    for (int64_t slot = 0; slot < visible[token]; ++slot) {
      take(keys + blocks[slot / block_size] * k_stride_block + slot % block_size * head_dim, chosen, count, padded, key);
      for (int64_t g = 0; g < group; ++g) {
        const float logit = product(queries + g * padded, key, padded) * scale;
        to[g * num_slots + slot] = soft_cap > 0 ? soft_cap * tanh(broadcast(logit / soft_cap))[0] : logit;
      }
    }
    for (int64_t g = 0; g < group; ++g)
      std::fill(to + g * num_slots + visible[token], to + (g + 1) * num_slots, -kInfinity);
  };
  with_dtype(q_dtype, [&](auto query_type) {
    with_dtype(k_dtype, [&](auto key_type) {
      const int64_t work = num_slots * group * padded;
      parallel_for_runs(num_tokens * num_kv_heads, work, kWorkPerThread, num_threads, [&](int64_t i) {
        score(query_type, key_type, i / num_kv_heads, i % num_kv_heads);
      });
    });
  });
}
