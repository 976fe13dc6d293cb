// A piece of paged attention on matrix tiles: the rows of one kv head against kPiece tokens. See attend.h
// for what it shares with the other way, and attend_heads.h for what is made of it.
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
constexpr long kValueStep = 8;              // tokens between two calls of `meanwhile`

constexpr unsigned kLowTiles = 1 << 0 | 1 << 1 | 1 << 4;  // sums and probabilities of the rows there are

// What a kv head keeps from piece to piece, and what all heads of a thread use in turn.
struct TileScratch {
  long dim;
  char *queries, *values;
  float *turned, *scores, *sums, *highest, *total;
  Bf16* probs;
};

// Queries as columns: [row tile][depth tile][pair of P][16 rows], absent rows zero.
inline void turn_queries(const Bf16* query, long stride, long group, long rows,
                         const TileScratch& s) {
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
inline void score_tile(const Bf16* keys, long stride, long token, bool both, const TileScratch& s) {
  const long depth_tiles = s.dim / kTileDepth;
  const char* second = s.queries + depth_tiles * kTileBytes;
  settle_memory();
  _tile_zero(2);
  _tile_zero(3);
  for (long t = 0; t < depth_tiles; ++t) {
    _tile_loadd(5, keys + t * kTileDepth, 2 * stride);
    _tile_loadd(6, s.queries + t * kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    if (!both) continue;
    _tile_loadd(7, second + t * kTileBytes, 64);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(2, s.turned, 64);
  if (both) _tile_stored(3, s.turned + 256, 64);
  for (long half = 0; half <= both; ++half) {
    __m512i lines[16];
    for (long i = 0; i < 16; ++i) lines[i] = _mm512_loadu_si512(s.turned + half * 256 + i * 16);
    float* to = s.scores + half * kTileSide * kPiece + token;
    transpose_square(lines, reinterpret_cast<uint32_t*>(to), kPiece);
  }
}

// values[depth tile][16 columns][pair of tokens][column][2]; tokens outside [begin, end) are zero,
// whatever their slots hold: they may be another request's.
template <typename Meanwhile>
inline void pair_values(const Bf16* cache, const long* slots, long begin, long end, long stride,
                        const TileScratch& s, const Meanwhile& meanwhile) {
  alignas(64) static const uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,
                                                  37, 6, 38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  alignas(64) static const Bf16 kZeros[32] = {};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  const long columns = s.dim / kTileSide;
  for (long token = 0; token < kPiece; token += 2) {
    if (token % kValueStep == 0) meanwhile();
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
template <typename Meanwhile>
inline void mix_tiles(bool both, const TileScratch& s, const Meanwhile& meanwhile) {
  const long columns = s.dim / kTileSide, bytes = 4 * s.dim;
  settle_memory();
  for (long column = 0; column < columns; column += 2) {
    meanwhile();
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

#endif

}  // namespace penstock
