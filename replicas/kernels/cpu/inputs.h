// What a step's rows begin with: embeddings, and the rotation of each row's position.
#pragma once

#include "matrix.h"

namespace penstock {

// `table` (tokens, k): row after row, or packed where it is also the head. `cos` and `sin`: a row of
// `angles` values for each position; null without rotation.
template <typename S>
struct Inputs {
  const int64_t *ids, *positions;
  const S *table, *cos, *sin;
  long packed, tokens, angles;

  bool known(long rows) const {
    for (long row = 0; row < rows; ++row)
      if (ids[row] < 0 || ids[row] >= tokens) return false;
    return true;
  }
};

// One row of a packed table.
template <typename S>
inline void unpack_row(const Matrix<S>& table, int64_t id, S* y) {
  const S* column = table.block(id / kLanes) + id % kLanes * kPack<S>;
  for (long i = 0; i < table.k; ++i)
    y[i] = column[i / kPack<S> * kLanes * kPack<S> + i % kPack<S>];
}

// This thread's share of the rows: hidden (rows, k), cos and sin (rows, angles).
template <typename S>
void begin_rows(const Inputs<S>& inputs, long rows, long k, S* hidden, S* cos, S* sin, Part part) {
  const Matrix<S> table{inputs.table, nullptr, inputs.tokens, k};
  const size_t bytes = inputs.angles * sizeof(S);
  const Range own = share(rows, part);
  for (long row = own.begin; row < own.end; ++row) {
    const int64_t id = inputs.ids[row], from = inputs.positions[row] * inputs.angles;
    if (inputs.packed)
      unpack_row(table, id, hidden + row * k);
    else
      std::memcpy(static_cast<void*>(hidden + row * k), inputs.table + id * k, k * sizeof(S));
    if (inputs.cos == nullptr) continue;
    std::memcpy(static_cast<void*>(cos + row * inputs.angles), inputs.cos + from, bytes);
    std::memcpy(static_cast<void*>(sin + row * inputs.angles), inputs.sin + from, bytes);
  }
}

}  // namespace penstock
