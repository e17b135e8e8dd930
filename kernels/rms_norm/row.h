// The normalisation of one row of floats, as other kernels call it.
#pragma once

#include <cstdint>

namespace kvasir::norm {

// out = x / sqrt(mean(x^2) + eps) * weight; x and out may be the same.
void normalize_row(const float* x, int64_t size, const float* weight, float eps, float* out);

// residual += x
void add_row(const float* x, int64_t size, float* residual);

}  // namespace kvasir::norm
