// Matrix tiles of processors with AMX. One instruction adds 32 products to each of 16 x 16 sums: the
// even ones and the odd ones in the order of k, each chain from zero, then both to the sum. That
// depends on neither the rows of a tile nor the thread, so as long as every product of a machine goes
// this way, a row's bits are its own, as with the chains of tile.h (whose bits these are not).
//
// Tiles 0-3 hold sums, 4 and 5 rows of x, 6 and 7 weights.
#pragma once

#include "team.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define PENSTOCK_AMX 1

#include <sys/syscall.h>
#include <unistd.h>

namespace penstock {

constexpr bool kHasTiles = true;
constexpr long kTileBytes = 1024, kTileDepth = 32, kTileSide = 16;

// The kernel grants a process its tile registers when asked.
inline bool ask_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// The compiler does not know that tile instructions read memory: what was written before this line is
// there after it.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// From here to the end of the block this thread computes with tiles; those in `low`, a bit each, have
// `rows` rows: of x and of sums.
class Tiles {
 public:
  explicit Tiles(long rows, unsigned low = 0x3f) {
    alignas(64) struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.row_bytes[tile] = 64;
      config.rows[tile] = static_cast<uint8_t>(low >> tile & 1 ? rows : kTileSide);
    }
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// Weights of one column block, whole tiles and what is left of an uneven depth, padded with zeros.
struct Column {
  const char* whole;
  const char* rest;
};

inline void fetch_tile(const char* at) {
  for (long line = 0; line < kTileBytes; line += 64) _mm_prefetch(at + line, _MM_HINT_T0);
}

inline void step_1x2(const char* x, const char* w0, const char* w1) {
  _tile_loadd(4, x, 64);
  _tile_loadd(6, w0, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, w1, 64);
  _tile_dpbf16ps(1, 4, 7);
}

// Up to 16 rows against two columns, the whole depth: each weight is read once, in two streams that
// are asked for a little ahead. `x_step`: bytes from one depth tile of x to the next. sums: [row][32].
// Measured: two streams read faster than one or four; asking for the next two columns' begin, rather
// than for what lies behind these, costs a quarter of the rate.
inline void multiply_1x2(const char* x, long x_step, const Column* columns, long depth_tiles,
                         float* sums) {
  constexpr long kAhead = 2 * kTileBytes;
  settle_memory();
  _tile_zero(0);
  _tile_zero(1);
  const char *w0 = columns[0].whole, *w1 = columns[1].whole;
  for (long t = 0; t < depth_tiles; ++t, x += x_step, w0 += kTileBytes, w1 += kTileBytes) {
    fetch_tile(w0 + kAhead);
    fetch_tile(w1 + kAhead);
    step_1x2(x, w0, w1);
  }
  if (columns[0].rest != nullptr) step_1x2(x, columns[0].rest, columns[1].rest);
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
}

inline void step_2x2(const char* x0, const char* x1, const char* w0, const char* w1) {
  _tile_loadd(4, x0, 64);
  _tile_loadd(6, w0, 64);
  _tile_loadd(7, w1, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, x1, 64);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Weights of the next two columns, fetched while these are multiplied: a few lines with every step.
// In one burst they would fill the core's miss buffers and the tiles wait (measured: x1.5).
class Ahead {
 public:
  Ahead(const Column* columns, long bytes, long steps)
      : w0_(columns[0].whole),
        w1_(columns[1].whole),
        left_(bytes / 64),
        lines_((left_ + steps - 1) / steps) {}
  void step() {
    for (long line = std::min(lines_, left_); line > 0; --line, --left_, w0_ += 64, w1_ += 64) {
      _mm_prefetch(w0_, _MM_HINT_T1);
      _mm_prefetch(w1_, _MM_HINT_T1);
    }
  }

 private:
  const char *w0_, *w1_;
  long left_, lines_;
};

// 32 rows against two columns for `depth_tiles` of the depth.
inline void multiply_2x2(const char* x0, const char* x1, const Column* columns, long depth_tiles,
                         bool first, bool with_rest, float* sums, long stride, Ahead& ahead) {
  const long bytes = 4 * stride;
  float* lower = sums + kTileSide * stride;
  settle_memory();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, bytes);
    _tile_loadd(1, sums + 16, bytes);
    _tile_loadd(2, lower, bytes);
    _tile_loadd(3, lower + 16, bytes);
  }
  const char *w0 = columns[0].whole, *w1 = columns[1].whole;
  for (long t = 0; t < depth_tiles; ++t) {
    ahead.step();
    step_2x2(x0, x1, w0, w1);
    x0 += kTileBytes, x1 += kTileBytes, w0 += kTileBytes, w1 += kTileBytes;
  }
  if (with_rest) step_2x2(x0, x1, columns[0].rest, columns[1].rest);
  _tile_stored(0, sums, bytes);
  _tile_stored(1, sums + 16, bytes);
  _tile_stored(2, lower, bytes);
  _tile_stored(3, lower + 16, bytes);
}

}  // namespace penstock

#else

namespace penstock {

constexpr bool kHasTiles = false;
inline bool ask_for_tiles() { return true; }

}  // namespace penstock

#endif
