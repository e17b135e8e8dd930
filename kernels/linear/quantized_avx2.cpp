// Quantised products with AVX2: bytes are widened to 16 bits, whose pairwise products are exact in int32. (Multiplying bytes
// directly would saturate at 16 bits: 2 * 255 * 127.) Bytes 0 and 2 of four make one vector, 1 and 3 another.
#include "quantized.h"

#if defined(__AVX2__)
#include <immintrin.h>

#include "quantized_ymm.h"

namespace kvasir::quantized {
namespace {

struct Avx2 : Ymm {
  struct Codes {
    __m256i even, odd;
  };
  struct Value {
    __m256i even, odd;
  };
  static constexpr int kVectors = 2, kRows = 4, kValueBytes = 8;

  KVASIR_TILE void widen(__m256i bytes, Codes& codes) {
    codes.even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    codes.odd = _mm256_srli_epi16(bytes, 8);
  }
  KVASIR_TILE void load(const uint8_t* p, Codes& codes) { widen(_mm256_loadu_si256((const __m256i*)p), codes); }
  KVASIR_TILE void load_halves(const uint8_t* p, Codes& low, Codes& high) {
    __m256i low_bytes, high_bytes;
    halves(p, low_bytes, high_bytes);
    widen(low_bytes, low);
    widen(high_bytes, high);
  }
  KVASIR_TILE Value load_value(const uint8_t* p) { return {broadcast_four(p), broadcast_four(p + 4)}; }
  KVASIR_TILE Int dot(Int sum, const Codes& codes, const Value& value) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(codes.even, value.even));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes.odd, value.odd));
  }
};

}  // namespace
}  // namespace kvasir::quantized
#endif

namespace kvasir::quantized {

const Kernels* avx2_kernels() {
#if defined(__AVX2__)
  static const Kernels kernels = kernels_of<Avx2>("avx2");
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace kvasir::quantized
