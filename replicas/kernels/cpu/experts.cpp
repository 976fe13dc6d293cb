// The routed experts of one layer in one call; see experts.h.

#include "experts.h"

namespace penstock {
namespace {

// This thread's share of the sums: whole rows, or with few of them stretches of each.
inline void add_up(const Pairs& pairs, const Wave& wave, const float* products, long rows, long dim,
                   double* y, Part part) {
  const bool by_row = rows >= 4L * part.count;
  const Range own = by_row ? share(rows, part) : share((dim + kLanes - 1) / kLanes, part);
  const long left = by_row ? 0 : own.begin * kLanes;
  const long width = (by_row ? dim : std::min(own.end * kLanes, dim)) - left;
  for (long pair = wave.first(); pair < wave.end(); ++pair) {
    const long row = pairs.row[pair];
    if (by_row && (row < own.begin || row >= own.end)) continue;
    add_pair(pairs, pair, products + (pair - wave.first()) * dim, dim, left, width, y + row * dim);
  }
}

template <typename S>
void run(const S* x, const Routed& routed, const Experts<S>& experts, double* y, void* memory,
         int threads) {
  Workspace workspace(memory);
  const long all = routed.rows * routed.top_k, dim = experts.dim;
  Pairs pairs = take_pairs(workspace, all, experts.slots);
  const Buffers<S> buffers = take_buffers<S>(workspace, all, dim, experts.ffn, threads);
  Team team(threads);
  sort_pairs(routed, experts.order, experts.slots, pairs);
  std::memset(y, 0, routed.rows * dim * sizeof(double));
  for (long from = 0; from < pairs.num_pieces;) {
    const Wave wave = place_wave<S>(pairs, from);
    from += wave.count;
#pragma omp parallel num_threads(threads)
    {
      const Part part = own_part(team);
      gather([&](long row, long index) { return x + row * dim + index * Rows<S>::kLine; }, pairs,
             wave, dim, buffers.input, part);
      wait(part);
      expert_products(experts, wave, buffers, part, EarlyReads(), [] {});
      add_up(pairs, wave, buffers.products, routed.rows, dim, y, part);
    }
  }
}

template <typename S>
long workspace_bytes(const Experts<S>& experts, long pairs, long threads) {
  Workspace counted(nullptr);
  take_pairs(counted, pairs, experts.slots);
  take_buffers<S>(counted, pairs, experts.dim, experts.ffn, threads);
  return counted.taken();
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;

// Rows that go nowhere come out zero. `y` (rows, dim) fp64.
#define PK_EXPERTS(suffix, S)                                                                      \
  void pk_experts_##suffix(const S* x, const int64_t* slots, const float* weights, long rows,      \
                           long top_k, const penstock::Experts<S>* experts, double* y,             \
                           void* workspace, int threads) {                                         \
    penstock::run(x, penstock::Routed{slots, weights, rows, top_k}, *experts, y, workspace,        \
                  threads);                                                                        \
  }                                                                                                \
  long pk_experts_bytes_##suffix(const penstock::Experts<S>* experts, long pairs, long threads) {  \
    return penstock::workspace_bytes(*experts, pairs, threads);                                    \
  }

extern "C" {

PK_EXPERTS(bf16, Bf16)
PK_EXPERTS(f32, float)

}  // extern "C"
