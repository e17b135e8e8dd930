// Products of bfloat16 weights and activations that are rounded to bfloat16, pair by pair along K, with fp32 sums.
//
// A pair adds to a sum its odd member's product first, then its even one's, each fused: exactly what vdpbf16ps does. The
// product of two bfloat16 numbers is exact in fp32, so wider instructions and plain floats give the same bits (but for
// subnormal numbers, which the instruction takes for zero). Pairs are summed one after the other within chunks of 128
// values of K, then the chunks one after the other, then the bias: neither rows, tiles nor threads change a bit.
//
// Memory: panel by panel of 32 columns, pair by pair: the two neighbours in k of one column side by side, then the next
// column. An odd K is padded with zeros. So what a task on few rows reads is one stream.
#pragma once

#include <cstdint>

namespace kvasir::linear {
struct Product;
}

namespace kvasir::pairs {

// What stands for an element type where a weight is held in pairs; code of cpp_impl.py.
constexpr int64_t kPairs = 16;

constexpr int64_t kPanel = 32;
constexpr int64_t kChunk = 64;  // pairs whose products are summed in registers
constexpr int kMaxRows = 12;    // that a kernel takes at once

// One chunk of one panel for a few rows.
struct Piece {
  const uint32_t* x;  // [rows][pairs], rows x_stride apart
  int64_t x_stride;
  const uint32_t* weights;  // [pairs][kPanel]
  const uint32_t* ahead;    // as many, fetched meanwhile: the next piece's
  int64_t num_pairs;
  const float* bias;  // null: none yet
  float* out;         // [rows][kPanel], rows out_stride apart
  int64_t out_stride;
  bool is_first;  // nothing is in `out` yet
};

using PanelKernel = void (*)(const Piece& piece, int64_t rows);  // rows <= max_rows

struct Kernels {
  const char* name;
  int max_rows;
  int64_t rate;  // multiply-adds in the time of one of floats
  PanelKernel panel;
};

inline bool is_pairs(int64_t dtype) { return dtype == kPairs; }

// Multiply-adds of this product in the time of one of floats.
int64_t rate();

// The rows of p.x as pairs, in memory of the calling thread until it prepares others.
const void* prepare(const linear::Product& p, int64_t threads);

// Rows `row` .. `row + rows` of the product by some panels; p.prepared is what `prepare` made.
void run(const linear::Product& p, int64_t row, int64_t rows, int64_t first_panel, int64_t end_panel);

// out = row `id` of the weight.
void unpack_row(const void* packed, int64_t depth, int64_t id, float* out);

// Null where the library or this CPU lacks the instructions.
const Kernels* generic_kernels();
const Kernels* avx512_kernels();

}  // namespace kvasir::pairs
