// Cache writes, alone and fused with the rotation of queries and keys. Threads share the tokens.
#include "token.h"

#include "../rope/rotate.h"
#include "team.h"

namespace {

using namespace kvasir;

using kv::Cache;
using kv::Rotation;
using kv::Rows;

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;

template <class T>
KVASIR_INLINE T* at(const Rows& rows, int64_t token, int64_t head) {
  return (T*)rows.data + token * rows.stride_token + head * rows.stride_head;
}

template <class C>
KVASIR_INLINE C* at_slot(const Cache& cache, int64_t slot, int64_t head, int64_t head_dim) {
  return (C*)cache.data + slot / cache.block_size * cache.stride_block + head * cache.stride_head +
         slot % cache.block_size * head_dim;
}

template <class T, class C>
KVASIR_INLINE void copy_head(const T* from, C* to, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(to + i, load(from + i));
  for (; i < size; ++i) to[i] = from_float<C>(to_float(from[i]));
}

template <class T, class C>
KVASIR_INLINE void write_token(const Rows& x, const Cache& cache, const int64_t* slots, int64_t t) {
  if (slots[t] < 0) return;
  for (int64_t h = 0; h < x.num_heads; ++h)
    copy_head(at<T>(x, t, h), at_slot<C>(cache, slots[t], h, x.head_dim), x.head_dim);
}

template <class T, class C>
void rotate_and_write(const Rows& q, const Rows& k, const Rows& v, const Rotation& rotation, const Cache& k_cache,
                      const Cache& v_cache, const int64_t* slots, int64_t t) {
  const int64_t half = rotation.rot_dim / 2;
  const float* row = rotation.cos_sin + rotation.positions[t] * rotation.rot_dim;
  for (int64_t h = 0; h < q.num_heads; ++h) {
    T* head = at<T>(q, t, h);
    rotate(head, head, row, half, q.head_dim, rotation.interleaved);
  }
  if (slots[t] < 0) return;
  for (int64_t h = 0; h < k.num_heads; ++h) {
    rotate(at<T>(k, t, h), at_slot<C>(k_cache, slots[t], h, k.head_dim), row, half, k.head_dim, rotation.interleaved);
    copy_head(at<T>(v, t, h), at_slot<C>(v_cache, slots[t], h, v.head_dim), v.head_dim);
  }
}

// Calls f with null pointers of the two element types.
template <class T, class F>
void with_cache_type(int64_t dtype, F f) {
  if (dtype == kFloat32) f((T*)nullptr, (float*)nullptr);
  if (dtype == kFloat16) f((T*)nullptr, (Half*)nullptr);
  if (dtype == kBFloat16) f((T*)nullptr, (BFloat16*)nullptr);
}

template <class F>
void with_types(int64_t dtype, int64_t cache_dtype, F f) {
  if (dtype == kFloat32) with_cache_type<float>(cache_dtype, f);
  if (dtype == kFloat16) with_cache_type<Half>(cache_dtype, f);
  if (dtype == kBFloat16) with_cache_type<BFloat16>(cache_dtype, f);
}

}  // namespace

namespace kvasir::kv {

void rotate_and_write_token(const Rows& q, const Rows& k, const Rows& v, const Rotation& rotation, const Cache& k_cache,
                            const Cache& v_cache, int64_t cache_dtype, const int64_t* slots, int64_t t) {
  with_cache_type<float>(cache_dtype, [&](float*, auto* c) {
    using C = std::remove_pointer_t<decltype(c)>;
    if (rotation.cos_sin != nullptr) {
      rotate_and_write<float, C>(q, k, v, rotation, k_cache, v_cache, slots, t);
    } else {
      write_token<float, C>(k, k_cache, slots, t);
      write_token<float, C>(v, v_cache, slots, t);
    }
  });
}

}  // namespace kvasir::kv

// The structs are laid out as in cpp_impl.py.
KVASIR_EXPORT void kvasir_kv_write(const Rows* x, int64_t dtype, const Cache* cache, int64_t cache_dtype,
                                   const int64_t* slots, int64_t num_tokens, int64_t num_threads) {
  with_types(dtype, cache_dtype, [&](auto* t, auto* c) {
    parallel_for_runs(num_tokens, x->num_heads * x->head_dim, kElementsPerThread, num_threads, [&](int64_t token) {
      write_token<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(c)>>(*x, *cache, slots, token);
    });
  });
}

KVASIR_EXPORT void kvasir_rope_kv_write(const Rows* q, const Rows* k, const Rows* v, int64_t dtype,
                                        const int64_t* positions, const float* cos_sin, int64_t rot_dim,
                                        int64_t interleaved, const Cache* k_cache, const Cache* v_cache,
                                        int64_t cache_dtype, const int64_t* slots, int64_t num_tokens,
                                        int64_t num_threads) {
  const Rotation rotation{positions, cos_sin, rot_dim, interleaved != 0};
  with_types(dtype, cache_dtype, [&](auto* t, auto* c) {
    parallel_for_runs(num_tokens, q->num_heads * q->head_dim, kElementsPerThread, num_threads, [&](int64_t token) {
      rotate_and_write<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(c)>>(
          *q, *k, *v, rotation, *k_cache, *v_cache, slots, token);
    });
  });
}
