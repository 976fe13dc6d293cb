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

// Copies a plain row to its lines; what fills up the last one is zero.
template <typename S>
inline void arrange_row(const S* x, const Rows<S>& to, long row) {
  for (long index = 0; index < to.lines(); ++index) {
    const long count = std::min(to.kLine, to.k - index * to.kLine);
    S* line = to.line(row, index);
    std::memcpy(static_cast<void*>(line), x + index * to.kLine, count * sizeof(S));
    if (count < to.kLine && Rows<S>::kTiled)
      std::memset(static_cast<void*>(line + count), 0, (to.kLine - count) * sizeof(S));
  }
}

// This thread's share of the rows. Those that fill up the last tiles hold what they held: a row of
// sums is made of no other row.
template <typename S>
void arrange(const S* x, long stride, const Rows<S>& to, Part part) {
  const Range own = share(to.rows, part);
  for (long row = own.begin; row < own.end; ++row) arrange_row(x + row * stride, to, row);
}

// This thread's share of the zeros behind rows that do not fill their last line.
template <typename S>
void clear_tails(const Rows<S>& rows, Part part) {
  const long filled = rows.k % rows.kLine;
  if (!Rows<S>::kTiled || filled == 0) return;
  const Range own = share(rows.rows, part);
  for (long row = own.begin; row < own.end; ++row)
    std::memset(static_cast<void*>(rows.line(row, rows.lines() - 1) + filled), 0,
                (rows.kLine - filled) * sizeof(S));
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

// Asks for the weights that a thread will read first, a few lines a call, while it waits for others: a
// core has only so many lines on their way, and those it does not ask for are lost to its rate.
class EarlyReads {
 public:
  EarlyReads() = default;  // of nothing
  // Of the product with `w`.
  template <typename S>
  EarlyReads(const Matrix<S>& w, Part part) {
    const Range own = share(w.blocks(), part);
    const long bytes = std::min(kMost, (own.end - own.begin) * block_bytes(w)) / 128 * 64;
    set(w.block(own.begin), bytes, bytes);
  }
  // Of two parts of it, side by side: its first half of columns and its second.
  template <typename S>
  static EarlyReads halves(const Matrix<S>& w, Part part) {
    EarlyReads reads;
    const long half = w.blocks() / 2;
    const Range own = share(half, part);
    const long bytes = std::min(kMost / 2, (own.end - own.begin) * block_bytes(w)) / 64 * 64;
    reads.set(w.block(own.begin), half * block_bytes(w), bytes);
    return reads;
  }

  // Whether anything was left to ask for.
  bool operator()() {
    if (at_ == end_) return false;
    for (long line = 0; line < 8 && at_ < end_; ++line, at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
      __builtin_prefetch(at_ + apart_, 0, 2);
    }
    return true;
  }

 private:
  static constexpr long kMost = 256 << 10;  // a part of the second-level cache

  template <typename S>
  static long block_bytes(const Matrix<S>& w) {
    return w.block_values() * static_cast<long>(sizeof(S));
  }
  void set(const void* begin, long apart, long bytes) {
    at_ = static_cast<const char*>(begin);
    end_ = at_ + bytes;
    apart_ = apart;
  }

  const char *at_ = nullptr, *end_ = nullptr;
  long apart_ = 0;
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

// `write(sums, stride, top, rows, column, columns)` is called with sums of x W^T, some rows and columns
// at a time: those of row `top` and the following ones, `stride` apart.
template <typename S, typename Write>
void multiply_each(const Rows<S>& x, const Matrix<S>& w, const Write& write, Part part) {
  Units units((w.blocks() + kVectors - 1) / kVectors, part);
  alignas(64) float sums[kRowChunk * kWidth];
  const auto group = [&](long first, long step, long columns) {
    for (long top = 0; top < x.rows; top += kRowChunk) {
      const long count = std::min(kRowChunk, x.rows - top);
      std::memset(sums, 0, count * kWidth * sizeof(float));
      for (long depth = 0; depth < w.k; depth += kDepthChunk)
        tiles(x.data + top * w.k + depth, w.k, w.block(first) + depth * kLanes, step,
              std::min(kDepthChunk, w.k - depth), count, sums);
      write(sums, kWidth, top, count, first * kLanes, columns);
    }
  };
  for (long g = units.next(); g >= 0; g = units.next()) {
    const long first = g * kVectors, end = std::min(first + kVectors, w.blocks());
    if (end - first == kVectors)
      group(first, w.block_values(), std::min<long>(kWidth, w.n - first * kLanes));
    else  // too few blocks left: one at a time, the others stand for the same one
      for (long b = first; b < end; ++b) group(b, 0, std::min<long>(kLanes, w.n - b * kLanes));
  }
}

}  // namespace penstock

#include "matrix_tiles.h"

namespace penstock {

template <typename S, typename Y>
void multiply(const Rows<S>& x, const Matrix<S>& w, Y* y, Part part) {
  const auto write = [&](const float* sums, long stride, long top, long rows, long column,
                         long columns) {
    write_rows(sums, stride, w.bias ? w.bias + column : nullptr, rows, columns,
               y + top * w.n + column, w.n);
  };
  multiply_each(x, w, write, part);
}

}  // namespace penstock
