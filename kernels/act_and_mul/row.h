// The gated activation of one row of floats, as other kernels call it.
#pragma once

#include <cstdint>

namespace kvasir::activation {

// out = activation(gate) * up; the activation's number as in kernel.cpp.
void activate_row(int64_t activation, const float* gate, const float* up, int64_t size, float* out);

}  // namespace kvasir::activation
