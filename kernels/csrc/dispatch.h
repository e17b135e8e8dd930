// From the element type code of an argument to a template instance.
#pragma once

#include "simd.h"

namespace kvasir {

// Calls function(T{}) with the storage type of that code (DType); does nothing for an unknown code.
template <class Function>
void with_dtype(int64_t dtype, Function function) {
  switch (dtype) {
    case kFloat32:
      return function(float{});
    case kFloat16:
      return function(Half{});
    case kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace kvasir
