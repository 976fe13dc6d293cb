// Which rows visit which routed expert: pairs of row and expert, sorted by expert and cut into pieces
// that are multiplied at once, and pieces put together to waves that stay in the cache.
#pragma once

#include "exact.h"
#include "matrix.h"

namespace penstock {

constexpr long kPieceRows = 256;  // rows of one expert in a piece
constexpr long kWaveRows = 2048;  // rows in work at a time: what lies in between stays in the cache

// Rows and the slots they visit, as they came, (rows, top_k); other slots than 0 .. slots - 1 are
// none.
struct Routed {
  const int64_t* slots;
  const float* weights;
  long rows, top_k;
};

// Up to kPieceRows pairs of one expert.
struct Piece {
  long slot, first, rows, padded;  // `padded`: where its rows begin among those of the wave
};

struct Pairs {
  int64_t* row;
  float *weight, *heaviest;  // `heaviest`: magnitude of the largest weight of the pair's row
  long* ends;  // by slot
  Piece* pieces;
  long count, num_pieces;
};

inline Pairs take_pairs(Workspace& memory, long pairs, long slots) {
  Pairs taken{};
  taken.row = memory.take<int64_t>(pairs);
  taken.weight = memory.take<float>(pairs);
  taken.heaviest = memory.take<float>(pairs);
  taken.ends = memory.take<long>(slots + 1);
  taken.pieces = memory.take<Piece>(slots + pairs / kPieceRows + 1);
  return taken;
}

// Pairs by expert, then by row, cut into pieces; `order`: slots in ascending order of their experts.
inline void sort_pairs(const Routed& routed, const int64_t* order, long slots, Pairs& pairs) {
  const long all = routed.rows * routed.top_k;
  long* place = pairs.ends;
  std::memset(place, 0, (slots + 1) * sizeof(long));
  const auto here = [&](long pair) {
    return routed.slots[pair] >= 0 && routed.slots[pair] < slots;
  };
  for (long pair = 0; pair < all; ++pair)
    if (here(pair)) ++place[routed.slots[pair]];
  for (long at = 0, begin = 0; at < slots; ++at) {
    const long slot = order[at], count = place[slot];
    for (long done = 0; done < count; done += kPieceRows)
      pairs.pieces[pairs.num_pieces++] = {slot, begin + done, std::min(kPieceRows, count - done), 0};
    place[slot] = begin;
    pairs.count = begin += count;
  }
  for (long row = 0; row < routed.rows; ++row) {
    const long begin = row * routed.top_k;
    const float heaviest = largest_magnitude(routed.weights + begin, routed.top_k);
    for (long pair = begin; pair < begin + routed.top_k; ++pair) {
      if (!here(pair)) continue;
      const long to = place[routed.slots[pair]]++;
      pairs.row[to] = row;
      pairs.weight[to] = routed.weights[pair];
      pairs.heaviest[to] = heaviest;
    }
  }
}

// Pieces that are in work together.
struct Wave {
  const Piece* pieces;
  long count;

  long first() const { return pieces[0].first; }
  long end() const { return pieces[count - 1].first + pieces[count - 1].rows; }
};

// Rows of activations that a wave's pieces take up.
inline long wave_rows(long pairs) { return std::min(kWaveRows, 2 * pairs) + 32; }

// The wave that begins with piece `from`; places its pieces.
template <typename S>
Wave place_wave(Pairs& pairs, long from) {
  long rows = 0, end = from;
  for (; end < pairs.num_pieces; ++end) {
    const long padded = Rows<S>::padded(pairs.pieces[end].rows);
    if (rows && rows + padded > kWaveRows) break;
    pairs.pieces[end].padded = rows;
    rows += padded;
  }
  return {pairs.pieces + from, end - from};
}

}  // namespace penstock
