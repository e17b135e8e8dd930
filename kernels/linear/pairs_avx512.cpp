// Products of bfloat16 pairs with AVX512-BF16: two multiply-adds per lane in one instruction. In assembly, so that the
// library needs no more than the flags of its level; whether the CPU has the instruction is asked at run time.
#include "pairs.h"

#if defined(__AVX512BW__)
#include <immintrin.h>

#include "pairs_tile.h"

namespace kvasir::pairs {
namespace {

struct Avx512Bf16 {
  using Float = __m512;
  using Weights = __m512i;
  using Value = __m512i;
  static constexpr int kLanes = 16, kVectors = 2, kRows = 12;

  KVASIR_PAIRS Float zero() { return _mm512_setzero_ps(); }
  KVASIR_PAIRS void load(const uint32_t* p, Weights& pairs) { pairs = _mm512_loadu_si512(p); }
  KVASIR_PAIRS Value broadcast(uint32_t pair) { return _mm512_set1_epi32(int(pair)); }
  KVASIR_PAIRS Float dot(Float sum, Weights pairs, Value value) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(value));
    return sum;
  }
  KVASIR_PAIRS Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  KVASIR_PAIRS Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  KVASIR_PAIRS void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
};

}  // namespace
}  // namespace kvasir::pairs
#endif

namespace kvasir::pairs {

const Kernels* avx512_kernels() {
#if defined(__AVX512BW__)
  static const Kernels kernels{"avx512_bf16", Avx512Bf16::kRows, 2, panel_kernel<Avx512Bf16>};
  if (__builtin_cpu_supports("avx512bf16")) return &kernels;
#endif
  return nullptr;
}

}  // namespace kvasir::pairs
