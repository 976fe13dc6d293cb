// A token per row of logits: temperature, top-k, top-p, min-p, then the inverse of the cumulative
// distribution in vocabulary order, as replicas/sampling/filters.py has it.
//
// That module's torch functions are the definition. Here exponentials and sums round differently, so
// every row carries a bound of what that can change: a row whose token lies within it is left to them
// (kUnsure). All others have the very token that torch gives.

#include <functional>
#include <limits>
#include <vector>

#include "team.h"

namespace penstock {
namespace {

constexpr int64_t kUnsure = -1;
constexpr long kBlock = 512;         // tokens whose sum is kept, to find a token's place soon

// Exponentials here and torch's divided ones are within 5e-7 of each other. A running sum's share of the
// whole, in double precision, is then within half of that, for what is true of the share is of the rest.
constexpr double kSumError = 3e-7;
// Top-p compares with shares that torch divides by a sum in fp32, whose lanes add up thousands of terms.
constexpr double kMassError = 1e-5;

// What a row asks for; 0, 1 and 0 leave the filters out.
struct Wish {
  float peak, divisor;
  int64_t top_k;
  double top_p;
  float min_p;
  double uniform;
};

// Memory of one thread: the row's probabilities, unnormalised, and a few candidates of them.
struct Probs {
  std::vector<float> values, some;
  std::vector<double> blocks, mass;
};

inline uint32_t bits_of(float value) { return load_as<uint32_t>(&value); }

// Larger floats have larger keys.
inline uint32_t key_of(float value) {
  const uint32_t bits = bits_of(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// values[i] = (logits[i] - peak) / divisor, rounded as torch does it.
inline void scale(const float* logits, long vocab, const Wish& wish, float* values) {
  long i = 0;
  for (; i + kLanes <= vocab; i += kLanes)
    store((load(logits + i) - wish.peak) / splat(wish.divisor), values + i);
  for (; i < vocab; ++i) values[i] = (logits[i] - wish.peak) / wish.divisor;
}

// The `rank`-th largest value; 1 is the largest.
float ranked(const std::vector<float>& values, long rank, std::vector<float>& some) {
  constexpr int kShift = 20;
  std::vector<int32_t> counts(1 << (32 - kShift));
  for (const float value : values) ++counts[key_of(value) >> kShift];
  uint32_t bin = static_cast<uint32_t>(counts.size());
  long above = 0;
  do {
    --bin;
    above += counts[bin];
  } while (above < rank);
  some.clear();
  for (const float value : values)
    if (key_of(value) >> kShift == bin) some.push_back(value);
  const long place = rank - (above - counts[bin]) - 1;
  std::nth_element(some.begin(), some.begin() + place, some.end(), std::greater<float>());
  return some[place];
}

// values[i] = exp(values[i]), nothing below `lowest`.
inline void exponentiate(std::vector<float>& values, float lowest) {
  const Vec edge = splat(lowest);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    const Vec value = load(values.data() + i);
    store(select(value < edge, Vec{}, exp_vec(value)), values.data() + i);
  }
  for (; i < values.size(); ++i) values[i] = values[i] < lowest ? 0.0f : exp_vec(splat(values[i]))[0];
}

// Sums of kBlock values each; the sum of all.
double sum_blocks(Probs& probs) {
  const size_t vocab = probs.values.size();
  probs.blocks.clear();
  double total = 0.0;
  for (size_t begin = 0; begin < vocab; begin += kBlock) {
    const size_t end = std::min(vocab, begin + kBlock);
    double lanes[8] = {};
    size_t i = begin;
    for (; i + 8 <= end; i += 8)
      for (int lane = 0; lane < 8; ++lane) lanes[lane] += probs.values[i + lane];
    for (; i < end; ++i) lanes[0] += probs.values[i];
    double sum = 0.0;
    for (const double lane : lanes) sum += lane;
    probs.blocks.push_back(sum);
    total += sum;
  }
  return total;
}

// A filter's edge: what is smaller is dropped.
struct Edge {
  float value = 0.0f;
  bool is_sure = false;  // a value that surely stays, and the last one of its size
  double doubt = 0.0;    // mass that either way of computing the edge may keep or drop
};

// The smallest of the most likely values whose mass reaches `wanted`.
Edge nucleus(Probs& probs, double wanted, double total) {
  constexpr int kShift = 18;  // of positive floats, whose order is that of their bits
  probs.mass.assign(size_t(1) << (31 - kShift), 0.0);
  for (const float value : probs.values) probs.mass[bits_of(value) >> kShift] += value;
  long bin = static_cast<long>(probs.mass.size());
  double above = 0.0;
  while (bin > 0 && above < wanted) above += probs.mass[--bin];
  above -= probs.mass[bin];
  probs.some.clear();
  for (const float value : probs.values)
    if (bits_of(value) >> kShift == static_cast<uint32_t>(bin)) probs.some.push_back(value);
  std::sort(probs.some.begin(), probs.some.end(), std::greater<float>());
  Edge edge;
  double before = above;
  for (const float value : probs.some) {
    if (above >= wanted) break;
    edge.value = value;
    before = above;
    above += value;
  }
  const double slack = kMassError * total;
  edge.is_sure = before < wanted - slack && above >= wanted + slack;
  if (!edge.is_sure) edge.doubt = slack + 2.0 * edge.value;
  return edge;
}

// Drops what lies below the edge. Of values as large as it, all but one that is sure are in doubt: which
// of several equals stay is for torch to say.
void drop_below(std::vector<float>& values, Edge& edge) {
  const float low = edge.value * (1.0f - static_cast<float>(kMassError));
  const float high = edge.value * (1.0f + static_cast<float>(kMassError));
  double on_it = 0.0;
  long count = 0;
  for (float& value : values) {
    if (value >= low && value <= high) {
      on_it += value;
      ++count;
    }
    if (value < edge.value) value = 0.0f;
  }
  edge.is_sure = edge.is_sure && count == 1;
  if (!edge.is_sure) edge.doubt += on_it;
}

// The smallest value that surely passes.
inline float surely_above(const Edge& edge) {
  return edge.is_sure ? edge.value : edge.value * (1.0f + 2.0f * static_cast<float>(kMassError));
}

// The token at which the running sum passes `uniform` of the whole, if neither `doubt` changes that nor
// one is in doubt whose value is below `floor`.
int64_t place_of(const Probs& probs, double uniform, double total, double doubt, float floor) {
  const double target = uniform * total, margin = kSumError * total + doubt;
  const long vocab = static_cast<long>(probs.values.size());
  double before = 0.0;
  size_t block = 0;
  while (block + 1 < probs.blocks.size() && before + probs.blocks[block] <= target)
    before += probs.blocks[block++];
  const long end = std::min(vocab, static_cast<long>(block + 1) * kBlock);
  for (long token = static_cast<long>(block) * kBlock; token < end; ++token) {
    const float value = probs.values[token];
    if (before + value <= target) {
      before += value;
      continue;
    }
    const bool inside = target - before > margin && before + value - target > margin;
    return inside && value >= floor ? token : kUnsure;
  }
  return kUnsure;
}

int64_t sample_row(const float* logits, long vocab, const Wish& wish, Probs& probs) {
  if (!std::isfinite(wish.peak)) return kUnsure;
  probs.values.resize(vocab);
  scale(logits, vocab, wish, probs.values.data());
  float lowest = -std::numeric_limits<float>::infinity();
  if (wish.top_k > 0 && wish.top_k < vocab) lowest = ranked(probs.values, wish.top_k, probs.some);
  exponentiate(probs.values, lowest);
  double total = sum_blocks(probs);
  std::vector<Edge> edges;
  if (wish.top_p < 1.0) edges.push_back(nucleus(probs, wish.top_p * total, total));
  if (wish.min_p > 0.0f) edges.push_back({wish.min_p});  // the largest value is exp(0)
  double doubt = 0.0;
  float floor = 0.0f;
  for (Edge& edge : edges) {
    drop_below(probs.values, edge);
    doubt += edge.doubt;
    floor = std::max(floor, surely_above(edge));
  }
  if (!edges.empty()) total = sum_blocks(probs);
  return place_of(probs, wish.uniform, total, doubt, floor);
}

}  // namespace
}  // namespace penstock

extern "C" {

// tokens[i]: what row `rows[i]` of logits wants; kUnsure where torch has to say.
void pk_sample_f32(const float* logits, long vocab, long stride, const int64_t* rows,
                   const penstock::Wish* wishes, long count, int64_t* tokens, int threads) {
  using namespace penstock;
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    Probs probs;
    Units units(count, own_part(team));
    for (long unit = units.next(); unit >= 0; unit = units.next())
      tokens[unit] = sample_row(logits + rows[unit] * stride, vocab, wishes[unit], probs);
  }
}

}  // extern "C"
