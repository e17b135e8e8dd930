// y[t] += scale * B (A x[t]) for tokens grouped by adapter, in two passes: the inner vectors of all tokens, then what
// they add to y. Both are bound by reading A and B, which the tokens of a block share while they lie in cache.
// Every sum runs in one fixed order: over K a vector of lanes at a time, over the rank one after the other. Neither the
// number of rows nor tiles nor threads enter, so a token's result is the same bits in any batch.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dispatch.h"
#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

// Columns of kernels/lora/table.py: ENTRY_FIELDS.
struct Entry {
  int64_t a, b, dtype, rank, first_column, num_columns;
};
// One piece of work of kernels/lora/plan.py.
struct Block {
  int64_t adapter, first, num_rows;
};

constexpr int64_t kRankChunk = 16;     // rows of A that a task reads: 64 KiB at K = 1024 in fp32
constexpr int64_t kColumnChunk = 256;  // columns of B that a task reads: 64 KiB at rank 64 in fp32
constexpr int kMaxRows = 4;            // tokens in registers at once
// Multiply-adds that are worth a thread, as in linear/kernel.cpp.
constexpr int64_t kMinWorkPerThread = 350'000;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// inner[i][j] = scale * (A row j . x row i)
template <class T, int Rows, int Ranks>
void shrink_tile(const float* const* x, const T* a, int64_t depth, float scale, float* const* inner) {
  vfloat sums[Rows][Ranks] = {};
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    vfloat values[Rows];
    for (int i = 0; i < Rows; ++i) values[i] = load(x[i] + k);
    for (int j = 0; j < Ranks; ++j) {
      const vfloat row = load(a + j * depth + k);
      for (int i = 0; i < Rows; ++i) sums[i][j] = fma(values[i], row, sums[i][j]);
    }
  }
  if (const int rest = int(depth - whole)) {
    for (int j = 0; j < Ranks; ++j) {
      const vfloat row = load_n(a + j * depth + whole, rest);
      for (int i = 0; i < Rows; ++i) sums[i][j] = fma(load_n(x[i] + whole, rest), row, sums[i][j]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Ranks; ++j) inner[i][j] = scale * reduce_add(sums[i][j]);
}

template <class T, int Rows>
void shrink_rows(const float* const* x, const T* a, int64_t depth, int64_t num_ranks, float scale, float** inner) {
  constexpr int kRanks = Rows == 1 ? 8 : Rows == 2 ? 4 : 2;  // 8 sums side by side hide the additions' latency
  for (int64_t j = 0; j < num_ranks;) {
    const bool is_whole = j + kRanks <= num_ranks;
    if (is_whole)
      shrink_tile<T, Rows, kRanks>(x, a + j * depth, depth, scale, inner);
    else
      shrink_tile<T, Rows, 1>(x, a + j * depth, depth, scale, inner);
    j += is_whole ? kRanks : 1;
    for (int i = 0; i < Rows; ++i) inner[i] += is_whole ? kRanks : 1;
  }
}

// y[i][column] += sum over j of inner[i][j] * B[j][column], for Vectors * kLanes columns, or `rest` when it is not 0
template <class T, int Rows, int Vectors>
void expand_tile(const float* const* inner, const T* b, int64_t row_stride, int64_t rank, int rest, float* const* y) {
  vfloat sums[Rows][Vectors] = {};
  for (int64_t j = 0; j < rank; ++j)
    for (int v = 0; v < Vectors; ++v) {
      const T* at = b + j * row_stride + v * kLanes;
      const vfloat row = rest ? load_n(at, rest) : load(at);
      for (int i = 0; i < Rows; ++i) sums[i][v] = fma(broadcast(inner[i][j]), row, sums[i][v]);
    }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) {
      float* at = y[i] + v * kLanes;
      if (rest)
        store_n(at, load_n(at, rest) + sums[i][v], rest);
      else
        store(at, load(at) + sums[i][v]);
    }
}

template <class T, int Rows>
void expand_rows(const float* const* inner, const T* b, int64_t row_stride, int64_t rank, int64_t num_columns,
                 float** y) {
  constexpr int kVectors = 2;
  for (int64_t column = 0; column < num_columns;) {
    const int64_t left = num_columns - column;
    int64_t step = kLanes;
    if (left >= kVectors * kLanes) {
      step = kVectors * kLanes;
      expand_tile<T, Rows, kVectors>(inner, b + column, row_stride, rank, 0, y);
    } else {
      expand_tile<T, Rows, 1>(inner, b + column, row_stride, rank, left < kLanes ? int(left) : 0, y);
    }
    column += step;
    for (int i = 0; i < Rows; ++i) y[i] += step;
  }
}

// Calls function(std::integral_constant<int, rows>) with rows in 1 .. kMaxRows.
template <class Function>
void with_rows(int64_t rows, Function function) {
  switch (rows) {
    case 1:
      return function(std::integral_constant<int, 1>{});
    case 2:
      return function(std::integral_constant<int, 2>{});
    case 3:
      return function(std::integral_constant<int, 3>{});
    default:
      return function(std::integral_constant<int, kMaxRows>{});
  }
}

struct Lora {
  float* y;
  int64_t y_stride;
  const float* x;
  int64_t x_stride, depth;
  const int64_t* rows;
  const Block* blocks;
  int64_t num_blocks;
  const Entry* entries;
  int64_t num_parts;
  const float* scales;
  float* inner;  // [rows][num_parts][max_rank]
  int64_t max_rank, max_columns;

  const Entry& entry(const Block& block, int64_t part) const { return entries[block.adapter * num_parts + part]; }
  float* inner_of(int64_t row, int64_t part) const { return inner + (row * num_parts + part) * max_rank; }

  // Task t: the blocks come first, so that neighbouring tasks share what they read.
  void shrink(int64_t t) const {
    const Block& block = blocks[t % num_blocks];
    const int64_t part = t / num_blocks % num_parts, first = t / num_blocks / num_parts * kRankChunk;
    const Entry& e = entry(block, part);
    if (first >= e.rank) return;
    const int64_t num_ranks = std::min(kRankChunk, e.rank - first);
    const float scale = scales[block.adapter * num_parts + part];
    with_dtype(e.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < block.num_rows; i += kMaxRows)
        with_rows(block.num_rows - i, [&](auto count) {
          const float* inputs[count];
          float* outputs[count];
          for (int r = 0; r < count; ++r) {
            inputs[r] = x + rows[block.first + i + r] * x_stride;
            outputs[r] = inner_of(block.first + i + r, part) + first;
          }
          shrink_rows<T, count>(inputs, (const T*)e.a + first * depth, depth, num_ranks, scale, outputs);
        });
    });
  }

  void expand(int64_t t) const {
    const Block& block = blocks[t % num_blocks];
    const int64_t part = t / num_blocks % num_parts, first = t / num_blocks / num_parts * kColumnChunk;
    const Entry& e = entry(block, part);
    if (e.rank == 0 || first >= e.num_columns) return;
    const int64_t num_columns = std::min(kColumnChunk, e.num_columns - first);
    with_dtype(e.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t i = 0; i < block.num_rows; i += kMaxRows)
        with_rows(block.num_rows - i, [&](auto count) {
          const float* inputs[count];
          float* outputs[count];
          for (int r = 0; r < count; ++r) {
            inputs[r] = inner_of(block.first + i + r, part);
            outputs[r] = y + rows[block.first + i + r] * y_stride + e.first_column + first;
          }
          expand_rows<T, count>(inputs, (const T*)e.b + first, e.num_columns, e.rank, num_columns, outputs);
        });
    });
  }

  int64_t work() const {
    int64_t total = 0;
    for (int64_t b = 0; b < num_blocks; ++b)
      for (int64_t part = 0; part < num_parts; ++part) {
        const Entry& e = entry(blocks[b], part);
        total += std::max(blocks[b].num_rows, int64_t(kMaxRows)) * e.rank * (depth + e.num_columns);
      }
    return total;
  }

  void run(int64_t max_threads) const {
    const int64_t num_shrinks = num_blocks * num_parts * ceil_div(max_rank, kRankChunk);
    const int64_t num_expands = num_blocks * num_parts * ceil_div(max_columns, kColumnChunk);
    const int64_t threads = std::clamp<int64_t>(work() / kMinWorkPerThread, 1, max_threads);
    parallel_for(num_shrinks, threads, [&](int64_t t) { shrink(t); });
    parallel_for(num_expands, threads, [&](int64_t t) { expand(t); });
  }
};

}  // namespace

// y, x: rows of floats; rows [n], blocks [num_blocks][3] of the plan; entries [adapters][num_parts][6] and scales
// [adapters][num_parts] of the table; inner: room for n * num_parts * max_rank floats.
KVASIR_EXPORT void kvasir_lora(float* y, int64_t y_stride, const float* x, int64_t x_stride, int64_t depth,
                               const int64_t* rows, const void* blocks, int64_t num_blocks, const void* entries,
                               int64_t num_parts, const float* scales, float* inner, int64_t max_rank,
                               int64_t max_columns, int64_t threads) {
  Lora{y, y_stride, x, x_stride, depth, rows, (const Block*)blocks, num_blocks, (const Entry*)entries, num_parts,
       scales, inner, max_rank, max_columns}
      .run(threads);
}
