// The packed product as other kernels call it: divided into tasks that may run in any order and on any thread.
#pragma once

#include <cstdint>

namespace kvasir::linear {

// out [num_rows][num_columns] = x W^T + bias; bias is null or has a whole number of panels; dtype as DType, or of quantized.h
// or pairs.h.
struct Product {
  const float* x;
  int64_t x_stride, num_rows, depth, num_columns;
  const void* weights;
  int64_t dtype;
  const float* bias;
  float* out;
  int64_t out_stride;
  const void* prepared = nullptr;  // what `prepare` made of x
};

// Makes of x what tasks read where x is rounded (quantized.h, pairs.h), nothing elsewhere; call it first, on the thread
// that waits for the tasks. Good until the next call on that thread.
void prepare(Product& product, int64_t threads);

// How a product falls into tasks, each a group of rows by a group of columns. Changes no bit of the result.
struct Division {
  int64_t column_groups, row_groups, threads;
  int64_t num_tasks() const { return column_groups * row_groups; }
};

Division divide(const Product& product, int64_t max_threads);
void run_task(const Product& product, const Division& division, int64_t task);

// What a product costs, in multiply-adds; reading a weight counts as some.
int64_t work_of(const Product& product);

// out[i] = row ids[i] of the weight that was packed.
void unpack_row(const void* packed, int64_t dtype, int64_t depth, int64_t id, float* out);

}  // namespace kvasir::linear
