// Arithmetic of attention on one tile: M query rows of one request and kv head against up to kTileKeys of its slots.
//
// Every (query, key) score and every (query, value column) sum is accumulated in one fixed order, whatever block of rows
// it is computed in: a score as kLanes partial sums over head_dim that are then added in a tree, a value sum key by key.
// So a query's result is bit for bit the same alone (decode) and among others (prefill). Keys are named by pointers:
// rows of the cache where they can be read as they are, else rows of a float copy.
#pragma once

#include <type_traits>

#include "simd.h"

namespace kvasir::attention {

constexpr int kTileKeys = 64;  // a multiple of kLanes
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Range {
  int begin, end;  // keys of the tile that a query row sees
  bool empty() const { return begin >= end; }
};

// Keys and values of a tile, by pointer to each row; kTileKeys readable ones each.
template <class T>
struct TileRows {
  const T* keys[kTileKeys];
  const T* values[kTileKeys];
};

// kLevel as of __builtin_prefetch: 3 is the first-level cache, 2 the second.
template <int kLevel, class T>
KVASIR_INLINE void prefetch_row(const T* row, int dim) {
  constexpr int kLine = 64 / sizeof(T);
  for (int d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 0, kLevel);
}

KVASIR_INLINE float exp_scalar(float x) { return exp(broadcast(x))[0]; }

// ---- scores: s[r][j] = q[r] . key[j] ----

// kRows rows against kLanes / kRows keys.
template <class T, int kRows>
KVASIR_INLINE void score_block(const float* q, const T* const* keys, int dim, float* s) {
  constexpr int kKeys = kLanes / kRows;
  vfloat acc[kLanes] = {};
  for (int d = 0; d < dim; d += kLanes) {
    vfloat key[kKeys];
#pragma GCC unroll 16
    for (int c = 0; c < kKeys; ++c) key[c] = load(keys[c] + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vfloat query = load(q + r * dim + d);
#pragma GCC unroll 16
      for (int c = 0; c < kKeys; ++c) acc[r * kKeys + c] = fma(query, key[c], acc[r * kKeys + c]);
    }
  }
  const vfloat sums = sum_each(acc);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) std::memcpy(s + r * kTileKeys, (const float*)&sums + r * kKeys, kKeys * sizeof(float));
}

// `next`, unless null, is the following tile: its rows are asked for in step with the work on this one. Blocks of the
// cache lie scattered, and the processor's own prefetching ends with each. Values, needed later, would push keys out of
// the first-level cache.
template <class T, int kRows>
KVASIR_INLINE void score_rows(const float* q, const T* const* keys, int dim, int dim_v, Range range, float* s,
                              const TileRows<T>* next) {
  constexpr int kKeys = kLanes / kRows;
  for (int j = range.begin / kKeys * kKeys; j < range.end; j += kKeys) {
    for (int c = j; next != nullptr && c < j + kKeys; ++c) {
      prefetch_row<3>(next->keys[c], dim);
      prefetch_row<2>(next->values[c], dim_v);
    }
    score_block<T, kRows>(q, keys + j, dim, s + j);
  }
}

// ---- scores from keys that lie side by side: no sums across lanes, worth it where many rows share a tile ----

constexpr bool kCanTranspose = kLanes == 16;  // of 16 registers, sums would leave none for keys

// kLanes elements from d on of each of kLanes rows -> out [kLanes][kLanes], out[i][j] = rows[j][d + i].
template <class T>
KVASIR_INLINE void transpose(const T* const* rows, int d, float* out) {
  vint low, high;  // of two vectors: their lower and upper halves interleaved
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  vfloat v[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = load(rows[i] + d);
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vfloat mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = __builtin_shuffle(v[i], v[i + kLanes / 2], low);
      mixed[2 * i + 1] = __builtin_shuffle(v[i], v[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = mixed[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(out + i * kLanes, v[i]);
}

// The keys of a tile, in the blocks of kLanes that hold some of the range -> out [blocks][dim][kLanes].
template <class T>
void transpose_keys(const T* const* keys, int dim, Range range, float* out) {
  for (int j = range.begin / kLanes * kLanes; j < range.end; j += kLanes)
    for (int d = 0; d < dim; d += kLanes) transpose(keys + j, d, out + j * dim + d * kLanes);
}

// kRows rows against kLanes keys. What score_block holds in lane l is summed alone, and the sums are added as sum_each
// adds the lanes: so the bits are the same.
template <int kRows>
KVASIR_INLINE void score_transposed(const float* q, const float* keys, int dim, float* s) {
  vfloat total[kRows][kLanes / 4];
#pragma GCC unroll 4
  for (int quarter = 0; quarter < kLanes / 4; ++quarter) {
    vfloat sum[4][kRows] = {};
    for (int d = 4 * quarter; d < dim; d += kLanes)
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        const vfloat key = load(keys + (d + l) * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[l][r] = fma(broadcast(q[r * dim + d + l]), key, sum[l][r]);
      }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) total[r][quarter] = (sum[0][r] + sum[2][r]) + (sum[1][r] + sum[3][r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    vfloat all = total[r][0] + total[r][1];
    if constexpr (kCanTranspose) all = all + (total[r][2] + total[r][3]);
    store(s + r * kTileKeys, all);
  }
}

// ---- softmax: scores to weights, one row ----

// Scales (and caps) the visible scores in place, sets the other lanes of their vectors to -inf; returns the largest.
KVASIR_INLINE float scale_row(float* s, Range range, float scale, float soft_cap) {
  vfloat largest = broadcast(-kInfinity);
  vint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int j = range.begin / kLanes * kLanes; j < range.end; j += kLanes) {
    vfloat x = load(s + j) * scale;
    if (soft_cap > 0) x = soft_cap * tanh(x / soft_cap);
    const vint key = lane + j;
    x = (key >= range.begin) & (key < range.end) ? x : broadcast(-kInfinity);
    largest = max(largest, x);
    store(s + j, x);
  }
  return reduce_max(largest);
}

// Turns scaled scores into e^(score - largest), zero for the keys of `tile` that the row does not see; returns their sum.
KVASIR_INLINE float weigh_row(float* s, Range range, Range tile, float largest) {
  const int first = range.begin / kLanes * kLanes;
  const int last = (range.end + kLanes - 1) / kLanes * kLanes;
  for (int j = tile.begin; j < first; ++j) s[j] = 0;
  for (int j = last; j < tile.end; ++j) s[j] = 0;
  vfloat sum = zeros();
  for (int j = first; j < last; j += kLanes) {
    const vfloat p = exp_not_positive(load(s + j) - largest);
    sum = sum + p;
    store(s + j, p);
  }
  return reduce_add(sum);
}

// ---- values: acc[r] = acc[r] * decay[r] + sum over keys of p[r][j] * value[j] ----

template <class T, int kRows, int kColumns>
KVASIR_INLINE void value_block(const float* p, const T* const* values, Range range, const float* decay, float* acc,
                               int dim, int column) {
  vfloat sum[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sum[r][c] = load(acc + r * dim + column + c * kLanes) * decay[r];
  for (int j = range.begin; j < range.end; ++j) {
    vfloat value[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) value[c] = load(values[j] + column + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vfloat weight = broadcast(p[r * kTileKeys + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] = fma(weight, value[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) store(acc + r * dim + column + c * kLanes, sum[r][c]);
}

template <class T, int kRows>
KVASIR_INLINE void value_rows(const float* p, const T* const* values, Range range, const float* decay, float* acc,
                              int dim) {
  constexpr int kColumns = kRows == 4 ? kLanes / 4 : 4;  // as many sums as registers hold
  int column = 0;
  for (; column + kColumns * kLanes <= dim; column += kColumns * kLanes)
    value_block<T, kRows, kColumns>(p, values, range, decay, acc, dim, column);
  // Heads of 32 with AVX-512: two columns side by side, or the sums would wait for each other.
  for (; kColumns > 2 && column + 2 * kLanes <= dim; column += 2 * kLanes)
    value_block<T, kRows, 2>(p, values, range, decay, acc, dim, column);
  for (; column < dim; column += kLanes) value_block<T, kRows, 1>(p, values, range, decay, acc, dim, column);
}

// ---- one tile ----

// State of M query rows while they walk over keys; rows of acc and q are dim floats, padded with zeros to kLanes.
struct Rows {
  int count;          // M
  int dim, dim_v;     // padded head dims
  const float* q;     // [M, dim]
  float* s;           // [M, kTileKeys]
  float* acc;         // [M, dim_v]  sum of weight * value, relative to `largest`
  float* largest;     // [M] largest score so far
  float* sum;         // [M] sum of weights, relative to `largest`
  float* decay;       // [M] scratch
  Range* range;       // [M] keys of the current tile that the row sees
};

// The keys that at least one of `count` rows sees; ranges are contiguous and overlap or touch.
KVASIR_INLINE Range union_of(const Range* range, int count) {
  Range all{kTileKeys, 0};
  for (int r = 0; r < count; ++r) {
    if (range[r].empty()) continue;
    all.begin = range[r].begin < all.begin ? range[r].begin : all.begin;
    all.end = range[r].end > all.end ? range[r].end : all.end;
  }
  return all;
}

// Calls fn(first row, integral_constant of the block's rows) over blocks of 4, 2 and 1 rows.
template <class Fn>
KVASIR_INLINE void for_row_blocks(int count, Fn fn) {
  int r = 0;
  for (; r + 4 <= count; r += 4) fn(r, std::integral_constant<int, 4>{});
  if (r + 2 <= count) {
    fn(r, std::integral_constant<int, 2>{});
    r += 2;
  }
  if (r < count) fn(r, std::integral_constant<int, 1>{});
}

// Adds one tile to the rows (online softmax); `next` as in score_rows. `transposed`, unless null, is what
// transpose_keys made of the keys; those of the tile are not read then.
template <class T>
void add_tile(const Rows& rows, const TileRows<T>& tile, const TileRows<T>* next, float scale, float soft_cap,
              const float* transposed = nullptr) {
  for_row_blocks(rows.count, [&](int r, auto size) {
    const Range seen = union_of(rows.range + r, size);
    if (transposed != nullptr) {
      for (int j = seen.begin / kLanes * kLanes; j < seen.end; j += kLanes)
        score_transposed<size>(rows.q + r * rows.dim, transposed + j * rows.dim, rows.dim, rows.s + r * kTileKeys + j);
      return;
    }
    score_rows<T, size>(rows.q + r * rows.dim, tile.keys, rows.dim, rows.dim_v, seen, rows.s + r * kTileKeys,
                        r == 0 ? next : nullptr);
  });
  for (int r = 0; r < rows.count; ++r) {
    const bool blind = rows.range[r].empty();
    rows.decay[r] = blind ? -kInfinity : scale_row(rows.s + r * kTileKeys, rows.range[r], scale, soft_cap);
  }
  for (int r = 0; r < rows.count; r += kLanes) {  // arrays are padded to kLanes
    const vfloat before = load(rows.largest + r);
    const vfloat now = max(before, load(rows.decay + r));
    store(rows.largest + r, now);
    store(rows.decay + r, exp(before - (now == -kInfinity ? zeros() : now)));
  }
  for_row_blocks(rows.count, [&](int first, auto size) {
    const Range seen = union_of(rows.range + first, size);
    for (int r = first; r < first + size; ++r) {
      float* s = rows.s + r * kTileKeys;
      const float largest = rows.largest[r] == -kInfinity ? 0 : rows.largest[r];
      const Range range = rows.range[r].empty() ? Range{kTileKeys, kTileKeys} : rows.range[r];
      rows.sum[r] = fma(rows.sum[r], rows.decay[r], weigh_row(s, range, seen, largest));
    }
    if (seen.empty()) return;
    value_rows<T, size>(rows.s + first * kTileKeys, tile.values, seen, rows.decay + first, rows.acc + first * rows.dim_v,
                        rows.dim_v);
  });
}

}  // namespace kvasir::attention
