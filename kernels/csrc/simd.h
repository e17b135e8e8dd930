// Vectors of floats of the width this library is compiled for (16 lanes with AVX-512, else 8), on GCC's vector
// extensions; intrinsics only where the extensions have no word for it. Element types: float, Half, BFloat16.
// The compiler is told not to contract a*b+c: write fma where fusing is wanted.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define KVASIR_EXPORT extern "C" __attribute__((visibility("default")))
#define KVASIR_INLINE inline __attribute__((always_inline))

namespace kvasir {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float vfloat __attribute__((vector_size(kLanes * 4)));
typedef int32_t vint __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vuint __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vhalfword __attribute__((vector_size(kLanes * 2)));

// Storage types; the arithmetic is always float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Codes of kernels/native.py: DTYPE_CODES.
enum DType : int64_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

KVASIR_INLINE vfloat broadcast(float x) { return x - vfloat{}; }
KVASIR_INLINE vfloat zeros() { return vfloat{}; }

template <class To, class From>
KVASIR_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- fma, max ----

KVASIR_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

KVASIR_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  vfloat r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#endif
}

// The second operand where either is NaN.
KVASIR_INLINE vfloat max(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

KVASIR_INLINE vfloat min(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

KVASIR_INLINE vfloat abs(vfloat x) { return (vfloat)((vint)x & 0x7fffffff); }

// ---- scalar conversions ----

KVASIR_INLINE float to_float(float x) { return x; }
KVASIR_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
KVASIR_INLINE float to_float(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float magnitude = float(mantissa) * 0x1p-24f;  // subnormal or zero
  return sign ? -magnitude : magnitude;
#endif
}

template <class T>
KVASIR_INLINE T from_float(float x);
template <>
KVASIR_INLINE float from_float<float>(float x) {
  return x;
}
template <>
KVASIR_INLINE BFloat16 from_float<BFloat16>(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
KVASIR_INLINE Half from_float<Half>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
  if (magnitude < 0x38800000) {  // subnormal: the addition rounds to a multiple of 2^-24
    return {uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13))};
#endif
}

// ---- loads and stores of kLanes elements, any alignment ----

KVASIR_INLINE vfloat load(const float* p) {
  vfloat v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

KVASIR_INLINE vfloat load(const BFloat16* p) {
  vhalfword h;
  std::memcpy(&h, p, sizeof(h));
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
}

KVASIR_INLINE vfloat load(const Half* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

KVASIR_INLINE void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof(v)); }

KVASIR_INLINE void store(BFloat16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint nan = (bits >> 16) | 0x40;
  const vhalfword h = __builtin_convertvector(v != v ? nan : rounded, vhalfword);
  std::memcpy(p, &h, sizeof(h));
}

KVASIR_INLINE void store(Half* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<Half>(v[i]);
#endif
}

// The first n < kLanes elements; the other lanes are zero. Reads nothing beyond.
template <class T>
KVASIR_INLINE vfloat load_n(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}

template <class T>
KVASIR_INLINE void store_n(T* p, vfloat v, int n) {
  T buffer[kLanes];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(T));
}

// ---- reductions over the lanes, always in the same order (halves are added to each other) ----

#if defined(__AVX2__)
// In registers; join(a, b) works lane by lane.
template <class Join>
KVASIR_INLINE float reduce(vfloat v, Join join) {
#if defined(__AVX512F__)
  const __m256 eight = join(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 eight = (__m256)v;
#endif
  const __m128 four = join(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = join(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(join(two, _mm_movehdup_ps(two)));
}

struct Add {
  KVASIR_INLINE __m256 operator()(__m256 a, __m256 b) const { return _mm256_add_ps(a, b); }
  KVASIR_INLINE __m128 operator()(__m128 a, __m128 b) const { return _mm_add_ps(a, b); }
};
struct Larger {
  KVASIR_INLINE __m256 operator()(__m256 a, __m256 b) const { return _mm256_max_ps(a, b); }
  KVASIR_INLINE __m128 operator()(__m128 a, __m128 b) const { return _mm_max_ps(a, b); }
};

KVASIR_INLINE float reduce_add(vfloat v) { return reduce(v, Add{}); }
KVASIR_INLINE float reduce_max(vfloat v) { return reduce(v, Larger{}); }
#else
KVASIR_INLINE float reduce_add(vfloat v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

KVASIR_INLINE float reduce_max(vfloat v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}
#endif

// Lane i of the result is the sum of the lanes of v[i], added in one order for all i; destroys v. Log2(kLanes) rounds of
// interleaving pairs cost less than kLanes separate reductions.
KVASIR_INLINE vfloat sum_each(vfloat (&v)[kLanes]) {
#if defined(__AVX512F__)
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)v[2 * i], b = (__m512)v[2 * i + 1];
    v[i] = (vfloat)_mm512_unpacklo_ps(a, b) + (vfloat)_mm512_unpackhi_ps(a, b);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = (__m512d)v[2 * i], b = (__m512d)v[2 * i + 1];
    v[i] = (vfloat)_mm512_unpacklo_pd(a, b) + (vfloat)_mm512_unpackhi_pd(a, b);
  }
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {  // 128-bit quarters: two pairs, then the last one
    const __m512 a = (__m512)(i < 2 ? v[2 * i] : v[0]), b = (__m512)(i < 2 ? v[2 * i + 1] : v[1]);
    const vfloat sum = (vfloat)_mm512_shuffle_f32x4(a, b, 0x88) + (vfloat)_mm512_shuffle_f32x4(a, b, 0xdd);
    v[i < 2 ? i : 0] = sum;
  }
  return v[0];
#elif defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 a = (__m256)v[2 * i], b = (__m256)v[2 * i + 1];
    v[i] = (vfloat)_mm256_unpacklo_ps(a, b) + (vfloat)_mm256_unpackhi_ps(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = (__m256d)v[2 * i], b = (__m256d)v[2 * i + 1];
    v[i] = (vfloat)_mm256_unpacklo_pd(a, b) + (vfloat)_mm256_unpackhi_pd(a, b);
  }
  const __m256 a = (__m256)v[0], b = (__m256)v[1];
  return (vfloat)_mm256_permute2f128_ps(a, b, 0x20) + (vfloat)_mm256_permute2f128_ps(a, b, 0x31);
#else
  vfloat sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = reduce_add(v[i]);
  return sums;
#endif
}

// ---- elementary functions ----

// e^x, relative error below 2e-7; 0 below -87.3, infinity above 88.7; NaN stays NaN.
// Range reduction x = n ln2 + r with |r| <= ln2 / 2 (ln2 in two parts), then the Taylor-like minimax polynomial of
// degree 6 (coefficients of Cephes' expf), then the exponent in two factors so that neither overflows.
template <bool kMayBePositive>
KVASIR_INLINE vfloat exp_of(vfloat x) {
  constexpr float kLow = -87.33654f, kHigh = 88.72283f;
  const vfloat magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vfloat clamped = max(broadcast(-88.0f), x);
  if constexpr (kMayBePositive) clamped = min(broadcast(89.0f), clamped);
  const vfloat shifted = fma(clamped, broadcast(1.44269504088896341f), magic);
  const vfloat n = shifted - magic;
  vfloat r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440e-4f), r);
  vfloat p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  const vint exponent = (vint)shifted - (vint)magic;
  if constexpr (!kMayBePositive) return x < kLow ? zeros() : p * (vfloat)((exponent + 127) << 23);
  const vint half = exponent >> 1;
  const vfloat scale_a = (vfloat)((half + 127) << 23), scale_b = (vfloat)((exponent - half + 127) << 23);
  vfloat y = p * scale_a * scale_b;
  y = x < kLow ? zeros() : y;
  y = x > kHigh ? broadcast(std::numeric_limits<float>::infinity()) : y;
  return x != x ? x : y;
}

KVASIR_INLINE vfloat exp(vfloat x) { return exp_of<true>(x); }

// The same bits for x <= 0, in fewer steps: from kLow on the exponent needs no second factor. NaN stays NaN.
KVASIR_INLINE vfloat exp_not_positive(vfloat x) { return exp_of<false>(x); }

// tanh x, relative error below 4e-7; polynomial of Cephes' tanhf below 0.625, else through e^2x.
KVASIR_INLINE vfloat tanh(vfloat x) {
  const vfloat a = abs(x);
  const vfloat square = x * x;
  vfloat p = broadcast(-5.70498872745e-3f);
  p = fma(p, square, broadcast(2.06390887954e-2f));
  p = fma(p, square, broadcast(-5.37397155531e-2f));
  p = fma(p, square, broadcast(1.33314422036e-1f));
  p = fma(p, square, broadcast(-3.33332819422e-1f));
  const vfloat small = fma(p * square, x, x);
  const vfloat large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  const vfloat signed_large = x < 0.0f ? -large : large;
  return a < 0.625f ? small : signed_large;
}

// 1 / (1 + e^-x)
KVASIR_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace kvasir
