// Row by row: RMS norms (with a residual sum, over heads with a rotation) and the gated product.
// Roundings are where torch has them: each product that a model computes in its own dtype is
// rounded to that dtype. Sums run in a fixed order; a row is one thread's.
#pragma once

#include "vec.h"

namespace penstock {

inline Vec round_to(Vec value, const float*) { return value; }
inline Vec round_to(Vec value, const Bf16*) { return (Vec)(round_bits(value) & 0xffff0000u); }

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
void norm_sum_row(const S* x, const S* delta, const S* weight, S* total, S* y, long dim,
                  float eps) {
  if (delta != nullptr) {
    add_row(x, delta, total, dim);
    x = total;
  }
  norm_row(x, weight, y, dim, eps);
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

// How a fused q/k/v row becomes queries and keys; absent parts are null.
template <typename S>
struct Heads {
  long heads, kv_heads, dim;
  const S *query_norm, *key_norm, *cos, *sin;
  float eps;
};

// In place on head h of a row of (heads + 2 * kv_heads, dim); the value heads are left alone.
template <typename S>
inline void prepare_head(const Heads<S>& with, S* qkv, long row, long h) {
  if (h >= with.heads + with.kv_heads) return;
  S* head = qkv + (row * (with.heads + 2 * with.kv_heads) + h) * with.dim;
  const S* weight = h < with.heads ? with.query_norm : with.key_norm;
  if (weight != nullptr) norm_row(head, weight, head, with.dim, with.eps);
  if (with.cos != nullptr)
    rotate_head(head, with.cos + row * with.dim, with.sin + row * with.dim, with.dim);
}

// silu(gate) * up of values that S holds exactly; still to be rounded to S.
template <typename S>
inline Vec gate_vec(Vec gate, Vec up, const S* like) {
  return round_to(gate / (1.0f + exp_vec(-gate)), like) * up;
}

// y = silu(gate) * up, element by element.
template <typename S>
inline void gate_values(const S* gate, const S* up, S* y, long count) {
  long i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(gate_vec(load(gate + i), load(up + i), gate), y + i);
  for (; i < count; ++i) {
    const float value = to_float(gate[i]);
    from_float(rounded(value / (1.0f + std::exp(-value)), gate) * to_float(up[i]), y + i);
  }
}

// x / (1 + exp(-2u)) is x (1 + tanh(u)) / 2.
inline Vec tanh_gelu_vec(Vec x) {
  const Vec inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp_vec(-2.0f * inner));
}

// x times the normal distribution's integral, by the Chebyshev fit to erfc of Numerical Recipes (1992,
// section 6.2), to 1.2e-7.
inline Vec erf_gelu_vec(Vec x) {
  constexpr float kFit[] = {-1.26551223f, 1.00002368f, 0.37409196f, 0.09678418f, -0.18628806f,
                            0.27886807f,  -1.13520398f, 1.48851587f, -0.82215223f, 0.17087277f};
  const Vec root = x * 0.7071067811865476f;
  const Vec size = select(root < Vec{}, -root, root);
  const Vec t = 1.0f / (1.0f + 0.5f * size);
  Vec fit = splat(kFit[9]);
  for (int i = 8; i >= 0; --i) fit = fit * t + kFit[i];
  const Vec tail = 0.5f * t * exp_vec(fit - size * size);
  return x * select(root < Vec{}, tail, 1.0f - tail);
}

// y = gelu(x); what is left over behind the last vector goes through a vector too, so that a value's
// bits do not depend on where it stands.
template <typename S>
inline void gelu_values(const S* x, S* y, long count, bool with_tanh) {
  const auto gelu = [&](Vec value) { return with_tanh ? tanh_gelu_vec(value) : erf_gelu_vec(value); };
  long i = 0;
  for (; i + kLanes <= count; i += kLanes) store(gelu(load(x + i)), y + i);
  if (i == count) return;
  S rest[kLanes] = {};
  std::memcpy(static_cast<void*>(rest), x + i, (count - i) * sizeof(S));
  store(gelu(load(rest)), rest);
  std::memcpy(static_cast<void*>(y + i), rest, (count - i) * sizeof(S));
}

}  // namespace penstock
