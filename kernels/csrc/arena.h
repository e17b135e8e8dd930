// Working memory that a thread keeps from call to call, for it is touched in every layer of every step.
#pragma once

#include <cstdint>
#include <new>

namespace kvasir {

class Arena {
 public:
  // Start of at least `count` floats, aligned for vectors; earlier contents are lost.
  float* reserve(int64_t count) {
    if (count > capacity_) {
      release();
      data_ = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
      capacity_ = count;
    }
    return data_;
  }
  ~Arena() { release(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  void release() {
    if (data_ != nullptr) ::operator delete(data_, kAlignment);
  }
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace kvasir
