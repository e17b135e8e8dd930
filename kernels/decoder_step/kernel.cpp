// All layers of a decoder in one call, for any ragged batch: embedding, norms, products, rotation and cache write,
// attention, activation. It calls the very functions that the single operations call, on the same values in the same
// order, so the hidden states have the same bits; what it saves is the way through Python between them.
//
// Work is cut into the tasks that the operations have, and each operation ends before the next begins.
#include <algorithm>
#include <utility>
#include <vector>

#include "../act_and_mul/row.h"
#include "../hadamard/transform.h"
#include "../kv_write/token.h"
#include "../linear/product.h"
#include "../merge_attention/head.h"
#include "../packed_blocks/attention.h"
#include "../paged_attention/attention.h"
#include "../rms_norm/row.h"
#include "arena.h"
#include "dispatch.h"
#include "simd.h"
#include "step.h"
#include "team.h"

namespace {

using namespace kvasir;
using namespace kvasir::decoder;

// Multiply-adds (read weights counted as in linear/kernel.cpp) for which a further thread pays in a step: a quarter of a
// millisecond. A shorter step leaves the other cores to the front end.
constexpr int64_t kStepWorkPerThread = 8'000'000;
constexpr int64_t kElementsPerThread = 8192;  // of element-wise work; the helpers are awake during a step
constexpr int64_t kAttentionWorkPerThread = 100'000;
constexpr int kTileQueries = 16;      // as TILE_QUERIES of paged_attention/cpp_impl.py
constexpr int64_t kItemsPerThread = 4;  // as ITEMS_PER_THREAD there

// How attention of this step is divided, for all layers; the rules are those of plan in paged_attention/cpp_impl.py.
struct AttentionWork {
  std::vector<attention::Item> items;
  std::vector<attention::Merge> merges;
  std::vector<float> partials;
  int64_t num_pairs = 0;  // queries times keys, of one kv head
  int64_t num_partials = 0;

  void plan(const Batch& b, int64_t num_kv_heads, int64_t threads) {
    items.clear(), merges.clear();
    num_partials = 0;
    const int64_t share = threads > 1 ? num_pairs * num_kv_heads / (threads * kItemsPerThread) : num_pairs;
    for_tiles(b, [&](int32_t row, int32_t first, int32_t count, int64_t num_keys) {
      const int32_t splits = int32_t((num_keys + attention::kSplitKeys - 1) / attention::kSplitKeys);
      if (count * num_keys <= share || splits < 2) {
        items.push_back({row, first, count, 0, splits, -1});
        return;
      }
      merges.push_back({row, first, count, splits, int32_t(num_partials)});
      for (int32_t split = 0; split < splits; ++split, num_partials += count)
        items.push_back({row, first, count, split, split + 1, int32_t(num_partials)});
    });
    if (threads <= 1) return;
    const auto cost = [&](const attention::Item& item) {
      return int64_t(item.num_queries) * (item.partial < 0 ? b.seq_lens[item.row] : attention::kSplitKeys);
    };
    std::stable_sort(items.begin(), items.end(), [&](const auto& a, const auto& c) { return cost(a) > cost(c); });
  }

  void count_pairs(const Batch& b) {
    num_pairs = 0;
    for_tiles(b, [&](int32_t, int32_t, int32_t count, int64_t num_keys) { num_pairs += count * num_keys; });
  }

 private:
  // Calls visit(row, first query, queries, keys that the last of them sees).
  template <class Visit>
  static void for_tiles(const Batch& b, Visit visit) {
    for (int32_t row = 0; row < b.num_rows; ++row) {
      const int32_t queries = b.cu_seqlens_q[row + 1] - b.cu_seqlens_q[row];
      for (int32_t first = 0; first < queries; first += kTileQueries) {
        const int32_t count = std::min(kTileQueries, queries - first);
        visit(row, first, count, std::max<int64_t>(0, b.seq_lens[row] - queries + first + count));
      }
    }
  }
};

thread_local Arena arena;
thread_local AttentionWork attention_work;

class Step {
 public:
  Step(const Program& program, const Pool& pool, const Batch& batch)
      : p_(program), pool_(pool), b_(batch), work_(attention_work), x_(batch.hidden) {
    const int64_t query_size = p_.num_heads * p_.head_dim, qkv_size = query_size + 2 * p_.num_kv_heads * p_.head_dim;
    const int64_t packed_size = b_.num_parts == 0 ? 0 : 2 * query_size + 2 * p_.num_heads;
    const int64_t mlp = std::max(2 * p_.intermediate_size, qkv_size + query_size + packed_size);
    float* next = arena.reserve(b_.num_tokens * (2 * p_.hidden_size + mlp + p_.intermediate_size));
    const auto take = [&](int64_t size) { return std::exchange(next, next + b_.num_tokens * size); };
    residual_ = take(p_.hidden_size);
    branch_ = take(p_.hidden_size);
    activated_ = take(p_.intermediate_size);
    gate_up_ = next;  // attention's buffers share the memory: both are never needed together
    qkv_ = take(qkv_size);
    attended_ = take(query_size);
    if (packed_size) {
      part_ = take(query_size), rotated_ = take(query_size);
      lse_ = take(p_.num_heads), part_lse_ = take(p_.num_heads);
    }
    plan();
  }

  void run() {
    embed();
    for (int64_t i = 0; i < p_.num_layers; ++i) {
      const Layer& layer = p_.layers[i];
      product(layer.qkv, x_, qkv_);
      write_cache(layer, i);
      attend(layer, i);
      product(layer.o, attended_, branch_);
      add_branch(layer.attention_out_norm, layer.mlp_norm);
      product(layer.gate_up, x_, gate_up_);
      for_tokens(p_.intermediate_size, [&](int64_t t) {
        const float* gate = gate_up_ + t * 2 * p_.intermediate_size;
        activation::activate_row(p_.activation, gate, gate + p_.intermediate_size, p_.intermediate_size,
                                 activated_ + t * p_.intermediate_size);
      });
      product(layer.down, activated_, branch_);
      add_branch(layer.mlp_out_norm, layer.next_norm);
    }
    if (x_ != b_.hidden) std::copy_n(x_, b_.num_tokens * p_.hidden_size, b_.hidden);
  }

 private:
  void plan() {
    work_.count_pairs(b_);
    const int64_t attention = work_.num_pairs * p_.num_heads * 2 * p_.head_dim;
    int64_t work = attention * p_.num_layers;
    for (int64_t i = 0; i < p_.num_layers; ++i)
      for (const Linear* linear : {&p_.layers[i].qkv, &p_.layers[i].o, &p_.layers[i].gate_up, &p_.layers[i].down})
        work += linear::work_of(product_of(*linear, nullptr, nullptr));
    threads_ = std::clamp<int64_t>(work / kStepWorkPerThread, 1, b_.num_threads);
    attention_threads_ = std::clamp<int64_t>(attention / kAttentionWorkPerThread, 1, threads_);
    work_.plan(b_, p_.num_kv_heads, attention_threads_);
    int64_t num_partials = work_.num_partials;  // packed parts run after the others, one after the other
    for (int64_t i = 0; i < b_.num_parts; ++i) num_partials = std::max(num_partials, b_.parts[i].num_partials);
    work_.partials.resize(num_partials * p_.num_heads * (p_.head_dim + 2));
  }

  // task(t) for each token, whose work is on `size` elements.
  template <class Task>
  void for_tokens(int64_t size, const Task& task) const {
    parallel_for_runs(b_.num_tokens, size, kElementsPerThread, threads_, task);
  }

  linear::Product product_of(const Linear& linear, const float* x, float* out) const {
    return {x, linear.depth, b_.num_tokens, linear.depth, linear.columns, linear.weights, linear.dtype, linear.bias, out,
            linear.columns};
  }

  void product(const Linear& linear, const float* x, float* out) const {
    linear::Product product = product_of(linear, x, out);
    linear::prepare(product, threads_);
    const linear::Division division = linear::divide(product, threads_);
    parallel_for(division.num_tasks(), division.threads, [&](int64_t t) { linear::run_task(product, division, t); });
  }

  void embed() {
    const Embedding& e = p_.embedding;
    for_tokens(p_.hidden_size * (e.is_packed ? 8 : 1), [&](int64_t t) {
      float* row = residual_ + t * p_.hidden_size;
      const int64_t id = b_.token_ids[t];
      if (e.is_packed) {
        linear::unpack_row(e.rows, e.dtype, p_.hidden_size, id, row);
      } else {
        with_dtype(e.dtype, [&](auto type) {
          const auto* from = (const decltype(type)*)e.rows + id * e.stride;
          for (int64_t j = 0; j < p_.hidden_size; ++j) row[j] = to_float(from[j]);
        });
      }
      if (p_.embedding_multiplier != 1.0f)
        for (int64_t j = 0; j < p_.hidden_size; ++j) row[j] *= p_.embedding_multiplier;
      if (p_.first_norm) norm::normalize_row(row, p_.hidden_size, p_.first_norm, p_.norm_eps, x_ + t * p_.hidden_size);
    });
    if (!p_.first_norm) x_ = residual_;
  }

  // Norms and rotation of queries and keys, keys and values into the cache.
  void write_cache(const Layer& layer, int64_t index) const {
    const int64_t d = p_.head_dim, heads = p_.num_heads, kv_heads = p_.num_kv_heads, stride = (heads + 2 * kv_heads) * d;
    const int64_t offset = index * pool_.stride_layer * (pool_.dtype == kFloat32 ? 4 : 2);
    const kv::Rows q{qkv_, stride, d, heads, d}, k{qkv_ + heads * d, stride, d, kv_heads, d};
    const kv::Rows v{qkv_ + (heads + kv_heads) * d, stride, d, kv_heads, d};
    const kv::Cache k_cache{(char*)pool_.k + offset, pool_.stride_block, pool_.stride_head, pool_.block_size};
    const kv::Cache v_cache{(char*)pool_.v + offset, pool_.stride_block, pool_.stride_head, pool_.block_size};
    const kv::Rotation rotation{b_.positions, layer.cos_sin, layer.rot_dim, false};
    for_tokens(stride, [&](int64_t t) {
      float* row = qkv_ + t * stride;
      if (layer.q_norm) {
        normalize_heads(row, heads, layer.q_norm);
        normalize_heads(row + heads * d, kv_heads, layer.k_norm);
      }
      if (p_.qkv_clip > 0)
        for (int64_t j = 0; j < stride; ++j)  // NaN stays NaN
          row[j] = row[j] < -p_.qkv_clip ? -p_.qkv_clip : row[j] > p_.qkv_clip ? p_.qkv_clip : row[j];
      kv::rotate_and_write_token(q, k, v, rotation, k_cache, v_cache, pool_.dtype, b_.slots, t);
    });
  }

  void normalize_heads(float* heads, int64_t count, const float* weight) const {
    const int64_t size = p_.norms_projection ? count * p_.head_dim : p_.head_dim;
    for (int64_t at = 0; at < count * p_.head_dim; at += size)
      norm::normalize_row(heads + at, size, weight, p_.norm_eps, heads + at);
  }

  void attend(const Layer& layer, int64_t index) {
    const int64_t d = p_.head_dim, offset = index * pool_.stride_layer * (pool_.dtype == kFloat32 ? 4 : 2);
    attention::Params a{};
    a.q = qkv_;
    a.k_cache = (char*)pool_.k + offset;
    a.v_cache = (char*)pool_.v + offset;
    a.block_table = b_.block_table;
    a.seq_lens = b_.seq_lens;
    a.cu_seqlens_q = b_.cu_seqlens_q;
    a.out = attended_;
    a.lse = b_.num_parts ? lse_ : nullptr;
    a.items = (const int32_t*)work_.items.data();
    a.merges = (const int32_t*)work_.merges.data();
    a.partial_acc = work_.partials.data();
    a.partial_stats = work_.partials.data() + work_.num_partials * p_.num_heads * d;
    a.num_heads = p_.num_heads, a.num_kv_heads = p_.num_kv_heads;
    a.head_dim = d, a.head_dim_v = d, a.block_size = pool_.block_size;
    a.q_stride_token = (p_.num_heads + 2 * p_.num_kv_heads) * d, a.q_stride_head = d;
    a.out_stride_token = p_.num_heads * d, a.out_stride_head = d;
    a.k_stride_block = a.v_stride_block = pool_.stride_block, a.k_stride_head = a.v_stride_head = pool_.stride_head;
    a.table_stride_row = b_.table_stride, a.lens_stride_row = 1;
    a.paths = b_.paths, a.paths_stride = b_.paths_stride;
    a.q_dtype = kFloat32, a.cache_dtype = pool_.dtype, a.window = layer.window;
    a.scale = p_.attention_scale, a.soft_cap = p_.attention_soft_cap;
    const int64_t kv_heads = p_.num_kv_heads;
    parallel_for(int64_t(work_.items.size()) * kv_heads, attention_threads_,
                 [&](int64_t i) { attention::run_item(a, i / kv_heads, i % kv_heads); });
    parallel_for(int64_t(work_.merges.size()) * kv_heads, attention_threads_,
                 [&](int64_t i) { attention::run_merge(a, i / kv_heads, i % kv_heads); });
    for (int64_t i = 0; i < b_.num_parts; ++i) attend_packed(b_.parts[i], index, a);
  }

  // Merges attention over packed tokens into `attended_`. of_others: the attention that was before.
  void attend_packed(const PackedPart& part, int64_t index, const attention::Params& of_others) {
    const int64_t d = p_.head_dim, heads = p_.num_heads, kv_heads = p_.num_kv_heads, size = heads * d;
    const int64_t first = part.first_token;
    packed::Packed tokens = part.tokens;
    tokens.layer = index;
    attention::Params a = of_others;
    a.q = qkv_ + first * a.q_stride_token;
    if (part.rotated) {
      const float scale = 1.0f / float(part.rotated);
      for_part(part, size, [&](int64_t t) {
        float* to = rotated_ + t * size;
        std::copy_n(qkv_ + t * a.q_stride_token, size, to);
        for (int64_t at = 0; at < size; at += part.rotated) hadamard::transform(to + at, part.rotated);
        for (int64_t i = 0; i < size; ++i) to[i] *= scale;
      });
      a.q = rotated_ + first * size;
      a.q_stride_token = size;
    }
    a.k_cache = a.v_cache = nullptr;
    a.block_table = part.table, a.seq_lens = part.lens, a.cu_seqlens_q = part.cu_seqlens_q;
    a.paths = nullptr;
    a.out = part_ + first * size, a.lse = part_lse_ + first * heads;
    a.items = part.items, a.merges = part.merges;
    a.partial_stats = work_.partials.data() + part.num_partials * heads * d;
    a.table_stride_row = part.table_stride, a.lens_stride_row = 0;
    a.k_stride_head = a.v_stride_head = 0;
    a.window = 0;
    parallel_for(part.num_items * kv_heads, attention_threads_,
                 [&](int64_t i) { packed::run_item(a, tokens, i / kv_heads, i % kv_heads); });
    parallel_for(part.num_merges * kv_heads, attention_threads_,
                 [&](int64_t i) { attention::run_merge(a, i / kv_heads, i % kv_heads); });
    for_part(part, size, [&](int64_t t) {
      for (int64_t head = 0; head < heads; ++head)
        attention::merge_head(attended_ + t * size + head * d, part_ + t * size + head * d, d, lse_[t * heads + head],
                              part_lse_[t * heads + head]);
    });
  }

  // task(t) for each token of a part, whose work is on `size` elements.
  template <class Task>
  void for_part(const PackedPart& part, int64_t size, const Task& task) const {
    parallel_for_runs(part.num_tokens, size, kElementsPerThread, threads_,
                      [&](int64_t t) { task(part.first_token + t); });
  }

  // Adds what a block gave to the residual stream, and makes the next block's input of the sum.
  void add_branch(const float* out_norm, const float* next_norm) {
    const int64_t size = p_.hidden_size;
    for_tokens(size, [&](int64_t t) {
      float *out = branch_ + t * size, *sum = residual_ + t * size;
      if (out_norm) norm::normalize_row(out, size, out_norm, p_.norm_eps, out);
      if (p_.residual_multiplier != 1.0f)
        for (int64_t j = 0; j < size; ++j) out[j] *= p_.residual_multiplier;
      norm::add_row(out, size, sum);
      if (next_norm) norm::normalize_row(sum, size, next_norm, p_.norm_eps, b_.hidden + t * size);
    });
    x_ = next_norm ? b_.hidden : residual_;
  }

  const Program& p_;
  const Pool& pool_;
  const Batch& b_;
  AttentionWork& work_;
  int64_t threads_ = 1, attention_threads_ = 1;
  float *residual_, *branch_, *qkv_, *attended_, *gate_up_, *activated_;
  float *part_, *rotated_, *lse_, *part_lse_;  // only where some rows have packed tokens
  float* x_;  // input of the next block: the output's memory, or the residual stream where no norm precedes
};

}  // namespace

namespace kvasir::decoder {

int64_t run_step(const Program& program, const Pool& pool, const Batch& batch) {
  for (int64_t t = 0; t < batch.num_tokens; ++t)
    if (batch.token_ids[t] < 0 || batch.token_ids[t] >= program.embedding.vocab_size) return t;
  Step(program, pool, batch).run();
  return -1;
}

}  // namespace kvasir::decoder

KVASIR_EXPORT int64_t kvasir_decoder_step(const Program* program, const Pool* pool, const Batch* batch) {
  return run_step(*program, *pool, *batch);
}
