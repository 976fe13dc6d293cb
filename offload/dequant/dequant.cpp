// Whole blocks of a quantised weight at once.

#include "codes.h"

namespace {

template <typename Y, int kBits>
void dequant(const uint8_t* codes, const uint16_t* scales, Y* y, long blocks, long lines, long width,
             long depth, long group_lines, int threads) {
  const penstock_codes::Layout at{lines, width, depth, group_lines};
  const long parts = blocks * at.groups();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < parts; ++part)
    penstock_codes::dequantise_group<Y, kBits>(at, codes, scales, y, part);
}

}  // namespace

#define PK_DEQUANT(name, type, bits)                                                              \
  void name(const uint8_t* codes, const uint16_t* scales, type* y, long blocks, long lines,       \
            long width, long depth, long group_lines, int threads) {                              \
    dequant<type, bits>(codes, scales, y, blocks, lines, width, depth, group_lines, threads);     \
  }

extern "C" {

int pk_dequant_abi() { return 2; }

long pk_dequant_max_line() { return penstock_codes::kMaxLine; }

PK_DEQUANT(pk_dequant_int8_bf16, uint16_t, 8)
PK_DEQUANT(pk_dequant_int8_f32, float, 8)
PK_DEQUANT(pk_dequant_int4_bf16, uint16_t, 4)
PK_DEQUANT(pk_dequant_int4_f32, float, 4)

}  // extern "C"
