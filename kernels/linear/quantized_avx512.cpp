// Quantised products with AVX-512 VNNI: four byte products and their sum into int32 in one instruction, without saturation.
// The instruction is written in assembly: GCC 12 copies the accumulators of its intrinsic, and spills them.
#include "quantized.h"

#if defined(__AVX512BW__)
#include <immintrin.h>

#include "quantized_tile.h"

namespace kvasir::quantized {
namespace {

struct Avx512Vnni {
  using Int = __m512i;
  using Float = __m512;
  using Codes = __m512i;
  static constexpr int kLanes = 16, kVectors = 2, kRows = 12, kValueBytes = 4;

  KVASIR_TILE void load(const uint8_t* p, Codes& codes) { codes = _mm512_loadu_si512(p); }
  KVASIR_TILE void load_halves(const uint8_t* p, Codes& low, Codes& high) {
    const __m512i both = _mm512_loadu_si512(p), mask = _mm512_set1_epi8(15);
    low = _mm512_and_si512(both, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
  KVASIR_TILE Int load_value(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
  }
  KVASIR_TILE Int dot(Int sum, Codes codes, Int value) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(value));
    return sum;
  }

  KVASIR_TILE Int broadcast(int32_t x) { return _mm512_set1_epi32(x); }
  KVASIR_TILE Int mul(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
  KVASIR_TILE Int load_int16(const uint8_t* p) {
    return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p));
  }
  KVASIR_TILE Float load_bfloat16(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  KVASIR_TILE Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
  KVASIR_TILE Float broadcast(float x) { return _mm512_set1_ps(x); }
  KVASIR_TILE Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  KVASIR_TILE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  KVASIR_TILE Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  KVASIR_TILE void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
};

}  // namespace
}  // namespace kvasir::quantized
#endif

namespace kvasir::quantized {

const Kernels* avx512_vnni_kernels() {
#if defined(__AVX512BW__)
  static const Kernels kernels = kernels_of<Avx512Vnni>("avx512_vnni");
  if (__builtin_cpu_supports("avx512vnni")) return &kernels;
#endif
  return nullptr;
}

}  // namespace kvasir::quantized
