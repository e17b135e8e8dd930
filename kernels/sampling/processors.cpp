// Around the choice of a token: penalties and masks before it, log-probabilities after it. Rows run in parallel.
#include "select.h"
#include "team.h"

using namespace kvasir;

namespace {

// Elements of rows that are worth waking a thread.
constexpr int64_t kElementsPerThread = 131072;

// The repetition penalty scales towards less likely whatever the sign; the other two subtract.
void penalise_row(float* row, int64_t n, const int32_t* counts, const uint8_t* in_prompt, float repetition,
                  float presence, float frequency) {
  for (int64_t i = 0; i < n; ++i) {
    const bool was_generated = counts[i] > 0;
    float x = row[i];
    const float repeated = x > 0.0f ? x / repetition : x * repetition;
    x = (was_generated || in_prompt[i]) ? repeated : x;
    row[i] = was_generated ? x - (frequency * float(counts[i]) + presence) : x;
  }
}

void mask_row(float* row, int64_t n, const uint32_t* allowed) {
  for (int64_t word = 0; word * 32 < n; ++word) {
    if (allowed[word] == 0xFFFFFFFFu) continue;
    const int64_t end = std::min<int64_t>(n, word * 32 + 32);
    // Adding keeps NaN and turns +inf into NaN, so a mask never hides a numerical fault.
    for (int64_t i = word * 32; i < end; ++i) row[i] += (allowed[word] >> (i % 32)) & 1 ? 0.0f : -kInfinity;
  }
}

struct LogProbRow {
  float* log_prob;
  int64_t* rank;
  int64_t* top_ids;
  float* top_log_probs;
};

void log_prob_row(const float* row, int n, int64_t id, int top_n, LogProbRow out) {
  static thread_local SelectScratch scratch;
  vfloat lanes = broadcast(-kInfinity);
  vint is_bad = {};
  float best = -kInfinity;
  bool bad = false;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vfloat x = load(row + i);
    is_bad |= ~(vint)(x < kInfinity);
    lanes = max(x, lanes);
  }
  for (; i < n; ++i) bad |= !(row[i] < kInfinity), best = std::max(best, row[i]);
  best = std::max(best, reduce_max(lanes));
  if (bad || any(is_bad) || best == -kInfinity || id < 0 || id >= n) {
    *out.log_prob = std::numeric_limits<float>::quiet_NaN();
    *out.rank = 0;
    std::fill(out.top_ids, out.top_ids + top_n, -1);
    std::fill(out.top_log_probs, out.top_log_probs + top_n, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  Sum sum;
  for (i = 0; i < n; i += kLanes) {
    // Lanes beyond the row hold `best`: e^0 each, subtracted below.
    vfloat x = i + kLanes <= n ? load(row + i) : load_n(row + i, n - i);
    if (i + kLanes > n)
      for (int lane = n - i; lane < kLanes; ++lane) x[lane] = best;
    sum.add(exp(x - best));
  }
  const double total = sum.total() - double(i - n);
  const float log_total = float(std::log(total));
  *out.log_prob = (row[id] - best) - log_total;
  const float own = row[id];
  int32_t rank = 1;
  for (i = 0; i < id; ++i) rank += row[i] >= own;  // equals with a lower id come first
  for (i = int(id) + 1; i < n; ++i) rank += row[i] > own;
  *out.rank = rank;
  if (top_n == 0) return;
  const Boundary last = top_k_boundary(row, n, top_n, scratch);
  auto& top = scratch.candidates;
  top.clear();
  for_each_at_least(row, n, last.key, [&](int j) {
    if (last.keeps(row[j], j)) top.push_back(j);
  });
  std::sort(top.begin(), top.end(), Precedes{row});
  for (int j = 0; j < top_n; ++j) {
    out.top_ids[j] = top[j];
    out.top_log_probs[j] = (row[top[j]] - best) - log_total;
  }
}

}  // namespace

// For each j: row rows[j] of logits [*, n] (rows `stride` apart) by the counts and the prompt mask of slot slots[j].
KVASIR_EXPORT void kvasir_apply_penalties(float* logits, int64_t n, int64_t stride, const int64_t* rows,
                                          const int64_t* slots, int64_t num_penalised, const int32_t* output_counts,
                                          const uint8_t* prompt_mask, const float* repetition, const float* presence,
                                          const float* frequency, int64_t num_threads) {
  parallel_for_runs(num_penalised, n, kElementsPerThread, num_threads, [&](int64_t j) {
    penalise_row(logits + rows[j] * stride, n, output_counts + slots[j] * n, prompt_mask + slots[j] * n, repetition[j],
                 presence[j], frequency[j]);
  });
}

// mask [num_rows, ceil(n / 32)]: bit i % 32 of word i / 32 allows token i.
KVASIR_EXPORT void kvasir_apply_token_bitmask(float* logits, int64_t num_rows, int64_t n, int64_t stride,
                                              const int32_t* mask, int64_t num_threads) {
  const int64_t num_words = (n + 31) / 32;
  parallel_for_runs(num_rows, n, kElementsPerThread, num_threads, [&](int64_t r) {
    mask_row(logits + r * stride, n, reinterpret_cast<const uint32_t*>(mask) + r * num_words);
  });
}

// A row that is not finite, and an id outside of it, give NaN, rank 0 and ids -1.
KVASIR_EXPORT void kvasir_log_probs(const float* logits, int64_t num_rows, int64_t n, int64_t stride, const int64_t* ids,
                                    int64_t top_n, float* log_probs, int64_t* ranks, int64_t* top_ids,
                                    float* top_log_probs, int64_t num_threads) {
  parallel_for_runs(num_rows, n, kElementsPerThread, num_threads, [&](int64_t r) {
    log_prob_row(logits + r * stride, int(n), ids[r], int(top_n),
                 {log_probs + r, ranks + r, top_ids + r * top_n, top_log_probs + r * top_n});
  });
}
