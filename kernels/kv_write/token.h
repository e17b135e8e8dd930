// Rotation and cache write of one token of float queries, keys and values, as other kernels call it.
#pragma once

#include <cstdint>

namespace kvasir::kv {

// Rows of tokens: element d of head h of token t is at data + t * stride_token + h * stride_head + d.
struct Rows {
  void* data;
  int64_t stride_token, stride_head, num_heads, head_dim;
};

// A cache [NB, H_kv, BS, D]; strides in elements, slots of a block contiguous.
struct Cache {
  void* data;
  int64_t stride_block, stride_head, block_size;
};

struct Rotation {
  const int64_t* positions;
  const float* cos_sin;  // null: nothing rotates
  int64_t rot_dim;
  bool interleaved;
};

// Rotates queries in place and keys on their way into the cache, and writes values. Slot -1 writes nothing.
void rotate_and_write_token(const Rows& q, const Rows& k, const Rows& v, const Rotation& rotation, const Cache& k_cache,
                            const Cache& v_cache, int64_t cache_dtype, const int64_t* slots, int64_t token);

}  // namespace kvasir::kv
