// Paged attention as other kernels call it: divided into work items that may run in any order and on any thread.
#pragma once

#include <cstdint>

namespace kvasir::attention {

constexpr int kSplitKeys = 256;  // as SPLIT_KEYS in cpp_impl.py; a multiple of kTileKeys

// Field by field the Params of cpp_impl.py.
struct Params {
  const void* q;
  const void* k_cache;
  const void* v_cache;
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* cu_seqlens_q;
  const float* sinks;    // or null
  const int32_t* paths;  // [T, W]: see AttentionPlan.paths; or null
  void* out;
  float* lse;  // or null
  const int32_t* items;   // [num_items, 6]: row, first query, queries, first split, last split + 1, partial or -1
  const int32_t* merges;  // [num_merges, 5]: row, first query, queries, splits, partial
  float* partial_acc;     // [partials, H, Dv]; a partial is one query of one split
  float* partial_stats;   // [partials, H, 2]: largest score, sum of weights
  int64_t num_items, num_merges, num_heads, num_kv_heads, head_dim, head_dim_v, block_size;
  int64_t q_stride_token, q_stride_head, out_stride_token, out_stride_head;
  int64_t k_stride_block, k_stride_head, v_stride_block, v_stride_head;
  int64_t table_stride_row, table_stride_head, lens_stride_row, lens_stride_head;
  int64_t paths_stride;
  int64_t q_dtype, cache_dtype, window, num_threads;
  float scale, soft_cap;
};

// As rows of Params::items and Params::merges.
struct Item {
  int32_t row, first_query, num_queries, first_split, last_split, partial;
};
struct Merge {
  int32_t row, first_query, num_queries, num_splits, partial;
};

// Item or merge i of one kv head; all merges come after all items.
void run_item(const Params& params, int64_t i, int64_t kv_head);
void run_merge(const Params& params, int64_t i, int64_t kv_head);

}  // namespace kvasir::attention
