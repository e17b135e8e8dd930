// Rotates one head by one position; shared by the rotation alone and its fusion with the cache write.
#pragma once

#include <type_traits>

#include "simd.h"

namespace kvasir {

// to may equal from. cos_sin: half cosines, then half sines. Elements beyond 2 * half are copied. The products are
// rounded before they are added, as torch does it.
template <class T, class U>
KVASIR_INLINE void rotate(const T* from, U* to, const float* cos_sin, int64_t half, int64_t head_dim,
                          bool interleaved) {
  const float* cos = cos_sin;
  const float* sin = cos_sin + half;
  int64_t i = 0;
  if (!interleaved) {
    for (; i + kLanes <= half; i += kLanes) {
      const vfloat a = load(from + i), b = load(from + half + i), c = load(cos + i), s = load(sin + i);
      store(to + i, a * c - b * s);
      store(to + half + i, b * c + a * s);
    }
  }
  for (; i < half; ++i) {
    const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : half + i;
    const float a = to_float(from[first]), b = to_float(from[second]);
    to[first] = from_float<U>(a * cos[i] - b * sin[i]);
    to[second] = from_float<U>(b * cos[i] + a * sin[i]);
  }
  if ((const void*)from != (void*)to) {
    for (int64_t j = 2 * half; j < head_dim; ++j) to[j] = from_float<U>(to_float(from[j]));
  }
}

}  // namespace kvasir
