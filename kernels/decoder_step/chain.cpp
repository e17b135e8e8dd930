// Chains of tokens, each chosen from what the decoder says after the one before it: all of a draft in one call. The steps
// are those of kernel.cpp and the choices those of kvasir_sample, so a chain is what these give when they alternate.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../linear/product.h"
#include "../sampling/choose.h"
#include "arena.h"
#include "simd.h"
#include "step.h"
#include "team.h"

namespace {

using namespace kvasir;
using namespace kvasir::decoder;

constexpr int64_t kHeadWorkPerThread = 3'000'000;  // multiply-adds for which a sleeping thread is woken: linear/kernel.cpp
constexpr int64_t kRowsPerThread = 32;             // of choices among some thousand columns

// Field by field the structures of structures.py.
struct Head {
  Linear linear;
  int64_t num_logits;  // columns that may be chosen
  float divisor, soft_cap;
};
struct Chains {
  const int64_t *token_ids, *lengths, *starts;  // what is computed first: row after row, and where each row's begins
  const int32_t* block_table;
  const int64_t *depths, *keys;  // tokens wanted, at least 1; noise of each, [row][depth_stride]
  const float* temperatures;
  const double* min_log_probs;
  int64_t* tokens;  // out, [row][depth_stride]
  float* log_probs;
  int64_t* counts;
  int64_t table_stride, depth_stride, num_rows, num_threads;
};

struct Buffers {
  std::vector<int64_t> token_ids, positions, slots, rows;
  std::vector<int32_t> cu_seqlens, seq_lens, table;
  std::vector<double> totals;
  Arena hidden, last, logits;
};
thread_local Buffers buffers;

class Drafting {
 public:
  Drafting(const Program& program, const Pool& pool, const Head& head, const Chains& chains)
      : p_(program), pool_(pool), head_(head), c_(chains), w_(buffers) {}

  // -1, or the index of the first token id that is not in the vocabulary.
  int64_t run() {
    w_.rows.resize(c_.num_rows), w_.totals.assign(c_.num_rows, 0.0);
    for (int64_t r = 0; r < c_.num_rows; ++r) w_.rows[r] = r, c_.counts[r] = 0;
    const int64_t bad = read_texts();
    if (bad >= 0) return bad;
    while (choose(), !w_.rows.empty()) extend();
    return -1;
  }

 private:
  int64_t read_texts() {
    w_.token_ids.clear(), w_.positions.clear(), w_.slots.clear();
    w_.cu_seqlens.assign(1, 0), w_.seq_lens.clear();
    const int64_t* ids = c_.token_ids;
    for (int64_t r = 0; r < c_.num_rows; ids += c_.lengths[r++]) {
      for (int64_t i = 0; i < c_.lengths[r]; ++i) add_token(r, ids[i], c_.starts[r] + i);
      end_row(c_.starts[r] + c_.lengths[r]);
    }
    const int64_t bad = step(c_.block_table);
    if (bad >= 0) return bad;
    float* last = w_.last.reserve(c_.num_rows * p_.hidden_size);
    for (int64_t r = 0; r < c_.num_rows; ++r)
      std::copy_n(hidden_ + (w_.cu_seqlens[r + 1] - 1) * p_.hidden_size, p_.hidden_size, last + r * p_.hidden_size);
    hidden_ = last;
    return -1;
  }

  // Computes the tokens chosen last, of chains that go on.
  void extend() {
    w_.token_ids.clear(), w_.positions.clear(), w_.slots.clear();
    w_.cu_seqlens.assign(1, 0), w_.seq_lens.clear();
    const int32_t* table = c_.block_table;
    for (const int64_t r : w_.rows) {
      const int64_t count = c_.counts[r], position = c_.starts[r] + c_.lengths[r] + count - 1;
      add_token(r, c_.tokens[r * c_.depth_stride + count - 1], position);
      end_row(position + 1);
    }
    if (int64_t(w_.rows.size()) < c_.num_rows) {
      w_.table.resize(w_.rows.size() * c_.table_stride);
      for (size_t i = 0; i < w_.rows.size(); ++i)
        std::copy_n(c_.block_table + w_.rows[i] * c_.table_stride, c_.table_stride, &w_.table[i * c_.table_stride]);
      table = w_.table.data();
    }
    step(table);  // chosen tokens are in the vocabulary
  }

  void add_token(int64_t row, int64_t id, int64_t position) {
    const int64_t block = c_.block_table[row * c_.table_stride + position / pool_.block_size];
    w_.token_ids.push_back(id), w_.positions.push_back(position);
    w_.slots.push_back(block * pool_.block_size + position % pool_.block_size);
  }

  void end_row(int64_t seq_len) {
    w_.cu_seqlens.push_back(int32_t(w_.token_ids.size()));
    w_.seq_lens.push_back(int32_t(seq_len));
  }

  int64_t step(const int32_t* table) {
    Batch b{};
    b.token_ids = w_.token_ids.data(), b.positions = w_.positions.data(), b.slots = w_.slots.data();
    b.cu_seqlens_q = w_.cu_seqlens.data(), b.seq_lens = w_.seq_lens.data();
    b.block_table = table, b.table_stride = c_.table_stride;
    b.num_tokens = w_.token_ids.size(), b.num_rows = w_.seq_lens.size(), b.num_threads = c_.num_threads;
    b.hidden = w_.hidden.reserve(b.num_tokens * p_.hidden_size);
    hidden_ = b.hidden;
    return run_step(p_, pool_, b);
  }

  // One token for every chain that is open, from hidden_; chains that end there are closed.
  void choose() {
    const int64_t count = w_.rows.size(), columns = head_.linear.columns;
    float* logits = w_.logits.reserve(count * columns);
    linear::Product product{hidden_,          p_.hidden_size,          count,
                            p_.hidden_size,   columns,                 head_.linear.weights,
                            head_.linear.dtype, head_.linear.bias,     logits,
                            columns};
    const int64_t threads = std::clamp<int64_t>(linear::work_of(product) / kHeadWorkPerThread, 1, c_.num_threads);
    linear::prepare(product, threads);
    const linear::Division division = linear::divide(product, threads);
    parallel_for(division.num_tasks(), division.threads, [&](int64_t t) { linear::run_task(product, division, t); });
    parallel_for_runs(count, 1, kRowsPerThread, c_.num_threads, [&](int64_t i) {
      const int64_t r = w_.rows[i], at = r * c_.depth_stride + c_.counts[r];
      float* row = logits + i * columns;
      finish(row);
      const sampling::Choice chosen =
          sampling::choose(row, int(head_.num_logits), c_.temperatures[r], uint64_t(c_.keys[at]));
      c_.tokens[at] = std::max<int64_t>(chosen.token, 0);  // any token will do after a row that is not finite
      c_.log_probs[at] = chosen.log_prob;
      w_.totals[r] += chosen.log_prob;
      ++c_.counts[r];
    });
    const auto has_ended = [&](int64_t r) {
      return c_.counts[r] >= c_.depths[r] || !(w_.totals[r] >= c_.min_log_probs[r]);  // NaN ends it too
    };
    w_.rows.erase(std::remove_if(w_.rows.begin(), w_.rows.end(), has_ended), w_.rows.end());
  }

  void finish(float* row) const {
    if (head_.divisor != 1.0f)
      for (int64_t j = 0; j < head_.num_logits; ++j) row[j] /= head_.divisor;
    if (head_.soft_cap != 0.0f)
      for (int64_t j = 0; j < head_.num_logits; ++j) row[j] = std::tanh(row[j] / head_.soft_cap) * head_.soft_cap;
  }

  const Program& p_;
  const Pool& pool_;
  const Head& head_;
  const Chains& c_;
  Buffers& w_;
  const float* hidden_ = nullptr;
};

}  // namespace

// Computes the rows' tokens, and behind each row chooses and computes one token after the other, until there are as many
// as wanted or their log-probabilities add up to less than the row's bound. All but the last are in the cache then.
// Returns -1, or the index of the first of the given token ids that is not in the vocabulary; then nothing has been written.
KVASIR_EXPORT int64_t kvasir_decoder_chain(const Program* program, const Pool* pool, const Head* head,
                                           const Chains* chains) {
  return Drafting(*program, *pool, *head, *chains).run();
}
