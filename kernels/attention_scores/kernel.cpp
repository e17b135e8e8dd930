// Attention scores on CPU. A task is one kv head of one row and kSplitKeys of its slots: it walks over the row's weighted
// queries in order, computes q.k as attention does (tile.h), and adds weights times probabilities to sums that belong to
// it alone. So no sum depends on the other rows, on threads, or on how queries are divided into tiles.
//
// Noisy probabilities have a softmax of their own: a first pass leaves each split's largest logit and sum of weights, a
// second merges them in order. The noise is dear, so the first pass also leaves the noisy logits, where there is room.
#include <algorithm>
#include <utility>
#include <vector>

#include "../paged_attention/cache_rows.h"
#include "../sampling/noise.h"
#include "arena.h"
#include "dispatch.h"
#include "team.h"

namespace kvasir::scores {
namespace {

using namespace attention;

constexpr int kSplitKeys = 256;  // as SPLIT_KEYS in cpp_impl.py; a multiple of kTileKeys
constexpr int kMaxTileRows = 64;  // queries times the heads that share a kv head; at least one query
constexpr int kMaxRowsReadInPlace = 8;  // with more rows, converting a 16-bit tile once is cheaper
constexpr float kNotBelow = 1 - 1e-4f;  // of 1 / visible: equality up to rounding is not below it

static_assert(kTileKeys % kNoiseTile == 0, "a tile of keys is made of whole tiles of noise");

enum Kind : int64_t { kSum = 0, kCount = 1, kNoisy = 2 };

// Field by field the Params of cpp_impl.py.
struct Params {
  const void* q;
  const void* k_cache;
  const int32_t* block_table;
  const int32_t* seq_lens;
  const int32_t* cu_seqlens_q;
  const float* lse;           // [T, H]
  const float* weights;       // [C, T]
  const int64_t* noise_keys;  // [T, H]
  const float* temperature;   // [T]
  float* norm;                // [T, H] log of the noisy softmax' denominator
  float* partials;            // [T, H, splits, 2]: largest logit, sum of weights
  float* noisy;               // [T, H, S rounded up to vectors] logits after the noise, or null: made anew each time
  float* out;                 // [C, R, H_kv, S]
  int64_t num_channels, num_tokens, num_rows, num_heads, num_kv_heads;
  int64_t head_dim, block_size, num_slots;
  int64_t q_stride_token, q_stride_head, k_stride_block, k_stride_head;
  int64_t table_stride_row, table_stride_head, lens_stride_row, lens_stride_head;
  int64_t q_dtype, cache_dtype, kind, window, num_threads;
  float scale, soft_cap;

  int64_t group() const { return num_heads / num_kv_heads; }
  int64_t num_splits() const { return (num_slots + kSplitKeys - 1) / kSplitKeys; }
  float* noisy_row(int64_t pair) const { return noisy + pair * round_up(num_slots, kLanes); }
};

// Tokens that have a weight in some channel, row after row.
struct Weighted {
  std::vector<int32_t> tokens;
  std::vector<int64_t> first;  // [R + 1] of each row, in `tokens`

  explicit Weighted(const Params& p) {
    for (int64_t row = 0; row < p.num_rows; ++row) {
      first.push_back(int64_t(tokens.size()));
      for (int32_t token = p.cu_seqlens_q[row]; token < p.cu_seqlens_q[row + 1]; ++token)
        if (has_weight(p, token)) tokens.push_back(token);
    }
    first.push_back(int64_t(tokens.size()));
  }

  static bool has_weight(const Params& p, int64_t token) {
    for (int64_t c = 0; c < p.num_channels; ++c)
      if (p.weights[c * p.num_tokens + token] != 0) return true;
    return false;
  }
};

thread_local Arena arena;

struct Scratch {
  float *q, *s, *k, *sums;
  Range *visible, *range;  // of each tile row: in slots, and in keys of the current tile

  explicit Scratch(const Params& p) {
    const int64_t rows = std::max<int64_t>(kMaxTileRows, p.group()), dim = round_up(p.head_dim, kLanes);
    static_assert(sizeof(Range) == 2 * sizeof(float), "ranges are carved from the same memory");
    float* next = arena.reserve(rows * (dim + kTileKeys + 4) + kTileKeys * dim + p.num_channels * kSplitKeys);
    const auto take = [&next](int64_t n) { return std::exchange(next, next + n); };
    q = take(rows * dim);
    s = take(rows * kTileKeys);
    k = take(kTileKeys * dim);
    sums = take(p.num_channels * kSplitKeys);
    visible = reinterpret_cast<Range*>(take(2 * rows));
    range = reinterpret_cast<Range*>(take(2 * rows));
  }
};

// One kv head of one row, and kSplitKeys of its slots.
template <class T>
class Split {
 public:
  Split(const Params& p, const Weighted& weighted, int64_t row, int64_t kv_head, int64_t split)
      : p_(p),
        tokens_(weighted.tokens.data() + weighted.first[row]),
        num_tokens_(weighted.first[row + 1] - weighted.first[row]),
        row_(row),
        kv_head_(kv_head),
        split_(split),
        begin_(split * kSplitKeys),
        seq_len_(p.seq_lens[row * p.lens_stride_row + kv_head * p.lens_stride_head]),
        end_(std::min({begin_ + kSplitKeys, seq_len_, p.num_slots})),
        dim_(round_up(p.head_dim, kLanes)),
        group_(p.group()) {}

  // Calls visit(tile row, first slot of the tile) for each row that sees something of each tile, queries in order; its
  // scaled logits are then in s, and the keys that it sees in range.
  template <class Visit>
  void walk(const Scratch& scratch, Visit visit) const {
    const int64_t step = std::max<int64_t>(1, kMaxTileRows / group_);
    for (int64_t first = 0; first < num_tokens_; first += step) {
      const int count = int(std::min(step, num_tokens_ - first) * group_);
      const Range seen = find_visible(scratch, first, count);
      if (seen.empty()) continue;
      load_queries(scratch, first, count);
      TileRows<T> tiles[2];
      int64_t slot = begin_ + (seen.begin - begin_) / kTileKeys * kTileKeys;
      find_tile(slot, seen, tiles[0]);
      for (int turn = 0; slot < seen.end; slot += kTileKeys, turn ^= 1) {
        const bool has_next = slot + kTileKeys < seen.end;
        if (has_next) find_tile(slot + kTileKeys, seen, tiles[turn ^ 1]);
        if (cut_to_tile(scratch, count, slot).empty()) continue;
        score_tile(scratch, count, range_at(slot, seen), tiles[turn], has_next ? &tiles[turn ^ 1] : nullptr);
        for (int m = 0; m < count; ++m)
          if (!scratch.range[m].empty()) visit(first + m / group_, m, slot);
      }
    }
  }

  // Calls visit(query, tile row) for each query and head that sees something, queries in order, with the slots of this
  // split that it sees.
  template <class Visit>
  void for_pairs(Visit visit) const {
    for (int64_t i = 0; i < num_tokens_; ++i) {
      const Range seen = seen_by(i);
      const Range own{int(std::max<int64_t>(seen.begin, begin_)), int(std::min<int64_t>(seen.end, end_))};
      for (int m = 0; m < group_ && !own.empty(); ++m) visit(i, m, own);
    }
  }

  bool is_empty() const { return num_tokens_ == 0 || begin_ >= end_; }
  int64_t begin() const { return begin_; }
  int64_t size() const { return end_ - begin_; }
  int32_t token(int64_t i) const { return tokens_[i]; }
  int64_t head(int m) const { return kv_head_ * group_ + m % group_; }
  int64_t pair(int64_t i, int m) const { return int64_t(token(i)) * p_.num_heads + head(m); }
  float* partial(int64_t i, int m) const { return p_.partials + (pair(i, m) * p_.num_splits() + split_) * 2; }
  // Slots that the row's weighted query i sees.
  Range seen_by(int64_t i) const {
    const int64_t end = std::max<int64_t>(0, seq_len_ - (p_.cu_seqlens_q[row_ + 1] - token(i)) + 1);
    return {int(p_.window > 0 ? std::max<int64_t>(0, end - p_.window) : 0), int(end)};
  }
  float* out(int64_t channel) const {
    return p_.out + ((channel * p_.num_rows + row_) * p_.num_kv_heads + kv_head_) * p_.num_slots + begin_;
  }

 private:
  // What each tile row sees of this split, and all of them together.
  Range find_visible(const Scratch& scratch, int64_t first, int count) const {
    Range all{int(end_), 0};
    for (int m = 0; m < count; ++m) {
      const Range seen = seen_by(first + m / group_);
      scratch.visible[m] = {int(std::max<int64_t>(seen.begin, begin_)), int(std::min<int64_t>(seen.end, end_))};
      if (scratch.visible[m].empty()) continue;
      all = {std::min(all.begin, scratch.visible[m].begin), std::max(all.end, scratch.visible[m].end)};
    }
    return all;
  }

  Range cut_to_tile(const Scratch& scratch, int count, int64_t slot) const {
    for (int m = 0; m < count; ++m) {
      scratch.range[m] = {int(std::max<int64_t>(scratch.visible[m].begin - slot, 0)),
                          int(std::min<int64_t>(scratch.visible[m].end - slot, kTileKeys))};
    }
    return union_of(scratch.range, count);
  }

  void load_queries(const Scratch& scratch, int64_t first, int count) const {
    for (int m = 0; m < count; ++m) {
      const int64_t offset = token(first + m / group_) * p_.q_stride_token + head(m) * p_.q_stride_head;
      float* to = scratch.q + m * dim_;
      if (p_.q_dtype == kFloat32) copy_row((const float*)p_.q + offset, p_.head_dim, dim_, to);
      if (p_.q_dtype == kFloat16) copy_row((const Half*)p_.q + offset, p_.head_dim, dim_, to);
      if (p_.q_dtype == kBFloat16) copy_row((const BFloat16*)p_.q + offset, p_.head_dim, dim_, to);
    }
  }

  static Range range_at(int64_t slot, Range seen) {
    return {int(std::max<int64_t>(seen.begin - slot, 0)), int(std::min<int64_t>(seen.end - slot, kTileKeys))};
  }

  void find_tile(int64_t slot, Range seen, TileRows<T>& tile) const {
    const T* cache = (const T*)p_.k_cache + kv_head_ * p_.k_stride_head;
    const int32_t* table = p_.block_table + row_ * p_.table_stride_row + kv_head_ * p_.table_stride_head;
    find_rows(cache, p_.k_stride_block, table, p_.block_size, p_.head_dim, slot, range_at(slot, seen), tile.keys);
    std::copy_n(tile.keys, kTileKeys, tile.values);  // values are never read
  }

  void score_tile(const Scratch& scratch, int count, Range range, const TileRows<T>& tile,
                  const TileRows<T>* next) const {
    if (dim_ == p_.head_dim && (std::is_same_v<T, float> || count <= kMaxRowsReadInPlace)) {
      score_rows_of(scratch, count, tile.keys, next);
    } else {
      const float* keys[kTileKeys];
      convert_rows(tile.keys, range, p_.head_dim, dim_, scratch.k, keys);
      score_rows_of<float>(scratch, count, keys, nullptr);
    }
    for (int m = 0; m < count; ++m)
      if (!scratch.range[m].empty()) scale_row(scratch.s + m * kTileKeys, scratch.range[m], p_.scale, p_.soft_cap);
  }

  template <class K>
  void score_rows_of(const Scratch& scratch, int count, const K* const* keys, const TileRows<K>* next) const {
    for_row_blocks(count, [&](int r, auto size) {
      score_rows<K, size>(scratch.q + r * dim_, keys, int(dim_), 0, union_of(scratch.range + r, size),
                          scratch.s + r * kTileKeys, r == 0 ? next : nullptr);
    });
  }

  const Params& p_;
  const int32_t* tokens_;
  const int64_t num_tokens_, row_, kv_head_, split_, begin_, seq_len_, end_, dim_, group_;
};

// Logits of one row to (logit + noise) / temperature; those that it does not see stay -inf.
void add_noise(float* s, Range range, int64_t slot, uint64_t key, float temperature) {
  for (int j = range.begin / kNoiseTile * kNoiseTile; j < range.end; j += kNoiseTile) {
    vuint words[4];
    tile_words(uint32_t(slot + j), key, words);
    for (int i = 0; i < 4; ++i) {
      const int at = j + i * kLanes;
      if (at + kLanes <= range.begin / kLanes * kLanes || at >= range.end) continue;
      store(s + at, (load(s + at) + gumbel(words[i])) / temperature);
    }
  }
}

KVASIR_INLINE vint is_in(Range range, int first) {
  vint key;
  for (int i = 0; i < kLanes; ++i) key[i] = first + i;
  return (key >= range.begin) & (key < range.end);
}

// Calls visit(index of the vector's first key, logits) for the vectors that hold keys of the range.
template <class Visit>
KVASIR_INLINE void for_vectors(const float* s, Range range, Visit visit) {
  for (int j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) visit(j, load(s + j));
}

void keep(float* to, const float* s, Range range) {
  for_vectors(s, range, [&](int j, vfloat x) { store(to + j, x); });
}

// ---- the noisy softmax' denominators ----

template <class T>
void find_partials(const Params& p, const Split<T>& split) {
  const Scratch scratch(p);
  split.walk(scratch, [&](int64_t i, int m, int64_t slot) {
    float* s = scratch.s + m * kTileKeys;
    const Range range = scratch.range[m];
    add_noise(s, range, slot, uint64_t(p.noise_keys[split.pair(i, m)]), p.temperature[split.token(i)]);
    if (p.noisy) keep(p.noisy_row(split.pair(i, m)) + slot, s, range);
    float* partial = split.partial(i, m);
    vfloat largest = broadcast(partial[0]), sum = zeros();
    for_vectors(s, range, [&](int, vfloat x) { largest = max(largest, x); });
    const float now = reduce_max(largest);
    if (now == -kInfinity) return;
    for_vectors(s, range, [&](int, vfloat x) { sum = sum + exp(x - now); });
    partial[1] = fma(partial[1], exp_scalar(partial[0] - now), reduce_add(sum));
    partial[0] = now;
  });
}

void merge_partials(const Params& p, int64_t token) {
  for (int64_t head = 0; head < p.num_heads; ++head) {
    const int64_t pair = token * p.num_heads + head;
    const float* partial = p.partials + pair * p.num_splits() * 2;
    float largest = -kInfinity, sum = 0;
    for (int64_t split = 0; split < p.num_splits(); ++split, partial += 2) {
      if (partial[0] == -kInfinity) continue;
      const float now = std::max(largest, partial[0]);
      sum = fma(sum, exp_scalar(largest - now), partial[1] * exp_scalar(partial[0] - now));
      largest = now;
    }
    p.norm[pair] = sum == 0 ? -kInfinity : largest + std::log(sum);
  }
}

// ---- sums ----

template <class T>
void add_scores(const Params& p, const Split<T>& split) {
  const Scratch scratch(p);
  const int64_t size = split.size();
  for (int64_t c = 0; c < p.num_channels; ++c) {
    std::memcpy(scratch.sums + c * kSplitKeys, split.out(c), size * sizeof(float));
    std::fill_n(scratch.sums + c * kSplitKeys + size, kSplitKeys - size, 0.0f);  // computed with, never kept
  }
  // s: logits of the slots from `slot` on, of which the range counts
  const auto add = [&](int64_t i, int m, int64_t slot, const float* s, Range range) {
    const int64_t token = split.token(i), pair = split.pair(i, m);
    const float norm = p.kind == kNoisy ? p.norm[pair] : p.lse[pair];
    if (norm == -kInfinity) return;  // nothing that it sees has a probability
    const Range seen = split.seen_by(i);
    const float num_seen = float(seen.end - seen.begin);
    for (int64_t c = 0; c < p.num_channels; ++c) {
      const float weight = p.weights[c * p.num_tokens + token];
      if (weight == 0) continue;
      float* sums = scratch.sums + c * kSplitKeys + (slot - split.begin());
      for_vectors(s, range, [&](int j, vfloat x) {
        vfloat term = exp(x - norm);
        if (p.kind == kCount) term = is_in(range, j) & (term * num_seen < kNotBelow) ? broadcast(1) : zeros();
        store(sums + j, fma(term, broadcast(weight), load(sums + j)));
      });
    }
  };
  if (p.kind == kNoisy && p.noisy) {
    split.for_pairs([&](int64_t i, int m, Range own) {
      const int64_t slot = split.begin();
      add(i, m, slot, p.noisy_row(split.pair(i, m)) + slot, {own.begin - int(slot), own.end - int(slot)});
    });
  } else {
    split.walk(scratch, [&](int64_t i, int m, int64_t slot) {
      float* s = scratch.s + m * kTileKeys;
      if (p.kind == kNoisy)
        add_noise(s, scratch.range[m], slot, uint64_t(p.noise_keys[split.pair(i, m)]), p.temperature[split.token(i)]);
      add(i, m, slot, s, scratch.range[m]);
    });
  }
  for (int64_t c = 0; c < p.num_channels; ++c)
    std::memcpy(split.out(c), scratch.sums + c * kSplitKeys, size * sizeof(float));
}

template <class T>
void run(const Params& p) {
  const Weighted weighted(p);
  const auto for_splits = [&](auto work) {
    parallel_for(p.num_rows * p.num_kv_heads * p.num_splits(), p.num_threads, [&](int64_t i) {
      const int64_t column = i / p.num_splits();
      const Split<T> split(p, weighted, column / p.num_kv_heads, column % p.num_kv_heads, i % p.num_splits());
      if (!split.is_empty()) work(p, split);
    });
  };
  if (p.kind == kNoisy) {
    const int64_t count = p.num_tokens * p.num_heads * p.num_splits();
    for (int64_t i = 0; i < count; ++i) p.partials[2 * i] = -kInfinity, p.partials[2 * i + 1] = 0;
    for_splits(find_partials<T>);
    parallel_for(int64_t(weighted.tokens.size()), p.num_threads,
                 [&](int64_t i) { merge_partials(p, weighted.tokens[i]); });
  }
  for_splits(add_scores<T>);
}

}  // namespace
}  // namespace kvasir::scores

KVASIR_EXPORT void kvasir_attention_scores(const kvasir::scores::Params* p) {
  using namespace kvasir;
  with_dtype(p->cache_dtype, [&](auto type) { scores::run<decltype(type)>(*p); });
}
