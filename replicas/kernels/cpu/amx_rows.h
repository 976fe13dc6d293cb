// What tile instructions compute for very few rows, on vectors: the same products and sums in the same
// order, to the same bits. Vectors are loaded from four places at once and a little ahead, for which
// tiles leave no room, so memory is read faster (measured: docs/decisions/0006).
//
// A tile instruction's even and odd products are two chains of fused multiply-adds from zero, added to
// each other and then to the sum; denormals are zero for it, as operands and as results.
#pragma once

#include "amx.h"
#include "matrix.h"

#if defined(PENSTOCK_AMX)

namespace penstock {

constexpr long kVectorRows = 2;  // sums of four columns of more do not fit the registers

// From here to the end of the block this thread computes with denormals as tiles do.
class TileRounding {
 public:
  TileRounding() : before_(_mm_getcsr()) { set(kNearestWithoutDenormals); }
  ~TileRounding() { set(before_); }
  TileRounding(const TileRounding&) = delete;

 private:
  static constexpr unsigned kNearestWithoutDenormals = 0x9fc0;

  // The compiler does not know that arithmetic depends on this; what it loads and stores stays put.
  static void set(unsigned state) {
    settle_memory();
    _mm_setcsr(state);
    settle_memory();
  }
  unsigned before_;
};

// Up to kVectorRows rows as numbers: for each depth tile and row 16 even ones, then 16 odd ones.
inline const float* as_numbers(const Rows<Bf16>& x) {
  const long count = x.lines() * x.rows;
  float* numbers = reinterpret_cast<float*>(thread_scratch_of<TileRounding>(count * 32 * 4));
  for (long line = 0; line < count; ++line) {
    const WordVec words = load_as<WordVec>(x.data + line * 32);
    store((Vec)(words << 16), numbers + line * 32);
    store((Vec)(words & 0xffff0000u), numbers + line * 32 + 16);
  }
  return numbers;
}

// One depth tile of kColumns columns: sums[column][row] += x w. Meanwhile as many bytes from `ahead` on are
// asked for.
template <long kRows, long kColumns, bool kFetch>
inline void add_depth_tile(const float* x, const char* const* w, const char* const* ahead,
                           Vec (*sums)[kRows]) {
  Vec even[kColumns][kRows] = {}, odd[kColumns][kRows] = {};
#pragma GCC unroll 16
  for (long word = 0; word < 16; ++word)
#pragma GCC unroll 4
    for (long column = 0; column < kColumns; ++column) {
      const char* at = w[column] + word * 64;
      if (kFetch) _mm_prefetch(ahead[column] + word * 64, _MM_HINT_T0);
      const WordVec words = load_as<WordVec>(at);
      const Vec low = (Vec)(words << 16), high = (Vec)(words & 0xffff0000u);
      for (long row = 0; row < kRows; ++row) {
        even[column][row] = low * x[row * 32 + word] + even[column][row];
        odd[column][row] = high * x[row * 32 + 16 + word] + odd[column][row];
      }
    }
  for (long column = 0; column < kColumns; ++column)
    for (long row = 0; row < kRows; ++row)
      sums[column][row] += even[column][row] + odd[column][row];
}

// kRows rows against pairs of columns, the whole depth. `sums`: [pair][row][32]. `following`: the columns that
// are probably next; their first tiles are fetched with the last ones of these, or each column would begin
// with a wait for memory.
template <long kRows, long kPairs>
void multiply_vectors(const float* x, const Column* columns, const Column* following,
                      long depth_tiles, float* sums) {
  constexpr long kColumns = 2 * kPairs;
  const TileRounding rounding;
  Vec totals[kColumns][kRows] = {};
  const char *at[kColumns], *ahead[kColumns];
  for (long column = 0; column < kColumns; ++column) at[column] = columns[column].whole;
  for (long t = 0; t < depth_tiles; ++t, x += kRows * 32) {
    for (long column = 0; column < kColumns; ++column)
      ahead[column] = t + 1 < depth_tiles ? at[column] + kTileBytes : following[column].whole;
    add_depth_tile<kRows, kColumns, true>(x, at, ahead, totals);
    for (const char*& next : at) next += kTileBytes;
  }
  if (columns[0].rest != nullptr) {
    for (long column = 0; column < kColumns; ++column) at[column] = columns[column].rest;
    add_depth_tile<kRows, kColumns, false>(x, at, at, totals);
  }
  for (long column = 0; column < kColumns; ++column)
    for (long row = 0; row < kRows; ++row)
      store(totals[column][row], sums + (column / 2 * kRows + row) * 32 + column % 2 * 16);
}

// The same of one pair or two.
inline void multiply_vectors(const float* x, long rows, const Column* columns,
                             const Column* following, long pairs, long depth_tiles, float* sums) {
  static_assert(kVectorRows == 2, "one case for each number of rows");
  const auto multiply = rows == 1 ? (pairs == 1 ? multiply_vectors<1, 1> : multiply_vectors<1, 2>)
                                  : (pairs == 1 ? multiply_vectors<2, 1> : multiply_vectors<2, 2>);
  multiply(x, columns, following, depth_tiles, sums);
}

}  // namespace penstock

#endif
