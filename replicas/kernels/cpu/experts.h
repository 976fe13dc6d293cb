// The routed experts of one layer inside a parallel region: rows are gathered per expert, go through its
// gated MLP, and each row's weighted outputs are settled and added up exactly (exact.h).
//
// Threads share out (expert, columns) units, so one token's two experts keep all of them busy as well
// as two thousand tokens do. Who computes a unit changes no bit: a sum over k is made as in matrix.h, a
// row's experts are added exactly, and every rounding is where the calls one by one have it
// (linear, gate, linear in fp32, times weight, settled).
#pragma once

#include "exact.h"
#include "expert_pairs.h"
#include "matrix.h"
#include "rows.h"

namespace penstock {

constexpr long kUnitLines = 8;           // of 32 columns: most that a unit has
constexpr long kUnitBytes = 256 << 10;   // of weights, where a unit's time is the reading of them
constexpr long kReadRows = 32;           // rows per piece up to which it is

template <typename S>
struct Expert {
  const S *up, *up_bias, *down, *down_bias;
};

// silu(gate) * up, or with a limit the clamped product of GPT-OSS.
struct Activation {
  float limit, alpha;
};

template <typename S>
struct Experts {
  const Expert<S>* all;  // by slot
  const int64_t* order;  // slots in ascending order of their experts
  long slots, dim, ffn;
  Activation activation;

  Matrix<S> both(long slot) const { return {all[slot].up, all[slot].up_bias, 2 * ffn, dim}; }
  Matrix<S> down(long slot) const { return {all[slot].down, all[slot].down_bias, dim, ffn}; }
};

// What of a wave lies in between; all in one caller's memory.
template <typename S>
struct Buffers {
  S *input, *inner, *halves;  // `halves`: per thread
  float* products;            // by pair of the wave
};

template <typename S>
Buffers<S> take_buffers(Workspace& memory, long pairs, long dim, long ffn, long threads) {
  const long rows = wave_rows(pairs), line = Rows<S>::kLine;
  Buffers<S> taken{};
  taken.input = memory.take<S>(rows * round_up(dim, line));
  taken.inner = memory.take<S>(rows * round_up(ffn, line));
  taken.products = memory.take<float>(std::min(kWaveRows, pairs) * dim);
  taken.halves = memory.take<S>(threads * 2 * kPieceRows * kUnitLines * line);
  return taken;
}

template <typename S>
Rows<S> piece_rows(S* base, const Piece& piece, long k) {
  return {base + piece.padded * round_up(k, Rows<S>::kLine), piece.rows, k};
}

// This thread's share of the gathered rows. `line(row, index)`: 32 values of a row.
template <typename S, typename Line>
void gather(const Line& line, const Pairs& pairs, const Wave& wave, long dim, S* input, Part part) {
  for (long p = 0; p < wave.count; ++p) {
    const Piece& piece = wave.pieces[p];
    const Rows<S> to = piece_rows(input, piece, dim);
    const Range own = share(Rows<S>::padded(to.rows), part);
    for (long row = own.begin; row < own.end; ++row) {
      const bool real = row < to.rows;
      const long from = real ? pairs.row[piece.first + row] : 0;
      for (long index = 0; index < to.lines(); ++index) {
        const long values = real ? std::min(to.kLine, dim - index * to.kLine) : 0;
        S* target = to.line(row, index);
        if (values)
          std::memcpy(static_cast<void*>(target), line(from, index), values * sizeof(S));
        if (values < to.kLine && Rows<S>::kTiled)
          std::memset(static_cast<void*>(target + values), 0, (to.kLine - values) * sizeof(S));
      }
    }
  }
}

// (up + 1) * silu(alpha * gate) / alpha, gate and up clamped first; torch's roundings.
template <typename S>
void clamped_values(const S* gate, const S* up, S* y, long count, Activation activation) {
  const float limit = rounded(activation.limit, gate), alpha = activation.alpha;
  for (long i = 0; i < count; i += kLanes) {
    const Vec g = load(gate + i), u = load(up + i);
    const Vec top = select(g > splat(limit), splat(limit), g);
    const Vec low = select(u < splat(-limit), splat(-limit), u);
    const Vec scaled = round_to(top * alpha, gate);
    const Vec shifted = round_to(select(low > splat(limit), splat(limit), low) + 1.0f, gate);
    const Vec inner = round_to(scaled / (1.0f + exp_vec(-scaled)), gate);
    store(round_to(inner * shifted, gate) / alpha, y + i);
  }
}

// Columns of a fused weight's half, a whole number of blocks from a whole block on.
template <typename S>
Matrix<S> columns_of_half(const Matrix<S>& both, long column, long columns) {
  const S* bias = both.bias == nullptr ? nullptr : both.bias + column;
  return {both.block(column / kLanes), bias, columns, both.k};
}

// This part of gate and up of some rows, and their product, by way of `halves`.
template <typename S>
void gate_in_halves(const Rows<S>& input, const Matrix<S>& both, Activation activation,
                    const Rows<S>& inner, S* halves, Part unit) {
  const Range lines = share(inner.lines(), unit);
  const long column = lines.begin * inner.kLine;
  const long columns = std::min(lines.end * inner.kLine, inner.k) - column;
  if (columns <= 0) return;
  S* up = halves + kPieceRows * kUnitLines * inner.kLine;
  multiply(input, columns_of_half(both, column, columns), halves, Part{0, 1});
  multiply(input, columns_of_half(both, inner.k + column, columns), up, Part{0, 1});
  for (long row = 0; row < Rows<S>::padded(inner.rows); ++row)
    for (long at = 0; at < columns; at += inner.kLine) {
      const long count = row < inner.rows ? std::min(inner.kLine, columns - at) : 0;
      S* line = inner.line(row, (column + at) / inner.kLine);
      const long from = row * columns + at;
      if (activation.limit > 0)
        clamped_values(halves + from, up + from, line, count, activation);
      else
        gate_values(halves + from, up + from, line, count);
      if (count < inner.kLine && Rows<S>::kTiled)
        std::memset(static_cast<void*>(line + count), 0, (inner.kLine - count) * sizeof(S));
    }
}

// The same; on tiles as the sums come, where the columns are whole lines.
template <typename S>
void gate_unit(const Rows<S>& input, const Matrix<S>& both, Activation activation,
               const Rows<S>& inner, S* halves, Part unit) {
#if defined(PENSTOCK_AMX)
  if constexpr (sizeof(S) == 2)
    if (suits_gated(both) && !(activation.limit > 0))
      return multiply_into(input, Gated{both, inner}, unit);
#endif
  gate_in_halves(input, both, activation, inner, halves, unit);
}

// Into how many units the columns of a weight are cut for pieces of so many rows.
template <typename S>
int unit_count(const Matrix<S>& weight, long rows_per_piece) {
  const long lines = (weight.n + Rows<S>::kLine - 1) / Rows<S>::kLine;
  const long line_bytes = 2 * weight.block_values() * static_cast<long>(sizeof(S));
  const long per_unit = rows_per_piece > kReadRows
                            ? kUnitLines
                            : std::min(std::max(1L, kUnitBytes / line_bytes), kUnitLines);
  return static_cast<int>((lines + per_unit - 1) / per_unit);
}

// y += what is settled of a pair's product, the `width` elements from `left` on.
inline void add_pair(const Pairs& pairs, long pair, const float* product, long dim, long left,
                     long width, double* y) {
  const float weight = pairs.weight[pair];
  // Rounding is monotonic: the largest product is the product of the largest.
  const float largest = settled(largest_magnitude(product, dim) * weight);
  const float anchor = anchor_of(largest, weight, pairs.heaviest[pair]);
  add_settled(product + left, weight, anchor, y + left, width);
}

// The products of a wave, each of a pair of row and expert; whole on return. The rows have been gathered
// and all threads know it. `halfway` is called between the two products; `next`: what is read then.
template <typename S, typename Halfway>
void expert_products(const Experts<S>& experts, const Wave& wave, const Buffers<S>& buffers,
                     Part part, const EarlyReads& next, const Halfway& halfway) {
  const long rows_each = (wave.end() - wave.first()) / wave.count;
  const int gate_units = unit_count(experts.both(0), rows_each);
  const int down_units = unit_count(experts.down(0), rows_each);
  S* halves = buffers.halves + part.index * 2 * kPieceRows * kUnitLines * Rows<S>::kLine;
  Units gates(wave.count * gate_units, part);
  for (long unit = gates.next(); unit >= 0; unit = gates.next()) {
    const Piece& piece = wave.pieces[unit / gate_units];
    gate_unit(piece_rows(buffers.input, piece, experts.dim), experts.both(piece.slot),
              experts.activation, piece_rows(buffers.inner, piece, experts.ffn), halves,
              Part{static_cast<int>(unit % gate_units), gate_units});
  }
  const long first = share(wave.count * down_units, part).begin;
  wait(part, EarlyReads(experts.down(wave.pieces[first / down_units].slot),
                        Part{static_cast<int>(first % down_units), down_units}));
  halfway();
  Units downs(wave.count * down_units, part);
  for (long unit = downs.next(); unit >= 0; unit = downs.next()) {
    const Piece& piece = wave.pieces[unit / down_units];
    multiply(piece_rows(buffers.inner, piece, experts.ffn), experts.down(piece.slot),
             buffers.products + (piece.first - wave.first()) * experts.dim,
             Part{static_cast<int>(unit % down_units), down_units});
  }
  wait(part, next);
}

}  // namespace penstock
