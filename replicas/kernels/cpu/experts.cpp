// The routed experts of one layer in one call: rows are gathered per expert, go through its gated MLP,
// and each row's weighted outputs are added up in ascending order of expert.
//
// Threads take (expert, columns) units from a counter, so one token's two experts keep all of them busy
// as well as two thousand tokens do. Who computes a unit changes no bit: a sum over k is made as in
// matrix.h, a row's experts are added in one order, and every rounding is where the calls one by one
// have it (linear, gate, linear in fp32, times weight, sum).
#include <atomic>

#include "matrix.h"
#include "rows.h"

namespace penstock {
namespace {

constexpr long kPieceRows = 256;     // rows of one expert in a unit
constexpr long kWaveRows = 2048;     // rows in work at a time: what lies in between stays in the cache
constexpr long kUnitColumns = 256;   // whole lines of `Rows`

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

  Matrix<S> gate(long slot, long column, long columns) const { return half(slot, column, columns); }
  Matrix<S> up(long slot, long column, long columns) const {
    return half(slot, ffn + column, columns);
  }
  Matrix<S> down(long slot) const { return {all[slot].down, all[slot].down_bias, dim, ffn}; }

 private:
  // Columns of the fused weight; both numbers are whole blocks.
  Matrix<S> half(long slot, long column, long columns) const {
    const Matrix<S> both{all[slot].up, all[slot].up_bias, 2 * ffn, dim};
    const S* bias = both.bias == nullptr ? nullptr : both.bias + column;
    return {both.block(column / kLanes), bias, columns, dim};
  }
};

// Rows and the slots they visit, as they came: (rows, top_k); other slots than 0 .. slots - 1 are
// none.
template <typename S>
struct Routed {
  const S* x;
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
  float* weight;
  long* ends;  // by slot
  Piece* pieces;
  long count, num_pieces;
};

// What of a wave lies in between; all in one caller's memory.
template <typename S>
struct Buffers {
  S *input, *inner, *halves;  // `halves`: per thread
  float* products;            // by pair of the wave
};

inline long max_pieces(long pairs, long slots) { return slots + pairs / kPieceRows + 1; }

inline long wave_rows(long pairs) { return std::min(kWaveRows, 2 * pairs) + 32; }

template <typename S>
Pairs take_pairs(Workspace& memory, long pairs, long slots) {
  Pairs taken{};
  taken.row = memory.take<int64_t>(pairs);
  taken.weight = memory.take<float>(pairs);
  taken.ends = memory.take<long>(slots + 1);
  taken.pieces = memory.take<Piece>(max_pieces(pairs, slots));
  return taken;
}

template <typename S>
Buffers<S> take_buffers(Workspace& memory, long pairs, long dim, long ffn, long threads) {
  const long rows = wave_rows(pairs), line = Rows<S>::kLine;
  Buffers<S> taken{};
  taken.input = memory.take<S>(rows * round_up(dim, line));
  taken.inner = memory.take<S>(rows * round_up(ffn, line));
  taken.products = memory.take<float>(std::min(kWaveRows, pairs) * dim);
  taken.halves = memory.take<S>(threads * 2 * kPieceRows * kUnitColumns);
  return taken;
}

// Pairs by expert, then by row, cut into pieces.
template <typename S>
void sort_pairs(const Routed<S>& routed, const Experts<S>& experts, Pairs& pairs) {
  const long all = routed.rows * routed.top_k;
  long* place = pairs.ends;
  std::memset(place, 0, (experts.slots + 1) * sizeof(long));
  const auto here = [&](long pair) {
    return routed.slots[pair] >= 0 && routed.slots[pair] < experts.slots;
  };
  for (long pair = 0; pair < all; ++pair)
    if (here(pair)) ++place[routed.slots[pair]];
  for (long at = 0, begin = 0; at < experts.slots; ++at) {
    const long slot = experts.order[at], count = place[slot];
    for (long done = 0; done < count; done += kPieceRows)
      pairs.pieces[pairs.num_pieces++] = {slot, begin + done, std::min(kPieceRows, count - done), 0};
    place[slot] = begin;
    pairs.count = begin += count;
  }
  for (long pair = 0; pair < all; ++pair) {
    if (!here(pair)) continue;
    const long to = place[routed.slots[pair]]++;
    pairs.row[to] = pair / routed.top_k;
    pairs.weight[to] = routed.weights[pair];
  }
}

// Places the pieces from `from` on that one wave holds; returns the first of the next.
template <typename S>
long place_wave(Pairs& pairs, long from) {
  long rows = 0, end = from;
  for (; end < pairs.num_pieces; ++end) {
    const long padded = Rows<S>::padded(pairs.pieces[end].rows);
    if (rows && rows + padded > kWaveRows) break;
    pairs.pieces[end].padded = rows;
    rows += padded;
  }
  return end;
}

template <typename S>
Rows<S> piece_rows(S* base, const Piece& piece, long k) {
  return {base + piece.padded * round_up(k, Rows<S>::kLine), piece.rows, k};
}

// This thread's share of the gathered rows.
template <typename S>
void gather(const Routed<S>& routed, const Pairs& pairs, const Piece* pieces, long count, long dim,
            S* input, Part part) {
  for (long p = 0; p < count; ++p) {
    const Rows<S> to = piece_rows(input, pieces[p], dim);
    const Range own = share(Rows<S>::padded(to.rows), part);
    for (long row = own.begin; row < own.end; ++row) {
      const bool real = row < to.rows;
      const S* from = real ? routed.x + pairs.row[pieces[p].first + row] * dim : nullptr;
      for (long index = 0; index < to.lines(); ++index) {
        const long values = real ? std::min(to.kLine, dim - index * to.kLine) : 0;
        S* line = to.line(row, index);
        if (values) std::memcpy(static_cast<void*>(line), from + index * to.kLine, values * sizeof(S));
        if (values < to.kLine && Rows<S>::kTiled)
          std::memset(static_cast<void*>(line + values), 0, (to.kLine - values) * sizeof(S));
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

// Unit of the first half: some columns of gate and up of one piece, and their product.
template <typename S>
void gate_unit(const Experts<S>& experts, const Piece& piece, long unit, const Rows<S>& input,
               const Rows<S>& inner, S* halves) {
  const long column = unit * kUnitColumns;
  const long columns = std::min(kUnitColumns, experts.ffn - column);
  S* up = halves + kPieceRows * kUnitColumns;
  multiply(input, experts.gate(piece.slot, column, columns), halves, Part{0, 1});
  multiply(input, experts.up(piece.slot, column, columns), up, Part{0, 1});
  for (long row = 0; row < Rows<S>::padded(piece.rows); ++row)
    for (long at = 0; at < columns; at += inner.kLine) {
      const long count = row < piece.rows ? std::min(inner.kLine, columns - at) : 0;
      S* line = inner.line(row, (column + at) / inner.kLine);
      const long from = row * columns + at;
      if (experts.activation.limit > 0)
        clamped_values(halves + from, up + from, line, count, experts.activation);
      else
        gate_values(halves + from, up + from, line, count);
      if (count < inner.kLine && Rows<S>::kTiled)
        std::memset(static_cast<void*>(line + count), 0, (inner.kLine - count) * sizeof(S));
    }
}

// The compiler may not fuse what made this value with what uses it.
inline Vec settled(Vec value) {
  asm("" : "+m"(value));
  return value;
}

// y += product * weight, with both roundings.
inline void add_weighted(const float* product, float weight, float* y, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(load(y + i) + settled(load(product + i) * weight), y + i);
  for (; i < count; ++i) {
    float value = product[i] * weight;
    asm("" : "+m"(value));
    y[i] += value;
  }
}

// This thread's share of the sums: whole rows, or with few of them stretches of each.
inline void add_up(const Pairs& pairs, long first, long end, const float* products, long rows,
                   long dim, float* y, Part part) {
  const bool by_row = rows >= 4L * part.count;
  const Range own = by_row ? share(rows, part) : share((dim + kLanes - 1) / kLanes, part);
  const long left = by_row ? 0 : own.begin * kLanes;
  const long width = (by_row ? dim : std::min(own.end * kLanes, dim)) - left;
  for (long pair = first; pair < end; ++pair) {
    const long row = pairs.row[pair];
    if (by_row && (row < own.begin || row >= own.end)) continue;
    add_weighted(products + (pair - first) * dim + left, pairs.weight[pair], y + row * dim + left,
                 width);
  }
}

// Units of one phase after another from one counter: each thread draws once in vain at its end.
class Units {
 public:
  Units(std::atomic<long>& next, long threads) : next_(next), threads_(threads) {}
  template <typename Work>
  void phase(long units, const Work& work) {
    for (;;) {
      const long unit = next_.fetch_add(1, std::memory_order_relaxed) - begin_;
      if (unit >= units) break;
      work(unit);
    }
    begin_ += units + threads_;
  }

 private:
  std::atomic<long>& next_;
  long threads_, begin_ = 0;
};

template <typename S>
void run(const Routed<S>& routed, const Experts<S>& experts, float* y, void* memory, int threads) {
  Workspace workspace(memory);
  const long all = routed.rows * routed.top_k, dim = experts.dim, ffn = experts.ffn;
  Pairs pairs = take_pairs<S>(workspace, all, experts.slots);
  const Buffers<S> buffers = take_buffers<S>(workspace, all, dim, ffn, threads);
  sort_pairs(routed, experts, pairs);
  std::memset(y, 0, routed.rows * dim * sizeof(float));
  for (long piece = 0; piece < pairs.num_pieces;) piece = place_wave<S>(pairs, piece);
  const long gate_units = (ffn + kUnitColumns - 1) / kUnitColumns;
  const long down_units = (dim + kUnitColumns - 1) / kUnitColumns;
  std::atomic<long> next{0};
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part();
    Units units(next, part.count);
    S* halves = buffers.halves + part.index * 2 * kPieceRows * kUnitColumns;
    for (long begin = 0, end = 0; begin < pairs.num_pieces; begin = end) {
      const Piece* pieces = pairs.pieces + begin;
      for (end = begin + 1; end < pairs.num_pieces && pairs.pieces[end].padded; ++end) {
      }
      const long count = end - begin, first = pieces[0].first;
      gather(routed, pairs, pieces, count, dim, buffers.input, part);
#pragma omp barrier
      units.phase(count * gate_units, [&](long unit) {
        const Piece& piece = pieces[unit / gate_units];
        gate_unit(experts, piece, unit % gate_units, piece_rows(buffers.input, piece, dim),
                  piece_rows(buffers.inner, piece, ffn), halves);
      });
#pragma omp barrier
      units.phase(count * down_units, [&](long unit) {
        const Piece& piece = pieces[unit / down_units];
        const Part columns{static_cast<int>(unit % down_units), static_cast<int>(down_units)};
        multiply(piece_rows(buffers.inner, piece, ffn), experts.down(piece.slot),
                 buffers.products + (piece.first - first) * dim, columns);
      });
#pragma omp barrier
      const Piece& last = pieces[count - 1];
      add_up(pairs, first, last.first + last.rows, buffers.products, routed.rows, dim, y, part);
#pragma omp barrier
    }
  }
}

template <typename S>
long workspace_bytes(long pairs, long slots, long dim, long ffn, long threads) {
  Workspace counted(nullptr);
  take_pairs<S>(counted, pairs, slots);
  take_buffers<S>(counted, pairs, dim, ffn, threads);
  return reinterpret_cast<long>(counted.take<char>(0));
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;

// Rows that go nowhere come out zero. `y` (rows, dim) fp32; `all`: four addresses per slot.
#define PK_EXPERTS(suffix, S)                                                                      \
  void pk_experts_##suffix(const S* x, const int64_t* visited, const float* weights, long rows,    \
                           long top_k, const void* all, const int64_t* order, long slots,          \
                           long dim, long ffn, float limit, float alpha, float* y,                 \
                           void* workspace, int threads) {                                         \
    penstock::run(penstock::Routed<S>{x, visited, weights, rows, top_k},                           \
                  penstock::Experts<S>{static_cast<const penstock::Expert<S>*>(all), order,        \
                                       slots, dim, ffn, {limit, alpha}},                           \
                  y, workspace, threads);                                                          \
  }                                                                                                \
  long pk_experts_bytes_##suffix(long pairs, long slots, long dim, long ffn, long threads) {       \
    return penstock::workspace_bytes<S>(pairs, slots, dim, ffn, threads);                          \
  }

extern "C" {

PK_EXPERTS(bf16, Bf16)
PK_EXPERTS(f32, float)

}  // extern "C"
