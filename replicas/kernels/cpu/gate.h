// From router logits to each row's experts and weights, for every gate that `moe/gating.py` knows; that
// function is the oracle. All in fp32, a row by itself; of equal values the lowest expert is taken.
#pragma once

#include "team.h"

namespace penstock {

// Shared with Python: see `GateShape` there.
struct Gate {
  long experts, top_k, groups, top_groups;
  int32_t score;        // 0 softmax, 1 sigmoid, 2 the logits themselves
  int32_t group_top2;   // a group is as good as its two best experts together, else as its best
  int32_t normalise;
  float scale;
};

// exp(values - highest) and their sum; `count` values, room for whole vectors.
inline float exponentials(float* values, long count) {
  float highest = values[0];
  for (long i = 1; i < count; ++i) highest = values[i] > highest ? values[i] : highest;
  for (long i = count; i % kLanes; ++i) values[i] = -INFINITY;
  Vec total{};
  for (long i = 0; i < count; i += kLanes) {
    const Vec power = exp_vec(load(values + i) - highest);
    store(power, values + i);
    total += power;
  }
  return sum_lanes(total);
}

inline void softmax(float* values, long count) {
  const float total = exponentials(values, count);
  for (long i = 0; i < count; ++i) values[i] /= total;
}

// The index of the largest value that is not taken; taken ones are marked.
inline long take_largest(const float* values, bool* taken, long count) {
  long best = -1;
  for (long i = 0; i < count; ++i)
    if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
  taken[best] = true;
  return best;
}

inline float group_score(const float* values, long count, bool top2) {
  float first = -INFINITY, second = -INFINITY;
  for (long i = 0; i < count; ++i) {
    if (values[i] > first) {
      second = first;
      first = values[i];
    } else if (values[i] > second) {
      second = values[i];
    }
  }
  return top2 ? first + second : first;
}

// Marks as taken what lies outside the best groups.
inline void limit_groups(const Gate& gate, const float* choice, float* scores, bool* group_taken,
                         bool* taken) {
  const long size = gate.experts / gate.groups;
  for (long group = 0; group < gate.groups; ++group)
    scores[group] = group_score(choice + group * size, size, gate.group_top2);
  std::fill(group_taken, group_taken + gate.groups, false);
  for (long kept = 0; kept < gate.top_groups; ++kept)
    take_largest(scores, group_taken, gate.groups);
  for (long expert = 0; expert < gate.experts; ++expert) taken[expert] = !group_taken[expert / size];
}

// One thread's working memory for a row.
struct Room {
  float *scores, *choice, *groups, *chosen;
  bool *taken, *group_taken;
};

inline Room take_room(const Gate& gate) {
  const long width = round_up(gate.experts, kLanes);
  char* memory = thread_scratch(4 * width * (sizeof(float) + 1) + 6 * 64);
  Workspace workspace(memory);
  Room room{};
  room.scores = workspace.take<float>(width);
  room.choice = workspace.take<float>(width);
  room.groups = workspace.take<float>(gate.groups);
  room.chosen = workspace.take<float>(round_up(gate.top_k, kLanes));
  room.taken = workspace.take<bool>(width);
  room.group_taken = workspace.take<bool>(gate.groups);
  return room;
}

// As `moe.gating.exact_sigmoid`.
inline float exact_sigmoid(float logit) {
  return static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logit))));
}

inline void score_row(const Gate& gate, const float* logits, float* scores) {
  for (long i = 0; i < gate.experts; ++i) scores[i] = logits[i];
  if (gate.score == 0) softmax(scores, gate.experts);
  if (gate.score == 1)
    for (long i = 0; i < gate.experts; ++i) scores[i] = exact_sigmoid(logits[i]);
}

inline void route_row(const Gate& gate, const float* logits, const float* bias, const Room& room,
                      int64_t* ids, float* weights) {
  score_row(gate, logits, room.scores);
  const float* choice = room.scores;
  if (bias != nullptr) {
    for (long i = 0; i < gate.experts; ++i) room.choice[i] = room.scores[i] + bias[i];
    choice = room.choice;
  }
  std::fill(room.taken, room.taken + gate.experts, false);
  if (gate.groups > 1) limit_groups(gate, choice, room.groups, room.group_taken, room.taken);
  for (long k = 0; k < gate.top_k; ++k) {
    ids[k] = take_largest(choice, room.taken, gate.experts);
    room.chosen[k] = room.scores[ids[k]];
  }
  if (gate.score == 2) softmax(room.chosen, gate.top_k);
  float total = 0;
  for (long k = 0; k < gate.top_k; ++k) total += room.chosen[k];
  for (long k = 0; k < gate.top_k; ++k) {
    weights[k] = gate.normalise ? room.chosen[k] / (total + 1e-20f) : room.chosen[k];
    if (gate.scale != 1.0f) weights[k] *= gate.scale;
  }
}

}  // namespace penstock
