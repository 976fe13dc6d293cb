// The row-wise operations on their own; what they do to a row is in rows.h.

#include "rows.h"

namespace penstock {
namespace {

template <typename S>
void rms_norm(const S* x, const S* delta, const S* weight, S* total, S* y, long rows, long dim,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 16384)
  for (long row = 0; row < rows; ++row) {
    const long at = row * dim;
    norm_sum_row(x + at, delta ? delta + at : nullptr, weight, total + at, y + at, dim, eps);
  }
}

template <typename S>
void prepare_heads(S* qkv, const Heads<S>& with, long rows, int threads) {
  const long heads = with.heads + with.kv_heads;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * heads * with.dim > 16384)
  for (long row = 0; row < rows; ++row)
    for (long h = 0; h < heads; ++h) prepare_head(with, qkv, row, h);
}

// Gate and up lie side by side in a row of x.
template <typename S>
void silu_mul(const S* x, S* y, long rows, long dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 8192)
  for (long row = 0; row < rows; ++row)
    gate_values(x + 2 * row * dim, x + (2 * row + 1) * dim, y + row * dim, dim);
}

template <typename S>
void gelu(const S* x, S* y, long rows, long dim, bool with_tanh, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 8192)
  for (long row = 0; row < rows; ++row)
    gelu_values(x + row * dim, y + row * dim, dim, with_tanh);
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;

#define PK_ROWS(suffix, S)                                                                         \
  void pk_rms_norm_##suffix(const S* x, const S* delta, const S* weight, S* total, S* y,           \
                            long rows, long dim, float eps, int threads) {                         \
    penstock::rms_norm(x, delta, weight, total, y, rows, dim, eps, threads);                       \
  }                                                                                                \
  void pk_prepare_heads_##suffix(S* qkv, const S* query_norm, const S* key_norm, const S* cos,     \
                                 const S* sin, long rows, long heads, long kv_heads, long dim,     \
                                 float eps, int threads) {                                         \
    penstock::prepare_heads(                                                                       \
        qkv, penstock::Heads<S>{heads, kv_heads, dim, query_norm, key_norm, cos, sin, eps}, rows,  \
        threads);                                                                                  \
  }                                                                                                \
  void pk_silu_mul_##suffix(const S* x, S* y, long rows, long dim, int threads) {                  \
    penstock::silu_mul(x, y, rows, dim, threads);                                                  \
  }                                                                                                \
  void pk_gelu_##suffix(const S* x, S* y, long rows, long dim, int with_tanh, int threads) {       \
    penstock::gelu(x, y, rows, dim, with_tanh != 0, threads);                                      \
  }

extern "C" {

PK_ROWS(bf16, Bf16)
PK_ROWS(f32, float)

}  // extern "C"
