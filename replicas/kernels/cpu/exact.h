// The rounding after which sums of experts' outputs are exact, and fp64 sums as integers of 31 bits.
// moe/exact_sums.py and moe/row_sums.py say what and why, and are what this is tested against.
#pragma once

#include "team.h"

namespace penstock {

constexpr int kSettledBits = 22;
constexpr uint32_t kMaxShift = 6;

typedef double WideVec __attribute__((vector_size(kLanes * 8)));

// The compiler may not fuse what made this value with what uses it.
inline Vec settled(Vec value) {
  asm("" : "+m"(value));
  return value;
}
inline float settled(float value) {
  asm("" : "+m"(value));
  return value;
}

inline uint32_t magnitude_bits(float value) { return load_as<uint32_t>(&value) & 0x7fffffffu; }

// Of the largest magnitude; as integers a NaN is above infinity and infinity above all numbers.
inline float largest_magnitude(const float* x, long count) {
  WordVec most{};
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const WordVec bits = load_as<WordVec>(x + i) & 0x7fffffffu;
    const WordVec above = (WordVec)(bits > most);
    most = (bits & above) | (most & ~above);
  }
  uint32_t highest = 0;
  for (int lane = 0; lane < kLanes; ++lane) highest = std::max<uint32_t>(highest, most[lane]);
  for (; i < count; ++i) highest = std::max(highest, magnitude_bits(x[i]));
  return load_as<float>(&highest);
}

// 1.5 x 2^23 of a row's grid: added and taken away again, it leaves whole multiples. NaN at the top.
inline float anchor_of(float largest, float weight, float heaviest) {
  const int lighter = static_cast<int>(magnitude_bits(heaviest) >> 23) -
                      static_cast<int>(magnitude_bits(weight) >> 23);
  const uint32_t shift = std::min(static_cast<uint32_t>(std::max(lighter, 0)), kMaxShift);
  const uint32_t place = (magnitude_bits(largest) >> 23) + shift + 24 - kSettledBits;
  const uint32_t bits = std::min(place, 255u) << 23 | 1u << 22;
  return load_as<float>(&bits);
}

// y += settled(product * weight).
inline void add_settled(const float* product, float weight, float anchor, double* y, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec value = (settled(load(product + i) * weight) + anchor) - anchor;
    const WideVec sum = load_as<WideVec>(y + i) + __builtin_convertvector(value, WideVec);
    std::memcpy(y + i, &sum, sizeof(sum));
  }
  for (; i < count; ++i) y[i] += (settled(product[i] * weight) + anchor) - anchor;
}

}  // namespace penstock
