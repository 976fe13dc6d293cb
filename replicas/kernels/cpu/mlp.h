// down(silu(gate) * up), gate and up fused in one weight, inside a parallel region.
#pragma once

#include "matrix.h"
#include "rows.h"

namespace penstock {

template <typename S>
struct Mlp {
  Matrix<S> up, down;  // gates, then ups
};

// Memory of an MLP between its products, shared by the threads.
template <typename S>
struct MlpRows {
  MlpRows(const Mlp<S>& mlp, long rows, Workspace& memory)
      : both(memory.take<S>(rows * mlp.up.n)),
        gated{memory.take<S>(Rows<S>::values(rows, mlp.down.k)), rows, mlp.down.k} {}
  S* both;
  Rows<S> gated;
};

// This thread's share of silu(gate) * up, from plain rows to the lines that `down` reads.
template <typename S>
void gate_rows(const S* both, const Rows<S>& gated, Part part) {
  const long lines = gated.lines(), dim = gated.k;
  const Range own = share(gated.rows * lines, part);
  for (long unit = own.begin; unit < own.end; ++unit) {
    const long row = unit / lines, at = unit % lines * gated.kLine;
    const long count = std::min(gated.kLine, dim - at);
    const S* gate = both + row * 2 * dim + at;
    gate_values(gate, gate + dim, gated.line(row, unit % lines), count);
  }
  clear_tails(gated, part);
}

// What a thread reads first of gate and up.
template <typename S>
EarlyReads early_gate_and_up(const Mlp<S>& mlp, Part part) {
#if defined(PENSTOCK_AMX)
  if constexpr (sizeof(S) == 2)
    if (suits_gated(mlp.up)) return EarlyReads::halves(mlp.up, part);
#endif
  return EarlyReads(mlp.up, part);
}

// Ends with all threads done.
template <typename S>
void gate_and_up(const Rows<S>& input, const Mlp<S>& mlp, const MlpRows<S>& memory, Part part) {
#if defined(PENSTOCK_AMX)
  if constexpr (sizeof(S) == 2)
    if (suits_gated(mlp.up)) {
      multiply_into(input, Gated{mlp.up, memory.gated}, part);
      wait(part, EarlyReads(mlp.down, part));
      return;
    }
#endif
  multiply(input, mlp.up, memory.both, part);
  wait(part);
  gate_rows(memory.both, memory.gated, part);
  wait(part, EarlyReads(mlp.down, part));
}

}  // namespace penstock
