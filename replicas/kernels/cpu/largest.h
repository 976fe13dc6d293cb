// The largest output of each row of a product and where it stands: what greedy decoding wants of the
// vocabulary, without writing the logits and without reading them again.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "matrix.h"

namespace penstock {

// A row's largest so far, the first of equals; a NaN counts as larger than every number.
struct Largest {
  float value = -std::numeric_limits<float>::infinity();
  int64_t place = std::numeric_limits<int64_t>::max();

  void take(float other, int64_t at) {
    const bool larger = std::isnan(other) ? !std::isnan(value) : other > value;
    const bool equal = other == value || (std::isnan(other) && std::isnan(value));
    if (larger || (equal && at < place)) *this = {other, at};
  }
};

// Whether a vector may hold something for `take`. Threads that help each other go through the columns in
// no order, so that an equal one may come first.
inline bool may_change(Vec values, float value) {
  const IntVec lower = values < splat(value);
  for (int lane = 0; lane < kLanes; ++lane)
    if (!lower[lane]) return true;
  return false;
}

inline void take_all(const float* sums, long column, long columns, Largest& largest) {
  long i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    if (may_change(load(sums + i), largest.value))
      for (long lane = i; lane < i + kLanes; ++lane) largest.take(sums[lane], column + lane);
  for (; i < columns; ++i) largest.take(sums[i], column + i);
}

// This thread's finds among the first `count` columns: `found[row]`.
template <typename S>
void find_own_largest(const Rows<S>& input, const Matrix<S>& w, long count, Largest* found,
                      Part part) {
  std::vector<Largest> own(input.rows);  // no neighbour of another thread's
  const auto write = [&](const float* sums, long stride, long top, long some, long column,
                         long columns) {
    for (long row = 0; row < some; ++row)
      take_all(sums + row * stride, column, std::min(columns, count - column), own[top + row]);
  };
  multiply_each(input, w, write, part);
  std::copy(own.begin(), own.end(), found);
}

// The places of the rows' largest from what each thread found, [thread][row]. Whether all are finite.
inline bool settle_largest(const std::vector<Largest>& found, long rows, int64_t* places) {
  bool are_finite = true;
  for (long row = 0; row < rows; ++row) {
    Largest all;
    for (size_t at = row; at < found.size(); at += rows) all.take(found[at].value, found[at].place);
    are_finite = are_finite && std::isfinite(all.value);
    places[row] = all.place;
  }
  return are_finite;
}

}  // namespace penstock
