// The Walsh-Hadamard transform of one run of entries, a power of two of them.
#pragma once

#include <cstdint>

namespace kvasir::hadamard {

inline void transform(float* x, int64_t size) {
  for (int64_t distance = 1; distance < size; distance *= 2)
    for (int64_t start = 0; start < size; start += 2 * distance) {
      float *first = x + start, *second = first + distance;
      for (int64_t i = 0; i < distance; ++i) {
        const float a = first[i], b = second[i];
        first[i] = a + b;
        second[i] = a - b;
      }
    }
}

}  // namespace kvasir::hadamard
