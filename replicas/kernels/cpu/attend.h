// One task of paged causal attention: a request, a kv head, a few query tokens.
//
// The tokens' heads are the rows of small products against kPiece context tokens at a time, which
// begin at multiples of kPiece from position 0. The softmax runs online over these pieces in fp32.
// Nothing of this depends on how many tokens or requests a step has, so neither batch nor chunk nor
// thread count changes a bit of a row. This file has the way that every machine can go.
#pragma once

#include <limits>
#include <vector>

#include "matrix.h"
#include "team.h"
#include "tile.h"
#include "transpose.h"

namespace penstock {

struct Shape {
  long heads, kv_heads, dim, block_size, window;  // window 0: all
  long query_stride, kv_stride, cache_values;  // elements; values begin `cache_values` after keys
  float scale;
};

constexpr long kPiece = kWidth;
constexpr long kMaxRows = 48;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Memory of one thread.
template <typename S>
struct Scratchpad {
  explicit Scratchpad(long dim)
      : rows(kMaxRows * dim), keys(words_of<S>(dim) * kPack<S> * kWidth), scores(kMaxRows * kWidth),
        sums(kMaxRows * dim), highest(kMaxRows), total(kMaxRows) {}
  std::vector<S> rows;
  std::vector<S> keys;
  std::vector<float> scores, sums, highest, total;
  long slots[kWidth];
};

// Turns the scores of one row into weights and rescales what was summed before. Never inlined: which
// products a compiler fuses with which sums may depend on what stands around them, and a row's bits must not
// depend on the caller that its step's shape chose.
[[gnu::noinline]] inline void softmax_step(float* scores, long begin, long end, float scale, float* highest,
                         float* total, float* sums, long dim) {
  const Vec lowest = splat(kMinusInfinity);
  Vec maximum = lowest;
  IntVec lane{};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int v = 0; v < kVectors; ++v) {
    const IntVec column = lane + v * kLanes;
    const IntVec visible =
        (column >= static_cast<int32_t>(begin)) & (column < static_cast<int32_t>(end));
    const Vec score = select(visible, load(scores + v * kLanes) * scale, lowest);
    maximum = select(score > maximum, score, maximum);
    store(score, scores + v * kLanes);
  }
  const float top = std::max(*highest, max_lanes(maximum));
  // All scores -inf or NaN: subtract nothing, so that the row becomes NaN as torch's does.
  const float base = top == kMinusInfinity ? 0.0f : top;
  Vec added{};
  for (int v = 0; v < kVectors; ++v) {
    const Vec weight = exp_vec(load(scores + v * kLanes) - base);
    added += weight;
    store(weight, scores + v * kLanes);
  }
  const float keep = *highest == kMinusInfinity ? 0.0f : exp_vec(splat(*highest - base))[0];
  *total = *total * keep + sum_lanes(added);
  *highest = top;
  if (keep == 1.0f) return;
  long i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(load(sums + i) * keep, sums + i);
  for (; i < dim; ++i) sums[i] *= keep;
}

// sums[row] += weights[row] . values, `kRows` rows and kParts vectors of the head at a time.
template <typename S, int kRows, int kParts>
inline void add_values(const float* weights, const S* cache, const long* slots, long begin,
                       long end, long stride, long dim, float* sums) {
  Vec chain[kRows][kParts];
  for (int row = 0; row < kRows; ++row)
    for (int part = 0; part < kParts; ++part)
      chain[row][part] = load(sums + row * dim + part * kLanes);
  for (long token = begin; token < end; ++token) {
    const S* value = cache + slots[token] * stride;
    Vec parts[kParts];
    for (int part = 0; part < kParts; ++part) parts[part] = load(value + part * kLanes);
    for (int row = 0; row < kRows; ++row)
      for (int part = 0; part < kParts; ++part)
        chain[row][part] += parts[part] * weights[row * kWidth + token];
  }
  for (int row = 0; row < kRows; ++row)
    for (int part = 0; part < kParts; ++part)
      store(chain[row][part], sums + row * dim + part * kLanes);
}

template <typename S, int kParts>
inline void add_rows(long rows, const float* weights, const S* cache, const long* slots,
                     long begin, long end, long stride, long dim, float* sums) {
  switch (rows) {
    case 4: return add_values<S, 4, kParts>(weights, cache, slots, begin, end, stride, dim, sums);
    case 3: return add_values<S, 3, kParts>(weights, cache, slots, begin, end, stride, dim, sums);
    case 2: return add_values<S, 2, kParts>(weights, cache, slots, begin, end, stride, dim, sums);
    case 1: return add_values<S, 1, kParts>(weights, cache, slots, begin, end, stride, dim, sums);
  }
}

// begin/end: tokens that at least one row sees; a weight of zero adds exactly nothing.
template <typename S>
void mix_values(const float* weights, const S* cache, const long* slots, long begin, long end,
                long stride, long dim, long rows, float* sums) {
  for (long row = 0; row < rows;) {
    const long step = std::min(4L, rows - row);
    const float* w = weights + row * kWidth;
    float* s = sums + row * dim;
    long i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes)
      add_rows<S, 4>(step, w, cache + i, slots, begin, end, stride, dim, s + i);
    for (; i + kLanes <= dim; i += kLanes)
      add_rows<S, 1>(step, w, cache + i, slots, begin, end, stride, dim, s + i);
    for (; i < dim; ++i)
      for (long r = 0; r < step; ++r)
        for (long token = begin; token < end; ++token)
          // Spelled out: a compiler that vectorises the sum would fuse some of its terms only.
          s[r * dim + i] = std::fma(w[r * kWidth + token],
                                    to_float(cache[slots[token] * stride + i]), s[r * dim + i]);
    row += step;
  }
}

// Where tokens [skip, seen) of the piece at `base` lie in the cache.
inline void find_slots(const Shape& shape, const int32_t* table, long base, long skip, long seen,
                       long* slots) {
  long block = (base + skip) / shape.block_size, offset = (base + skip) % shape.block_size;
  for (long token = skip; token < seen; ++token) {
    slots[token] = static_cast<long>(table[block]) * shape.block_size + offset;
    if (++offset < shape.block_size) continue;
    offset = 0;
    ++block;
  }
}

// Where the heads of a token go: plain rows, or the lines that a product reads.
template <typename S>
struct HeadRows {
  S* plain;  // null: `lines`
  Rows<S> lines;

  // Of a row's elements; those to the end of their line lie together.
  S* at(long row, long element) const {
    if (plain != nullptr) return plain + row * lines.k + element;
    return lines.line(row, element / Rows<S>::kLine) + element % Rows<S>::kLine;
  }
};

// Query tokens first..first+count of one request, all heads of kv head g.
template <typename S>
void attend(const Shape& shape, const S* query, const S* cache, const int32_t* table,
            const HeadRows<S>& output, long first, long g, long count, long position,
            Scratchpad<S>& scratch) {
  const long dim = shape.dim, group = shape.heads / shape.kv_heads, rows = count * group;
  for (long row = 0; row < rows; ++row)
    std::memcpy(scratch.rows.data() + row * dim,
                query + row / group * shape.query_stride + (g * group + row % group) * dim,
                dim * sizeof(S));
  std::fill_n(scratch.sums.begin(), rows * dim, 0.0f);
  std::fill_n(scratch.highest.begin(), rows, kMinusInfinity);
  std::fill_n(scratch.total.begin(), rows, 0.0f);
  const S *keys = cache + g * dim, *values = keys + shape.cache_values;
  const long stop = position + count;  // one past the last position any row sees
  const long start = shape.window ? std::max(0L, position - shape.window + 1) : 0;
  for (long base = start / kWidth * kWidth; base < stop; base += kWidth) {
    const long seen = std::min<long>(kWidth, stop - base), skip = std::max(0L, start - base);
    find_slots(shape, table, base, skip, seen, scratch.slots);
    // Blocks before the window may be gone: tokens there stand for the first one inside.
    std::fill_n(scratch.slots, skip, scratch.slots[skip]);
    transpose_keys(keys, scratch.slots, seen, shape.kv_stride, dim, scratch.keys.data());
    std::fill_n(scratch.scores.begin(), rows * kWidth, 0.0f);
    tiles(scratch.rows.data(), dim, scratch.keys.data(),
          words_of<S>(dim) * kPack<S> * kLanes, dim, rows, scratch.scores.data());
    for (long row = 0; row < rows; ++row) {
      const long own = position + row / group;
      const long from = shape.window ? std::max(0L, own - shape.window + 1 - base) : 0;
      float* scores = scratch.scores.data() + row * kWidth;
      if (own < base || from >= kWidth) {
        std::fill_n(scores, kWidth, 0.0f);
        continue;
      }
      softmax_step(scores, from, std::min<long>(kWidth, own - base + 1), shape.scale,
                   &scratch.highest[row], &scratch.total[row], scratch.sums.data() + row * dim,
                   dim);
    }
    mix_values(scratch.scores.data(), values, scratch.slots, skip, seen, shape.kv_stride, dim, rows,
               scratch.sums.data());
  }
  for (long row = 0; row < rows; ++row) {
    const long head = (g * group + row % group) * dim;
    for (long i = 0; i < dim; ++i)
      from_float(scratch.sums[row * dim + i] / scratch.total[row],
                 output.at(first + row / group, head + i));
  }
}

}  // namespace penstock
