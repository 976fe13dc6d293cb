// The inner product every matrix kernel is made of: a few rows against kWidth columns.
//
// A block stores its columns side by side, so that lanes are columns and each (row, column) sum is
// ONE chain of fused multiply-adds in the order of k. That chain is what makes a row's bits
// independent of how many rows share the tile, of the tile's height and of the thread that runs it.
//
// Block layout: fp32 [k][kLanes]; bf16 [k / 2][kLanes][2], an odd k padded with zero. A product takes
// kVectors blocks at once, `step` elements apart.
#pragma once

#include "vec.h"

namespace penstock {

// Elements of k that one 32-bit word of a block holds.
template <typename S>
constexpr int kPack = 4 / static_cast<int>(sizeof(S));

template <typename S>
constexpr long words_of(long k) {
  return (k + kPack<S> - 1) / kPack<S>;
}

inline void multiply_add(Vec* sums, const WordVec* weights, float x, const float*) {
  for (int v = 0; v < kVectors; ++v) sums[v] += (Vec)weights[v] * x;
}

// `x` holds two bf16 values; the even one is added first.
inline void multiply_add(Vec* sums, const WordVec* weights, uint32_t x, const Bf16*) {
#if defined(__AVX512BF16__)
  const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(x));
  for (int v = 0; v < kVectors; ++v)
    sums[v] = (Vec)_mm512_dpbf16_ps((__m512)sums[v], (__m512bh)weights[v], pair);
#else
  const uint32_t low = x << 16, high = x & 0xffff0000u;
  const float even = load_as<float>(&low), odd = load_as<float>(&high);
  for (int v = 0; v < kVectors; ++v) {
    const WordVec first = weights[v] << 16, second = weights[v] & 0xffff0000u;
    sums[v] += (Vec)first * even;
    sums[v] += (Vec)second * odd;
  }
#endif
}

inline float word_at(const float* x, long word) { return x[word]; }
inline uint32_t word_at(const Bf16* x, long word) { return load_as<uint32_t>(x + 2 * word); }

// The last element of an odd k, its partner zero.
inline float tail_word(const float* x, long) { return *x; }
inline uint32_t tail_word(const Bf16* x, long k) { return x[k - 1].bits; }

// sums[row][0..kWidth) += x[row][0..k) . block; `sums` is kept in registers in between.
template <typename S, int kRows>
inline void tile(const S* x, long row_stride, const S* block, long step, long k, float* sums) {
  Vec chain[kRows][kVectors];
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) chain[row][v] = load(sums + row * kWidth + v * kLanes);
  const char* bytes = reinterpret_cast<const char*>(block);
  const long whole = k / kPack<S>;
  const long apart = step * static_cast<long>(sizeof(S));
  for (long word = 0; word < words_of<S>(k); ++word, bytes += 4 * kLanes) {
    WordVec weights[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      weights[v] = load_as<WordVec>(bytes + v * apart);
      if (kRows <= 2) __builtin_prefetch(bytes + v * apart + 2048);
    }
    for (int row = 0; row < kRows; ++row) {
      const S* start = x + row * row_stride;
      const auto value = word < whole ? word_at(start, word) : tail_word(start, k);
      multiply_add(chain[row], weights, value, x);
    }
  }
  for (int row = 0; row < kRows; ++row)
    for (int v = 0; v < kVectors; ++v) store(chain[row][v], sums + row * kWidth + v * kLanes);
}

// Any number of rows, cut into tiles.
template <typename S>
inline void tiles(const S* x, long row_stride, const S* block, long step, long k, long rows,
                  float* sums) {
  long row = 0;
  for (; row + kTileRows <= rows; row += kTileRows)
    tile<S, kTileRows>(x + row * row_stride, row_stride, block, step, k, sums + row * kWidth);
  x += row * row_stride;
  sums += row * kWidth;
  switch (rows - row) {
    case 5: return tile<S, 5>(x, row_stride, block, step, k, sums);
    case 4: return tile<S, 4>(x, row_stride, block, step, k, sums);
    case 3: return tile<S, 3>(x, row_stride, block, step, k, sums);
    case 2: return tile<S, 2>(x, row_stride, block, step, k, sums);
    case 1: return tile<S, 1>(x, row_stride, block, step, k, sums);
  }
}

}  // namespace penstock
