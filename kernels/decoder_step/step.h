// One step of a whole decoder, as other kernels call it, and what describes it.
#pragma once

#include <cstdint>

#include "../packed_blocks/attention.h"

namespace kvasir::decoder {

// Field by field the structures of structures.py.
struct Linear {
  const void* weights;
  const float* bias;
  int64_t dtype, depth, columns;
};
struct Layer {
  Linear qkv, o, gate_up, down;
  const float *q_norm, *k_norm, *attention_out_norm, *mlp_norm, *mlp_out_norm, *next_norm;  // null: not there
  const float* cos_sin;                                                                     // null: nothing rotates
  int64_t rot_dim, window;
};
struct Embedding {
  const void* rows;  // [vocab_size][hidden_size], or packed in panels
  int64_t dtype, stride, is_packed, vocab_size;
};
struct Program {
  const Layer* layers;
  const float* first_norm;
  Embedding embedding;
  int64_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim, activation, norms_projection;
  float norm_eps, attention_scale, attention_soft_cap, qkv_clip, residual_multiplier, embedding_multiplier;
};
// Both pools have the same layout.
struct Pool {
  void *k, *v;
  int64_t dtype, block_size, stride_block, stride_layer, stride_head;
};
// Neighbouring rows that have packed tokens besides: attention over these is merged with that over the others.
struct PackedPart {
  packed::Packed tokens;                          // its layer is the step's
  const int32_t *table, *lens, *cu_seqlens_q;     // of these rows; their tokens count from 0
  const int32_t *items, *merges;                  // as of attention::Params
  int64_t first_token, num_tokens, table_stride, num_items, num_merges, num_partials;
  int64_t rotated;  // entries of a query that are mixed with each other, as those of the keys were; 0: none
};
struct Batch {
  const int64_t *token_ids, *positions, *slots;
  const int32_t *cu_seqlens_q, *seq_lens, *block_table, *paths;
  int64_t table_stride, paths_stride, num_tokens, num_rows, num_threads;
  const PackedPart* parts;
  int64_t num_parts;
  float* hidden;
};

// Writes hidden [num_tokens][hidden_size] and the tokens' keys and values. Returns -1, or the place of the first token id
// that is not in the vocabulary; then nothing has been written.
int64_t run_step(const Program& program, const Pool& pool, const Batch& batch);

}  // namespace kvasir::decoder
