// Products on matrix tiles: two column blocks at a time. What is made of their sums says which two.
#pragma once

#include "amx.h"
#include "amx_rows.h"
#include "matrix.h"
#include "rows.h"

#if defined(PENSTOCK_AMX)

namespace penstock {

// Sums of neighbouring blocks; a missing second one stands for the last there is.
template <typename Write>
struct Plain {
  const Matrix<Bf16>& w;
  const Write& take;  // see `multiply_each`

  long pairs() const { return (w.blocks() + 1) / 2; }
  const Bf16* block(long pair, long side) const {
    return w.block(std::min(2 * pair + side, w.blocks() - 1));
  }
  void write(const float* sums, long stride, long top, long rows, long left, long end) const {
    const long column = left * 32;
    take(sums, stride, top, rows, column, std::min(end * 32, w.n) - column);
  }
};

// silu(gate) * up, from a block of gates and the block of the same columns' ups; whole lines only.
struct Gated {
  const Matrix<Bf16>& w;
  const Rows<Bf16>& y;

  long pairs() const { return w.blocks() / 2; }
  const Bf16* block(long pair, long side) const { return w.block(pair + side * pairs()); }
  Vec value(const float* sums, long column) const {
    const Vec sum = load(sums);
    return round_to(w.bias ? sum + load(w.bias + column) : sum, w.bias);
  }
  void write(const float* sums, long stride, long top, long rows, long left, long end) const {
    for (long row = 0; row < rows; ++row)
      for (long pair = left; pair < end; ++pair) {
        const float* both = sums + row * stride + (pair - left) * 32;
        const Vec gate = value(both, pair * 16), up = value(both + 16, w.n / 2 + pair * 16);
        store(gate_vec(gate, up, w.bias), y.line(top + row, pair / 2) + pair % 2 * 16);
      }
  }
};

// Whether the gates can be applied as the sums come.
inline bool suits_gated(const Matrix<Bf16>& w) { return w.n % 64 == 0; }

// The two blocks of a pair from a depth tile on, what is left of an uneven depth padded into `rest`.
template <typename Output>
inline void columns_of(const Output& output, long pair, long depth, Column* columns, char* rest) {
  const Matrix<Bf16>& w = output.w;
  const long whole = w.k / kTileDepth, left = words_of<Bf16>(w.k) - whole * 16;
  for (long side = 0; side < 2; ++side) {
    const char* block = reinterpret_cast<const char*>(output.block(pair, side));
    columns[side] = {block + depth * kTileBytes, nullptr};
    if (left == 0) continue;
    std::memset(rest + side * kTileBytes, 0, kTileBytes);
    std::memcpy(rest + side * kTileBytes, block + whole * kTileBytes, left * 64);
    columns[side].rest = rest + side * kTileBytes;
  }
}

// Where the columns of a pair begin, as far as there is such a pair.
template <typename Output>
inline void begins_of(const Output& output, long pair, Column* columns) {
  for (long side = 0; side < 2; ++side)
    columns[side].whole = reinterpret_cast<const char*>(
        output.block(std::min(pair, output.pairs() - 1), side));
}

// Two pairs of columns at a time, whichever come: four streams from memory.
template <typename Output>
void multiply_very_few(const Rows<Bf16>& x, const Output& output, Part part) {
  alignas(64) float sums[2 * kVectorRows * 32];
  alignas(64) char rest[4 * kTileBytes];
  Column columns[4], following[4];
  const float* numbers = as_numbers(x);
  Units units(output.pairs(), part);
  for (long pair = units.next(); pair >= 0; pair = units.next()) {
    const long other = units.next(), pairs = other >= 0 ? 2 : 1;
    columns_of(output, pair, 0, columns, rest);
    if (pairs == 2) columns_of(output, other, 0, columns + 2, rest + 2 * kTileBytes);
    begins_of(output, pair + 2, following);
    begins_of(output, other + 2, following + 2);
    multiply_vectors(numbers, x.rows, columns, following, pairs, output.w.k / kTileDepth, sums);
    output.write(sums, 32, 0, x.rows, pair, pair + 1);
    if (pairs == 2) output.write(sums + x.rows * 32, 32, 0, x.rows, other, other + 1);
  }
}

template <typename Output>
void multiply_few(const Rows<Bf16>& x, const Output& output, Part part) {
  alignas(64) float sums[16 * 32];
  alignas(64) char rest[2 * kTileBytes];
  Column columns[2];
  const Tiles tiles(x.side());
  Units units(output.pairs(), part);
  for (long pair = units.next(); pair >= 0; pair = units.next()) {
    columns_of(output, pair, 0, columns, rest);
    multiply_1x2(reinterpret_cast<const char*>(x.data), x.side() * 64, columns,
                 output.w.k / kTileDepth, sums);
    output.write(sums, 32, 0, x.rows, pair, pair + 1);
  }
}

constexpr long kSomeRows = 64;

// Up to kSomeRows: the weights pass by once, the next two columns are known while these are read.
template <typename Output>
void multiply_some(const Rows<Bf16>& x, const Output& output, Part part) {
  alignas(64) float sums[kSomeRows * 32];
  alignas(64) char rest[2 * kTileBytes], unused[2 * kTileBytes];
  Column columns[2], following[2];
  const Tiles tiles(16);
  const long whole = output.w.k / kTileDepth;
  Units units(output.pairs(), part);
  for (long pair = units.next(), next; pair >= 0; pair = next) {
    next = units.next();
    columns_of(output, pair, 0, columns, rest);
    columns_of(output, std::max(next, 0L), 0, following, unused);
    Ahead ahead(following, next < 0 ? 0 : whole * kTileBytes,
                (x.rows + 31) / 32 * std::max(whole, 1L));
    for (long row = 0; row < x.rows; row += 32)
      multiply_2x2(reinterpret_cast<const char*>(x.line(row, 0)),
                   reinterpret_cast<const char*>(x.line(row + 16, 0)), columns, whole, true,
                   columns[0].rest != nullptr, sums + row * 32, 32, ahead);
    output.write(sums, 32, 0, x.rows, pair, pair + 1);
  }
}

// Pieces that stay in the second-level cache: 256 rows x 256 columns x 256 of the depth.
template <typename Output>
void multiply_many(const Rows<Bf16>& x, const Output& output, Part part) {
  constexpr long kSide = 256, kDepth = 8;  // tiles of the depth
  float* sums = reinterpret_cast<float*>(thread_scratch(kSide * kSide * sizeof(float)));
  alignas(64) char rest[2 * kTileBytes], unused[2 * kTileBytes];
  Column columns[2], next[2];
  const Tiles tiles(16);
  const long whole = output.w.k / kTileDepth;
  const Range own = share(output.pairs(), part);
  for (long top = 0; top < x.rows; top += kSide)
    for (long left = own.begin; left < own.end; left += kSide / 32) {
      const long rows = std::min(kSide, x.rows - top), end = std::min(left + kSide / 32, own.end);
      for (long depth = 0; depth == 0 || depth < whole;) {
        const long stop = depth + kDepth >= whole ? whole : depth + kDepth;
        for (long pair = left; pair < end; ++pair) {
          columns_of(output, pair, depth, columns, rest);
          const bool turns = pair + 1 == end;  // to the next piece of the depth
          columns_of(output, turns ? left : pair + 1, turns ? stop : depth, next, unused);
          const long steps = (rows + 31) / 32 * std::max(stop - depth, 1L);
          Ahead ahead(next, (stop - depth) * kTileBytes, steps);
          for (long row = 0; row < rows; row += 32)
            multiply_2x2(reinterpret_cast<const char*>(x.line(top + row, depth)),
                         reinterpret_cast<const char*>(x.line(top + row + 16, depth)), columns,
                         stop - depth, depth == 0, stop == whole && columns[0].rest != nullptr,
                         sums + row * kSide + (pair - left) * 32, kSide, ahead);
        }
        depth = std::max(stop, 1L);
      }
      output.write(sums, kSide, top, rows, left, end);
    }
}

template <typename Output>
void multiply_into(const Rows<Bf16>& x, const Output& output, Part part) {
  if (x.rows <= kVectorRows) return multiply_very_few(x, output, part);
  if (x.rows <= 16) return multiply_few(x, output, part);
  if (x.rows <= kSomeRows) return multiply_some(x, output, part);
  multiply_many(x, output, part);
}

template <typename Write>
void multiply_each(const Rows<Bf16>& x, const Matrix<Bf16>& w, const Write& write, Part part) {
  multiply_into(x, Plain<Write>{w, write}, part);
}

}  // namespace penstock

#endif
