// Codes of quantised weights -> the block layout of the matrix kernels, one line at a time.
//
// A line holds `line` elements that lie side by side in a block; `group_lines` lines share their
// scales. Same arithmetic as offload/quant.py: code x scale is exact in fp32, then one addition, then
// one rounding to nearest even, so fused and separate operations give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace penstock_codes {

constexpr long kMaxLine = 128;

// How the blocks of one weight lie: codes [block][line], scales [block][group][2][width].
struct Layout {
  long lines, width, depth, group_lines;

  long line() const { return width * depth; }
  long groups() const { return (lines + group_lines - 1) / group_lines; }
};

inline float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void narrow(float value, float* y) { *y = value; }

inline void narrow(float value, uint16_t* y) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  *y = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Scale and minimum of every element of a line.
inline void spread(const uint16_t* scales, long width, long depth, float* scale, float* minimum) {
  for (long row = 0; row < width; ++row)
    for (long i = 0; i < depth; ++i) {
      scale[row * depth + i] = widen(scales[row]);
      minimum[row * depth + i] = widen(scales[width + row]);
    }
}

template <typename Y>
inline void line8(const uint8_t* codes, const float* scale, const float* minimum, Y* y, long line) {
#pragma omp simd
  for (long i = 0; i < line; ++i) narrow(codes[i] * scale[i] + minimum[i], y + i);
}

template <typename Y>
inline void line4(const uint8_t* codes, const float* scale, const float* minimum, Y* y, long line) {
  const long half = line / 2;
#pragma omp simd
  for (long i = 0; i < half; ++i) narrow((codes[i] & 15) * scale[i] + minimum[i], y + i);
#pragma omp simd
  for (long i = 0; i < half; ++i)
    narrow((codes[i] >> 4) * scale[half + i] + minimum[half + i], y + half + i);
}

// The lines of one group, any layout.
template <typename Y, int kBits>
void plain_group(const uint8_t* codes, const uint16_t* scales, Y* y, long lines, long width,
                 long depth) {
  alignas(64) float scale[kMaxLine], minimum[kMaxLine];
  spread(scales, width, depth, scale, minimum);
  const long line = width * depth, bytes = line * kBits / 8;
  for (long l = 0; l < lines; ++l, codes += bytes, y += line) {
    // The common sizes are constants, so that the loop becomes a few vector instructions.
    if (line == 64)
      kBits == 8 ? line8(codes, scale, minimum, y, 64) : line4(codes, scale, minimum, y, 64);
    else if (line == 32)
      kBits == 8 ? line8(codes, scale, minimum, y, 32) : line4(codes, scale, minimum, y, 32);
    else
      kBits == 8 ? line8(codes, scale, minimum, y, line) : line4(codes, scale, minimum, y, line);
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)

// The rounding instruction takes what is not normal for zero. Numbers this far from it never give
// such a sum: it is a multiple of the smaller one's last bit.
inline bool is_far_from_zero(__m256i halves) {
  const __m256i size = _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff));
  const __m256i less_one = _mm256_sub_epi16(size, _mm256_set1_epi16(1));  // zero becomes large
  const __m256i near = _mm256_subs_epu16(_mm256_set1_epi16(32 << 7), less_one);
  return _mm256_testz_si256(near, near);
}

// A half vector of the scales of 8 rows, twice each.
inline __m512 doubled(__m256i halves, int first) {
  const __m512i rows = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  const __m512i pairs = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i which = _mm512_add_epi32(pairs, _mm512_set1_epi32(first));
  return _mm512_castsi512_ps(_mm512_permutexvar_epi32(which, rows));
}

// A group of lines of 16 rows x 2 inputs as bf16; false: not this way.
template <int kBits>
inline bool quick_group(const uint8_t* codes, const uint16_t* scales, uint16_t* y, long lines) {
  const __m256i scale = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  const __m256i minimum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 16));
  if (!is_far_from_zero(scale) || !is_far_from_zero(minimum)) return false;
  const __m512 low_scale = doubled(scale, 0), high_scale = doubled(scale, 8);
  const __m512 low_minimum = doubled(minimum, 0), high_minimum = doubled(minimum, 8);
  const __m512 digits = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (long l = 0; l < lines; ++l, codes += 4 * kBits, y += 32) {
    const auto* from = reinterpret_cast<const __m128i*>(codes);
    __m512 low, high;
    if (kBits == 4) {
      // A permutation looks at the low four bits of its indices only.
      const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
      low = _mm512_permutexvar_ps(both, digits);
      high = _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), digits);
    } else {
      low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from)));
      high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from + 1)));
    }
    const __m512bh values = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(high, high_scale, high_minimum),
                                                _mm512_fmadd_ps(low, low_scale, low_minimum));
    std::memcpy(y, &values, sizeof values);
  }
  return true;
}

#else

template <int kBits>
inline bool quick_group(const uint8_t*, const uint16_t*, uint16_t*, long) {
  return false;
}

#endif

template <int kBits>
inline bool try_quick(const Layout& at, const uint8_t* codes, const uint16_t* scales, uint16_t* y,
                      long lines) {
  return at.width == 16 && at.depth == 2 && quick_group<kBits>(codes, scales, y, lines);
}

template <int kBits>
inline bool try_quick(const Layout&, const uint8_t*, const uint16_t*, float*, long) {
  return false;
}

// Group `part` of all blocks' groups in a row; y [block][line][element].
template <typename Y, int kBits>
inline void dequantise_group(const Layout& at, const uint8_t* codes, const uint16_t* scales, Y* y,
                             long part) {
  const long block = part / at.groups(), first = part % at.groups() * at.group_lines;
  const long from = (block * at.lines + first) * at.line();
  const long lines = std::min(at.group_lines, at.lines - first);
  codes += from * kBits / 8;
  scales += part * 2 * at.width;
  if (!try_quick<kBits>(at, codes, scales, y + from, lines))
    plain_group<Y, kBits>(codes, scales, y + from, lines, at.width, at.depth);
}

}  // namespace penstock_codes
