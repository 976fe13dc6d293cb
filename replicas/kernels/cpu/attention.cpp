// Paged causal attention straight from the blocks, for decode and prefill alike: alone, and as the
// whole block of a layer from its normed input to its output projection in one parallel region.

#include "block.h"

namespace penstock {
namespace {

template <typename S>
void attention(const Shape& shape, const Step& step, const S* query, const S* cache, S* output,
               int threads) {
  const std::vector<Task> tasks = tasks_of(shape, step, threads);
  const HeadRows<S> rows{output, {nullptr, step.rows, shape.heads * shape.dim}};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (size_t index = 0; index < tasks.size(); ++index)
    run_task<S>(shape, step, tasks[index], nullptr, query, cache, rows);
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

template <typename S>
void whole_block(const Block<S>& block, const Step& step, const S* x, S* cache, S* y, void* memory,
                 int threads) {
  Workspace workspace(memory);
  const bool alias = can_alias<S>(step.rows, block.width);
  const Rows<S> input{
      alias ? const_cast<S*>(x) : workspace.take<S>(Rows<S>::values(step.rows, block.width)),
      step.rows, block.width};
  const BlockRows<S> rows(block, step.rows, workspace);
  const std::vector<Task> tasks = tasks_of(block.shape, step, threads);
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    if (!alias) {
      arrange(x, block.width, input, part);
      wait(part);
    }
    attention_block(block, step, tasks, input, rows, cache, y, part);
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
    penstock::whole_block(*block, *step, x, cache, y, workspace, threads);                         \
  }

extern "C" {

PK_ATTENTION(bf16, Bf16)
PK_ATTENTION(f32, float)

}  // extern "C"
