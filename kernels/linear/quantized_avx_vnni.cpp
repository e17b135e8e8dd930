// Quantised products with AVX-VNNI, for CPUs that have the instruction but not AVX-512; with its 256-bit form of AVX-512
// VNNI where the library is built for that, so that this path is tested on such machines too.
#include "quantized.h"

#if defined(__AVX2__)
#include <cpuid.h>
#include <immintrin.h>

#include "quantized_ymm.h"

namespace kvasir::quantized {
namespace {

struct AvxVnni : Ymm {
  using Codes = __m256i;
  static constexpr int kVectors = 2, kRows = 6, kValueBytes = 4;

  KVASIR_TILE void load(const uint8_t* p, Codes& codes) { codes = _mm256_loadu_si256((const __m256i*)p); }
  KVASIR_TILE void load_halves(const uint8_t* p, Codes& low, Codes& high) { halves(p, low, high); }
  KVASIR_TILE Int load_value(const uint8_t* p) { return broadcast_four(p); }
  KVASIR_TILE Int dot(Int sum, Codes codes, Int value) {
#if defined(__AVX512VL__)
    asm("%{evex%} vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(value));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(value));
#endif
    return sum;
  }
};

}  // namespace
}  // namespace kvasir::quantized
#endif

namespace kvasir::quantized {

const Kernels* avx_vnni_kernels() {
#if defined(__AVX2__)
#if defined(__AVX512VL__)
  const bool is_here = __builtin_cpu_supports("avx512vnni");
#else
  unsigned eax = 0, ebx, ecx, edx;
  const bool is_here = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
#endif
  static const Kernels kernels = kernels_of<AvxVnni>("avx_vnni");
  if (is_here) return &kernels;
#endif
  return nullptr;
}

}  // namespace kvasir::quantized
