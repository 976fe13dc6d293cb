// y = x W^T + bias inside a parallel region: how W and x lie, and each thread's share.
//
// W is packed in blocks of kLanes output features, [block][k / kPack][kLanes][kPack], which serves the
// chains of tile.h and the tiles of amx.h alike. Threads share out features, never k.
#pragma once

#include "amx.h"
#include "tile.h"

namespace penstock {

// Rows that a linear reads, written line by line (kLine elements of one row).
// Plain: row after row. Tiled: for each 16 rows the depth tiles, [16 rows][64 bytes] each; fewer rows
// make lower tiles, so that one row is a plain one.
template <typename S>
struct Rows {
  static constexpr bool kTiled = kHasTiles && sizeof(S) == 2;
  static constexpr long kLine = 32;

  S* data;
  long rows, k;

  static long padded(long rows) { return !kTiled || rows <= 16 ? rows : round_up(rows, 32); }
  static long values(long rows, long k) { return padded(rows) * round_up(k, kLine); }
  long side() const { return std::min(rows, 16L); }
  long lines() const { return (k + kLine - 1) / kLine; }
  S* line(long row, long index) const {
    if (!kTiled) return data + row * k + index * kLine;
    return data + ((row / 16 * lines() + index) * side() + row % 16) * kLine;
  }
};

template <typename S>
inline bool can_alias(long rows, long k) {
  return !Rows<S>::kTiled || (rows == 1 && k % Rows<S>::kLine == 0);
}

// This thread's share of the copy of plain rows; the rows that fill up the last tiles become zero.
template <typename S>
void arrange(const S* x, long stride, const Rows<S>& to, Part part) {
  const Range own = share(Rows<S>::padded(to.rows), part);
  for (long row = own.begin; row < own.end; ++row)
    for (long index = 0; index < to.lines(); ++index) {
      const long count = row < to.rows ? std::min(to.kLine, to.k - index * to.kLine) : 0;
      S* line = to.line(row, index);
      if (count) std::memcpy(static_cast<void*>(line), x + row * stride + index * to.kLine,
                             count * sizeof(S));
      if (count < to.kLine && Rows<S>::kTiled)
        std::memset(static_cast<void*>(line + count), 0, (to.kLine - count) * sizeof(S));
    }
}

// A packed weight.
template <typename S>
struct Matrix {
  const S* packed;
  const S* bias;
  long n, k;

  long blocks() const { return (n + kLanes - 1) / kLanes; }
  long block_values() const { return words_of<S>(k) * kPack<S> * kLanes; }
  const S* block(long index) const { return packed + index * block_values(); }
};

// y[row][0..columns) = sums[row][...] + bias, rounded once.
template <typename S, typename Y>
void write_rows(const float* sums, long sums_stride, const S* bias, long rows, long columns, Y* y,
                long stride) {
  for (long row = 0; row < rows; ++row, sums += sums_stride, y += stride) {
    long i = 0;
    if (bias == nullptr)
      for (; i + kLanes <= columns; i += kLanes) store(load(sums + i), y + i);
    for (; i < columns; ++i) from_float(sums[i] + (bias ? to_float(bias[i]) : 0.0f), y + i);
  }
}

constexpr long kRowChunk = 96;      // sums of a chunk: 24 KiB on AVX-512
constexpr long kDepthChunk = 1024;  // even; bf16 blocks of this depth are 128 KiB

template <typename S, typename Y>
void multiply(const Rows<S>& x, const Matrix<S>& w, Y* y, Part part) {
  const Range own = share((w.blocks() + kVectors - 1) / kVectors, part);
  alignas(64) float sums[kRowChunk * kWidth];
  const auto group = [&](long first, long step, long columns) {
    for (long top = 0; top < x.rows; top += kRowChunk) {
      const long count = std::min(kRowChunk, x.rows - top);
      std::memset(sums, 0, count * kWidth * sizeof(float));
      for (long depth = 0; depth < w.k; depth += kDepthChunk)
        tiles(x.data + top * w.k + depth, w.k, w.block(first) + depth * kLanes, step,
              std::min(kDepthChunk, w.k - depth), count, sums);
      write_rows(sums, kWidth, w.bias ? w.bias + first * kLanes : nullptr, count, columns,
                 y + top * w.n + first * kLanes, w.n);
    }
  };
  for (long g = own.begin; g < own.end; ++g) {
    const long first = g * kVectors, end = std::min(first + kVectors, w.blocks());
    if (end - first == kVectors)
      group(first, w.block_values(), std::min<long>(kWidth, w.n - first * kLanes));
    else  // too few blocks left: one at a time, the others stand for the same one
      for (long b = first; b < end; ++b) group(b, 0, std::min<long>(kLanes, w.n - b * kLanes));
  }
}

#if defined(PENSTOCK_AMX)

// Two or four blocks from `first` on; a missing one stands for the last there is.
inline void columns_of(const Matrix<Bf16>& w, long first, long count, long depth, Column* columns,
                       char* rest) {
  const long whole = w.k / kTileDepth, left = words_of<Bf16>(w.k) - whole * 16;
  for (long b = 0; b < count; ++b) {
    const char* block = reinterpret_cast<const char*>(w.block(std::min(first + b, w.blocks() - 1)));
    columns[b] = {block + depth * kTileBytes, nullptr};
    if (left == 0) continue;
    std::memset(rest + b * kTileBytes, 0, kTileBytes);
    std::memcpy(rest + b * kTileBytes, block + whole * kTileBytes, left * 64);
    columns[b].rest = rest + b * kTileBytes;
  }
}

template <typename Y>
void multiply_few(const Rows<Bf16>& x, const Matrix<Bf16>& w, Y* y, Part part) {
  alignas(64) float sums[16 * 64];
  alignas(64) char rest[4 * kTileBytes];
  Column columns[4];
  const Tiles tiles(x.side());
  const Range own = share((w.blocks() + 3) / 4, part);
  const char* from = reinterpret_cast<const char*>(x.data);
  const long step = x.side() * 64, whole = w.k / kTileDepth;
  for (long g = own.begin; g < own.end; ++g) {
    const long first = 4 * g, count = std::min(4L, w.blocks() - first);
    columns_of(w, first, count, 0, columns, rest);
    switch (count) {
      case 4: multiply_1xn<4>(from, step, columns, whole, sums); break;
      case 3: multiply_1xn<3>(from, step, columns, whole, sums); break;
      case 2: multiply_1xn<2>(from, step, columns, whole, sums); break;
      default: multiply_1xn<1>(from, step, columns, whole, sums);
    }
    write_rows(sums, 64, w.bias ? w.bias + first * 16 : nullptr, x.rows,
               std::min(64L, w.n - first * 16), y + first * 16, w.n);
  }
}

// Pieces that stay in the second-level cache: 256 rows x 256 columns x 256 of the depth; with few
// rows the weights pass by once and the depth is not cut.
template <bool kFew, typename Y>
void multiply_many(const Rows<Bf16>& x, const Matrix<Bf16>& w, Y* y, Part part) {
  constexpr long kSide = 256, kDepth = 8;  // tiles of the depth
  float* sums = reinterpret_cast<float*>(thread_scratch(kSide * kSide * sizeof(float)));
  alignas(64) char rest[2 * kTileBytes], unused[2 * kTileBytes];
  Column columns[2], next[2];
  const Tiles tiles(16);
  const long pairs = (w.blocks() + 1) / 2, whole = w.k / kTileDepth;
  const Range own = share(pairs, part);
  for (long top = 0; top < x.rows; top += kSide)
    for (long left = own.begin; left < own.end; left += kSide / 32) {
      const long rows = std::min(kSide, x.rows - top), end = std::min(left + kSide / 32, own.end);
      for (long depth = 0; depth == 0 || depth < whole;) {
        const long stop = kFew || depth + kDepth >= whole ? whole : depth + kDepth;
        for (long pair = left; pair < end; ++pair) {
          columns_of(w, 2 * pair, 2, depth, columns, rest);
          const bool turns = pair + 1 == end;  // to the next piece of the depth
          columns_of(w, 2 * (turns ? left : pair + 1), 2, turns ? stop : depth, next, unused);
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
      const long column = left * 32;
      write_rows(sums, kSide, w.bias ? w.bias + column : nullptr, rows,
                 std::min(end * 32, w.n) - column, y + top * w.n + column, w.n);
    }
}

template <typename Y>
void multiply(const Rows<Bf16>& x, const Matrix<Bf16>& w, Y* y, Part part) {
  if (x.rows <= 16) return multiply_few(x, w, y, part);
  if (x.rows <= 64) return multiply_many<true>(x, w, y, part);
  multiply_many<false>(x, w, y, part);
}

#endif

}  // namespace penstock
