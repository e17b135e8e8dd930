// Moves rows of a pool within segments. Threads share the segments; each reads its sources into memory of its own first.
#include "arena.h"
#include "simd.h"
#include "team.h"

namespace {

using namespace kvasir;

// Bytes that are worth waking a thread.
constexpr int64_t kBytesPerThread = 1 << 18;

thread_local Arena arena;

void move_segment(char* pool, int64_t row_bytes, const int64_t* src, const int64_t* dst, int64_t count) {
  const auto moves = [&](int64_t i) { return src[i] >= 0 && dst[i] >= 0 && src[i] != dst[i]; };
  int64_t num_moved = 0;
  for (int64_t i = 0; i < count; ++i) num_moved += moves(i);
  if (num_moved == 0) return;
  char* buffer = reinterpret_cast<char*>(arena.reserve((num_moved * row_bytes + 3) / 4));
  char* to = buffer;
  for (int64_t i = 0; i < count; ++i) {
    if (!moves(i)) continue;
    std::memcpy(to, pool + src[i] * row_bytes, size_t(row_bytes));
    to += row_bytes;
  }
  const char* from = buffer;
  for (int64_t i = 0; i < count; ++i) {
    if (!moves(i)) continue;
    std::memcpy(pool + dst[i] * row_bytes, from, size_t(row_bytes));
    from += row_bytes;
  }
}

}  // namespace

// src, dst: [num_segments, count] rows of the pool, negative: none.
KVASIR_EXPORT void kvasir_move_slots(char* pool, int64_t row_bytes, const int64_t* src, const int64_t* dst,
                                     int64_t num_segments, int64_t count, int64_t num_threads) {
  parallel_for_runs(num_segments, count * row_bytes, kBytesPerThread, num_threads, [&](int64_t segment) {
    move_segment(pool, row_bytes, src + segment * count, dst + segment * count, count);
  });
}
