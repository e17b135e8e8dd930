// Parts of a row in the order (key descending, index ascending) without sorting the row: its best k elements, or the
// smallest prefix that holds a given mass. A prefix is described by its last element.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace kvasir {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kTile = 64;          // elements per tile; tiles without a candidate are skipped
constexpr int kFewElements = 512;  // so few are ordered directly

// The last element of a prefix.
struct Boundary {
  float key;
  int32_t index;
  bool keeps(float other, int32_t i) const { return (other > key) | ((other == key) & (i <= index)); }
};

struct SelectScratch {
  std::vector<float> tile_best;
  std::vector<int32_t> candidates;
};

KVASIR_INLINE bool any(vint mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// Sums many floats with an error that does not grow with their number.
class Sum {
 public:
  KVASIR_INLINE void add(vfloat v) {
    part_ += v;
    if (++pending_ == 32) flush();
  }
  double total() {
    flush();
    return total_;
  }

 private:
  KVASIR_INLINE void flush() {
    total_ += reduce_add(part_);
    part_ = zeros();
    pending_ = 0;
  }
  vfloat part_ = zeros();
  double total_ = 0;
  int pending_ = 0;
};

// Calls visit(i) for each index of [0, n) with low < key <= high (at_least: low <= key), ascending.
template <bool at_least, class Visit>
KVASIR_INLINE void for_each_between(const float* key, int n, float low, float high, Visit visit) {
  const auto is_in = [&](auto x) { return (at_least ? x >= low : x > low) & (x <= high); };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (!any((vint)is_in(load(key + i)))) continue;
    for (int j = i; j < i + kLanes; ++j)
      if (is_in(key[j])) visit(j);
  }
  for (; i < n; ++i)
    if (is_in(key[i])) visit(i);
}

template <class Visit>
KVASIR_INLINE void for_each_at_least(const float* key, int n, float least, Visit visit) {
  for_each_between<true>(key, n, least, kInfinity, visit);
}

struct Precedes {
  const float* key;
  bool operator()(int32_t a, int32_t b) const { return key[a] > key[b] || (key[a] == key[b] && a < b); }
};

// The k-th element of the order; 1 <= k <= n. The k-th largest of the tiles' maxima is exceeded or met by at least k
// elements, so only elements from there on are ordered.
inline Boundary top_k_boundary(const float* key, int n, int k, SelectScratch& scratch) {
  float least = -kInfinity;
  const int num_tiles = (n + kTile - 1) / kTile;
  if (k <= num_tiles) {
    scratch.tile_best.clear();
    for (int start = 0; start < n; start += kTile) {
      const int end = std::min(start + kTile, n);
      float best = -kInfinity;
      int i = start;
      if (end - start == kTile) {
        vfloat lanes = load(key + i);
        for (i += kLanes; i < end; i += kLanes) lanes = max(lanes, load(key + i));
        best = reduce_max(lanes);
      }
      for (; i < end; ++i) best = std::max(best, key[i]);
      scratch.tile_best.push_back(best);
    }
    auto kth = scratch.tile_best.begin() + (k - 1);
    std::nth_element(scratch.tile_best.begin(), kth, scratch.tile_best.end(), std::greater<float>());
    least = *kth;
  }
  auto& candidates = scratch.candidates;
  candidates.clear();
  for_each_at_least(key, n, least, [&](int i) { candidates.push_back(i); });
  std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), Precedes{key});
  return {key[candidates[k - 1]], candidates[k - 1]};
}

struct Tail {
  double mass;
  int64_t count;
};

// Mass and number of the elements whose key lies above `threshold`.
inline Tail above(const float* key, const float* weight, int n, float threshold) {
  Sum sum;
  vint count = {};
  double rest = 0;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vint is_above = (vint)(load(key + i) > threshold);
    sum.add(is_above ? load(weight + i) : zeros());
    count -= is_above;
  }
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += count[lane];
  for (; i < n; ++i)
    if (key[i] > threshold) rest += weight[i], ++total;
  return {sum.total() + rest, total};
}

// The element of `order` at which the mass, starting from `mass`, reaches `target`; the last one if none does.
inline Boundary reach_mass(const float* key, const float* weight, std::vector<int32_t>& order, double mass, double target) {
  size_t begin = 0, end = order.size();
  const Precedes precedes{key};
  while (end - begin > kFewElements) {  // partition, then go on in the half in which the target is reached
    const size_t middle = begin + (end - begin) / 2;
    std::nth_element(order.begin() + begin, order.begin() + middle, order.begin() + end, precedes);
    double half = 0;
    for (size_t i = begin; i < middle; ++i) half += weight[order[i]];
    if (mass + half >= target) {
      end = middle;
    } else {
      mass += half;
      begin = middle;
    }
  }
  std::sort(order.begin() + begin, order.begin() + end, precedes);
  size_t last = begin;
  while (last + 1 < end && (mass += weight[order[last]]) < target) ++last;
  return {key[order[last]], order[last]};
}

// The last element of the smallest prefix with at least `target` of mass, and at least one element; n >= 1.
// All elements that may belong to it have keys in (low, high]. Bisection on the key by vector passes until few remain.
inline Boundary mass_boundary(const float* key, const float* weight, int n, double target, float low, float high,
                              SelectScratch& scratch) {
  constexpr int kMaxPasses = 16;
  Tail below_high = above(key, weight, n, high), below_low = above(key, weight, n, low);
  for (int pass = 0; pass < kMaxPasses && below_low.count - below_high.count > kFewElements; ++pass) {
    const float middle = low + (high - low) / 2;
    if (!(low < middle && middle < high)) break;
    const Tail tail = above(key, weight, n, middle);
    if (tail.mass < target) {
      high = middle;
      below_high = tail;
    } else {
      low = middle;
      below_low = tail;
    }
  }
  auto& candidates = scratch.candidates;
  candidates.clear();
  for_each_between<false>(key, n, low, high, [&](int i) { candidates.push_back(i); });
  return reach_mass(key, weight, candidates, below_high.mass, target);
}

}  // namespace kvasir
