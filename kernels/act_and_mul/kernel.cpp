// Gated activations: out = activation(gate) * up, float arithmetic. Threads share the rows; small work stays on one.
#include "row.h"

#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };  // as ACTIVATIONS in __init__.py

// Elements that are worth waking a thread.
constexpr int64_t kElementsPerThread = 65536;

template <Activation A>
KVASIR_INLINE vfloat activate(vfloat x) {
  if constexpr (A == kSilu) return x * sigmoid(x);
  if constexpr (A == kGeluTanh) {  // 0.5 * (1 + tanh(z)) is sigmoid(2 z)
    const vfloat inner = x * fma(x * x, broadcast(0.044715f), broadcast(1.0f));
    return x * sigmoid(inner * 1.5957691216057308f);
  }
  vfloat y;
  for (int i = 0; i < kLanes; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
  return y;
}

template <class T, Activation A>
void row(const T* gate, const T* up, int64_t size, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, activate<A>(load(gate + i)) * load(up + i));
  const int rest = int(size - i);
  if (rest) store_n(out + i, activate<A>(load_n(gate + i, rest)) * load_n(up + i, rest), rest);
}

template <class T, Activation A>
void rows(const T* gate_up, int64_t stride, int64_t num_rows, int64_t size, T* out, int64_t num_threads) {
  parallel_for_runs(num_rows, size, kElementsPerThread, num_threads, [&](int64_t i) {
    row<T, A>(gate_up + i * stride, gate_up + i * stride + size, size, out + i * size);
  });
}

template <class T>
void dispatch(const void* gate_up, int64_t stride, int64_t num_rows, int64_t size, int64_t activation, void* out,
              int64_t num_threads) {
  auto run = activation == kSilu ? rows<T, kSilu> : activation == kGeluTanh ? rows<T, kGeluTanh> : rows<T, kGelu>;
  run((const T*)gate_up, stride, num_rows, size, (T*)out, num_threads);
}

}  // namespace

namespace kvasir::activation {

void activate_row(int64_t activation, const float* gate, const float* up, int64_t size, float* out) {
  const auto run = activation == kSilu       ? row<float, kSilu>
                   : activation == kGeluTanh ? row<float, kGeluTanh>
                                             : row<float, kGelu>;
  run(gate, up, size, out);
}

}  // namespace kvasir::activation

// gate_up: num_rows rows of 2 * size elements, `stride` elements apart; out: [num_rows, size]; dtype as DType.
KVASIR_EXPORT void kvasir_act_and_mul(const void* gate_up, int64_t stride, int64_t num_rows, int64_t size,
                                      int64_t dtype, int64_t activation, void* out, int64_t num_threads) {
  if (dtype == kFloat32) dispatch<float>(gate_up, stride, num_rows, size, activation, out, num_threads);
  if (dtype == kFloat16) dispatch<Half>(gate_up, stride, num_rows, size, activation, out, num_threads);
  if (dtype == kBFloat16) dispatch<BFloat16>(gate_up, stride, num_rows, size, activation, out, num_threads);
}
