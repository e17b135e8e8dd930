// Weights of 8 and 4 bits: quantising, the rounding of activations, and which instructions the products use. See
// quantized.h for what is computed.
#include "quantized.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "arena.h"
#include "dispatch.h"
#include "product.h"
#include "simd.h"
#include "team.h"

namespace kvasir::quantized {
namespace {

constexpr int64_t kElementsPerThread = 16384;  // whose rounding is worth a thread that is awake

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Function>
void with_format(int64_t format, Function function) {
  format == kInt8 ? function(Int8{}) : function(Int4{});
}

template <class Format>
int64_t num_groups_of(int64_t depth) {
  return ceil_div(depth, Format::kGroup);
}

// ---- the product without special instructions ----

template <class Format>
void generic_panel(const Activations& x, int64_t row, int64_t rows, const uint8_t* panel, float* out) {
  for (int64_t group = 0; group < x.num_groups; ++group, panel += Format::kBytes)
    for (int64_t r = row; r < row + rows; ++r) {
      const int16_t* values = (const int16_t*)(x.codes + r * x.code_stride) + group * Format::kGroup;
      int32_t sums[kPanel] = {};
      for (int k = 0; k < Format::kGroup; ++k) {
        const int in_four = k % 4, value = values[k / 4 * 4 + (in_four >> 1 | (in_four & 1) << 1)];
        const int line = Format::kIsPacked ? k / 8 : k / 4, shift = Format::kIsPacked ? k / 4 % 2 * 4 : 0;
        const uint8_t* codes = panel + Format::kHead + line * kPanel * 4 + in_four;
        for (int64_t j = 0; j < kPanel; ++j)
          sums[j] += value * (Format::kIsPacked ? codes[4 * j] >> shift & 15 : codes[4 * j]);
      }
      const float scale = x.scales[r * x.num_groups + group];
      const int32_t sum = x.sums[r * x.num_groups + group];
      for (int64_t j = 0; j < kPanel; ++j) {
        const int32_t zero = Format::kZero >= 0 ? Format::kZero : ((const int16_t*)panel)[kPanel + j];
        out[(r - row) * kPanel + j] +=
            float(sums[j] - zero * sum) * (to_float(((const BFloat16*)panel)[j]) * scale);
      }
    }
}

// ---- choice ----

std::atomic<const Kernels*> chosen{nullptr};

const Kernels* widest() {
  for (const Kernels* kernels : {avx512_vnni_kernels(), avx_vnni_kernels(), avx2_kernels()})
    if (kernels != nullptr) return kernels;
  return generic_kernels();
}

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_relaxed);
  if (found == nullptr) chosen.store(found = widest(), std::memory_order_relaxed);
  return *found;
}

// ---- activations ----

// Codes of `count` values, and zeros up to a whole group. Values that are not finite make the scale NaN, and so the row.
void round_group(const float* x, int64_t count, int group, bool as_int16, uint8_t* codes, float* scale, int32_t* sum) {
  constexpr int kMaxGroup = Int8::kGroup;
  constexpr int32_t kInfinity = 0x7f800000;
  alignas(64) float values[kMaxGroup] = {};
  alignas(64) int32_t rounded[kMaxGroup];
  std::copy_n(x, count, values);
  int32_t largest = 0;  // as bits: NaN is larger than all
  for (int k = 0; k < group; ++k) largest = std::max(largest, bit_cast<int32_t>(values[k]) & 0x7fffffff);
  const float top = bit_cast<float>(largest);
  *scale = largest >= kInfinity ? std::numeric_limits<float>::quiet_NaN() : top / 127.0f;
  const float inverse = largest >= kInfinity || top < kSmallest ? 0.0f : 127.0f / top;
  if (top < kSmallest) *scale = 0.0f;
  if (largest >= kInfinity) std::fill_n(values, group, 0.0f);
  int32_t total = 0;
  for (int k = 0; k < group; ++k) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
    rounded[k] = bit_cast<int32_t>(values[k] * inverse + kMagic) - bit_cast<int32_t>(kMagic);
    total += rounded[k];
  }
  *sum = total;
  if (!as_int16) {
    for (int k = 0; k < group; ++k) ((int8_t*)codes)[k] = int8_t(rounded[k]);
    return;
  }
  int16_t* wide = (int16_t*)codes;
  for (int k = 0; k < group; k += 4) {
    wide[k] = int16_t(rounded[k]), wide[k + 1] = int16_t(rounded[k + 2]);
    wide[k + 2] = int16_t(rounded[k + 1]), wide[k + 3] = int16_t(rounded[k + 3]);
  }
}

template <class Format>
const Activations* round_rows(const linear::Product& p, int64_t threads) {
  thread_local Arena arena;
  thread_local Activations rows;
  const bool as_int16 = kernels().takes_int16;
  const int64_t groups = num_groups_of<Format>(p.depth), code_bytes = groups * Format::kGroup * (as_int16 ? 2 : 1);
  float* memory = arena.reserve(p.num_rows * (code_bytes / 4 + 2 * groups));
  uint8_t* codes = (uint8_t*)memory;
  float* scales = memory + p.num_rows * code_bytes / 4;
  int32_t* sums = (int32_t*)(scales + p.num_rows * groups);
  rows = {codes, scales, sums, code_bytes, groups};
  parallel_for_runs(p.num_rows, p.depth, kElementsPerThread, threads, [&](int64_t r) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k0 = g * Format::kGroup, count = std::min<int64_t>(Format::kGroup, p.depth - k0);
      round_group(p.x + r * p.x_stride + k0, count, Format::kGroup, as_int16,
                  codes + r * code_bytes + k0 * (as_int16 ? 2 : 1), scales + r * groups + g, sums + r * groups + g);
    }
  });
  return &rows;
}

// ---- weights ----

// The smallest bfloat16 that is not below x >= 0.
BFloat16 round_up(float x) { return {uint16_t((bit_cast<uint32_t>(x) + 0xffff) >> 16)}; }

// One group of one column: scale, zero and codes at their places. `values` has zeros beyond the weight's end.
template <class Format>
void quantize_group(const float* values, int64_t column, uint8_t* at) {
  float low = 0, high = 0;
  bool is_finite = true;
  for (int k = 0; k < Format::kGroup; ++k) {
    low = std::min(low, values[k]), high = std::max(high, values[k]);
    is_finite &= std::isfinite(values[k]);
  }
  const float span = Format::kIsPacked ? (high - low) / 15.0f : std::max(high, -low) / 127.0f;
  is_finite &= std::isfinite(span);
  const BFloat16 scale = is_finite ? round_up(span) : from_float<BFloat16>(std::numeric_limits<float>::quiet_NaN());
  const float step = to_float(scale);
  const bool is_empty = !(step > 0);
  const int zero = Format::kIsPacked ? (is_empty ? 0 : int(std::nearbyint(-low / step))) : Format::kZero;
  ((BFloat16*)at)[column] = scale;
  if (Format::kIsPacked) ((int16_t*)at)[kPanel + column] = int16_t(zero);
  for (int k = 0; k < Format::kGroup; ++k) {
    const int code = is_empty ? zero : int(std::nearbyint(values[k] / step)) + zero;
    uint8_t* byte = at + Format::kHead + (k / (Format::kIsPacked ? 8 : 4) * kPanel + column) * 4 + k % 4;
    if (!Format::kIsPacked)
      *byte = uint8_t(code);
    else if (k % 8 < 4)
      *byte = uint8_t(std::clamp(code, 0, 15));
    else
      *byte = uint8_t(*byte | std::clamp(code, 0, 15) << 4);
  }
}

template <class Format, class T>
void pack(const T* weight, int64_t row_stride, int64_t num_columns, int64_t depth, uint8_t* packed, int64_t threads) {
  const int64_t groups = num_groups_of<Format>(depth);
  parallel_for(ceil_div(num_columns, kPanel), threads, [&](int64_t p) {
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t column = p * kPanel + j, k0 = g * Format::kGroup;
        float values[Format::kGroup] = {};
        if (column < num_columns)
          for (int64_t k = 0; k < std::min<int64_t>(Format::kGroup, depth - k0); ++k)
            values[k] = to_float(weight[column * row_stride + k0 + k]);
        quantize_group<Format>(values, j, packed + (p * groups + g) * Format::kBytes);
      }
  });
}

template <class Format>
void unpack(const uint8_t* packed, int64_t depth, int64_t id, float* out) {
  const int64_t groups = num_groups_of<Format>(depth), column = id % kPanel;
  const uint8_t* at = packed + id / kPanel * groups * Format::kBytes;
  for (int64_t k0 = 0; k0 < depth; k0 += Format::kGroup, at += Format::kBytes) {
    const float scale = to_float(((const BFloat16*)at)[column]);
    const int zero = Format::kIsPacked ? ((const int16_t*)at)[kPanel + column] : Format::kZero;
    for (int64_t k = 0; k < std::min<int64_t>(Format::kGroup, depth - k0); ++k) {
      const int byte = at[Format::kHead + (k / (Format::kIsPacked ? 8 : 4) * kPanel + column) * 4 + k % 4];
      const int code = Format::kIsPacked ? byte >> (k % 8 < 4 ? 0 : 4) & 15 : byte;
      out[k0 + k] = float(code - zero) * scale;
    }
  }
}

}  // namespace

const Kernels* generic_kernels() {
  static const Kernels kernels{"generic", kMaxRows, true, generic_panel<Int8>, generic_panel<Int4>};
  return &kernels;
}

const Activations* prepare(const linear::Product& p, int64_t threads) {
  const Activations* rows = nullptr;
  with_format(p.dtype, [&](auto format) { rows = round_rows<decltype(format)>(p, threads); });
  return rows;
}

void run(const linear::Product& p, int64_t row, int64_t rows, int64_t first_panel, int64_t end_panel) {
  const Activations& x = *(const Activations*)p.prepared;
  const Kernels& chosen = kernels();
  const PanelKernel kernel = p.dtype == kInt8 ? chosen.int8 : chosen.int4;
  const int64_t panel_bytes = x.num_groups * (p.dtype == kInt8 ? Int8::kBytes : Int4::kBytes);
  const int64_t num_blocks = ceil_div(rows, chosen.max_rows);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t column = panel * kPanel, width = std::min(kPanel, p.num_columns - column);
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t begin = row + rows * b / num_blocks, end = row + rows * (b + 1) / num_blocks;
      alignas(64) float sums[kMaxRows * kPanel] = {};
      kernel(x, begin, end - begin, (const uint8_t*)p.weights + panel * panel_bytes, sums);
      for (int64_t r = begin; r < end; ++r) {
        const float* sum = sums + (r - begin) * kPanel;
        float* target = p.out + r * p.out_stride + column;
        for (int64_t j = 0; j < width; ++j) target[j] = p.bias ? sum[j] + p.bias[column + j] : sum[j];
      }
    }
  }
}

void unpack_row(const void* packed, int64_t format, int64_t depth, int64_t id, float* out) {
  with_format(format, [&](auto f) { unpack<decltype(f)>((const uint8_t*)packed, depth, id, out); });
}

}  // namespace kvasir::quantized

using namespace kvasir;

// Bytes of `depth` x `num_columns` weights.
KVASIR_EXPORT int64_t kvasir_quantized_bytes(int64_t format, int64_t num_columns, int64_t depth) {
  int64_t bytes = 0;
  quantized::with_format(format, [&](auto f) {
    using Format = decltype(f);
    bytes = quantized::ceil_div(num_columns, quantized::kPanel) * quantized::num_groups_of<Format>(depth) * Format::kBytes;
  });
  return bytes;
}

// weight [num_columns][depth] with row_stride elements between rows -> packed.
KVASIR_EXPORT void kvasir_quantized_pack(const void* weight, int64_t dtype, int64_t row_stride, int64_t num_columns,
                                         int64_t depth, int64_t format, void* packed, int64_t threads) {
  with_dtype(dtype, [&](auto type) {
    quantized::with_format(format, [&](auto f) {
      quantized::pack<decltype(f)>((const decltype(type)*)weight, row_stride, num_columns, depth, (uint8_t*)packed,
                                   threads);
    });
  });
}

// Name of the instruction set in use; `wanted` takes that one from now on, where it is there, and null the widest.
KVASIR_EXPORT const char* kvasir_quantized_isa(const char* wanted) {
  using namespace quantized;
  if (wanted == nullptr) return kernels().name;
  chosen.store(widest());
  for (const Kernels* found : {avx512_vnni_kernels(), avx_vnni_kernels(), avx2_kernels(), generic_kernels()})
    if (found != nullptr && std::strcmp(found->name, wanted) == 0) chosen.store(found);
  return kernels().name;
}
