// Rows of a paged cache for arithmetic on tiles: found through a block table, and copied to floats where need be.
#pragma once

#include <algorithm>

#include "tile.h"

namespace kvasir::attention {

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The first n elements, then zeros up to `padded`.
template <class T>
void copy_row(const T* from, int64_t n, int64_t padded, float* to) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) store(to + d, load(from + d));
  if (d < n) store(to + d, load_n(from + d, int(n - d)));
  for (d = round_up(n, kLanes); d < padded; ++d) to[d] = 0;
}

// Pointers to rows first..last-1 of a tile whose first slot is `slot`; the others repeat the nearest, so that whole
// blocks of pointers can be read.
template <class T>
void find_rows(const T* cache, int64_t stride_block, const int32_t* table, int64_t block_size, int64_t dim, int64_t slot,
               Range range, const T** rows) {
  for (int j = range.begin; j < range.end;) {
    const int64_t block = (slot + j) / block_size, offset = (slot + j) % block_size;
    const T* row = cache + table[block] * stride_block + offset * dim;
    const int stop = int(std::min<int64_t>(range.end, j + block_size - offset));
    for (; j < stop; ++j, row += dim) rows[j] = row;
  }
  for (int j = 0; j < range.begin; ++j) rows[j] = rows[range.begin];
  for (int j = range.end; j < kTileKeys; ++j) rows[j] = rows[range.end - 1];
}

template <class T>
void convert_rows(const T* const* from, Range range, int64_t n, int64_t padded, float* copy, const float** to) {
  if (n == padded) {
    for (int j = range.begin; j < range.end; ++j)
      for (int64_t d = 0; d < n; d += kLanes) store(copy + j * n + d, load(from[j] + d));
  } else {
    for (int j = range.begin; j < range.end; ++j) copy_row(from[j], n, padded, copy + j * padded);
  }
  for (int j = 0; j < range.begin; ++j) to[j] = copy + range.begin * padded;
  for (int j = range.begin; j < range.end; ++j) to[j] = copy + j * padded;
  for (int j = range.end; j < kTileKeys; ++j) to[j] = copy + (range.end - 1) * padded;
}

}  // namespace kvasir::attention
