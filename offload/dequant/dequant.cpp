// Codes of quantised weights -> the block layout of the matrix kernels, one line at a time.
//
// A line holds `line` elements that lie side by side in a block; `group_lines` lines share their
// scales. Same arithmetic as offload/quant.py: code x scale is exact in fp32, then one addition, then
// one rounding to nearest even, so fused and separate operations give the same bits.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr long kMaxLine = 128;

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

template <typename Y, int kBits>
void group(const uint8_t* codes, const uint16_t* scales, Y* y, long lines, long width, long depth) {
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

// codes [block][line], scales [block][group][2][width], y [block][line][element].
template <typename Y, int kBits>
void dequant(const uint8_t* codes, const uint16_t* scales, Y* y, long blocks, long lines, long width,
             long depth, long group_lines, int threads) {
  const long groups = (lines + group_lines - 1) / group_lines, line = width * depth;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < blocks * groups; ++part) {
    const long block = part / groups, first = part % groups * group_lines;
    const long at = (block * lines + first) * line;
    group<Y, kBits>(codes + at * kBits / 8, scales + part * 2 * width, y + at,
                    std::min(group_lines, lines - first), width, depth);
  }
}

}  // namespace

#define PK_DEQUANT(name, type, bits)                                                              \
  void name(const uint8_t* codes, const uint16_t* scales, type* y, long blocks, long lines,       \
            long width, long depth, long group_lines, int threads) {                              \
    dequant<type, bits>(codes, scales, y, blocks, lines, width, depth, group_lines, threads);     \
  }

extern "C" {

int pk_dequant_abi() { return 1; }

long pk_dequant_max_line() { return kMaxLine; }

PK_DEQUANT(pk_dequant_int8_bf16, uint16_t, 8)
PK_DEQUANT(pk_dequant_int8_f32, float, 8)
PK_DEQUANT(pk_dequant_int4_bf16, uint16_t, 4)
PK_DEQUANT(pk_dequant_int4_f32, float, 4)

}  // extern "C"
