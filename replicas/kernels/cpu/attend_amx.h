// One task of paged attention on matrix tiles; see attend.h for what it shares with the other way.
//
// Scores are computed as keys x queries: 16 keys of a block lie in the cache as a tile wants them, and
// are not copied. The probabilities are rounded to bf16 for the product with the values, whose rows
// are interleaved two by two into a buffer first.
//
//   keys (tokens x P)   . queries (P x rows)   -> scores^T -> transposed, softmax in fp32
//   probs (rows x tokens) . values (tokens x P) -> sums, fp32
#pragma once

#include "amx.h"
#include "attend.h"

namespace penstock {

// Whether a model's shape can go this way: part of the shape, so all its rows do or none.
inline bool suits_tiles(const Shape& shape) {
  return kHasTiles && shape.dim % 32 == 0 && shape.block_size % 16 == 0 &&
         shape.heads / shape.kv_heads <= 32;
}

#if defined(PENSTOCK_AMX)

constexpr long kTileRows2 = 2 * kTileSide;  // rows of one task

// Memory of one thread.
struct TileScratch {
  explicit TileScratch(long dim) : dim(dim) {
    Workspace memory(thread_scratch((6 * kTileRows2 + 2 * kPiece) * dim +
                                    (4 * kTileSide + 6 * kPiece + 8) * kTileRows2 + 1024));
    queries = memory.take<char>(kTileRows2 * dim * 2);
    values = memory.take<char>(kPiece * dim * 2);
    turned = memory.take<float>(kTileSide * kTileRows2);
    scores = memory.take<float>(kTileRows2 * kPiece);
    probs = memory.take<Bf16>(kTileRows2 * kPiece);
    sums = memory.take<float>(kTileRows2 * dim);
    highest = memory.take<float>(kTileRows2);
    total = memory.take<float>(kTileRows2);
  }
  long dim;
  char *queries, *values;
  float *turned, *scores, *sums, *highest, *total;
  Bf16* probs;
};

// Queries as columns: [row tile][depth tile][pair of P][16 rows], absent rows zero.
inline void turn_queries(const Bf16* query, long stride, long group, long rows, TileScratch& s) {
  const long depth_tiles = s.dim / kTileDepth;
  for (long top = 0; top < rows; top += kTileSide)
    for (long t = 0; t < depth_tiles; ++t) {
      __m512i lines[16];
      for (long i = 0; i < 16; ++i) {
        const long row = top + i;
        lines[i] = row < rows ? _mm512_loadu_si512(query + row / group * stride +
                                                   row % group * s.dim + t * kTileDepth)
                              : _mm512_setzero_si512();
      }
      char* to = s.queries + (top / kTileSide * depth_tiles + t) * kTileBytes;
      transpose_square(lines, reinterpret_cast<uint32_t*>(to), 16);
    }
}

// scores[row][token] of 16 tokens that lie one after another in the cache.
inline void score_tile(const Bf16* keys, long stride, long token, bool both, TileScratch& s) {
  const long depth_tiles = s.dim / kTileDepth;
  const char* second = s.queries + depth_tiles * kTileBytes;
  settle_memory();
  _tile_zero(0);
  _tile_zero(1);
  for (long t = 0; t < depth_tiles; ++t) {
    _tile_loadd(4, keys + t * kTileDepth, 2 * stride);
    _tile_loadd(6, s.queries + t * kTileBytes, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (!both) continue;
    _tile_loadd(7, second + t * kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, s.turned, 64);
  if (both) _tile_stored(1, s.turned + 256, 64);
  for (long half = 0; half <= both; ++half) {
    __m512i lines[16];
    for (long i = 0; i < 16; ++i) lines[i] = _mm512_loadu_si512(s.turned + half * 256 + i * 16);
    float* to = s.scores + half * kTileSide * kPiece + token;
    transpose_square(lines, reinterpret_cast<uint32_t*>(to), kPiece);
  }
}

// values[depth tile][16 columns][pair of tokens][column][2]; tokens outside [begin, end) are zero,
// whatever their slots hold: they may be another request's.
inline void pair_values(const Bf16* cache, const long* slots, long begin, long end, long stride,
                        TileScratch& s) {
  alignas(64) static const uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6, 38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static const Bf16 kZeros[32] = {};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const long columns = s.dim / kTileSide;
  for (long token = 0; token < kPiece; token += 2) {
    char* to = s.values + token / kTileDepth * columns * kTileBytes + token % kTileDepth * 32;
    const bool has_even = token >= begin && token < end;
    const bool has_odd = token + 1 >= begin && token + 1 < end;
    const Bf16* row = cache + (slots[token / 16] + token % 16) * stride;
    const Bf16 *even = has_even ? row : kZeros, *odd = has_odd ? row + stride : kZeros;
    const long step_even = has_even ? 32 : 0, step_odd = has_odd ? 32 : 0;
    for (long i = 0; i < columns; i += 2, to += 2 * kTileBytes) {
      const __m512i one = _mm512_loadu_si512(even), two = _mm512_loadu_si512(odd);
      _mm512_store_si512(to, _mm512_permutex2var_epi16(one, first, two));
      _mm512_store_si512(to + kTileBytes, _mm512_permutex2var_epi16(one, second, two));
      even += step_even, odd += step_odd;
    }
  }
}

// Whole lines at once: a tile load does not get its bytes from two stores that are on their way.
inline void narrow_row(const float* scores, Bf16* probs) {
  for (long i = 0; i < kPiece; i += 32) {
    alignas(64) Bf16 line[32];
    store(load(scores + i), line);
    store(load(scores + i + 16), line + 16);
    const __m256i low = _mm256_load_si256(reinterpret_cast<__m256i*>(line));
    const __m256i high = _mm256_load_si256(reinterpret_cast<__m256i*>(line + 16));
    _mm512_store_si512(probs + i, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
}

// sums += probs . values
inline void mix_tiles(bool both, TileScratch& s) {
  const long columns = s.dim / kTileSide, bytes = 4 * s.dim;
  settle_memory();
  for (long column = 0; column < columns; column += 2) {
    float *upper = s.sums + column * 16, *lower = upper + kTileSide * s.dim;
    _tile_loadd(0, upper, bytes);
    _tile_loadd(1, upper + 16, bytes);
    if (both) {
      _tile_loadd(2, lower, bytes);
      _tile_loadd(3, lower + 16, bytes);
    }
    for (long t = 0; t < kPiece / kTileDepth; ++t) {
      const char* values = s.values + (t * columns + column) * kTileBytes;
      _tile_loadd(4, s.probs + t * kTileDepth, 2 * kPiece);
      _tile_loadd(6, values, 64);
      _tile_loadd(7, values + kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (!both) continue;
      _tile_loadd(5, s.probs + kTileSide * kPiece + t * kTileDepth, 2 * kPiece);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, upper, bytes);
    _tile_stored(1, upper + 16, bytes);
    if (both) {
      _tile_stored(2, lower, bytes);
      _tile_stored(3, lower + 16, bytes);
    }
  }
}

// Where each 16 tokens of the piece at `base` begin in the cache; those outside [skip, seen) stay as
// they are, because their blocks may be gone or not there yet.
inline void find_tiles(const Shape& shape, const int32_t* table, long base, long skip, long seen,
                       long* slots) {
  for (long token = skip / 16 * 16; token < seen; token += 16) {
    const long at = base + token, block = at / shape.block_size;
    slots[token / 16] = table[block] * shape.block_size + at - block * shape.block_size;
  }
}

// Asks for keys and values of a piece early: rows of one head lie apart, no hardware foresees them.
inline void fetch_piece(const Shape& shape, const Bf16* keys, const int32_t* table, long base,
                        long skip, long stop) {
  const long seen = std::min<long>(kPiece, stop - base);
  long slots[kPiece / 16];
  find_tiles(shape, table, base, skip, seen, slots);
  for (long token = skip; token < seen; ++token) {
    const Bf16* key = keys + (slots[token / 16] + token % 16) * shape.kv_stride;
    for (long i = 0; i < shape.dim; i += 32) {
      _mm_prefetch(key + i, _MM_HINT_T0);
      _mm_prefetch(key + shape.cache_values + i, _MM_HINT_T0);
    }
  }
}

// Keys and values that this thread attends to next, fetched into the second-level cache while it
// computes: whole rows, one after another, as they lie. Head by head they would come a few lines here
// and there, at less than half the rate (measured: 6.5 GB/s a core against 15).
class NextContext {
 public:
  NextContext() = default;
  // Of heads [g, end) of a request at positions [begin, stop), in about so many steps.
  NextContext(const Shape& shape, const int32_t* table, const Bf16* cache, long g, long end,
              long begin, long stop, long steps)
      : shape_(&shape),
        table_(table),
        keys_(cache + g * shape.dim),
        width_((end - g) * shape.dim),
        at_(begin),
        stop_(stop),
        tokens_((stop - begin + steps - 1) / steps) {}

  void step() {
    for (long left = tokens_; left > 0 && at_ < stop_; --left, ++at_) {
      const long block = at_ / shape_->block_size, offset = at_ - block * shape_->block_size;
      const Bf16* key = keys_ + (table_[block] * shape_->block_size + offset) * shape_->kv_stride;
      for (long i = 0; i < width_; i += 32) {
        _mm_prefetch(key + i, _MM_HINT_T1);
        _mm_prefetch(key + shape_->cache_values + i, _MM_HINT_T1);
      }
    }
  }

 private:
  const Shape* shape_ = nullptr;
  const int32_t* table_ = nullptr;
  const Bf16* keys_ = nullptr;
  long width_ = 0, at_ = 0, stop_ = 0, tokens_ = 0;
};

// As `attend`; at most kTileRows2 rows. `more`: the next kv head of these tokens follows.
inline void attend_tiles(const Shape& shape, const Bf16* query, const Bf16* cache,
                         const int32_t* table, const HeadRows<Bf16>& output, long first, long g,
                         long count, long position, bool more, NextContext& next) {
  TileScratch s(shape.dim);
  const Tiles tiles(kTileSide);
  const long dim = shape.dim, group = shape.heads / shape.kv_heads, rows = count * group;
  const bool both = rows > kTileSide;
  turn_queries(query + g * group * dim, shape.query_stride, group, rows, s);
  const long height = both ? kTileRows2 : kTileSide;
  std::memset(s.sums, 0, height * dim * sizeof(float));
  std::memset(static_cast<void*>(s.probs), 0, height * kPiece * sizeof(Bf16));
  std::fill_n(s.highest, rows, kMinusInfinity);
  std::fill_n(s.total, rows, 0.0f);
  const Bf16 *keys = cache + g * dim, *values = keys + shape.cache_values;
  const long stop = position + count;
  const long start = shape.window ? std::max(0L, position - shape.window + 1) : 0;
  long slots[kPiece / 16] = {};
  for (long base = start / kPiece * kPiece; base < stop; base += kPiece) {
    const long seen = std::min<long>(kPiece, stop - base), skip = std::max(0L, start - base);
    find_tiles(shape, table, base, skip, seen, slots);
    if (base + kPiece < stop)
      fetch_piece(shape, keys, table, base + kPiece, 0, stop);
    else if (more)
      fetch_piece(shape, keys + dim, table, start / kPiece * kPiece, start % kPiece, stop);
    for (long token = skip / 16 * 16; token < seen; token += 16) {
      score_tile(keys + slots[token / 16] * shape.kv_stride, shape.kv_stride, token, both, s);
      next.step();
    }
    pair_values(values, slots, skip, seen, shape.kv_stride, s);
    for (long row = 0; row < rows; ++row) {
      const long own = position + row / group;
      const long from = shape.window ? std::max(0L, own - shape.window + 1 - base) : 0;
      float* scores = s.scores + row * kPiece;
      if (own < base || from >= kPiece)
        std::fill_n(scores, kPiece, 0.0f);
      else
        softmax_step(scores, from, std::min<long>(kPiece, own - base + 1), shape.scale,
                     &s.highest[row], &s.total[row], s.sums + row * dim, dim);
      narrow_row(scores, s.probs + row * kPiece);
    }
    mix_tiles(both, s);
  }
  for (long row = 0; row < rows; ++row) {
    const long head = (g * group + row % group) * dim;
    const Vec total = splat(s.total[row]);
    for (long i = 0; i < dim; i += kLanes)
      store(load(s.sums + row * dim + i) / total, output.at(first + row / group, head + i));
  }
}

#endif

}  // namespace penstock
