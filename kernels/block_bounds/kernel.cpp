// Smallest and largest keys of blocks, and upper bounds of logits from them. Threads share tokens, and (row, kv head)s.
//
// A bound is summed in the order in which attention sums a logit (tile.h), over products that are not smaller, each
// rounded like the other: rounding keeps the order, so the bound holds for rounded logits, too.
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

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;

thread_local Arena arena;

template <class T>
vfloat load_some(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load_n(from, int(count));
}

template <class T>
void store_some(T* to, vfloat x, int64_t count) {
  if (count >= kLanes)
    store(to, x);
  else
    store_n(to, x, int(count));
}

// keys: [filled, dim]; bounds: [2, dim].
template <class T>
void find_bounds(const T* keys, int64_t filled, int64_t dim, T* bounds) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    vfloat smallest = load_some(keys + d, dim - d), largest = smallest;
    for (int64_t i = 1; i < filled; ++i) {
      const vfloat key = load_some(keys + i * dim + d, dim - d);
      smallest = min(smallest, key);
      largest = max(largest, key);
    }
    store_some(bounds + d, smallest, dim - d);
    store_some(bounds + dim + d, largest, dim - d);
  }
}

// q: [group, dim] floats, padded with zeros to vectors; bounds: [2, head_dim].
template <class T>
float bound(const float* q, int64_t group, int64_t dim, const T* bounds, int64_t head_dim) {
  float best = -kInfinity;
  for (int64_t g = 0; g < group; ++g, q += dim) {
    vfloat sum[kLanes] = {};
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const vfloat query = load(q + d);
      const vfloat smallest = load_some(bounds + d, head_dim - d);
      const vfloat largest = load_some(bounds + head_dim + d, head_dim - d);
      sum[0] = fma(query, query < 0.0f ? smallest : largest, sum[0]);
    }
    best = std::max(best, sum_each(sum)[0]);
  }
  return best;
}

}  // namespace

// k_cache: [NB, H_kv, BS, D]; bounds: [NB, H_kv, 2, D]; strides in elements. slots: [num_tokens].
KVASIR_EXPORT void kvasir_update_bounds(const void* k_cache, int64_t k_stride_block, int64_t k_stride_head, void* bounds,
                                        int64_t b_stride_block, int64_t b_stride_head, const int64_t* slots,
                                        int64_t num_tokens, int64_t num_kv_heads, int64_t block_size, int64_t head_dim,
                                        int64_t dtype, int64_t num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t work = num_kv_heads * block_size * head_dim;
    parallel_for_runs(num_tokens, work, kElementsPerThread, num_threads, [&](int64_t t) {
      if (slots[t] < 0) return;
      const int64_t block = slots[t] / block_size, filled = slots[t] % block_size + 1;
      // The last token of a block says how far it is filled.
      if (t + 1 < num_tokens && slots[t + 1] >= 0 && slots[t + 1] / block_size == block) return;
      for (int64_t head = 0; head < num_kv_heads; ++head) {
        find_bounds((const T*)k_cache + block * k_stride_block + head * k_stride_head, filled, head_dim,
                    (T*)bounds + block * b_stride_block + head * b_stride_head);
      }
    });
  });
}

// q: [R, H, D]; bounds: [NB, H_kv, 2, D]; scores: [R, H_kv, MB].
KVASIR_EXPORT void kvasir_bound_scores(const void* q, int64_t q_stride_row, int64_t q_stride_head, int64_t q_dtype,
                                       const void* bounds, int64_t b_stride_block, int64_t b_stride_head,
                                       int64_t b_dtype, const int32_t* table, int64_t table_stride,
                                       const int32_t* num_blocks, float* scores, int64_t num_rows, int64_t num_kv_heads,
                                       int64_t max_blocks, int64_t num_heads, int64_t head_dim, int64_t num_threads) {
  const int64_t group = num_heads / num_kv_heads, dim = round_up(head_dim, kLanes);
  const auto score = [&](auto query_type, auto bound_type, int64_t row, int64_t kv_head) {
    float* queries = arena.reserve(group * dim);
    for (int64_t g = 0; g < group; ++g) {
      const auto* from = (const decltype(query_type)*)q + row * q_stride_row + (kv_head * group + g) * q_stride_head;
      copy_row(from, head_dim, dim, queries + g * dim);
    }
    const auto* of_head = (const decltype(bound_type)*)bounds + kv_head * b_stride_head;
    float* to = scores + (row * num_kv_heads + kv_head) * max_blocks;
    const int64_t count = std::min<int64_t>(num_blocks[row], max_blocks);
    for (int64_t i = 0; i < count; ++i)
      to[i] = bound(queries, group, dim, of_head + table[row * table_stride + i] * b_stride_block, head_dim);
    std::fill(to + std::max<int64_t>(count, 0), to + max_blocks, -kInfinity);
  };
  with_dtype(q_dtype, [&](auto query_type) {
    with_dtype(b_dtype, [&](auto bound_type) {
      const int64_t work = max_blocks * num_heads * head_dim;
      parallel_for_runs(num_rows * num_kv_heads, work, kElementsPerThread, num_threads, [&](int64_t i) {
        score(query_type, bound_type, i / num_kv_heads, i % num_kv_heads);
      });
    });
  });
}
