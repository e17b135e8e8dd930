// Paged attention on CPU. A work item is (row, tile of queries, range of key splits) for one kv head, with all query
// heads that share it, so that keys and values are read once for them.
//
// Keys are taken in splits of kSplitKeys slots aligned to slot 0; each split gives a partial result (sum of values,
// largest score, sum of weights) from scratch, and the partials are merged in order. An item that holds all splits of
// its queries merges as it goes; long sequences are divided over several items, whose partials a second pass merges with
// the same function. So the division into items changes no bit of the result. plan in cpp_impl.py makes the items.
#include <algorithm>
#include <utility>

#include "arena.h"
#include "attention.h"
#include "cache_rows.h"
#include "team.h"
#include "tile.h"

namespace kvasir::attention {
namespace {

constexpr int kMaxRowsReadInPlace = 8;  // with more rows, converting a 16-bit tile once is cheaper
constexpr int kDimPerRow = 4;           // with more rows than dim by this, so is laying its keys side by side

thread_local Arena arena;

struct Scratch {
  Rows rows;
  float *q, *k, *v;                             // k, v: float copies of a tile
  float* transposed;                            // the keys of a tile, side by side
  float *merged, *merged_largest, *merged_sum;  // partials merged so far
  Range* visible;                               // [M] slots that each row sees
  float* single;                                // largest, sum and decay of the rows of one query

  Scratch(const Params& p, int64_t num_queries) {
    const int64_t count = num_queries * (p.num_heads / p.num_kv_heads), padded = round_up(count, 16);
    const int64_t dim = round_up(p.head_dim, kLanes), dim_v = round_up(p.head_dim_v, kLanes);
    static_assert(sizeof(Range) == 2 * sizeof(float), "ranges are carved from the same memory");
    float* next = arena.reserve(padded * (dim + 2 * dim_v + kTileKeys + 12) + kTileKeys * (2 * dim + dim_v));
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    q = take(padded * dim);
    k = take(kTileKeys * dim);
    v = take(kTileKeys * dim_v);
    transposed = take(kTileKeys * dim);
    float* s = take(padded * kTileKeys);
    float* acc = take(padded * dim_v);
    merged = take(padded * dim_v);
    merged_largest = take(padded);
    merged_sum = take(padded);
    float *largest = take(padded), *sum = take(padded), *decay = take(padded);
    single = take(3 * padded);
    visible = reinterpret_cast<Range*>(take(2 * padded));
    Range* range = reinterpret_cast<Range*>(take(2 * padded));
    rows = {int(count), int(dim), int(dim_v), q, s, acc, largest, sum, decay, range};
  }
};

// ---- queries in, results out ----

template <class T>
void write_row(const float* from, int64_t n, float factor, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load(from + d) * factor);
  if (d < n) store_n(to + d, load(from + d) * factor, int(n - d));
}

// Row m of a tile is query m / G, head m % G of the kv head.
struct TileIndex {
  int64_t first_token, first_head, group;
  int64_t token(int m) const { return first_token + m / group; }
  int64_t head(int m) const { return first_head + m % group; }
};

TileIndex tile_index(const Params& p, int row, int first_query, int64_t kv_head) {
  const int64_t group = p.num_heads / p.num_kv_heads;
  return {p.cu_seqlens_q[row] + first_query, kv_head * group, group};
}

void load_queries(const Params& p, const TileIndex& index, const Scratch& scratch) {
  for (int m = 0; m < scratch.rows.count; ++m) {
    const int64_t offset = index.token(m) * p.q_stride_token + index.head(m) * p.q_stride_head;
    float* to = scratch.q + m * scratch.rows.dim;
    if (p.q_dtype == kFloat32) copy_row((const float*)p.q + offset, p.head_dim, scratch.rows.dim, to);
    if (p.q_dtype == kFloat16) copy_row((const Half*)p.q + offset, p.head_dim, scratch.rows.dim, to);
    if (p.q_dtype == kBFloat16) copy_row((const BFloat16*)p.q + offset, p.head_dim, scratch.rows.dim, to);
  }
}

// Divides by the sum of weights (with the head's sink) and writes out and lse.
void finish(const Params& p, const TileIndex& index, const Scratch& scratch) {
  for (int m = 0; m < scratch.rows.count; ++m) {
    const int64_t token = index.token(m), head = index.head(m);
    float largest = scratch.merged_largest[m], sum = scratch.merged_sum[m], factor = 1;
    if (p.sinks != nullptr) {
      const float with_sink = std::max(largest, p.sinks[head]);
      factor = exp_scalar(largest - with_sink);
      sum = fma(sum, factor, exp_scalar(p.sinks[head] - with_sink));
      largest = with_sink;
    }
    if (p.lse != nullptr) p.lse[token * p.num_heads + head] = sum == 0 ? -kInfinity : largest + std::log(sum);
    factor = sum == 0 ? 0 : factor / sum;
    const float* from = scratch.merged + m * scratch.rows.dim_v;
    const int64_t offset = token * p.out_stride_token + head * p.out_stride_head;
    if (p.q_dtype == kFloat32) write_row(from, p.head_dim_v, factor, (float*)p.out + offset);
    if (p.q_dtype == kFloat16) write_row(from, p.head_dim_v, factor, (Half*)p.out + offset);
    if (p.q_dtype == kBFloat16) write_row(from, p.head_dim_v, factor, (BFloat16*)p.out + offset);
  }
}

// ---- merging partials ----

void clear_merged(const Scratch& scratch) {
  std::fill_n(scratch.merged, scratch.rows.count * scratch.rows.dim_v, 0.0f);
  std::fill_n(scratch.merged_largest, scratch.rows.count, -kInfinity);
  std::fill_n(scratch.merged_sum, scratch.rows.count, 0.0f);
}

// Adds one row's partial (n values) to what is merged of row m. A partial that saw nothing changes nothing.
void merge_row(const Scratch& scratch, int m, const float* acc, int64_t n, float largest, float sum) {
  if (largest == -kInfinity) return;
  const float before = scratch.merged_largest[m], now = std::max(before, largest);
  const float keep = exp_scalar(before - now), add = exp_scalar(largest - now);
  scratch.merged_largest[m] = now;
  scratch.merged_sum[m] = fma(sum, add, scratch.merged_sum[m] * keep);
  float* to = scratch.merged + m * scratch.rows.dim_v;
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, fma(load(acc + d), broadcast(add), load(to + d) * keep));
  if (d < n) store(to + d, fma(load_n(acc + d, int(n - d)), broadcast(add), load(to + d) * keep));
}

void write_partial(const Params& p, const TileIndex& index, const Scratch& scratch, int64_t partial) {
  for (int m = 0; m < scratch.rows.count; ++m) {
    const int64_t slot = (partial + m / index.group) * p.num_heads + index.head(m);
    p.partial_stats[2 * slot] = scratch.rows.largest[m];
    p.partial_stats[2 * slot + 1] = scratch.rows.sum[m];
    std::memcpy(p.partial_acc + slot * p.head_dim_v, scratch.rows.acc + m * scratch.rows.dim_v,
                p.head_dim_v * sizeof(float));
  }
}

void merge_partials(const Params& p, const Merge& merge, int64_t kv_head) {
  const Scratch scratch(p, merge.num_queries);
  const TileIndex index = tile_index(p, merge.row, merge.first_query, kv_head);
  clear_merged(scratch);
  for (int split = 0; split < merge.num_splits; ++split) {
    for (int m = 0; m < scratch.rows.count; ++m) {
      const int64_t partial = merge.partial + int64_t(split) * merge.num_queries + m / index.group;
      const int64_t slot = partial * p.num_heads + index.head(m);
      merge_row(scratch, m, p.partial_acc + slot * p.head_dim_v, p.head_dim_v, p.partial_stats[2 * slot],
                p.partial_stats[2 * slot + 1]);
    }
  }
  finish(p, index, scratch);
}

// ---- keys and values ----

// One kv head's part of one row's cache.
template <class T>
struct Cache {
  const T *k, *v;
  const int32_t* table;

  Cache(const Params& p, int64_t row, int64_t kv_head)
      : k((const T*)p.k_cache + kv_head * p.k_stride_head),
        v((const T*)p.v_cache + kv_head * p.v_stride_head),
        table(p.block_table + row * p.table_stride_row + kv_head * p.table_stride_head) {}

  void find_tile(const Params& p, int64_t slot, Range range, TileRows<T>& tile) const {
    find_rows(k, p.k_stride_block, table, p.block_size, p.head_dim, slot, range, tile.keys);
    find_rows(v, p.v_stride_block, table, p.block_size, p.head_dim_v, slot, range, tile.values);
  }

  // The same for one query of a tree: from `before` on, its path says where the tokens are.
  void find_path_tile(const Params& p, int64_t slot, Range range, int64_t before, const int32_t* path,
                      TileRows<T>& tile) const {
    for (int j = range.begin; j < range.end; ++j) {
      const int64_t at = slot + j < before ? slot + j : before + path[slot + j - before];
      const int64_t block = table[at / p.block_size], offset = at % p.block_size;
      tile.keys[j] = k + block * p.k_stride_block + offset * p.head_dim;
      tile.values[j] = v + block * p.v_stride_block + offset * p.head_dim_v;
    }
    for (int j = 0; j < kTileKeys; ++j) {
      const int nearest = std::clamp(j, range.begin, range.end - 1);
      tile.keys[j] = tile.keys[nearest], tile.values[j] = tile.values[nearest];
    }
  }
};

// Adds slots [slot + range.begin, slot + range.end), which `tile` points to, to the rows.
template <class T>
void run_tile(const Params& p, const Scratch& scratch, int64_t slot, Range range, const TileRows<T>& tile,
              const TileRows<T>* next) {
  const Rows& rows = scratch.rows;
  for (int m = 0; m < rows.count; ++m) {
    rows.range[m] = {int(std::max<int64_t>(scratch.visible[m].begin - slot, range.begin)),
                     int(std::min<int64_t>(scratch.visible[m].end - slot, range.end))};
  }
  const bool whole_vectors = rows.dim == p.head_dim && rows.dim_v == p.head_dim_v;
  const float* transposed = nullptr;
  if (kCanTranspose && whole_vectors && rows.count > std::max(kMaxRowsReadInPlace, rows.dim / kDimPerRow)) {
    transpose_keys(tile.keys, rows.dim, range, scratch.transposed);
    transposed = scratch.transposed;
  }
  if (whole_vectors && (std::is_same_v<T, float> || rows.count <= kMaxRowsReadInPlace)) {
    add_tile(rows, tile, next, p.scale, p.soft_cap, transposed);
    return;
  }
  TileRows<float> copy;
  if (transposed == nullptr) convert_rows(tile.keys, range, p.head_dim, rows.dim, scratch.k, copy.keys);
  convert_rows(tile.values, range, p.head_dim_v, rows.dim_v, scratch.v, copy.values);
  add_tile<float>(rows, copy, nullptr, p.scale, p.soft_cap, transposed);
}

// Where the tokens of a tree's queries are: from slot `before` on, every query reads the slots on its own path.
struct Tree {
  const int32_t* paths;  // of the item's first query, as Params::paths; null for a simple sequence
  int64_t stride, before, group;
};

// As run_tile, where queries differ in what is in the slots: one query after the other.
template <class T>
void run_path_tile(const Params& p, const Cache<T>& cache, const Scratch& scratch, int64_t slot, Range range,
                   const Tree& tree) {
  const Rows& all = scratch.rows;
  const int64_t group = tree.group, padded = round_up(group, 16);
  for (int64_t m = 0; m < all.count; m += group) {
    const Range seen{int(std::max<int64_t>(scratch.visible[m].begin - slot, range.begin)),
                     int(std::min<int64_t>(scratch.visible[m].end - slot, range.end))};
    if (seen.empty()) continue;
    TileRows<T> tile;
    cache.find_path_tile(p, slot, seen, tree.before, tree.paths + m / group * tree.stride + 1, tile);
    Scratch one = scratch;
    one.visible = scratch.visible + m;
    float *largest = scratch.single, *sum = largest + padded, *decay = sum + padded;
    std::copy_n(all.largest + m, group, largest);
    std::copy_n(all.sum + m, group, sum);
    std::fill(largest + group, largest + padded, -kInfinity);
    std::fill(decay + group, decay + padded, -kInfinity);
    one.rows = {int(group), all.dim, all.dim_v, all.q + m * all.dim, all.s + m * kTileKeys, all.acc + m * all.dim_v,
                largest,    sum,     decay,     all.range + m};
    run_tile<T>(p, one, slot, seen, tile, nullptr);
    std::copy_n(largest, group, all.largest + m);
    std::copy_n(sum, group, all.sum + m);
  }
}

// Adds slots [begin, end), tile by tile from a multiple of kTileKeys, to rows that have seen nothing yet. `last` is the
// end of all that the rows will see; end is a multiple of kTileKeys or `last`.
template <class T>
void run_split(const Params& p, const Cache<T>& cache, const Scratch& scratch, const Tree& tree, int64_t begin,
               int64_t end, int64_t last) {
  const Rows& rows = scratch.rows;
  std::fill_n(rows.acc, rows.count * rows.dim_v, 0.0f);
  std::fill_n(rows.largest, rows.count, -kInfinity);
  std::fill_n(rows.sum, rows.count, 0.0f);
  const auto range_at = [&](int64_t slot) {
    return Range{int(std::max<int64_t>(begin - slot, 0)), int(std::min<int64_t>(last - slot, kTileKeys))};
  };
  TileRows<T> tiles[2];
  int64_t slot = begin / kTileKeys * kTileKeys;
  const int64_t stop = tree.paths == nullptr ? end : std::min(end, tree.before / kTileKeys * kTileKeys);
  const int64_t same = tree.paths == nullptr ? last : std::min(last, stop);  // end of what all queries find alike
  if (slot < stop) cache.find_tile(p, slot, range_at(slot), tiles[0]);
  for (int turn = 0; slot < stop; slot += kTileKeys, turn ^= 1) {
    const bool has_next = slot + kTileKeys < same;
    if (has_next) cache.find_tile(p, slot + kTileKeys, range_at(slot + kTileKeys), tiles[turn ^ 1]);
    run_tile(p, scratch, slot, range_at(slot), tiles[turn], has_next ? &tiles[turn ^ 1] : nullptr);
  }
  for (; slot < end; slot += kTileKeys) run_path_tile(p, cache, scratch, slot, range_at(slot), tree);
}

template <class T>
void attend(const Params& p, const Item& item, int64_t kv_head) {
  const Scratch scratch(p, item.num_queries);
  const Rows& rows = scratch.rows;
  const TileIndex index = tile_index(p, item.row, item.first_query, kv_head);
  const Cache<T> cache(p, item.row, kv_head);
  const int64_t seq_len = p.seq_lens[item.row * p.lens_stride_row + kv_head * p.lens_stride_head];
  const int64_t num_queries = p.cu_seqlens_q[item.row + 1] - p.cu_seqlens_q[item.row];
  Tree tree{p.paths, p.paths_stride, seq_len - num_queries, index.group};
  if (tree.paths != nullptr) tree.paths += index.first_token * tree.stride;
  if (tree.paths != nullptr && tree.paths[0] == 0) tree.paths = nullptr;
  int64_t first = std::numeric_limits<int64_t>::max(), last = 0;
  for (int m = 0; m < rows.count; ++m) {
    const int64_t query = m / index.group;
    const int64_t seen = tree.paths == nullptr ? item.first_query + query + 1 : tree.paths[query * tree.stride];
    const int64_t end = std::max<int64_t>(0, tree.before + seen);
    scratch.visible[m] = {int(p.window > 0 ? std::max<int64_t>(0, end - p.window) : 0), int(end)};
    first = std::min<int64_t>(first, scratch.visible[m].begin);
    last = std::max<int64_t>(last, end);
  }

  load_queries(p, index, scratch);
  clear_merged(scratch);
  for (int64_t split = item.first_split; split < item.last_split; ++split) {
    const int64_t begin = std::max(split * kSplitKeys, first), end = std::min((split + 1) * kSplitKeys, last);
    if (begin >= end && item.partial < 0) continue;
    run_split(p, cache, scratch, tree, begin, end, last);
    if (item.partial >= 0) {
      write_partial(p, index, scratch, item.partial + (split - item.first_split) * item.num_queries);
      continue;
    }
    for (int m = 0; m < rows.count; ++m)
      merge_row(scratch, m, rows.acc + m * rows.dim_v, rows.dim_v, rows.largest[m], rows.sum[m]);
  }
  if (item.partial < 0) finish(p, index, scratch);
}

}  // namespace

void run_item(const Params& p, int64_t i, int64_t kv_head) {
  const Item& item = ((const Item*)p.items)[i];
  switch (p.cache_dtype) {
    case kFloat32: return attend<float>(p, item, kv_head);
    case kFloat16: return attend<Half>(p, item, kv_head);
    case kBFloat16: return attend<BFloat16>(p, item, kv_head);
  }
}

void run_merge(const Params& p, int64_t i, int64_t kv_head) {
  merge_partials(p, ((const Merge*)p.merges)[i], kv_head);
}

}  // namespace kvasir::attention

KVASIR_EXPORT void kvasir_paged_attention(const kvasir::attention::Params* p) {
  using namespace kvasir;
  parallel_for(p->num_items * p->num_kv_heads, p->num_threads,
               [&](int64_t i) { attention::run_item(*p, i / p->num_kv_heads, i % p->num_kv_heads); });
  parallel_for(p->num_merges * p->num_kv_heads, p->num_threads,
               [&](int64_t i) { attention::run_merge(*p, i / p->num_kv_heads, i % p->num_kv_heads); });
}
