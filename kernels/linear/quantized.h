// Products with weights of 8 or 4 bits and activations that are rounded to 8 bits, row by row, in groups along K.
//
// A group of a row of W holds codes q, one zero z and one scale s: w = s (q - z). A group of a row of x holds codes in
// [-127, 127] and one scale. Products of codes are summed exactly in int32; only then, group after group, floats are added
// up: out = ((0 + d_0 s_0 t_0) + d_1 s_1 t_1) + ... + bias, with d the integer sum over (q - z) x, each product rounded
// once ((s t) first) and nothing fused. So neither rows, tiles, threads nor instruction set change a bit.
//
// Memory, panel by panel of 32 columns, group by group: 32 scales (bfloat16); with 4 bits 32 zeros (int16); the codes, four
// neighbours in k of one column side by side, then the next column. With 4 bits a byte holds k in its low half and k + 4
// in its high half.
#pragma once

#include <cstdint>

namespace kvasir::linear {
struct Product;
}

namespace kvasir::quantized {

// What stands for an element type where a weight is quantised; codes of cpp_impl.py.
constexpr int64_t kInt8 = 8, kInt4 = 4;

constexpr int64_t kPanel = 32;

struct Int8 {
  static constexpr int kGroup = 128;
  static constexpr int kZero = 128;  // of every group
  static constexpr bool kIsPacked = false;
  static constexpr int64_t kHead = kPanel * 2;  // bytes before the codes of a group
  static constexpr int64_t kBytes = kHead + kPanel * kGroup;
};

struct Int4 {
  static constexpr int kGroup = 64;
  static constexpr int kZero = -1;  // each group has its own
  static constexpr bool kIsPacked = true;
  static constexpr int64_t kHead = kPanel * 4;
  static constexpr int64_t kBytes = kHead + kPanel * kGroup / 2;
};

// The rows of x as a kernel takes them. Rows are padded to whole groups with zeros.
struct Activations {
  const uint8_t* codes;  // four int8 neighbours, or as int16 in the order 0, 2, 1, 3
  const float* scales;   // [row][group]
  const int32_t* sums;   // [row][group]: of the codes
  int64_t code_stride;   // bytes between rows
  int64_t num_groups;
};

// Groups of x whose largest magnitude is below count as zero: their inverse scale would overflow.
constexpr float kSmallest = 1e-30f;

constexpr int kMaxRows = 12;  // that a kernel takes at once

// sums[r][0 .. 32) += rows `row` .. `row + rows` of x times one panel; rows <= kMaxRows.
using PanelKernel = void (*)(const Activations& x, int64_t row, int64_t rows, const uint8_t* panel, float* sums);

struct Kernels {
  const char* name;
  int max_rows;       // that are computed together
  bool takes_int16;   // activations
  PanelKernel int8, int4;
};

inline bool is_quantized(int64_t dtype) { return dtype == kInt8 || dtype == kInt4; }

// The rows of p.x, rounded, in memory of the calling thread until it prepares others.
const Activations* prepare(const linear::Product& p, int64_t threads);

// Rows `row` .. `row + rows` of the product by some panels; p.prepared is what `prepare` made.
void run(const linear::Product& p, int64_t row, int64_t rows, int64_t first_panel, int64_t end_panel);

// out = row `id` of the weight, as far as its codes hold it.
void unpack_row(const void* packed, int64_t format, int64_t depth, int64_t id, float* out);

// Each is null where the library or this CPU lacks the instructions.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_vnni_kernels();

}  // namespace kvasir::quantized
