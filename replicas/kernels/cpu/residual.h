// The residual stream between the layers of one parallel region, and the norms on it.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace penstock {

constexpr long kOwnRows = 2;  // rows that every thread norms for itself, rather than wait

struct NormedLine {};  // whose scratch memory holds a row before it is arranged

// The residual stream of a step and its norms. Of few rows every thread has its own copy.
template <typename S>
class Residual {
 public:
  Residual(S* hidden, const Rows<S>& normed, Part part)
      : hidden_(hidden), normed_(normed), part_(part), shared_(normed.rows > kOwnRows) {
    if (!shared_) {
      const long values = normed.rows * normed.k;
      char* memory = thread_scratch_of<Residual>(2 * round_up(values * sizeof(S), 64) +
                                                 normed.values(normed.rows, normed.k) * sizeof(S));
      Workspace own(memory);
      hidden_ = own.take<S>(values);
      std::memcpy(static_cast<void*>(hidden_), hidden, values * sizeof(S));
      normed_.data = own.take<S>(normed.values(normed.rows, normed.k));
    }
    own_ = shared_ ? share(normed.rows, part) : Range{0, normed.rows};
  }

  // The norm of hidden + delta, the new hidden; all of it is there on return.
  const Rows<S>& add_norm(const S* delta, const S* weight, float eps) {
    const long dim = normed_.k;
    S* line = reinterpret_cast<S*>(thread_scratch_of<NormedLine>(dim * sizeof(S)));
    for (long row = own_.begin; row < own_.end; ++row) {
      S* hidden = hidden_ + row * dim;
      norm_sum_row(hidden, delta ? delta + row * dim : nullptr, weight, hidden, line, dim, eps);
      arrange_row(line, normed_, row);
    }
    if (shared_) wait(part_);
    return normed_;
  }

  // Whether every thread has its own copy, and the rows that are this thread's.
  bool alone() const { return !shared_; }
  Range own() const { return own_; }

  // The same into plain rows, which end up shared.
  void last_norm(const S* delta, const S* weight, float eps, S* y) {
    const long dim = normed_.k;
    const Range rows = share(normed_.rows, part_);
    for (long row = rows.begin; row < rows.end; ++row)
      norm_sum_row(hidden_ + row * dim, delta + row * dim, weight, hidden_ + row * dim,
                   y + row * dim, dim, eps);
  }

 private:
  S* hidden_;
  Rows<S> normed_;
  Part part_;
  bool shared_;
  Range own_;
};

}  // namespace penstock
