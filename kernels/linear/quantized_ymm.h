// What AVX2 and AVX-VNNI share: vectors of 8 columns.
#pragma once

#include <immintrin.h>

#include "quantized_tile.h"

namespace kvasir::quantized {
namespace {

struct Ymm {
  using Int = __m256i;
  using Float = __m256;
  static constexpr int kLanes = 8;

  KVASIR_TILE void halves(const uint8_t* p, __m256i& low, __m256i& high) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)p), mask = _mm256_set1_epi8(15);
    low = _mm256_and_si256(both, mask);
    high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
  KVASIR_TILE Int broadcast_four(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  KVASIR_TILE Int broadcast(int32_t x) { return _mm256_set1_epi32(x); }
  KVASIR_TILE Int mul(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
  KVASIR_TILE Int load_int16(const uint8_t* p) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)); }
  KVASIR_TILE Float load_bfloat16(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  KVASIR_TILE Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
  KVASIR_TILE Float broadcast(float x) { return _mm256_set1_ps(x); }
  KVASIR_TILE Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  KVASIR_TILE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  KVASIR_TILE Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  KVASIR_TILE void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
};

}  // namespace
}  // namespace kvasir::quantized
