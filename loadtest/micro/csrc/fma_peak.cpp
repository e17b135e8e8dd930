// One thread's highest rate of float32 multiply-adds: independent chains in registers, no memory.
#include "../../../kernels/csrc/simd.h"

namespace {
constexpr int kChains = 12;  // enough to hide the latency of the unit, few enough for 16 registers
}

// Runs kChains * count vector multiply-adds; returns a value that depends on all of them. lanes: set to their width.
KVASIR_EXPORT float kvasir_fma_peak(int64_t count, int64_t* lanes) {
  using namespace kvasir;
  vfloat chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = broadcast(1.0f + i);
  vfloat factor = broadcast(0.999f), term = broadcast(0.001f);
  // not known to the compiler, so that no chain becomes a constant
  asm volatile("" : "+x"(factor), "+x"(term));
  for (int64_t n = 0; n < count; ++n) {
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], factor, term);
  }
  float sum = 0;
  for (int i = 0; i < kChains; ++i) sum += chains[i][0];
  *lanes = kLanes;
  return sum;
}
