// One chunk of one panel times a few rows, for any instruction set; included by one file for each. Rows beyond what
// registers hold are the caller's to divide.
#pragma once

#include "pairs.h"

#define KVASIR_PAIRS static inline __attribute__((always_inline))

namespace kvasir::pairs {
namespace {

// Isa offers: Float vectors of kLanes columns, kVectors of them at a time, kRows rows at a time;
//   Weights   pairs of kLanes columns        load
//   Value     a pair of x for all columns    broadcast
//   Float dot(Float sum, Weights, Value); Float operations.
template <class Isa, int Rows, int Vectors>
__attribute__((noinline)) void tile(const Piece& p, int64_t column) {
  using Float = typename Isa::Float;
  Float sums[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sums[r][j] = Isa::zero();
  const uint32_t *x = p.x, *weights = p.weights + column;
  const uint32_t* ahead = p.ahead + p.num_pairs * column;  // this tile's share
  const int64_t x_stride = p.x_stride, num_pairs = p.num_pairs;
#pragma GCC unroll 2
  for (int64_t k = 0; k < num_pairs; ++k, weights += kPanel) {
    // With few rows the hardware prefetcher keeps up with the plain stream and more instructions only cost.
    if constexpr (Rows >= 4) {
      for (int64_t j = 0; j < Vectors * Isa::kLanes; j += 16)
        __builtin_prefetch(ahead + k * Vectors * Isa::kLanes + j, 0, 2);
    }
    typename Isa::Weights pairs[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) Isa::load(weights + j * Isa::kLanes, pairs[j]);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const auto value = Isa::broadcast(x[r * x_stride + k]);
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sums[r][j] = Isa::dot(sums[r][j], pairs[j], value);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      const int64_t at = column + j * Isa::kLanes;
      float* target = p.out + r * p.out_stride + at;
      Float sum = p.is_first ? sums[r][j] : Isa::add(Isa::load_float(target), sums[r][j]);
      if (p.bias) sum = Isa::add(sum, Isa::load_float(p.bias + at));
      Isa::store(target, sum);
    }
}

template <class Isa, int Rows>
void panel_of_at_most(const Piece& p, int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return panel_of_at_most<Isa, Rows - 1>(p, rows);
  }
  // As many vectors side by side as registers allow: with one or two rows the additions' latency would bound.
  constexpr int kVectors = Rows <= 2 ? int(kPanel) / Isa::kLanes : Isa::kVectors;
  for (int64_t column = 0; column < kPanel; column += kVectors * Isa::kLanes) tile<Isa, Rows, kVectors>(p, column);
}

template <class Isa>
void panel_kernel(const Piece& p, int64_t rows) {
  panel_of_at_most<Isa, Isa::kRows>(p, rows);
}

}  // namespace
}  // namespace kvasir::pairs
