// The highest scores of each row, in the order of the slots: finds the last key that is kept by quickselect (linear in
// the row), then walks over the row once. Keys are score above slot, so that no two are equal.
#include <algorithm>
#include <vector>

#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

// Scores that are worth waking a thread.
constexpr int64_t kScoresPerThread = 8192;

// Unsigned 32 bits that order as the floats do; NaN lowest.
inline uint32_t ordered(float score) {
  if (score != score) return 0;
  const uint32_t bits = bit_cast<uint32_t>(score + 0.0f);  // adding turns -0.0 into 0.0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline uint64_t key_of(const float* scores, int64_t slot) { return uint64_t(ordered(scores[slot])) << 32 | uint64_t(slot); }

void choose(const float* scores, int64_t length, int64_t count, int64_t* index, int64_t width) {
  int64_t at = 0;
  count = std::min(count, length);
  if (count == length) {
    for (; at < count; ++at) index[at] = at;
  } else if (count > 0) {
    thread_local std::vector<uint64_t> keys;
    keys.resize(length);
    for (int64_t slot = 0; slot < length; ++slot) keys[slot] = key_of(scores, slot);
    std::nth_element(keys.begin(), keys.end() - count, keys.end());
    const uint64_t last = keys[length - count];
    for (int64_t slot = 0; slot < length; ++slot)
      if (key_of(scores, slot) >= last) index[at++] = slot;
  }
  std::fill(index + at, index + width, int64_t(-1));
}

}  // namespace

// scores: rows of num_slots, `stride` apart; index: [num_rows, width].
KVASIR_EXPORT void kvasir_top_slots(const float* scores, int64_t stride, const int64_t* num_kept, const int64_t* lengths,
                                    int64_t* index, int64_t width, int64_t num_rows, int64_t num_slots,
                                    int64_t num_threads) {
  parallel_for_runs(num_rows, num_slots, kScoresPerThread, num_threads, [&](int64_t row) {
    choose(scores + row * stride, lengths[row], num_kept[row], index + row * width, width);
  });
}
