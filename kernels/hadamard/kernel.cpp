// The Walsh-Hadamard transform of rows whose length is a power of two, in float arithmetic.
#include "arena.h"
#include "dispatch.h"
#include "simd.h"
#include "team.h"
#include "transform.h"

namespace {

using namespace kvasir;

constexpr int64_t kElementsPerThread = 65536;  // that are worth waking a thread

thread_local Arena arena;

}  // namespace

// x, out: [num_rows, size], dtype as DType.
KVASIR_EXPORT void kvasir_hadamard(const void* x, int64_t num_rows, int64_t size, int64_t dtype, float scale, void* out,
                                   int64_t num_threads) {
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for_runs(num_rows, size, kElementsPerThread, num_threads, [&](int64_t row) {
      float* y = arena.reserve(size);
      for (int64_t i = 0; i < size; ++i) y[i] = to_float(((const T*)x)[row * size + i]);
      hadamard::transform(y, size);
      for (int64_t i = 0; i < size; ++i) ((T*)out)[row * size + i] = from_float<T>(y[i] * scale);
    });
  });
}
