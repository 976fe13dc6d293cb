// A layer's attention from its normed input to its output projection, inside a parallel region:
// every thread of the region calls these functions with its own part.
#pragma once

#include <vector>

#include "attend_heads.h"
#include "matrix.h"
#include "rows.h"

namespace penstock {

// The requests of a step.
struct Step {
  const int32_t* tables;
  const int64_t *query_start, *seq_lens, *slots;
  const void *cos, *sin;
  long requests, rows, table_stride;
};

// Query tokens of a request and the kv heads [g, end) that one thread takes, one after another.
struct Task {
  long request, first, count, g, end;
};

constexpr long kTaskValues = 2048;  // of a token's keys: a piece of them and the next fit a core's cache

// With tokens enough for all threads a task has all heads, or many: they lie side by side in the cache.
inline std::vector<Task> tasks_of(const Shape& shape, const Step& step, int threads) {
  const long per_task = std::max(1L, 32 / (shape.heads / shape.kv_heads));
  const bool many = step.rows / per_task >= 4L * threads || step.requests >= 4L * threads;
  const long heads =
      many ? std::min(shape.kv_heads, std::max(1L, kTaskValues / shape.dim)) : 1;
  std::vector<Task> tasks;
  for (long r = 0; r < step.requests; ++r)
    for (long first = step.query_start[r]; first < step.query_start[r + 1]; first += per_task)
      for (long g = 0; g < shape.kv_heads; g += heads)
        tasks.push_back({r, first, std::min(per_task, step.query_start[r + 1] - first), g,
                         std::min(g + heads, shape.kv_heads)});
  return tasks;
}

// Where the first query token of a task stands in its request.
inline long position_of(const Step& step, const Task& task) {
  return step.seq_lens[task.request] - (step.query_start[task.request + 1] - task.first);
}

// `next`: the task that this thread takes after this one, or null.
template <typename S>
void run_task(const Shape& shape, const Step& step, const Task& task, const Task* next,
              const S* query, const S* cache, const HeadRows<S>& output) {
  const S* queries = query + task.first * shape.query_stride;
  const int32_t* table = step.tables + task.request * step.table_stride;
  const long position = position_of(step, task);
#if defined(PENSTOCK_AMX)
  if constexpr (sizeof(S) == 2)
    if (suits_tiles(shape)) {
      HeadsContext upcoming;
      if (next != nullptr)
        upcoming = {context_of(shape, step.tables + next->request * step.table_stride,
                               position_of(step, *next), next->count),
                    next->g, next->end};
      attend_tiles(shape, {queries, output, task.first, task.count, position}, cache, table, task.g,
                   task.end, upcoming);
      return;
    }
#endif
  Scratchpad<S> scratch(shape.dim);
  for (long g = task.g; g < task.end; ++g)
    attend(shape, queries, cache, table, output, task.first, g, task.count, position, scratch);
}

// What one layer's attention block is made of.
template <typename S>
struct Block {
  Shape shape;
  const S *qkv, *qkv_bias, *out, *out_bias, *query_norm, *key_norm;
  long width, out_width;  // of the input and the output
  float head_eps;

  long inner() const { return shape.heads * shape.dim; }
  long fused() const { return inner() + 2 * shape.kv_heads * shape.dim; }
  Matrix<S> into() const { return {qkv, qkv_bias, fused(), width}; }
  Matrix<S> out_of() const { return {out, out_bias, out_width, inner()}; }
};

// Head h of a row becomes a query, or a key or value that goes to its slot.
template <typename S>
void prepare_and_write(const Block<S>& block, const Step& step, S* qkv, S* cache, long row,
                       long h) {
  const Shape& shape = block.shape;
  const Heads<S> with{shape.heads,      shape.kv_heads,
                      shape.dim,        block.query_norm,
                      block.key_norm,   static_cast<const S*>(step.cos),
                      static_cast<const S*>(step.sin), block.head_eps};
  const long dim = shape.dim, kv = h - shape.heads;
  prepare_head(with, qkv, row, h);
  if (kv < 0) return;
  const bool is_value = kv >= shape.kv_heads;
  S* to = cache + (is_value ? shape.cache_values + (kv - shape.kv_heads) * dim : kv * dim);
  std::memcpy(static_cast<void*>(to + step.slots[row] * shape.kv_stride),
              qkv + (row * (shape.heads + 2 * shape.kv_heads) + h) * dim, dim * sizeof(S));
}

// What a task of a single token reads: its queries, and the newest key and value of its heads.
template <typename S>
void prepare_task(const Block<S>& block, const Step& step, const Task& task, S* qkv, S* cache) {
  const Shape& shape = block.shape;
  const long group = shape.heads / shape.kv_heads;
  for (long h = task.g * group; h < task.end * group; ++h)
    prepare_and_write(block, step, qkv, cache, task.first, h);
  for (long g = task.g; g < task.end; ++g)
    for (long h : {shape.heads + g, shape.heads + shape.kv_heads + g})
      prepare_and_write(block, step, qkv, cache, task.first, h);
}

// Memory of a block between its products, shared by the threads.
template <typename S>
struct BlockRows {
  BlockRows(const Block<S>& block, long rows, Workspace& memory)
      : qkv(memory.take<S>(rows * block.fused())),
        attended{memory.take<S>(Rows<S>::values(rows, block.inner())), rows, block.inner()} {}
  S* qkv;
  Rows<S> attended;
};

// Ends with all threads done.
template <typename S>
void attend_all(const Block<S>& block, const Step& step, const std::vector<Task>& tasks,
                const BlockRows<S>& memory, S* cache, Part part) {
  // Where no request has two tokens, a task needs no other's keys: nobody has to wait for them.
  const bool alone = step.rows == step.requests;
  if (!alone) {
    const long heads = block.shape.heads + 2 * block.shape.kv_heads;
    const Range own = share(step.rows * heads, part);  // so that a single row is shared out too
    for (long unit = own.begin; unit < own.end; ++unit)
      prepare_and_write(block, step, memory.qkv, cache, unit / heads, unit % heads);
    wait(part);
  }
  const HeadRows<S> output{nullptr, memory.attended};
  Units units(static_cast<long>(tasks.size()), part);
  for (long index = units.next(), next; index >= 0; index = next) {
    next = units.next();
    if (alone) prepare_task(block, step, tasks[index], memory.qkv, cache);
    // Neighbouring tasks of a prompt read the same context.
    run_task(block.shape, step, tasks[index], alone && next >= 0 ? &tasks[next] : nullptr,
             memory.qkv, cache, output);
  }
  wait(part, EarlyReads(block.out_of(), part));
}

// From the projections' input to the block's output; `y` is whole once all threads are done.
template <typename S>
void attention_block(const Block<S>& block, const Step& step, const std::vector<Task>& tasks,
                     const Rows<S>& input, const BlockRows<S>& memory, S* cache, S* y, Part part) {
  multiply(input, block.into(), memory.qkv, part);
  clear_tails(memory.attended, part);
  wait(part);
  attend_all(block, step, tasks, memory, cache, part);
  multiply(memory.attended, block.out_of(), y, part);
}

}  // namespace penstock
