// Row by row: RMS norms (with a residual sum, over heads with a rotation) and the gated product.
// Roundings are where torch has them: each product that a model computes in its own dtype is
// rounded to that dtype. Sums run in a fixed order; a row is one thread's.

#include "vec.h"

namespace penstock {
namespace {

template <typename S>
inline Vec round_to(Vec value, const S*) {
  S narrow[kLanes];
  store(value, narrow);
  return load(narrow);
}

template <typename S>
float inverse_rms(const S* x, long dim, float eps) {
  Vec squares{};
  long i = 0;
  for (; i + kLanes <= dim; i += kLanes) squares += load(x + i) * load(x + i);
  float total = sum_lanes(squares);
  for (; i < dim; ++i) total += to_float(x[i]) * to_float(x[i]);
  return 1.0f / std::sqrt(total / static_cast<float>(dim) + eps);
}

// y may be x.
template <typename S>
void norm_row(const S* x, const S* weight, S* y, long dim, float eps) {
  const float scale = inverse_rms(x, dim, eps);
  long i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    store(round_to(load(x + i) * scale, x) * load(weight + i), y + i);
  for (; i < dim; ++i)
    from_float(rounded(to_float(x[i]) * scale, x) * to_float(weight[i]), y + i);
}

template <typename S>
void add_row(const S* x, const S* delta, S* total, long dim) {
  long i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(load(x + i) + load(delta + i), total + i);
  for (; i < dim; ++i) from_float(to_float(x[i]) + to_float(delta[i]), total + i);
}

// `delta` may be null: then `total` is not written and x is normalised.
template <typename S>
void rms_norm(const S* x, const S* delta, const S* weight, S* total, S* y, long rows, long dim,
              float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 16384)
  for (long row = 0; row < rows; ++row) {
    const S* from = x + row * dim;
    if (delta != nullptr) {
      add_row(from, delta + row * dim, total + row * dim, dim);
      from = total + row * dim;
    }
    norm_row(from, weight, y + row * dim, dim, eps);
  }
}

// x[i], x[i + P/2] turned by their angle; three roundings, as in torch.
template <typename S>
void rotate_head(S* head, const S* cos, const S* sin, long dim) {
  const long half = dim / 2;
  long i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec first = load(head + i), second = load(head + half + i);
    const Vec left = round_to(first * load(cos + i), head);
    const Vec right = round_to(second * load(cos + half + i), head);
    store(left - round_to(second * load(sin + i), head), head + i);
    store(right + round_to(first * load(sin + half + i), head), head + half + i);
  }
  for (; i < half; ++i) {
    const float first = to_float(head[i]), second = to_float(head[half + i]);
    const float left = rounded(first * to_float(cos[i]), head);
    const float right = rounded(second * to_float(cos[half + i]), head);
    from_float(left - rounded(second * to_float(sin[i]), head), head + i);
    from_float(right + rounded(first * to_float(sin[half + i]), head), head + half + i);
  }
}

// In place on (rows, heads + 2 * kv_heads, dim); the value heads are left alone.
template <typename S>
void prepare_heads(S* qkv, const S* query_weight, const S* key_weight, const S* cos, const S* sin,
                   long rows, long heads, long kv_heads, long dim, float eps, int threads) {
  const long stride = (heads + 2 * kv_heads) * dim;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * stride > 16384)
  for (long row = 0; row < rows; ++row)
    for (long h = 0; h < heads + kv_heads; ++h) {
      S* head = qkv + row * stride + h * dim;
      const S* weight = h < heads ? query_weight : key_weight;
      if (weight != nullptr) norm_row(head, weight, head, dim, eps);
      if (cos != nullptr) rotate_head(head, cos + row * dim, sin + row * dim, dim);
    }
}

// y = silu(gate) * up, gate and up side by side in a row of x.
template <typename S>
void silu_mul(const S* x, S* y, long rows, long dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 8192)
  for (long row = 0; row < rows; ++row) {
    const S *gate = x + 2 * row * dim, *up = gate + dim;
    S* to = y + row * dim;
    long i = 0;
    for (; i + kLanes <= dim; i += kLanes) {
      const Vec value = load(gate + i);
      store(round_to(value / (1.0f + exp_vec(-value)), x) * load(up + i), to + i);
    }
    for (; i < dim; ++i) {
      const float value = to_float(gate[i]);
      from_float(rounded(value / (1.0f + std::exp(-value)), x) * to_float(up[i]), to + i);
    }
  }
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;

extern "C" {

void pk_rms_norm_bf16(const Bf16* x, const Bf16* delta, const Bf16* weight, Bf16* total, Bf16* y,
                      long rows, long dim, float eps, int threads) {
  penstock::rms_norm(x, delta, weight, total, y, rows, dim, eps, threads);
}

void pk_rms_norm_f32(const float* x, const float* delta, const float* weight, float* total,
                     float* y, long rows, long dim, float eps, int threads) {
  penstock::rms_norm(x, delta, weight, total, y, rows, dim, eps, threads);
}

void pk_prepare_heads_bf16(Bf16* qkv, const Bf16* query_weight, const Bf16* key_weight,
                           const Bf16* cos, const Bf16* sin, long rows, long heads, long kv_heads,
                           long dim, float eps, int threads) {
  penstock::prepare_heads(qkv, query_weight, key_weight, cos, sin, rows, heads, kv_heads, dim, eps,
                          threads);
}

void pk_prepare_heads_f32(float* qkv, const float* query_weight, const float* key_weight,
                          const float* cos, const float* sin, long rows, long heads, long kv_heads,
                          long dim, float eps, int threads) {
  penstock::prepare_heads(qkv, query_weight, key_weight, cos, sin, rows, heads, kv_heads, dim, eps,
                          threads);
}

void pk_silu_mul_bf16(const Bf16* x, Bf16* y, long rows, long dim, int threads) {
  penstock::silu_mul(x, y, rows, dim, threads);
}

void pk_silu_mul_f32(const float* x, float* y, long rows, long dim, int threads) {
  penstock::silu_mul(x, y, rows, dim, threads);
}

}  // extern "C"
