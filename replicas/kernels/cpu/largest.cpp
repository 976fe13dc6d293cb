// The largest output of each row of a product and where it stands: what greedy decoding wants of the
// vocabulary, without writing the logits and without reading them again.

#include <limits>
#include <vector>

#include "matrix.h"

namespace penstock {
namespace {

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

template <typename S>
bool find_largest(const S* x, const Matrix<S>& w, long count, long rows, int64_t* places,
                  S* workspace, int threads) {
  const bool alias = can_alias<S>(rows, w.k);
  const Rows<S> input{alias ? const_cast<S*>(x) : workspace, rows, w.k};
  std::vector<Largest> found(threads * rows);
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    std::vector<Largest> own(rows);  // no neighbour of another thread's
    if (!alias) {
      arrange(x, w.k, input, part);
      wait(part);
    }
    const auto write = [&](const float* sums, long stride, long top, long some, long column,
                           long columns) {
      for (long row = 0; row < some; ++row)
        take_all(sums + row * stride, column, std::min(columns, count - column), own[top + row]);
    };
    multiply_each(input, w, write, part);
    std::copy(own.begin(), own.end(), found.begin() + part.index * rows);
  }
  bool are_finite = true;
  for (long row = 0; row < rows; ++row) {
    Largest all;
    for (long thread = 0; thread < threads; ++thread)
      all.take(found[thread * rows + row].value, found[thread * rows + row].place);
    are_finite = are_finite && std::isfinite(all.value);
    places[row] = all.place;
  }
  return are_finite;
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;
using penstock::Matrix;

// Of the first `count` columns of a packed (n, k) weight. Whether all of them are finite.
#define PK_LARGEST(suffix, S)                                                                      \
  bool pk_largest_##suffix(const S* x, const S* packed, long rows, long n, long k, long count,     \
                           int64_t* places, S* workspace, int threads) {                           \
    return penstock::find_largest(x, Matrix<S>{packed, nullptr, n, k}, count, rows, places,        \
                                  workspace, threads);                                             \
  }

extern "C" {

PK_LARGEST(bf16, Bf16)
PK_LARGEST(f32, float)

}  // extern "C"
