// Gathers rows of a matrix, widening 16-bit rows to float where asked. One thread: a step gathers little, and a
// fork-join would cost more than the copy.
#include "dispatch.h"
#include "simd.h"

namespace {

using namespace kvasir;

template <class T>
void widen_rows(const T* source, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t size, float* out) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* from = source + rows[i] * stride;
    float* to = out + i * size;
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) store(to + j, load(from + j));
    for (; j < size; ++j) to[j] = to_float(from[j]);
  }
}

// Whether no element is infinite or NaN: x - x is 0 for all others.
template <class T>
bool all_finite(const T* x, int64_t stride, int64_t num_rows, int64_t size) {
  vfloat sums = zeros();
  float rest = 0.0f;
  for (int64_t i = 0; i < num_rows; ++i) {
    const T* row = x + i * stride;
    int64_t j = 0;
    for (; j + kLanes <= size; j += kLanes) {
      const vfloat value = load(row + j);
      sums = sums + (value - value);
    }
    for (; j < size; ++j) rest += to_float(row[j]) - to_float(row[j]);
  }
  for (int lane = 0; lane < kLanes; ++lane) rest += sums[lane];
  return rest == 0.0f;
}

}  // namespace

// source: rows of `size` elements, `stride` elements apart; out: [num_rows, size]. Types as DType; out_dtype is
// source_dtype or float.
KVASIR_EXPORT void kvasir_gather_rows(const void* source, int64_t stride, int64_t source_dtype, const int64_t* rows,
                                      int64_t num_rows, int64_t size, void* out, int64_t out_dtype) {
  if (source_dtype == out_dtype) {
    const size_t width = source_dtype == kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < num_rows; ++i) {
      std::memcpy((char*)out + size_t(i * size) * width, (const char*)source + size_t(rows[i] * stride) * width,
                  size_t(size) * width);
    }
  } else if (source_dtype == kFloat16) {
    widen_rows((const Half*)source, stride, rows, num_rows, size, (float*)out);
  } else {
    widen_rows((const BFloat16*)source, stride, rows, num_rows, size, (float*)out);
  }
}

// x: rows of `size` elements, `stride` elements apart; row r of out [num_segments, size] is row cu_seqlens[r + 1] - 1 of
// x, in its own type. Returns whether all elements of x up to there are finite.
KVASIR_EXPORT int64_t kvasir_gather_last(const void* x, int64_t stride, int64_t dtype, const int32_t* cu_seqlens,
                                         int64_t num_segments, int64_t size, void* out) {
  const size_t width = dtype == kFloat32 ? 4 : 2;
  for (int64_t r = 0; r < num_segments; ++r)
    std::memcpy((char*)out + size_t(r * size) * width, (const char*)x + size_t((cu_seqlens[r + 1] - 1) * stride) * width,
                size_t(size) * width);
  bool is_finite = true;
  with_dtype(dtype, [&](auto type) {
    is_finite = all_finite((const decltype(type)*)x, stride, cu_seqlens[num_segments], size);
  });
  return is_finite;
}
