// RMS normalisation of rows, float arithmetic. Threads share the tokens; small work stays on one.
#include "row.h"

#include "dispatch.h"
#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 131072;
constexpr int kUnroll = 4;  // sums side by side, so that the additions' latency does not bound

template <class T>
float sum_of_squares(const T* x, int64_t size) {
  vfloat sums[kUnroll] = {};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= size; i += kUnroll * kLanes)
    for (int u = 0; u < kUnroll; ++u) {
      const vfloat v = load(x + i + u * kLanes);
      sums[u] = fma(v, v, sums[u]);
    }
  for (; i < size; i += kLanes) {
    const vfloat v = i + kLanes <= size ? load(x + i) : load_n(x + i, int(size - i));
    sums[0] = fma(v, v, sums[0]);
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x and out may be the same.
template <class T>
void normalize(const T* x, int64_t size, const float* weight, float eps, T* out) {
  const vfloat scale = broadcast(1.0f / std::sqrt(sum_of_squares(x, size) / float(size) + eps));
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
  const int rest = int(size - i);
  if (rest) store_n(out + i, load_n(x + i, rest) * scale * load_n(weight + i, rest), rest);
}

template <class T>
void add(const T* x, int64_t size, T* residual) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
  const int rest = int(size - i);
  if (rest) store_n(residual + i, load_n(residual + i, rest) + load_n(x + i, rest), rest);
}

}  // namespace

namespace kvasir::norm {

void normalize_row(const float* x, int64_t size, const float* weight, float eps, float* out) {
  normalize(x, size, weight, eps, out);
}

void add_row(const float* x, int64_t size, float* residual) { add(x, size, residual); }

}  // namespace kvasir::norm

// x, out: [num_tokens][num_heads][size] with their own strides, in elements; dtype as DType; weight: [size] float.
KVASIR_EXPORT void kvasir_rms_norm(const void* x, int64_t x_stride_t, int64_t x_stride_h, void* out,
                                   int64_t out_stride_t, int64_t out_stride_h, int64_t dtype, int64_t num_tokens,
                                   int64_t num_heads, int64_t size, const float* weight, float eps,
                                   int64_t num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for_runs(num_tokens, num_heads * size, kElementsPerThread, num_threads, [&](int64_t t) {
      for (int64_t h = 0; h < num_heads; ++h)
        normalize((const T*)x + t * x_stride_t + h * x_stride_h, size, weight, eps,
                  (T*)out + t * out_stride_t + h * out_stride_h);
    });
  });
}

// residual += x, out = its normalisation; rows of size elements, out contiguous.
KVASIR_EXPORT void kvasir_add_rms_norm(const void* x, int64_t x_stride, void* residual, int64_t residual_stride,
                                       void* out, int64_t dtype, int64_t num_tokens, int64_t size,
                                       const float* weight, float eps, int64_t num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for_runs(num_tokens, size, kElementsPerThread, num_threads, [&](int64_t t) {
      T* sum = (T*)residual + t * residual_stride;
      add((const T*)x + t * x_stride, size, sum);
      normalize<T>(sum, size, weight, eps, (T*)out + t * size);
    });
  });
}
