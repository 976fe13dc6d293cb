// One task of paged attention on matrix tiles: query tokens of a request against its context, some kv
// heads. Each head's softmax runs over the same pieces in the same order, whatever comes in between.
//
// A decoding token's context is read once and lies in memory: piece by piece, in each all heads, because
// the rows of one token's heads lie side by side and so whole blocks are read from their begin to their
// end. While a piece is computed the next one, or the next task's first, comes into the second-level
// cache. A prompt's tokens share their context, which that cache has: head by head.
#pragma once

#include "attend_amx.h"

#if defined(PENSTOCK_AMX)

namespace penstock {

// Positions [begin, stop) of a request.
struct Context {
  const int32_t* table = nullptr;
  long begin = 0, stop = 0;

  bool empty() const { return begin >= stop; }
  // Those of its first piece, and the others.
  Context piece() const { return {table, begin, std::min(stop, (begin / kPiece + 1) * kPiece)}; }
  Context rest() const { return {table, piece().stop, stop}; }
};

// What queries at [position, position + count) see.
inline Context context_of(const Shape& shape, const int32_t* table, long position, long count) {
  const long begin = shape.window ? std::max(0L, position - shape.window + 1) : 0;
  return {table, begin, position + count};
}

// Kv heads [g, end) of a context.
struct HeadsContext {
  Context context;
  long g = 0, end = 0;
};

// Asks for keys and values in the order in which they lie, a few lines with every step of other work:
// hardware foresees such reads, and a core has only so many lines on their way. Keys and values, the
// first half of the positions and the second: four streams.
class ContextReads {
 public:
  // All of it within `steps` steps.
  ContextReads(const Shape& shape, const Bf16* cache, const HeadsContext& heads, long steps)
      : shape_(shape),
        context_(heads.context),
        cache_(cache + heads.g * shape.dim),
        width_((heads.end - heads.g) * shape.dim),
        left_((context_.stop - context_.begin + 1) / 2),
        apart_(left_),
        lines_((left_ * (width_ / kLine) + steps - 1) / steps) {
    find_rows();
  }

  void step() {
    for (long line = 0; line < lines_ && left_ > 0; ++line) {
      for (const Bf16* row : {first_, second_}) {
        _mm_prefetch(row + column_, _MM_HINT_T1);
        _mm_prefetch(row + shape_.cache_values + column_, _MM_HINT_T1);
      }
      column_ += kLine;
      if (column_ < width_) continue;
      column_ = 0;
      ++context_.begin;
      --left_;
      find_rows();
    }
  }

 private:
  static constexpr long kLine = 32;  // elements

  const Bf16* row(long position) const {
    const long block = position / shape_.block_size, offset = position % shape_.block_size;
    return cache_ + (context_.table[block] * shape_.block_size + offset) * shape_.kv_stride;
  }
  void find_rows() {
    if (left_ <= 0) return;
    first_ = row(context_.begin);
    second_ = row(std::min(context_.begin + apart_, context_.stop - 1));
  }

  const Shape& shape_;
  Context context_;
  const Bf16 *cache_, *first_ = nullptr, *second_ = nullptr;
  long width_, left_, apart_, lines_, column_ = 0;
};

// Some query tokens of a request, and where their heads go.
struct TileQueries {
  const Bf16* query;
  const HeadRows<Bf16>& output;
  long first, count, position;
};

// Kv heads [g, end) of one task, kept in this thread's memory from piece to piece.
class TileHeads {
 public:
  TileHeads(const Shape& shape, const TileQueries& queries, const Bf16* cache, long g, long end)
      : shape_(shape),
        queries_(queries),
        cache_(cache),
        g_(g),
        end_(end),
        group_(shape.heads / shape.kv_heads),
        rows_(queries.count * group_),
        both_(rows_ > kTileSide),
        tile_rows_(both_ ? kTileRows2 : kTileSide),
        height_(both_ ? kTileRows2 : rows_) {
    Workspace counted(nullptr);
    take(counted);
    Workspace memory(thread_scratch(counted.taken()));
    take(memory);
    std::memset(static_cast<void*>(shared_.probs), 0, height_ * kPiece * sizeof(Bf16));
    for (long head = g; head < end; ++head) begin(head);
  }

  // Adds a piece of the context; `reads` go on meanwhile.
  void add(const Context& piece, ContextReads& reads) {
    const long base = piece.begin / kPiece * kPiece;
    const Range seen{piece.begin - base, piece.stop - base};
    find_tiles(shape_, piece.table, base, seen.begin, seen.end, slots_);
    for (long head = g_; head < end_; ++head) add(head, base, seen, reads);
  }

  // Steps of `reads` in a piece.
  long steps(const Context& piece) const {
    const long tiles = (piece.stop + 15) / 16 - piece.begin / 16;
    return (end_ - g_) * (tiles + kPiece / kValueStep + shape_.dim / kTileDepth);
  }

  void write() const {
    const long dim = shape_.dim;
    for (long head = g_; head < end_; ++head) {
      const TileScratch s = scratch(head);
      for (long row = 0; row < rows_; ++row) {
        const long to = (head * group_ + row % group_) * dim;
        const Vec total = splat(s.total[row]);
        for (long i = 0; i < dim; i += kLanes)
          store(load(s.sums + row * dim + i) / total,
                queries_.output.at(queries_.first + row / group_, to + i));
      }
    }
  }

 private:
  void take(Workspace& memory) {
    const long heads = end_ - g_, dim = shape_.dim;
    shared_ = {};
    shared_.dim = dim;
    shared_.values = memory.take<char>(kPiece * dim * sizeof(Bf16));
    shared_.turned = memory.take<float>(kTileSide * kTileRows2);
    shared_.scores = memory.take<float>(tile_rows_ * kPiece);
    shared_.probs = memory.take<Bf16>(height_ * kPiece);
    shared_.queries = memory.take<char>(heads * tile_rows_ * dim * sizeof(Bf16));
    shared_.sums = memory.take<float>(heads * height_ * dim);
    shared_.highest = memory.take<float>(heads * height_);
    shared_.total = memory.take<float>(heads * height_);
  }

  TileScratch scratch(long head) const {
    const long above = (head - g_) * height_;
    TileScratch own = shared_;
    own.queries += (head - g_) * tile_rows_ * shape_.dim * sizeof(Bf16);
    own.sums += above * shape_.dim;
    own.highest += above;
    own.total += above;
    return own;
  }

  void begin(long head) {
    const TileScratch s = scratch(head);
    turn_queries(queries_.query + head * group_ * shape_.dim, shape_.query_stride, group_, rows_, s);
    std::memset(s.sums, 0, height_ * shape_.dim * sizeof(float));
    std::fill_n(s.highest, rows_, kMinusInfinity);
    std::fill_n(s.total, rows_, 0.0f);
  }

  void add(long head, long base, Range seen, ContextReads& reads) {
    const TileScratch s = scratch(head);
    const Bf16 *keys = cache_ + head * shape_.dim, *values = keys + shape_.cache_values;
    const auto meanwhile = [&] { reads.step(); };
    for (long token = seen.begin / 16 * 16; token < seen.end; token += 16) {
      score_tile(keys + slots_[token / 16] * shape_.kv_stride, shape_.kv_stride, token, both_, s);
      meanwhile();
    }
    pair_values(values, slots_, seen.begin, seen.end, shape_.kv_stride, s, meanwhile);
    weigh(base, s);
    mix_tiles(both_, s, meanwhile);
  }

  // Scores of the piece at `base` become probabilities.
  void weigh(long base, const TileScratch& s) const {
    const long rows = rows_, group = group_, dim = shape_.dim;
    for (long row = 0; row < rows; ++row) {
      const long own = queries_.position + row / group;
      const long from = shape_.window ? std::max(0L, own - shape_.window + 1 - base) : 0;
      float* scores = s.scores + row * kPiece;
      if (own < base || from >= kPiece)
        std::fill_n(scores, kPiece, 0.0f);
      else
        softmax_step(scores, from, std::min<long>(kPiece, own - base + 1), shape_.scale,
                     &s.highest[row], &s.total[row], s.sums + row * dim, dim);
      narrow_row(scores, s.probs + row * kPiece);
    }
  }

  const Shape& shape_;
  const TileQueries& queries_;
  const Bf16* cache_;
  const long g_, end_, group_, rows_;  // `rows_`: of a head
  const bool both_;                    // whether they take two tiles
  const long tile_rows_, height_;      // of whole tiles, and what is kept of each head
  TileScratch shared_;  // whose first head's pieces are the begin of all heads'
  long slots_[kPiece / 16] = {};
};

// Heads [g, end), piece by piece together. `next`: what is read after that.
inline void attend_together(const Shape& shape, const TileQueries& queries, const Bf16* cache,
                            const int32_t* table, long g, long end, const HeadsContext& next) {
  TileHeads heads(shape, queries, cache, g, end);
  Context left = context_of(shape, table, queries.position, queries.count);
  while (!left.empty()) {
    const Context piece = left.piece();
    left = left.rest();
    const HeadsContext following = left.empty() ? next : HeadsContext{left, g, end};
    ContextReads reads(shape, cache, {following.context.piece(), following.g, following.end},
                       heads.steps(piece));
    heads.add(piece, reads);
  }
  heads.write();
}

// As `attend`, for kv heads [g, end); at most kTileRows2 rows a head. `next`: what this thread reads then.
inline void attend_tiles(const Shape& shape, const TileQueries& queries, const Bf16* cache,
                         const int32_t* table, long g, long end, const HeadsContext& next) {
  const long rows = queries.count * (shape.heads / shape.kv_heads);
  const Tiles tiles(std::min(rows, kTileSide), kLowTiles);
  if (queries.count == 1) return attend_together(shape, queries, cache, table, g, end, next);
  const Context all = context_of(shape, table, queries.position, queries.count);
  for (long head = g; head < end; ++head)
    attend_together(shape, queries, cache, table, head, head + 1,
                    head + 1 < end ? HeadsContext{all, head + 1, head + 2} : next);
}

}  // namespace penstock

#endif
