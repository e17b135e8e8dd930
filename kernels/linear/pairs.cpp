// bfloat16 times bfloat16: packing, the rounding of activations, the product on plain floats, and which instructions are
// used. See pairs.h for what is computed.
#include "pairs.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "arena.h"
#include "dispatch.h"
#include "pairs_tile.h"
#include "product.h"
#include "simd.h"
#include "team.h"

namespace kvasir::pairs {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // whose rounding is worth a thread that is awake
constexpr int64_t kLine = 16;                  // pairs in a cache line

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t num_pairs_of(int64_t depth) { return ceil_div(depth, 2); }

// ---- the product without special instructions: both members of a pair are widened ----

struct Generic {
  using Float = vfloat;
  struct Weights {
    vfloat even, odd;
  };
  struct Value {
    vfloat even, odd;
  };
  static constexpr int kLanes = kvasir::kLanes, kVectors = 2;
  static constexpr int kRows = kLanes == 16 ? 12 : 6;  // accumulators in three quarters of the registers

  KVASIR_PAIRS Float zero() { return zeros(); }
  KVASIR_PAIRS void load(const uint32_t* p, Weights& pairs) {
    vuint both;
    std::memcpy(&both, p, sizeof(both));
    pairs.even = (vfloat)(both << 16);
    pairs.odd = (vfloat)(both & 0xffff0000u);
  }
  KVASIR_PAIRS Value broadcast(uint32_t pair) {
    return {kvasir::broadcast(bit_cast<float>(pair << 16)), kvasir::broadcast(bit_cast<float>(pair & 0xffff0000u))};
  }
  KVASIR_PAIRS Float multiply_add(Float a, Float b, Float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fma(a, b, c);
#else
    return a * b + c;  // a * b is exact, so fusing would change nothing
#endif
  }
  KVASIR_PAIRS Float dot(Float sum, const Weights& pairs, const Value& value) {
    return multiply_add(pairs.even, value.even, multiply_add(pairs.odd, value.odd, sum));
  }
  KVASIR_PAIRS Float add(Float a, Float b) { return a + b; }
  KVASIR_PAIRS Float load_float(const float* p) { return kvasir::load(p); }
  KVASIR_PAIRS void store(float* p, Float x) { kvasir::store(p, x); }
};

// ---- choice ----

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* widest() { return avx512_kernels() != nullptr ? avx512_kernels() : generic_kernels(); }

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) chosen.store(found = widest(), std::memory_order_relaxed);
  return *found;
}

// ---- activations ----

struct Rows {
  const uint32_t* pairs;
  int64_t stride;
};

void round_row(const float* x, int64_t depth, uint32_t* pairs) {
  BFloat16* values = (BFloat16*)pairs;
  int64_t k = 0;
  for (; k + kvasir::kLanes <= depth; k += kvasir::kLanes) store(values + k, load(x + k));
  for (; k < depth; ++k) values[k] = from_float<BFloat16>(x[k]);
  if (depth % 2) values[depth] = BFloat16{};
}

// ---- weights ----

template <class T>
uint32_t rounded_bits(T x) {
  return from_float<BFloat16>(to_float(x)).bits;
}
template <>
uint32_t rounded_bits(BFloat16 x) {
  return x.bits;
}

// Index of the pair k of a column among the packed ones.
int64_t packed_index(int64_t column, int64_t k, int64_t num_pairs) {
  return (column / kPanel * num_pairs + k) * kPanel + column % kPanel;
}

template <class T>
void pack(const T* weight, int64_t row_stride, int64_t num_columns, int64_t depth, uint32_t* packed, int64_t threads) {
  const int64_t num_pairs = num_pairs_of(depth);
  parallel_for(ceil_div(num_columns, kPanel), threads, [&](int64_t p) {
    for (int64_t k0 = 0; k0 < num_pairs; k0 += kChunk)  // what is written stays in the first cache
      for (int64_t column = p * kPanel; column < (p + 1) * kPanel; ++column) {
        const T* row = weight + column * row_stride;
        uint32_t* target = packed + packed_index(column, k0, num_pairs);
        for (int64_t k = k0; k < std::min(k0 + kChunk, num_pairs); ++k, target += kPanel) {
          const bool is_there = column < num_columns, has_odd = is_there && 2 * k + 1 < depth;
          *target = (is_there ? rounded_bits(row[2 * k]) : 0) | (has_odd ? rounded_bits(row[2 * k + 1]) : 0) << 16;
        }
      }
  });
}

// The last panel may be narrower than it is packed: its rows pass through a full-width buffer.
void narrow_panel(const Kernels& kernels, Piece piece, int64_t rows, int64_t width) {
  alignas(64) float buffer[kMaxRows * kPanel] = {};
  float* target = piece.out;
  const int64_t stride = piece.out_stride;
  if (!piece.is_first)
    for (int64_t r = 0; r < rows; ++r) std::copy_n(target + r * stride, width, buffer + r * kPanel);
  piece.out = buffer, piece.out_stride = kPanel;
  kernels.panel(piece, rows);
  for (int64_t r = 0; r < rows; ++r) std::copy_n(buffer + r * kPanel, width, target + r * stride);
}

}  // namespace

const Kernels* generic_kernels() {
  static const Kernels kernels{"generic", Generic::kRows, 1, panel_kernel<Generic>};
  return &kernels;
}

int64_t rate() { return kernels().rate; }

const void* prepare(const linear::Product& p, int64_t threads) {
  thread_local Arena arena;
  thread_local Rows rows;
  // An odd number of cache lines between rows: those of a tile never share the cache's sets.
  const int64_t stride = (ceil_div(num_pairs_of(p.depth), kLine) | 1) * kLine;
  uint32_t* pairs = (uint32_t*)arena.reserve(p.num_rows * stride);
  rows = {pairs, stride};
  parallel_for_runs(p.num_rows, p.depth, kElementsPerThread, threads,
                    [&](int64_t r) { round_row(p.x + r * p.x_stride, p.depth, pairs + r * stride); });
  return &rows;
}

void run(const linear::Product& p, int64_t row, int64_t rows, int64_t first_panel, int64_t end_panel) {
  const Rows& x = *(const Rows*)p.prepared;
  const Kernels& used = kernels();
  const int64_t num_pairs = num_pairs_of(p.depth), num_blocks = ceil_div(rows, used.max_rows);
  const auto piece = [&](int64_t panel, int64_t k0, int64_t begin, int64_t count, int64_t next_panel, int64_t next_k0) {
    const uint32_t* weights = (const uint32_t*)p.weights;
    const int64_t chunk = std::min(kChunk, num_pairs - k0), column = panel * kPanel, width = p.num_columns - column;
    const Piece piece{x.pairs + begin * x.stride + k0,
                      x.stride,
                      weights + (panel * num_pairs + k0) * kPanel,
                      weights + (next_panel * num_pairs + next_k0) * kPanel,
                      chunk,
                      k0 + chunk == num_pairs && p.bias ? p.bias + column : nullptr,
                      p.out + begin * p.out_stride + column,
                      p.out_stride,
                      k0 == 0};
    width < kPanel ? narrow_panel(used, piece, count, width) : used.panel(piece, count);
  };
  if (num_blocks == 1) {  // in the order in which the weights lie
    for (int64_t panel = first_panel; panel < end_panel; ++panel)
      for (int64_t k0 = 0; k0 == 0 || k0 < num_pairs; k0 += kChunk) piece(panel, k0, row, rows, panel, k0 + kChunk);
    return;
  }
  for (int64_t k0 = 0; k0 == 0 || k0 < num_pairs; k0 += kChunk)  // a chunk of weights stays in the cache for all rows
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t begin = row + rows * b / num_blocks, count = row + rows * (b + 1) / num_blocks - begin;
      for (int64_t panel = first_panel; panel < end_panel - 1; ++panel) piece(panel, k0, begin, count, panel + 1, k0);
      piece(end_panel - 1, k0, begin, count, first_panel, b + 1 < num_blocks ? k0 : k0 + kChunk);
    }
}

void unpack_row(const void* packed, int64_t depth, int64_t id, float* out) {
  const int64_t num_pairs = num_pairs_of(depth);
  for (int64_t k = 0; k < num_pairs; ++k) {
    const uint32_t pair = ((const uint32_t*)packed)[packed_index(id, k, num_pairs)];
    out[2 * k] = bit_cast<float>(pair << 16);
    if (2 * k + 1 < depth) out[2 * k + 1] = bit_cast<float>(pair & 0xffff0000u);
  }
}

}  // namespace kvasir::pairs

using namespace kvasir;

// Bytes of `depth` x `num_columns` weights.
KVASIR_EXPORT int64_t kvasir_pairs_bytes(int64_t num_columns, int64_t depth) {
  return pairs::ceil_div(num_columns, pairs::kPanel) * pairs::kPanel * pairs::num_pairs_of(depth) * 4;
}

// weight [num_columns][depth] with row_stride elements between rows, rounded to bfloat16 -> packed.
KVASIR_EXPORT void kvasir_pairs_pack(const void* weight, int64_t dtype, int64_t row_stride, int64_t num_columns,
                                     int64_t depth, void* packed, int64_t threads) {
  with_dtype(dtype, [&](auto type) {
    pairs::pack((const decltype(type)*)weight, row_stride, num_columns, depth, (uint32_t*)packed, threads);
  });
}

// Name of the instructions in use; `wanted` takes those from now on, where they are there, and null changes nothing.
KVASIR_EXPORT const char* kvasir_pairs_isa(const char* wanted) {
  using namespace pairs;
  if (wanted == nullptr) return kernels().name;
  chosen.store(widest());
  for (const Kernels* found : {avx512_kernels(), generic_kernels()})
    if (found != nullptr && std::strcmp(found->name, wanted) == 0) chosen.store(found);
  return kernels().name;
}
