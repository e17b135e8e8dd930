// From floats to the codes of packed blocks and back: one group of block_size tokens of one kv head. What the formats are
// stands in __init__.py, where the bytes lie in layout.py.
#pragma once

#include <algorithm>

#include "simd.h"

namespace kvasir::packed {

enum Coding : int64_t { kFp8 = 0, kInt8 = 1, kChannel = 2, kToken = 3 };

// Keys or values; field by field the Side of cpp_impl.py.
struct Side {
  int64_t coding, bits, dim, block_size, row_bytes, group_bytes, num_scales, value_group;
};

constexpr int kNumberBits = 8;        // of a scale that lies in the lowest bits of the first 8 codes
constexpr int kNotFinite = 255;       // the scale's number that makes all its values NaN
constexpr float kHalfMax = 65504;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

KVASIR_INLINE vfloat as_floats(vint v) { return __builtin_convertvector(v, vfloat); }

// kLanes bytes, widened; the compiler's own conversion by four goes lane by lane.
KVASIR_INLINE vint load_unsigned(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vint)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (vint)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vint v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

KVASIR_INLINE vint load_signed(const uint8_t* p) { return load_unsigned(p) << 24 >> 24; }

// ---- the scale of int8 and fp8 ----

KVASIR_INLINE int number_in(const uint8_t* codes) {
  uint64_t word;
  std::memcpy(&word, codes, sizeof(word));
  return int((word & 0x0101010101010101u) * 0x0102040810204080u >> 56);  // bit i of the top byte is that of byte i
}

KVASIR_INLINE float int8_scale(int number) { return bit_cast<float>(uint32_t(number + 832) << 20); }
KVASIR_INLINE float fp8_scale(int number) { return bit_cast<float>(uint32_t(number) << 23); }

// ---- codes to floats ----

KVASIR_INLINE float fp8_value(int magnitude) {
  return magnitude < 8 ? float(magnitude) * 0x1p-9f : bit_cast<float>(uint32_t(magnitude + 960) << 20);
}

// Through fp16, whose exponent is one bit wider, so that small codes need no case of their own: value * 2^-8.
KVASIR_INLINE vfloat load_fp8(const uint8_t* p) {
  const vint codes = load_unsigned(p);
  const vhalfword bits = __builtin_convertvector((codes & 0x7f) << 7 | (codes & 0x80) << 8, vhalfword);
  Half half[kLanes];
  std::memcpy(half, &bits, sizeof(half));
  return load(half);
}

inline void unpack_int8(const Side& side, const uint8_t* codes, int64_t first, int64_t count, float* to) {
  for (int64_t t = first; t < first + count; ++t, to += side.dim) {
    const uint8_t* row = codes + t * side.dim;
    const int number = number_in(row);
    const float scale = number == kNotFinite ? kNaN : int8_scale(number);
    int64_t d = 0;
    for (; d + kLanes <= side.dim; d += kLanes)
      store(to + d, as_floats(load_signed(row + d)) * scale);
    for (; d < side.dim; ++d) to[d] = float(int8_t(row[d])) * scale;
  }
}

inline void unpack_fp8(const Side& side, const uint8_t* codes, int64_t first, int64_t count, float* to) {
  const int number = number_in(codes);
  const float scale = number == kNotFinite ? kNaN : fp8_scale(number);
  const int64_t n = count * side.dim;
  codes += first * side.dim;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_fp8(codes + i) * 256.0f * scale);
  for (; i < n; ++i) to[i] = (codes[i] & 0x80 ? -1.0f : 1.0f) * fp8_value(codes[i] & 0x7f) * scale;
}

// Codes of kLanes neighbouring channels of any token. A byte holds channels that lie row_bytes apart, so they are kLanes
// bytes with one shift, or all bytes of a short row repeated, with a shift for each repetition.
struct CodeVector {
  int64_t row_bytes, offset;
  vint shift, mask;

  static bool covers(const Side& side) {
    return side.dim % kLanes == 0 && (side.row_bytes % kLanes == 0 || (side.row_bytes == 8 || side.row_bytes == 4));
  }

  CodeVector(const Side& side, int64_t channel)
      : row_bytes(side.row_bytes), offset(channel % side.row_bytes), mask(vint{} + ((1 << side.bits) - 1)) {
    for (int lane = 0; lane < kLanes; ++lane) shift[lane] = int((channel + lane) / row_bytes * side.bits);
  }

  KVASIR_INLINE vfloat load(const uint8_t* row) const {
    if (row_bytes >= kLanes) return as_floats((load_unsigned(row + offset) >> shift) & mask);
    uint64_t word[2];
    if (row_bytes == 8) {
      std::memcpy(word, row, 8);
    } else {
      uint32_t half;
      std::memcpy(&half, row, 4);
      word[0] = half * 0x100000001u;
    }
    word[1] = word[0];
    return as_floats((load_unsigned((const uint8_t*)word) >> shift) & mask);
  }
};

KVASIR_INLINE float code_at(const Side& side, const uint8_t* row, int64_t channel) {
  return float(row[channel % side.row_bytes] >> (channel / side.row_bytes * side.bits) & ((1 << side.bits) - 1));
}

// Scales of a group: that of token t and channel d is at t * per_token + d / channels.
struct Scales {
  const Half *scale, *zero;
  int64_t per_token, channels;
  Scales(const Side& side, const uint8_t* group) : scale((const Half*)group), zero(scale + side.num_scales) {
    per_token = side.coding == kChannel ? 0 : side.num_scales / side.block_size;
    channels = side.coding == kChannel ? 1 : side.value_group;
  }
};

// A vector of channels lies in one group of values: value_group is a multiple of kLanes, or there is one group only.
inline void unpack_uniform(const Side& side, const uint8_t* group, int64_t first, int64_t count, float* to) {
  const Scales scales(side, group);
  const uint8_t* rows = group + side.num_scales * 4;
  int64_t d = 0;
  for (; CodeVector::covers(side) && d < side.dim; d += kLanes) {
    const CodeVector codes(side, d);
    const Half *scale = scales.scale + d / scales.channels, *zero = scales.zero + d / scales.channels;
    vfloat s, z;
    if (scales.per_token == 0) s = load(scale), z = load(zero);
    for (int64_t t = first; t < first + count; ++t) {
      if (scales.per_token != 0) {
        s = broadcast(to_float(scale[t * scales.per_token]));
        z = broadcast(to_float(zero[t * scales.per_token]));
      }
      store(to + (t - first) * side.dim + d, fma(codes.load(rows + t * side.row_bytes), s, z));
    }
  }
  for (; d < side.dim; ++d) {
    for (int64_t t = first; t < first + count; ++t) {
      const int64_t at = t * scales.per_token + d / scales.channels;
      const float code = code_at(side, rows + t * side.row_bytes, d);
      to[(t - first) * side.dim + d] = fma(code, to_float(scales.scale[at]), to_float(scales.zero[at]));
    }
  }
}

// Tokens [first, first + count) of a group to count * dim floats.
inline void unpack(const Side& side, const uint8_t* group, int64_t first, int64_t count, float* to) {
  switch (side.coding) {
    case kFp8: return unpack_fp8(side, group, first, count, to);
    case kInt8: return unpack_int8(side, group, first, count, to);
    default: return unpack_uniform(side, group, first, count, to);
  }
}

// ---- floats to codes ----

// The largest magnitude of n values, and 0 where all are finite, else NaN.
struct Extent {
  float largest = 0, poison = 0;
  Extent(const float* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      largest = std::max(largest, std::fabs(x[i]));
      poison += x[i] - x[i];
    }
  }
};

// The neighbour of a code that has the wrong lowest bit: towards y, at a tie the smaller one.
KVASIR_INLINE int with_bit(int magnitude, int bit, float y, float value) {
  if ((magnitude & 1) == bit) return magnitude;
  return y > value || magnitude == 0 ? magnitude + 1 : magnitude - 1;
}

inline void pack_int8(const float* x, int64_t n, uint8_t* codes) {
  const Extent extent(x, n);
  const int bits = bit_cast<int32_t>(extent.largest / 127.0f);
  int number = std::clamp(((bits + 0xfffff) >> 20) - 832, 0, 254);
  const float scale = int8_scale(number);
  if (extent.poison != 0) number = kNotFinite;
  for (int64_t i = 0; i < n; ++i) {
    const float y = std::min(127.0f, std::fabs(x[i]) / scale);
    int magnitude = int(std::nearbyint(y));
    if (i < kNumberBits) magnitude = with_bit(magnitude, number >> i & 1, y, float(magnitude));
    codes[i] = uint8_t(std::signbit(x[i]) ? -magnitude : magnitude);
  }
}

// The e4m3 magnitude nearest to 0 <= y <= 448. Adding 2^14 rounds to multiples of 2^-9, the spacing below 2^-6.
KVASIR_INLINE int nearest_fp8(float y) {
  const uint32_t bits = bit_cast<uint32_t>(y);
  const uint32_t small = bit_cast<uint32_t>(y + 16384.0f) - bit_cast<uint32_t>(16384.0f);
  return int(y < 0x1p-6f ? small : ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - 960);
}

inline void pack_fp8(const float* x, int64_t n, uint8_t* codes) {
  const Extent extent(x, n);
  const int bits = bit_cast<int32_t>(extent.largest / 448.0f);
  int number = std::clamp(int(uint32_t(bits + 0x7fffff) >> 23), 1, 253);
  const float inverse = fp8_scale(254 - number);
  if (extent.poison != 0) number = kNotFinite;
  for (int64_t i = 0; i < n; ++i) {
    const float y = std::min(448.0f, std::fabs(x[i]) * inverse);
    int magnitude = nearest_fp8(y);
    if (i < kNumberBits) magnitude = with_bit(magnitude, number >> i & 1, y, fp8_value(magnitude));
    codes[i] = uint8_t(magnitude | (std::signbit(x[i]) ? 0x80 : 0));
  }
}

// Scale and zero for `count` values that lie `stride` apart, and their codes, one byte each.
inline void pack_uniform(const float* x, int64_t count, int64_t stride, int levels, Half* scale, Half* zero,
                         uint8_t* codes) {
  float low = x[0], high = x[0], poison = 0;
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, x[i * stride]);
    high = std::max(high, x[i * stride]);
    poison += x[i * stride] - x[i * stride];
  }
  const float z = to_float(from_float<Half>(std::clamp(low, -kHalfMax, kHalfMax)));
  *scale = from_float<Half>(std::min(std::max(high - z, 0.0f) / float(levels), kHalfMax));
  *zero = from_float<Half>(z + poison);
  const float s = to_float(*scale);
  for (int64_t i = 0; i < count; ++i) {
    const float y = s > 0 ? (x[i * stride] - z) / s : 0;
    codes[i * stride] = uint8_t(std::nearbyint(std::min(float(levels), std::max(0.0f, y))));
  }
}

inline void pack_group_uniform(const Side& side, const float* x, uint8_t* group, uint8_t* scratch) {
  const int levels = (1 << side.bits) - 1;
  Half *scale = (Half*)group, *zero = scale + side.num_scales;
  if (side.coding == kChannel) {
    for (int64_t d = 0; d < side.dim; ++d)
      pack_uniform(x + d, side.block_size, side.dim, levels, scale + d, zero + d, scratch + d);
  } else {
    for (int64_t t = 0; t < side.block_size; ++t)
      for (int64_t d = 0; d < side.dim; d += side.value_group, ++scale, ++zero) {
        const int64_t at = t * side.dim + d;
        pack_uniform(x + at, std::min(side.value_group, side.dim - d), 1, levels, scale, zero, scratch + at);
      }
  }
  uint8_t* rows = group + side.num_scales * 4;
  for (int64_t t = 0; t < side.block_size; ++t)
    for (int64_t j = 0; j < side.row_bytes; ++j) {
      int byte = 0;
      for (int64_t i = 0; i < 8 / side.bits; ++i) byte |= scratch[t * side.dim + i * side.row_bytes + j] << (i * side.bits);
      rows[t * side.row_bytes + j] = uint8_t(byte);
    }
}

// block_size * dim floats to a group; `scratch` is block_size * dim bytes.
inline void pack(const Side& side, const float* x, uint8_t* group, uint8_t* scratch) {
  switch (side.coding) {
    case kFp8: return pack_fp8(x, side.block_size * side.dim, group);
    case kInt8:
      for (int64_t t = 0; t < side.block_size; ++t) pack_int8(x + t * side.dim, side.dim, group + t * side.dim);
      return;
    default: return pack_group_uniform(side, x, group, scratch);
  }
}

}  // namespace kvasir::packed
