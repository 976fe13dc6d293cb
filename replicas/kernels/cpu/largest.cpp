// The head's product and the choice of its largest in a call of their own; see largest.h.

#include "largest.h"

namespace penstock {
namespace {

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
    if (!alias) {
      arrange(x, w.k, input, part);
      wait(part);
    }
    find_own_largest(input, w, count, found.data() + part.index * rows, part);
  }
  return settle_largest(found, rows, places);
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
