// y = x W^T + bias with W packed into blocks (see tile.h), and rows of W read back for embeddings.
// Threads share out blocks of output features, never k: a result does not depend on their number.

#include <algorithm>

#include "tile.h"

namespace penstock {
namespace {

constexpr long kRowChunk = 96;     // sums of a chunk: 24 KiB on AVX-512
constexpr long kDepthChunk = 1024;  // even; a bf16 block of this depth is 128 KiB

template <typename S>
void pack(const S* weight, long n, long k, S* packed, int threads) {
  const long words = words_of<S>(k), block_size = words * kPack<S> * kWidth;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long first = 0; first < n; first += kWidth) {
    S* block = packed + first / kWidth * block_size;
    std::memset(static_cast<void*>(block), 0, block_size * sizeof(S));
    for (long column = 0; column < std::min<long>(kWidth, n - first); ++column) {
      const S* row = weight + (first + column) * k;
      for (long i = 0; i < k; ++i)
        block[(i / kPack<S> * kWidth + column) * kPack<S> + i % kPack<S>] = row[i];
    }
  }
}

template <typename S, typename Y>
void write_rows(const float* sums, const S* bias, long rows, long columns, Y* y, long stride) {
  for (long row = 0; row < rows; ++row, sums += kWidth, y += stride) {
    if (columns == kWidth && bias == nullptr) {
      for (int v = 0; v < kVectors; ++v) store(load(sums + v * kLanes), y + v * kLanes);
      continue;
    }
    for (long column = 0; column < columns; ++column)
      from_float(sums[column] + (bias ? to_float(bias[column]) : 0.0f), y + column);
  }
}

template <typename S, typename Y>
void one_block(const S* x, long stride, const S* block, const S* bias, Y* y, long rows, long n,
               long k, long columns) {
  alignas(64) float sums[kRowChunk * kWidth];
  for (long first = 0; first < rows; first += kRowChunk) {
    const long count = std::min(kRowChunk, rows - first);
    std::memset(sums, 0, count * kWidth * sizeof(float));
    for (long depth = 0; depth < k; depth += kDepthChunk)
      tiles(x + first * stride + depth, stride, block + depth * kWidth,
            std::min(kDepthChunk, k - depth), count, sums);
    write_rows(sums, bias, count, columns, y + first * n, n);
  }
}

template <typename S, typename Y>
void linear(const S* x, long stride, const S* packed, const S* bias, Y* y, long rows, long n,
            long k, int threads) {
  const long block_size = words_of<S>(k) * kPack<S> * kWidth;
  const long blocks = (n + kWidth - 1) / kWidth;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (long b = 0; b < blocks; ++b)
    one_block(x, stride, packed + b * block_size, bias ? bias + b * kWidth : nullptr,
              y + b * kWidth, rows, n, k, std::min<long>(kWidth, n - b * kWidth));
}

template <typename S>
void embed(const int64_t* ids, const S* packed, S* y, long rows, long k, int threads) {
  const long block_size = words_of<S>(k) * kPack<S> * kWidth;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
  for (long row = 0; row < rows; ++row) {
    const S* block = packed + ids[row] / kWidth * block_size + ids[row] % kWidth * kPack<S>;
    for (long i = 0; i < k; ++i)
      y[row * k + i] = block[i / kPack<S> * kWidth * kPack<S> + i % kPack<S>];
  }
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;

extern "C" {

int pk_abi() { return 1; }

int pk_block_width() { return penstock::kWidth; }

const char* pk_isa() {
#if defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

void pk_pack_bf16(const Bf16* weight, long n, long k, Bf16* packed, int threads) {
  penstock::pack(weight, n, k, packed, threads);
}

void pk_pack_f32(const float* weight, long n, long k, float* packed, int threads) {
  penstock::pack(weight, n, k, packed, threads);
}

void pk_linear_bf16(const Bf16* x, long stride, const Bf16* packed, const Bf16* bias, Bf16* y,
                    long rows, long n, long k, int threads) {
  penstock::linear(x, stride, packed, bias, y, rows, n, k, threads);
}

void pk_linear_bf16_f32(const Bf16* x, long stride, const Bf16* packed, const Bf16* bias, float* y,
                        long rows, long n, long k, int threads) {
  penstock::linear(x, stride, packed, bias, y, rows, n, k, threads);
}

void pk_linear_f32(const float* x, long stride, const float* packed, const float* bias, float* y,
                   long rows, long n, long k, int threads) {
  penstock::linear(x, stride, packed, bias, y, rows, n, k, threads);
}

void pk_embed_bf16(const int64_t* ids, const Bf16* packed, Bf16* y, long rows, long k,
                   int threads) {
  penstock::embed(ids, packed, y, rows, k, threads);
}

void pk_embed_f32(const int64_t* ids, const float* packed, float* y, long rows, long k,
                  int threads) {
  penstock::embed(ids, packed, y, rows, k, threads);
}

}  // extern "C"
