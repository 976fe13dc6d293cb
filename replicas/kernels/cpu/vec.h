// One vector type for every instruction set, on the compilers' own vector extension: the flags of
// the build decide whether it becomes AVX-512, AVX2, SSE or NEON. Nothing here knows of tensors.
// Storage types: `float` and `Bf16`; all arithmetic is fp32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace penstock {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // vectors per weight block: 6 x 4 sums + 4 weights fit 32 registers
constexpr int kTileRows = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kVectors = 2;  // 5 x 2 sums, 2 weights and a broadcast fit 16 registers
constexpr int kTileRows = 5;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
constexpr int kTileRows = 5;
#endif
constexpr int kWidth = kLanes * kVectors;  // output features of one product

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t WordVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

struct Bf16 {
  uint16_t bits;
};

template <typename V>
inline V load_as(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

inline Vec splat(float value) { return Vec{} + value; }

inline float to_float(float value) { return value; }
inline float to_float(Bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  return load_as<float>(&bits);
}

// Round to nearest, ties to even; a NaN stays a NaN.
inline void from_float(float value, float* to) { *to = value; }
inline void from_float(float value, Bf16* to) {
  const uint32_t bits = load_as<uint32_t>(&value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->bits = is_nan ? static_cast<uint16_t>((bits >> 16) | 0x40u)
                    : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float rounded(float value, const float*) { return value; }
inline float rounded(float value, const Bf16*) {
  Bf16 narrow;
  from_float(value, &narrow);
  return to_float(narrow);
}

inline Vec load(const float* from) { return load_as<Vec>(from); }
inline Vec load(const Bf16* from) {
#if defined(__AVX512F__)  // in two instructions; the compilers find no such way themselves
  const __m512i words = _mm512_cvtepu16_epi32(load_as<__m256i>(from));
  return (Vec)_mm512_slli_epi32(words, 16);
#else
  const WordVec bits = __builtin_convertvector(load_as<HalfVec>(from), WordVec) << 16;
  return load_as<Vec>(&bits);
#endif
}

// Rounded to bf16, as `from_float` does, in the upper half of each word; the lower is not cleared.
inline WordVec round_bits(Vec value) {
  const WordVec bits = load_as<WordVec>(&value);
  const WordVec even = bits + 0x7fffu + ((bits >> 16) & 1u), quiet = bits | 0x400000u;
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  return (WordVec)_mm512_mask_mov_epi32((__m512i)even, is_nan, (__m512i)quiet);
#else
  const IntVec is_nan = (IntVec)(bits & 0x7fffffffu) > (IntVec{} + 0x7f800000);
  return (quiet & (WordVec)is_nan) | (even & ~(WordVec)is_nan);
#endif
}

inline void store(Vec value, float* to) { std::memcpy(to, &value, sizeof(value)); }
inline void store(Vec value, Bf16* to) {
  const WordVec high = round_bits(value) >> 16;
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)high);
#else
  const HalfVec narrow = __builtin_convertvector(high, HalfVec);
#endif
  std::memcpy(to, &narrow, sizeof(narrow));
}

inline Vec select(IntVec mask, Vec yes, Vec no) {
  return (Vec)(((IntVec)yes & mask) | ((IntVec)no & ~mask));
}

// Lanes in pairs half a vector apart, then half of that: the order of a sum is part of its bits.
inline float sum_lanes(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float lanes[kLanes];
  std::memcpy(lanes, &value, sizeof(value));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
#endif
}

// Of numbers; a NaN may get lost.
inline float max_lanes(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float highest = value[0];
  for (int lane = 1; lane < kLanes; ++lane) highest = value[lane] > highest ? value[lane] : highest;
  return highest;
#endif
}

// The compiler may not fuse the product that made this value with a sum that uses it: whether it does depends
// on the place, and so would the bits.
inline Vec unfused(Vec value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#else
  asm("" : "+m"(value));
#endif
  return value;
}

// exp(x) to about 2 ulp for x <= 88 (Cephes' expf); 0 below -87.3, NaN stays NaN.
inline Vec exp_vec(Vec x) {
  const Vec clamped = select(x > splat(88.0f), splat(88.0f), x);
  const Vec shifted = clamped * 1.44269504088896341f + 12582912.0f;  // rounds to an integer
  const Vec whole = shifted - 12582912.0f;
  const Vec rest = clamped - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec poly = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  poly = poly * rest + 8.3334519073e-3f;
  poly = poly * rest + 4.1665795894e-2f;
  poly = poly * rest + 1.6666665459e-1f;
  poly = poly * rest + 5.0000001201e-1f;
  poly = poly * rest * rest + rest + 1.0f;
  const IntVec power = ((IntVec)shifted - 0x4b400000 + 127) << 23;
  return select(x < splat(-87.3f), Vec{}, unfused(poly * (Vec)power));
}

}  // namespace penstock
