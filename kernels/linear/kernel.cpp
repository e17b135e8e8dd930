// x W^T + bias on weights packed in panels of 32 columns, 16 or 32 bits wide, with fp32 accumulation.
// The sum over K runs in one fixed order for every output element: fused multiply-adds one k after the other within
// chunks of 128, then the chunks one after the other, then the bias. Row count, tile, vector width and threads do not
// enter, so a row's result is the same bits in any batch.
#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "dispatch.h"
#include "pairs.h"
#include "product.h"
#include "quantized.h"
#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

constexpr int64_t kPanel = 32;   // columns of W^T side by side in memory
constexpr int64_t kChunk = 128;  // rows of W^T whose products are summed in registers; shorter sums round less
// Floats between the rows of a copied block of x. Not a multiple of 1024: rows 4 KiB apart would share cache sets.
constexpr int64_t kRowStride = kChunk + 16;
constexpr int64_t kPairsPerPanel = kPanel / (2 * kLanes);
// A task: what it sums into (144 KiB) and a chunk of its 16-bit weights (192 KiB) stay in L2.
constexpr int64_t kMaxPanelsPerTask = 24;
constexpr int64_t kMaxRowsPerTask = 48;
constexpr int64_t kTasksPerThread = 4;
// Multiply-adds that are worth a thread that is awake: 7 us. Reading two bytes of weights takes as long as four of them.
constexpr int64_t kMinWorkPerThread = 350'000;
// And for which threads that may be asleep are woken: a product on its own.
constexpr int64_t kMinWorkToWake = 3'000'000;
constexpr int64_t kWorkPerByte = 2;
constexpr int64_t kQuantizedRate = 4;  // multiply-adds of bytes in the time of one of floats
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;  // 24 accumulators of 32 registers
#else
constexpr int kMaxRows = 6;  // 12 accumulators of 16 registers
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

KVASIR_INLINE vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return fma(a, b, c);
#else
  return a * b + c;  // fmaf in software would cost a call per element
#endif
}

// Position in a panel row of column `column`. A pair of bfloat16 vectors is stored interleaved: one shift and one mask
// widen it, which is cheaper than two widening loads.
template <class T>
KVASIR_INLINE int64_t position(int64_t column) {
  return column;
}
template <>
KVASIR_INLINE int64_t position<BFloat16>(int64_t column) {
  const int64_t pair = column / (2 * kLanes), lane = column % (2 * kLanes);
  return pair * 2 * kLanes + 2 * (lane % kLanes) + lane / kLanes;
}

template <class T>
KVASIR_INLINE void load_pair(const T* p, vfloat& a, vfloat& b) {
  a = load(p);
  b = load(p + kLanes);
}
template <>
KVASIR_INLINE void load_pair<BFloat16>(const BFloat16* p, vfloat& a, vfloat& b) {
  vuint both;
  std::memcpy(&both, p, sizeof(both));
  a = (vfloat)(both << 16);
  b = (vfloat)(both & 0xffff0000u);
}

// out[Rows][Pairs * 2 * kLanes] (+)= x[Rows][depth] * w[depth][...], then + bias where it is not null; meanwhile this
// tile's share of what is needed next, at `ahead` (past the end a harmless address), is fetched.
template <class T, int Rows, int Pairs>
__attribute__((noinline)) void tile(const float* x, const T* w, const T* ahead, int64_t depth, bool is_first,
                                    const float* bias, float* out, int64_t out_stride) {
  constexpr int64_t kAheadStep = Pairs * 2 * kLanes;
  vfloat sums[Rows][2 * Pairs];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * Pairs; ++j) sums[r][j] = zeros();
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = w + k * kPanel;
    // With few rows the hardware prefetcher keeps up with the plain stream and more instructions only cost.
    if constexpr (Rows >= 4) {
      for (int64_t byte = 0; byte < kAheadStep * int64_t(sizeof(T)); byte += 64)
        __builtin_prefetch((const char*)(ahead + k * kAheadStep) + byte, 0, 2);
    }
    vfloat weights[2 * Pairs];
#pragma GCC unroll 2
    for (int j = 0; j < Pairs; ++j) load_pair(row + j * 2 * kLanes, weights[2 * j], weights[2 * j + 1]);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const vfloat value = broadcast(x[r * kRowStride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < 2 * Pairs; ++j) sums[r][j] = multiply_add(value, weights[j], sums[r][j]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 2 * Pairs; ++j) {
      float* target = out + r * out_stride + j * kLanes;
      vfloat sum = is_first ? sums[r][j] : load(target) + sums[r][j];
      if (bias) sum = sum + load(bias + j * kLanes);
      store(target, sum);
    }
}

// One panel for `rows` <= Rows rows.
template <class T, int Rows>
void panel(int64_t rows, const float* x, const T* w, const T* ahead, int64_t depth, bool is_first, const float* bias,
           float* out, int64_t out_stride) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return panel<T, Rows - 1>(rows, x, w, ahead, depth, is_first, bias, out, out_stride);
  }
  // As many vectors side by side as registers allow: with one or two rows the additions' latency would bound.
  constexpr int kPairs = Rows <= 2 ? kPairsPerPanel : 1;
  for (int64_t column = 0; column < kPanel; column += kPairs * 2 * kLanes)
    tile<T, Rows, kPairs>(x, w + column, ahead + depth * column, depth, is_first, bias ? bias + column : nullptr,
                          out + column, out_stride);
}

int64_t num_panels_of(const linear::Product& p) { return ceil_div(p.num_columns, kPanel); }

// A product on weights of type T.
template <class T>
struct Panels : linear::Product {
  explicit Panels(const linear::Product& product) : linear::Product(product) {}

  const T* weights_at(int64_t p, int64_t k0) const { return (const T*)weights + (p * depth + k0) * kPanel; }

  // The last panel may be narrower than it is packed: its rows pass through a full-width buffer.
  void partial_panel(int64_t rows, const float* block, const T* w, const T* ahead, int64_t chunk, bool is_first,
                     const float* bias_at, float* target, int64_t width) const {
    float buffer[kMaxRows * kPanel] = {};
    if (!is_first)
      for (int64_t r = 0; r < rows; ++r) std::copy_n(target + r * out_stride, width, buffer + r * kPanel);
    panel<T, kMaxRows>(rows, block, w, ahead, chunk, is_first, bias_at, buffer, kPanel);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(buffer + r * kPanel, width, target + r * out_stride);
  }

  // Rows `row` .. `row + rows` times a chunk of one panel; `block` has the chunk of x.
  void piece(const float* block, int64_t row, int64_t rows, int64_t p, int64_t k0, const T* ahead) const {
    const int64_t chunk = std::min(kChunk, depth - k0), width = num_columns - p * kPanel;
    const bool is_first = k0 == 0, is_last = k0 + chunk == depth;
    const float* bias_at = is_last && bias ? bias + p * kPanel : nullptr;
    float* target = out + row * out_stride + p * kPanel;
    if (width < kPanel)
      partial_panel(rows, block, weights_at(p, k0), ahead, chunk, is_first, bias_at, target, width);
    else
      panel<T, kMaxRows>(rows, block, weights_at(p, k0), ahead, chunk, is_first, bias_at, target, out_stride);
  }

  // The chunk of x as a piece reads it: a single row where it lies, others in `block`.
  const float* chunk_of_x(int64_t row, int64_t rows, int64_t k0, float* block) const {
    const float* first = x + row * x_stride + k0;
    if (rows == 1) return first;
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(first + r * x_stride, std::min(kChunk, depth - k0), block + r * kRowStride);
    return block;
  }

  void task(int64_t row, int64_t rows, int64_t first_panel, int64_t end_panel) const {
    alignas(64) float block[kMaxRows * kRowStride];
    const int64_t num_blocks = ceil_div(rows, kMaxRows);
    if (num_blocks == 1) {  // memory bounds it: weights are read as one stream
      const float* chunk = chunk_of_x(row, rows, 0, block);
      for (int64_t p = first_panel; p < end_panel; ++p)
        for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kChunk) {
          if (depth > kChunk) chunk = chunk_of_x(row, rows, k0, block);
          piece(chunk, row, rows, p, k0, weights_at(p, k0 + kChunk));
        }
      return;
    }
    for (int64_t k0 = 0; k0 == 0 || k0 < depth; k0 += kChunk)  // a chunk of weights stays in the cache for all rows
      for (int64_t b = 0; b < num_blocks; ++b) {
        const int64_t begin = rows * b / num_blocks, count = rows * (b + 1) / num_blocks - begin;
        const float* chunk = chunk_of_x(row + begin, count, k0, block);
        for (int64_t p = first_panel; p < end_panel; ++p)
          piece(chunk, row + begin, count, p, k0, weights_at(p + 1, k0));
      }
  }
};

// Index of W[column][k] among the packed weights: panel by panel, k by k.
template <class T>
KVASIR_INLINE int64_t packed_index(int64_t column, int64_t k, int64_t depth) {
  return (column / kPanel * depth + k) * kPanel + position<T>(column % kPanel);
}

template <class T>
void pack(const T* weight, int64_t row_stride, int64_t num_columns, int64_t depth, T* packed, int64_t threads) {
  const int64_t num_panels = ceil_div(num_columns, kPanel);
  parallel_for(num_panels, threads, [&](int64_t p) {
    for (int64_t k0 = 0; k0 < depth; k0 += kChunk)  // what is written stays in the first cache
      for (int64_t column = p * kPanel; column < (p + 1) * kPanel; ++column) {
        T* target = packed + packed_index<T>(column, k0, depth);
        for (int64_t k = k0; k < std::min(k0 + kChunk, depth); ++k, target += kPanel)
          *target = column < num_columns ? weight[column * row_stride + k] : T{};
      }
  });
}

template <class T>
void unpack(const T* packed, int64_t depth, int64_t id, float* out) {
  const T* source = packed + packed_index<T>(id, 0, depth);
  for (int64_t k = 0; k < depth; ++k, source += kPanel) out[k] = to_float(*source);
}

}  // namespace

namespace kvasir::linear {

void prepare(Product& p, int64_t threads) {
  if (quantized::is_quantized(p.dtype)) p.prepared = quantized::prepare(p, threads);
  if (pairs::is_pairs(p.dtype)) p.prepared = pairs::prepare(p, threads);
}

int64_t work_of(const Product& p) {
  if (quantized::is_quantized(p.dtype)) {
    const int64_t reading = kWorkPerByte * p.dtype / 8;
    return p.num_columns * p.depth * std::max<int64_t>(ceil_div(p.num_rows, kQuantizedRate), reading);
  }
  const int64_t width = p.dtype == kFloat32 ? 4 : 2, rate = pairs::is_pairs(p.dtype) ? pairs::rate() : 1;
  return p.num_columns * p.depth * std::max<int64_t>(ceil_div(p.num_rows, rate), kWorkPerByte * width);
}

Division divide(const Product& p, int64_t max_threads) {
  const int64_t threads = std::clamp<int64_t>(work_of(p) / kMinWorkPerThread, 1, max_threads);
  const int64_t wanted = threads > 1 ? threads * kTasksPerThread : 1, num_panels = num_panels_of(p);
  const int64_t min_row_groups = ceil_div(p.num_rows, kMaxRowsPerTask);
  const int64_t min_column_groups = ceil_div(num_panels, kMaxPanelsPerTask);
  const int64_t column_groups = std::clamp(wanted / std::max<int64_t>(min_row_groups, 1), min_column_groups, num_panels);
  // Rows are split further where the columns do not feed all threads.
  const int64_t row_groups =
      std::clamp(wanted / column_groups, min_row_groups, std::max(min_row_groups, p.num_rows / kMaxRows));
  return {column_groups, row_groups, threads};
}

void run_task(const Product& p, const Division& d, int64_t t) {
  // Neighbouring tasks share weights: the first one brings them into the cache.
  const int64_t num_panels = num_panels_of(p), columns = t / d.row_groups, group = t % d.row_groups;
  const int64_t row = p.num_rows * group / d.row_groups, end = p.num_rows * (group + 1) / d.row_groups;
  const int64_t first = num_panels * columns / d.column_groups, last = num_panels * (columns + 1) / d.column_groups;
  if (quantized::is_quantized(p.dtype)) return quantized::run(p, row, end - row, first, last);
  if (pairs::is_pairs(p.dtype)) return pairs::run(p, row, end - row, first, last);
  with_dtype(p.dtype, [&](auto type) { Panels<decltype(type)>(p).task(row, end - row, first, last); });
}

void unpack_row(const void* packed, int64_t dtype, int64_t depth, int64_t id, float* out) {
  if (quantized::is_quantized(dtype)) return quantized::unpack_row(packed, dtype, depth, id, out);
  if (pairs::is_pairs(dtype)) return pairs::unpack_row(packed, depth, id, out);
  with_dtype(dtype, [&](auto type) { unpack((const decltype(type)*)packed, depth, id, out); });
}

}  // namespace kvasir::linear

// weight [num_columns][depth] with row_stride elements between rows -> packed, rounded up to whole panels.
KVASIR_EXPORT void kvasir_linear_pack(const void* weight, int64_t dtype, int64_t row_stride, int64_t num_columns,
                                      int64_t depth, void* packed, int64_t threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    pack((const T*)weight, row_stride, num_columns, depth, (T*)packed, threads);
  });
}

// out[i] = row ids[i] of the weight that was packed, as fp32.
KVASIR_EXPORT void kvasir_linear_unpack_rows(const void* packed, int64_t dtype, int64_t depth, const int64_t* ids,
                                             int64_t num_ids, float* out, int64_t threads) {
  parallel_for_runs(num_ids, depth * kPanel, kMinWorkPerThread, threads, [&](int64_t i) {
    linear::unpack_row(packed, dtype, depth, ids[i], out + i * depth);
  });
}

// out [num_rows][num_columns] = x W^T + bias; bias is null or has a whole number of panels.
KVASIR_EXPORT void kvasir_linear(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth, int64_t num_columns,
                                 const void* packed, int64_t dtype, const float* bias, float* out, int64_t out_stride,
                                 int64_t threads) {
  linear::Product product{x, x_stride, num_rows, depth, num_columns, packed, dtype, bias, out, out_stride};
  const int64_t useful = std::clamp<int64_t>(linear::work_of(product) / kMinWorkToWake, 1, threads);
  linear::prepare(product, useful);
  const linear::Division division = linear::divide(product, useful);
  parallel_for(division.num_tasks(), division.threads, [&](int64_t t) { linear::run_task(product, division, t); });
}

// Ask for large pages before the memory is first touched: a product streams every weight, and with 4 KiB pages the
// address translation costs about a quarter of the read bandwidth. A hint; where it is refused nothing changes.
KVASIR_EXPORT void kvasir_linear_advise_large_pages(void* memory, int64_t num_bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (uintptr_t)memory / kPage * kPage, end = ((uintptr_t)memory + num_bytes) / kPage * kPage;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)num_bytes;
#endif
}
