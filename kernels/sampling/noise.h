// The noise of sampling: Philox4x32-10 (Salmon et al. 2011), key = the row's 64 bits, counter = (token / 4, 0, 0, 0),
// output word token % 4; and Gumbel variables from its words, accurate in both tails.
#pragma once

#include "simd.h"

namespace kvasir {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// No Gumbel variable from 32 random bits is larger: -ln(-ln(1 - 2^-33)) = 33 ln 2 = 22.874.
constexpr float kMaxGumbel = 22.88f;

typedef uint64_t vulong __attribute__((vector_size(kLanes * 4)));

// Products of the lower halves of the 64-bit lanes with b.
KVASIR_INLINE vulong multiply_even(vulong a, uint32_t b) {
#if defined(__AVX512F__)  // maskz: the plain form makes GCC 12 warn about its own header
  return (vulong)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vulong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// High and low halves of the 64-bit products a[i] * b.
KVASIR_INLINE void multiply_wide(vuint a, uint32_t b, vuint& high, vuint& low) {
  const vulong even = multiply_even((vulong)a, b), odd = multiply_even((vulong)a >> 32, b);
  const vulong upper = vulong{} + 0xFFFFFFFF00000000u;
  high = (vuint)((even >> 32) | (odd & upper));
  low = (vuint)((even & ~upper) | (odd << 32));
}

struct PhiloxWords {
  vuint word[4];
};

// The four output words for kLanes counters.
KVASIR_INLINE PhiloxWords philox(vuint counter, uint64_t key) {
  vuint c0 = counter, c1 = vuint{}, c2 = vuint{}, c3 = vuint{};
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    vuint high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxM0, high0, low0);
    multiply_wide(c2, kPhiloxM1, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

#if defined(__clang__)
#define KVASIR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVASIR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vuint){__VA_ARGS__})
#endif

KVASIR_INLINE void interleave(vuint a, vuint b, vuint& low, vuint& high) {
#if defined(__AVX512F__)
  low = KVASIR_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = KVASIR_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  low = KVASIR_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = KVASIR_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
}

constexpr int kNoiseTile = 4 * kLanes;

// Words of the kNoiseTile tokens from `first` (a multiple of 4) on, in token order.
KVASIR_INLINE void tile_words(uint32_t first, uint64_t key, vuint words[4]) {
  vuint lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  const PhiloxWords x = philox(lane + first / 4, key);
  vuint even_low, even_high, odd_low, odd_high;
  interleave(x.word[0], x.word[2], even_low, even_high);
  interleave(x.word[1], x.word[3], odd_low, odd_high);
  interleave(even_low, odd_low, words[0], words[1]);
  interleave(even_high, odd_high, words[2], words[3]);
}

// Words of any kLanes tokens.
KVASIR_INLINE vuint token_words(vuint token, uint64_t key) {
  const PhiloxWords x = philox(token >> 2, key);
  const vuint lane = token & 3u;
  const vuint low = lane == 0u ? x.word[0] : x.word[1];
  const vuint high = lane == 2u ? x.word[2] : x.word[3];
  return lane < 2u ? low : high;
}

// ln(1 + t) + exponent * ln 2 for sqrt(1/2) - 1 <= t <= sqrt(2) - 1; polynomial of Cephes' logf.
KVASIR_INLINE vfloat log_reduced(vfloat t, vfloat exponent) {
  const vfloat square = t * t;
  vfloat p = broadcast(7.0376836292e-2f);
  p = fma(p, t, broadcast(-1.1514610310e-1f));
  p = fma(p, t, broadcast(1.1676998740e-1f));
  p = fma(p, t, broadcast(-1.2420140846e-1f));
  p = fma(p, t, broadcast(1.4249322787e-1f));
  p = fma(p, t, broadcast(-1.6668057665e-1f));
  p = fma(p, t, broadcast(2.0000714765e-1f));
  p = fma(p, t, broadcast(-2.4999993993e-1f));
  p = fma(p, t, broadcast(3.3333331174e-1f));
  p = p * t * square;
  p = fma(exponent, broadcast(-2.12194440e-4f), p);
  p = fma(square, broadcast(-0.5f), p);
  return fma(exponent, broadcast(0.693359375f), t + p);
}

// x = m * 2^exponent with sqrt(1/2) <= m < sqrt(2), for normal positive x; returns m - 1.
KVASIR_INLINE vfloat split_exponent(vfloat x, vfloat& exponent) {
  const vint bits = (vint)x;
  const vint e = (bits - 0x3f3504f3) >> 23;
  exponent = __builtin_convertvector(e, vfloat);
  return (vfloat)(bits - (e << 23)) - 1.0f;
}

// -ln(-ln u), u = (word + 0.5) / 2^32. Near u = 1, where large values come from, u itself has no room in a float:
// there 1 - u is formed instead, exactly, and the logarithm is taken of 1 - (1 - u).
KVASIR_INLINE vfloat gumbel(vuint word) {
  const vint is_high = word >= 0xB504F334u;  // u >= sqrt(1/2)
  const vuint distance = is_high ? ~word : word;
  const vfloat part = (__builtin_convertvector(distance, vfloat) + 0.5f) * 0x1p-32f;  // 1 - u or u
  vfloat exponent;
  const vfloat reduced = split_exponent(part, exponent);
  const vfloat t = is_high ? -part : reduced;
  const vfloat minus_log = -log_reduced(t, is_high ? zeros() : exponent);
  const vfloat outer = split_exponent(minus_log, exponent);
  return -log_reduced(outer, exponent);
}

}  // namespace kvasir
