// Keys turned into columns, for products whose lanes are tokens.
#pragma once

#include "tile.h"

namespace penstock {

#if defined(__AVX512F__)
// 16 x 16 words: to[i * stride + j] = rows[j][i].
inline void transpose_square(const __m512i* rows, uint32_t* to, long stride) {
  __m512i r[16], t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(to + i * stride, _mm512_shuffle_i32x4(even, even_high, 0x88));
    _mm512_storeu_si512(to + (4 + i) * stride, _mm512_shuffle_i32x4(odd, odd_high, 0x88));
    _mm512_storeu_si512(to + (8 + i) * stride, _mm512_shuffle_i32x4(even, even_high, 0xdd));
    _mm512_storeu_si512(to + (12 + i) * stride, _mm512_shuffle_i32x4(odd, odd_high, 0xdd));
  }
}
#endif

// Column-wise copy of `count` keys: the layout of a packed weight.
template <typename S>
void transpose_keys(const S* cache, const long* slots, long count, long stride, long dim, S* keys) {
  const long words = words_of<S>(dim);
  for (long first = 0; first < kWidth; first += kLanes) {
    uint32_t* to = reinterpret_cast<uint32_t*>(keys) + first * words;
    long done = 0;
#if defined(__AVX512F__)
    for (; done + 16 <= words; done += 16) {
      __m512i rows[16];
      for (long lane = 0; lane < 16; ++lane)
        rows[lane] = first + lane < count
                         ? _mm512_loadu_si512(reinterpret_cast<const char*>(
                                                  cache + slots[first + lane] * stride) +
                                              4 * done)
                         : _mm512_setzero_si512();
      transpose_square(rows, to + done * kLanes, kLanes);
    }
#endif
    for (long lane = 0; lane < kLanes; ++lane) {
      const long token = first + lane;
      if (token >= count) {
        for (long word = done; word < words; ++word) to[word * kLanes + lane] = 0;
        continue;
      }
      const char* from = reinterpret_cast<const char*>(cache + slots[token] * stride);
      for (long word = done; word < words; ++word)
        to[word * kLanes + lane] = load_as<uint32_t>(from + 4 * word);
    }
  }
}

}  // namespace penstock
