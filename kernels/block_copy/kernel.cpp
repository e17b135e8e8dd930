// Copies whole blocks of a pool. A step has few pairs, so one thread does it.
#include "simd.h"

// pool: blocks of block_bytes bytes; pairs: [num_pairs, 2] source and destination block.
KVASIR_EXPORT void kvasir_copy_blocks(char* pool, int64_t block_bytes, const int64_t* pairs, int64_t num_pairs) {
  for (int64_t i = 0; i < num_pairs; ++i) {
    std::memcpy(pool + pairs[2 * i + 1] * block_bytes, pool + pairs[2 * i] * block_bytes, size_t(block_bytes));
  }
}
