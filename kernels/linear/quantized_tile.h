// One panel of a quantised weight times a few rows, for any instruction set; included by one file for each.
#pragma once

#include "quantized.h"

#define KVASIR_TILE static inline __attribute__((always_inline))

namespace kvasir::quantized {
namespace {

// Isa offers: Int and Float vectors of kLanes columns, kVectors of them at a time, kRows rows at a time;
//   Codes   bytes of weights as `dot` takes them         load, low_half, high_half -> Codes
//   Value   four activations for all columns             broadcast
//   Int dot(Int sum, Codes, Value); Int start(zeros, -sum); Float operations.
template <class Isa, class Format, int Rows>
struct Tile {
  using Int = typename Isa::Int;
  using Float = typename Isa::Float;
  static constexpr int kVectors = Isa::kVectors;
  static constexpr int64_t kLine = kPanel * 4;  // bytes of one step in k

  // A function of its own: the compiler must not keep what is in `out` in the registers that the sums need.
  __attribute__((noinline)) static void add_group(const Activations& x, int64_t row, int64_t group, const uint8_t* w, int64_t column,
                                                  float* out) {
    Int sums[Rows][kVectors];
    const uint8_t* x_at = x.codes + row * x.code_stride + group * (Format::kGroup / 4) * Isa::kValueBytes;
    const float* scale_at = x.scales + row * x.num_groups + group;
    const int32_t* sum_at = x.sums + row * x.num_groups + group;
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] = start(w, column + j * Isa::kLanes, sum_at[r * x.num_groups]);
    const uint8_t* line = w + Format::kHead + column * 4;
    constexpr int kLines = Format::kGroup / (Format::kIsPacked ? 8 : 4);
#pragma GCC unroll 2
    for (int i = 0; i < kLines; ++i, line += kLine) {
      if constexpr (Format::kIsPacked) {
        typename Isa::Codes low[kVectors], high[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) Isa::load_halves(line + j * Isa::kLanes * 4, low[j], high[j]);
        add_line(x_at, x.code_stride, low, sums);
        add_line(x_at + Isa::kValueBytes, x.code_stride, high, sums);
        x_at += 2 * Isa::kValueBytes;
      } else {
        typename Isa::Codes codes[kVectors];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) Isa::load(line + j * Isa::kLanes * 4, codes[j]);
        add_line(x_at, x.code_stride, codes, sums);
        x_at += Isa::kValueBytes;
      }
    }
    Float scales[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) scales[j] = Isa::load_bfloat16(w + 2 * (column + j * Isa::kLanes));
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const float scale = scale_at[r * x.num_groups];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* target = out + r * kPanel + column + j * Isa::kLanes;
        Isa::store(target, Isa::add(Isa::load_float(target),
                                    Isa::mul(Isa::to_float(sums[r][j]), Isa::mul(scales[j], Isa::broadcast(scale)))));
      }
    }
  }

  // The sum over q x begins at minus z times the sum of x.
  KVASIR_TILE Int start(const uint8_t* w, int64_t column, int32_t sum) {
    if constexpr (Format::kZero >= 0) return Isa::broadcast(-Format::kZero * sum);
    return Isa::mul(Isa::load_int16(w + 2 * (kPanel + column)), Isa::broadcast(-sum));
  }

  KVASIR_TILE void add_line(const uint8_t* x, int64_t stride, const typename Isa::Codes (&codes)[kVectors],
                            Int (&sums)[Rows][kVectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const auto value = Isa::load_value(x + r * stride);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[r][j] = Isa::dot(sums[r][j], codes[j], value);
    }
  }
};

template <class Isa, class Format, int Rows>
static void rows_times_panel(const Activations& x, int64_t row, const uint8_t* panel, float* out) {
  for (int64_t group = 0; group < x.num_groups; ++group, panel += Format::kBytes)
    for (int64_t column = 0; column < kPanel; column += Isa::kVectors * Isa::kLanes)
      Tile<Isa, Format, Rows>::add_group(x, row, group, panel, column, out);
}

template <class Isa, class Format, int Rows>
static void panel_of_at_most(const Activations& x, int64_t row, int64_t rows, const uint8_t* panel, float* out) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return panel_of_at_most<Isa, Format, Rows - 1>(x, row, rows, panel, out);
  }
  rows_times_panel<Isa, Format, Rows>(x, row, panel, out);
}

template <class Isa, class Format>
static void panel_kernel(const Activations& x, int64_t row, int64_t rows, const uint8_t* panel, float* out) {
  panel_of_at_most<Isa, Format, Isa::kRows>(x, row, rows, panel, out);
}

template <class Isa>
static Kernels kernels_of(const char* name) {
  return {name, Isa::kRows, Isa::kValueBytes == 8, panel_kernel<Isa, Int8>, panel_kernel<Isa, Int4>};
}

}  // namespace
}  // namespace kvasir::quantized
