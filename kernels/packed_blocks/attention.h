// Attention over packed tokens as other kernels call it.
#pragma once

#include "../paged_attention/attention.h"
#include "codes.h"

namespace kvasir::packed {

// A pool of keys or values [NB, L, H_kv, bytes]; field by field the Pool of cpp_impl.py.
struct Pool {
  Side side;
  uint8_t* data;
  int64_t num_layers, num_heads, unit_bytes;
  uint8_t* unit(int64_t block, int64_t layer, int64_t head) const {
    return data + ((block * num_layers + layer) * num_heads + head) * unit_bytes;
  }
};

// A row's packed tokens; field by field the Packed of cpp_impl.py.
struct Packed {
  Pool keys, values;
  int64_t layer, places;
};

// Item i of one kv head. params: as for paged attention, with block_table and seq_lens those of packed tokens and no
// caches. Its partial results are merged by attention::run_merge.
void run_item(const attention::Params& params, const Packed& packed, int64_t i, int64_t kv_head);

}  // namespace kvasir::packed
