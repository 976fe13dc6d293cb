// Paged causal attention straight from the blocks, for decode and prefill alike: alone, and as the
// whole block of a layer from its normed input to its output projection in one parallel region.

#include <vector>

#include "attend_amx.h"
#include "matrix.h"
#include "rows.h"

namespace penstock {
namespace {

// The requests of a step.
struct Step {
  const int32_t* tables;
  const int64_t *query_start, *seq_lens, *slots;
  const void *cos, *sin;
  long requests, rows;
};

// Query tokens of a request and the kv heads [g, end) that one thread takes, one after another.
struct Task {
  long request, first, count, g, end;
};

// With tokens enough for all threads a task has all heads: they lie side by side in the cache.
std::vector<Task> tasks_of(const Shape& shape, const Step& step, int threads) {
  const long per_task = std::max(1L, 32 / (shape.heads / shape.kv_heads));
  const long heads = step.rows / per_task >= 4L * threads || step.requests >= 4L * threads
                         ? shape.kv_heads
                         : 1;
  std::vector<Task> tasks;
  for (long r = 0; r < step.requests; ++r)
    for (long first = step.query_start[r]; first < step.query_start[r + 1]; first += per_task)
      for (long g = 0; g < shape.kv_heads; g += heads)
        tasks.push_back({r, first, std::min(per_task, step.query_start[r + 1] - first), g,
                         g + heads});
  return tasks;
}

template <typename S>
void run_task(const Shape& shape, const Step& step, const Task& task, const S* query,
              const S* cache, S* output) {
  const long behind = step.query_start[task.request + 1] - task.first;
  const S* queries = query + task.first * shape.query_stride;
  const int32_t* table = step.tables + task.request * shape.table_stride;
  S* to = output + task.first * shape.heads * shape.dim;
  const long position = step.seq_lens[task.request] - behind;
#if defined(PENSTOCK_AMX)
  if constexpr (sizeof(S) == 2)
    if (suits_tiles(shape)) {
      for (long g = task.g; g < task.end; ++g)
        attend_tiles(shape, queries, cache, table, to, g, task.count, position, g + 1 < task.end);
      return;
    }
#endif
  Scratchpad<S> scratch(shape.dim);
  for (long g = task.g; g < task.end; ++g)
    attend(shape, queries, cache, table, to, g, task.count, position, scratch);
}

template <typename S>
void attention(const Shape& shape, const Step& step, const S* query, const S* cache, S* output,
               int threads) {
  const std::vector<Task> tasks = tasks_of(shape, step, threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (size_t index = 0; index < tasks.size(); ++index)
    run_task(shape, step, tasks[index], query, cache, output);
}

template <typename S>
inline void write_head(const S* from, S* cache, long slot, long width) {
  std::memcpy(static_cast<void*>(cache + slot * width), from, width * sizeof(S));
}

template <typename S>
void write_slots(const S* key, const S* value, long stride, S* cache, long cache_values,
                 const int64_t* slots, long rows, long width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > 32768)
  for (long row = 0; row < rows; ++row) {
    write_head(key + row * stride, cache, slots[row], width);
    write_head(value + row * stride, cache + cache_values, slots[row], width);
  }
}

// What one layer's attention block is made of.
template <typename S>
struct Block {
  Shape shape;
  const S *qkv, *qkv_bias, *out, *out_bias, *query_norm, *key_norm;
  long width, out_width;  // of the input and the output
  float head_eps;
};

// Head by head, so that a single row is shared out too.
template <typename S>
void prepare_and_write(const Block<S>& block, const Step& step, S* qkv, S* cache, Part part) {
  const Shape& shape = block.shape;
  const Heads<S> with{shape.heads,      shape.kv_heads,
                      shape.dim,        block.query_norm,
                      block.key_norm,   static_cast<const S*>(step.cos),
                      static_cast<const S*>(step.sin), block.head_eps};
  const long heads = shape.heads + 2 * shape.kv_heads, dim = shape.dim;
  const Range own = share(step.rows * heads, part);
  for (long unit = own.begin; unit < own.end; ++unit) {
    const long row = unit / heads, h = unit % heads, kv = h - shape.heads;
    prepare_head(with, qkv, row, h);
    if (kv < 0) continue;
    const bool is_value = kv >= shape.kv_heads;
    S* to = cache + (is_value ? shape.cache_values + (kv - shape.kv_heads) * dim : kv * dim);
    std::memcpy(static_cast<void*>(to + step.slots[row] * shape.kv_stride), qkv + unit * dim,
                dim * sizeof(S));
  }
}

template <typename S>
void attention_block(const Block<S>& block, const Step& step, const S* x, S* cache, S* y,
                     void* memory, int threads) {
  Workspace workspace(memory);
  const Shape& shape = block.shape;
  const long rows = step.rows, inner = shape.heads * shape.dim;
  const long fused = inner + 2 * shape.kv_heads * shape.dim;
  const bool alias = can_alias<S>(rows, block.width), alias_out = can_alias<S>(rows, inner);
  const Rows<S> input{
      alias ? const_cast<S*>(x) : workspace.take<S>(Rows<S>::values(rows, block.width)), rows,
      block.width};
  S* qkv = workspace.take<S>(rows * fused);
  S* attended = workspace.take<S>(rows * inner);
  const Rows<S> output{alias_out ? attended : workspace.take<S>(Rows<S>::values(rows, inner)), rows,
                       inner};
  const std::vector<Task> tasks = tasks_of(shape, step, threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part();
    if (!alias) {
      arrange(x, block.width, input, part);
#pragma omp barrier
    }
    multiply(input, Matrix<S>{block.qkv, block.qkv_bias, fused, block.width}, qkv, part);
#pragma omp barrier
    prepare_and_write(block, step, qkv, cache, part);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (size_t index = 0; index < tasks.size(); ++index)
      run_task(shape, step, tasks[index], qkv, cache, attended);
    if (!alias_out) {
      arrange(attended, inner, output, part);
#pragma omp barrier
    }
    multiply(output, Matrix<S>{block.out, block.out_bias, block.out_width, inner}, y, part);
  }
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;
using penstock::Block;
using penstock::Shape;
using penstock::Step;

#define PK_ATTENTION(suffix, S)                                                                    \
  void pk_write_slots_##suffix(const S* key, const S* value, long stride, S* cache,                \
                               long cache_values, const int64_t* slots, long rows, long width,     \
                               int threads) {                                                      \
    penstock::write_slots(key, value, stride, cache, cache_values, slots, rows, width, threads);   \
  }                                                                                                \
  void pk_attention_##suffix(const Shape* shape, const Step* step, const S* query, const S* cache, \
                             S* output, int threads) {                                             \
    penstock::attention(*shape, *step, query, cache, output, threads);                             \
  }                                                                                                \
  void pk_attention_block_##suffix(const Block<S>* block, const Step* step, const S* x, S* cache,  \
                                   S* y, void* workspace, int threads) {                           \
    penstock::attention_block(*block, *step, x, cache, y, workspace, threads);                     \
  }

extern "C" {

PK_ATTENTION(bf16, Bf16)
PK_ATTENTION(f32, float)

}  // extern "C"
