// Choosing tokens, one row of logits at a time and rows in parallel; the result of a row depends on nothing else.
// What is computed is defined in reference.py; how, in noise.h (the draws) and select.h (top-k, nucleus).
//
// The leader rule: a tile whose best logit lies so far below the best noised logit found so far that no noise could
// lift it (kMaxGumbel, before any noise is made; word_limit, before its logarithms) is skipped. No result changes.
#include <cfloat>

#include "choose.h"
#include "noise.h"
#include "select.h"
#include "team.h"

using namespace kvasir;

namespace {

// Elements of rows that are worth waking a thread, when only the best is looked for and when noise or filters come in:
// some 200 microseconds.
constexpr int64_t kGreedyElementsPerThread = 1'000'000, kElementsPerThread = 131072;
constexpr float kGreedyBelow = 1e-5f;  // __init__.py: GREEDY_BELOW

struct Leader {
  float value = -kInfinity;
  int32_t index = -1;
  KVASIR_INLINE void offer(float other, int32_t i) {
    if (other > value || (other == value && i < index)) value = other, index = i;
  }
};

// Best logit (lowest index among equals) of a row; index -1 when any is NaN or +inf, or all are -inf.
Leader best_logit(const float* row, int n) {
  vfloat best = broadcast(-kInfinity);
  vint best_index = {}, is_bad = {}, index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes, index += kLanes) {
    const vfloat x = load(row + i);
    is_bad |= ~(vint)(x < kInfinity);
    const vint is_better = (vint)(x > best);
    best = is_better ? x : best;
    best_index = is_better ? index : best_index;
  }
  bool bad = any(is_bad);
  Leader leader;
  for (int lane = 0; lane < kLanes; ++lane)
    if (best[lane] > -kInfinity) leader.offer(best[lane], best_index[lane]);
  for (; i < n; ++i) {
    bad |= !(row[i] < kInfinity);
    if (row[i] > leader.value) leader = {row[i], i};
  }
  if (bad) leader.index = -1;
  return leader;
}

// Largest ~word with which a token at distance z - leader may still reach the leader. Rounded up: since
// gumbel <= -ln(1 - u), that takes 1 - u <= e^(z - leader).
KVASIR_INLINE vuint word_limit(vfloat z, float leader) {
  const vfloat limit = exp(min(z - leader, zeros())) * (1.001f * 0x1p32f) + 1.0f;
  return __builtin_convertvector(min(limit, broadcast(4294967040.0f)), vuint);
}

// Offers the noised logits of one tile, (x - shift) * scale + gumbel, to `leader`; the first `count` are real.
KVASIR_INLINE void offer_tile(const float* x, int count, float shift, float scale, uint32_t first, uint64_t key,
                              Leader& leader) {
  vfloat z[4];
  for (int j = 0; j < 4; ++j) z[j] = (load(x + j * kLanes) - shift) * scale;
  const vfloat best = max(max(z[0], z[1]), max(z[2], z[3]));
  if (!any((vint)(best + kMaxGumbel >= leader.value))) return;
  vuint words[4];
  tile_words(first, key, words);
  const vuint limit = word_limit(best, leader.value);
  vint may_win = {};
  for (int j = 0; j < 4; ++j) may_win |= (vint)(~words[j] <= limit);
  if (!any(may_win)) return;
  float noised[kNoiseTile];
  for (int j = 0; j < 4; ++j) store(noised + j * kLanes, z[j] + gumbel(words[j]));
  for (int j = 0; j < count; ++j) leader.offer(noised[j], int32_t(first) + j);
}

// argmax over the whole row of (logit - shift) * scale + gumbel; `top` is the best logit's index.
int32_t noised_argmax(const float* row, int n, int32_t top, float shift, float scale, uint64_t key) {
  Leader leader;
  const int tiled = n - n % kNoiseTile;
  float tail[kNoiseTile];
  std::fill(tail, tail + kNoiseTile, -kInfinity);
  std::copy(row + tiled, row + n, tail);
  const auto offer = [&](int first) {
    const bool is_tail = first == tiled;
    offer_tile(is_tail ? tail : row + first, is_tail ? n - tiled : kNoiseTile, shift, scale, first, key, leader);
  };
  offer(top - top % kNoiseTile);  // first, so that most other tiles are skipped
  for (int first = 0; first < n; first += kNoiseTile) offer(first);
  return leader.index;
}

struct Filters {
  int64_t top_k;
  float top_p, min_p, typical_p;
};

struct Scratch {
  std::vector<float> z, weight, key;
  std::vector<int32_t> ids;
  SelectScratch select;
};

// The tokens of a row that a filter has left: z = (logit - best) / temperature, ids ascending.
class Kept {
 public:
  Kept(Scratch& scratch, const float* row, int n, float shift, float scale) : s_(scratch), n_(n) {
    s_.z.resize(n + kLanes), s_.weight.resize(n + kLanes), s_.key.resize(n), s_.ids.resize(n + kLanes);
    for (int i = 0; i < n; ++i) s_.z[i] = (row[i] - shift) * scale;
  }

  void keep_top_k(int64_t k) {
    if (k < n_) keep(s_.z.data(), top_k_boundary(s_.z.data(), n_, int(k), s_.select));
  }

  // Nucleus, then the tokens whose probability is at least min_p times the best one's.
  void keep_top_p_min_p(float top_p, float min_p) {
    Boundary boundary = {-FLT_MAX, n_};
    if (top_p < 1.0f) {
      const double total = fill_weights(0.0f);
      // Below this key all n tokens together hold less than 1 - top_p.
      const double low = std::log((1.0 - double(top_p)) * total / n_) - 0.01;
      boundary = mass_boundary(s_.z.data(), s_.weight.data(), n_, double(top_p) * total, std::max(float(low), -FLT_MAX),
                               0.0f, s_.select);
    }
    const float least = min_p > 0.0f ? std::log(min_p) : -FLT_MAX;
    if (least > boundary.key) boundary = {least, n_};
    keep(s_.z.data(), boundary);
  }

  // Locally typical set: tokens whose surprise is closest to the entropy, until they hold the mass.
  void keep_typical(float typical_p) {
    const float log_total = float(std::log(fill_weights(0.0f)));
    const double mass = fill_weights(log_total);  // probabilities
    Sum sum;
    double rest = 0;
    int i = 0;
    for (; i + kLanes <= n_; i += kLanes) sum.add(load(&s_.weight[i]) * (log_total - load(&s_.z[i])));
    for (; i < n_; ++i) rest += double(s_.weight[i]) * (log_total - s_.z[i]);
    const float entropy = float(sum.total() + rest);
    float low = 0.0f, high = -FLT_MAX;
    for (i = 0; i < n_; ++i) {
      s_.key[i] = -std::fabs((log_total - s_.z[i]) - entropy);
      low = std::min(low, s_.key[i]);
      high = std::max(high, s_.key[i]);
    }
    keep(s_.key.data(), mass_boundary(s_.key.data(), s_.weight.data(), n_, double(typical_p) * mass,
                                      std::nextafter(low, -kInfinity), high, s_.select));
  }

  // The token with the best noised logit.
  int32_t noised_argmax(uint64_t key) {
    materialise_ids();
    std::fill(&s_.z[n_], &s_.z[n_] + kLanes, -kInfinity);
    std::fill(&s_.ids[n_], &s_.ids[n_] + kLanes, 0);
    Leader leader;
    for (int i = 0; i < n_; i += kLanes) {
      const vfloat z = load(&s_.z[i]);
      if (!any((vint)(z + kMaxGumbel >= leader.value))) continue;
      vuint token;
      std::memcpy(&token, &s_.ids[i], sizeof(token));
      const vuint words = token_words(token, key);
      if (!any((vint)(~words <= word_limit(z, leader.value)))) continue;
      const vfloat value = z + gumbel(words);
      for (int j = 0; j < std::min(kLanes, n_ - i); ++j) leader.offer(value[j], s_.ids[i + j]);
    }
    return leader.index;
  }

 private:
  // weight = e^(z - shift); returns their sum.
  double fill_weights(float shift) {
    std::fill(&s_.z[n_], &s_.z[n_] + kLanes, -kInfinity);
    Sum sum;
    for (int i = 0; i < n_; i += kLanes) {
      const vfloat w = exp(load(&s_.z[i]) - shift);
      store(&s_.weight[i], w);
      sum.add(w);
    }
    return sum.total();
  }

  void materialise_ids() {
    if (is_whole_row_)
      for (int i = 0; i < n_; ++i) s_.ids[i] = i;
    is_whole_row_ = false;
  }

  // Drops what `boundary` does not keep, and what has no probability at all.
  void keep(const float* key, Boundary boundary) {
    int32_t count = 0;
    const float least = std::max(boundary.key, -FLT_MAX);
    for (int first = 0; first < n_; first += kLanes) {
      const int end = std::min(first + kLanes, n_);
      if (end == first + kLanes && !any((vint)(load(key + first) >= least))) continue;
      for (int i = first; i < end; ++i) {  // no branches: in a wide nucleus who stays is as good as random
        const int32_t id = is_whole_row_ ? i : s_.ids[i];
        const float z = s_.z[i];
        s_.ids[count] = id;
        s_.z[count] = z;
        count += boundary.keeps(key[i], i) & (z > -kInfinity);
      }
    }
    n_ = count;
    is_whole_row_ = false;
  }

  Scratch& s_;
  int n_;
  bool is_whole_row_ = true;
};

int64_t sample_row(const float* row, int n, float temperature, Filters filters, uint64_t key) {
  const Leader top = best_logit(row, n);
  if (top.index < 0 || temperature < kGreedyBelow) return top.index;
  const float scale = 1.0f / temperature;
  const bool has_top_k = filters.top_k > 0 && filters.top_k < n;
  const bool has_top_p = filters.top_p < 1.0f || filters.min_p > 0.0f;
  const bool has_typical = filters.typical_p < 1.0f;
  if (!has_top_k && !has_top_p && !has_typical) return noised_argmax(row, n, top.index, top.value, scale, key);
  static thread_local Scratch scratch;
  Kept kept(scratch, row, n, top.value, scale);
  if (has_top_k) kept.keep_top_k(filters.top_k);
  if (has_top_p || has_typical) kept.keep_top_p_min_p(filters.top_p, filters.min_p);
  if (has_typical) kept.keep_typical(filters.typical_p);
  return kept.noised_argmax(key);
}

}  // namespace

namespace kvasir::sampling {

Choice choose(const float* row, int n, float temperature, uint64_t key) {
  const bool is_greedy = temperature < kGreedyBelow;
  const int64_t token = sample_row(row, n, temperature, {0, 1.0f, 0.0f, 1.0f}, key);
  if (token < 0) return {-1, std::numeric_limits<float>::quiet_NaN()};
  const float best = best_logit(row, n).value, scale = is_greedy ? 1.0f : 1.0f / temperature;
  Sum sum;
  double rest = 0;
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) sum.add(exp((load(row + i) - best) * scale));
  for (; i < n; ++i) rest += std::exp((row[i] - best) * scale);
  return {token, (row[token] - best) * scale - float(std::log(sum.total() + rest))};
}

}  // namespace kvasir::sampling

// logits [num_rows, n] with rows `stride` apart. Every parameter array has one entry per row; a null pointer means the
// neutral value in every row (for `temperature`: all rows greedy).
KVASIR_EXPORT void kvasir_sample(const float* logits, int64_t num_rows, int64_t n, int64_t stride,
                                 const float* temperature, const int64_t* top_k, const float* top_p,
                                 const float* min_p, const float* typical_p, const int64_t* keys, int64_t* out,
                                 int64_t num_threads) {
  const int64_t enough = temperature ? kElementsPerThread : kGreedyElementsPerThread;
  parallel_for_runs(num_rows, n, enough, num_threads, [&](int64_t r) {
    const Filters filters = {top_k ? top_k[r] : 0, top_p ? top_p[r] : 1.0f, min_p ? min_p[r] : 0.0f,
                             typical_p ? typical_p[r] : 1.0f};
    const float t = temperature ? temperature[r] : 0.0f;
    out[r] = sample_row(logits + r * stride, int(n), t, filters, keys ? uint64_t(keys[r]) : 0);
  });
}

// The random words of tokens [0, n) of each row, widened: out [num_rows, n].
KVASIR_EXPORT void kvasir_random_bits(const int64_t* keys, int64_t num_rows, int64_t n, int64_t* out) {
  for (int64_t r = 0; r < num_rows; ++r) {
    for (int64_t first = 0; first < n; first += kNoiseTile) {
      vuint words[4];
      tile_words(uint32_t(first), uint64_t(keys[r]), words);
      for (int64_t i = first; i < std::min<int64_t>(n, first + kNoiseTile); ++i)
        out[r * n + i] = words[(i - first) / kLanes][(i - first) % kLanes];
    }
  }
}
