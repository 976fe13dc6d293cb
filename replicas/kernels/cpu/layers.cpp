// Embeddings, all layers of a model and its last norm in one parallel region: between two products there is a
// barrier, and nothing else. The bits are those of the layers' separate calls, whose functions run.

#include <chrono>
#include <optional>

#include "block.h"
#include "inputs.h"
#include "mixture.h"
#include "mlp.h"

namespace penstock {
namespace {

// `mixture`: null in a dense layer, which has an MLP instead.
template <typename S>
struct Layer {
  Block<S> block;
  const S *attention_norm, *mlp_norm, *up, *up_bias, *down, *down_bias;
  const Mixture<S>* mixture;
  S* cache;
};

// `seconds`: what each kind of work took, added up; see `Kind`. `mixture`: one of them, all are of the
// same shape; null where there are none.
template <typename S>
struct Stack {
  const Layer<S>* layers;
  const S* last_norm;
  const Mixture<S>* mixture;
  double* seconds;
  long count, width, ffn;
  float eps;

  Mlp<S> mlp(const Layer<S>& layer) const {
    return {{layer.up, layer.up_bias, 2 * ffn, width}, {layer.down, layer.down_bias, width, ffn}};
  }
};

enum Kind { kNorms, kQkv, kAttention, kOut, kUp, kDown, kRoutes };

// Time since the last call, on the thread that began it.
class Watch {
 public:
  Watch(double* seconds, bool runs) : seconds_(seconds), runs_(runs) {
    if (runs_) last_ = Clock::now();
  }
  void count(Kind kind) {
    if (!runs_) return;
    const Clock::time_point now = Clock::now();
    seconds_[kind] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* seconds_;
  bool runs_;
  Clock::time_point last_;
};

constexpr long kOwnRows = 2;  // rows that every thread norms for itself, rather than wait

// The residual stream of a step and its norms. Of few rows every thread has its own copy.
template <typename S>
class Residual {
 public:
  Residual(S* hidden, const Rows<S>& normed, Part part)
      : hidden_(hidden), normed_(normed), part_(part), shared_(normed.rows > kOwnRows) {
    if (!shared_) {
      const long values = normed.rows * normed.k;
      char* memory = thread_scratch_of<Residual>(2 * round_up(values * sizeof(S), 64) +
                                                 normed.values(normed.rows, normed.k) * sizeof(S));
      Workspace own(memory);
      hidden_ = own.take<S>(values);
      std::memcpy(static_cast<void*>(hidden_), hidden, values * sizeof(S));
      normed_.data = own.take<S>(normed.values(normed.rows, normed.k));
    }
    own_ = shared_ ? share(normed.rows, part) : Range{0, normed.rows};
  }

  // The norm of hidden + delta, the new hidden; all of it is there on return.
  const Rows<S>& add_norm(const S* delta, const S* weight, float eps) {
    const long dim = normed_.k;
    S* line = reinterpret_cast<S*>(thread_scratch_of<Layer<S>>(dim * sizeof(S)));
    for (long row = own_.begin; row < own_.end; ++row) {
      S* hidden = hidden_ + row * dim;
      norm_sum_row(hidden, delta ? delta + row * dim : nullptr, weight, hidden, line, dim, eps);
      arrange_row(line, normed_, row);
    }
    if (shared_) wait(part_);
    return normed_;
  }

  // Whether every thread has its own copy, and the rows that are this thread's.
  bool alone() const { return !shared_; }
  Range own() const { return own_; }

  // The same into plain rows, which end up shared.
  void last_norm(const S* delta, const S* weight, float eps, S* y) {
    const long dim = normed_.k;
    const Range rows = share(normed_.rows, part_);
    for (long row = rows.begin; row < rows.end; ++row)
      norm_sum_row(hidden_ + row * dim, delta + row * dim, weight, hidden_ + row * dim,
                   y + row * dim, dim, eps);
  }

 private:
  S* hidden_;
  Rows<S> normed_;
  Part part_;
  bool shared_;
  Range own_;
};

// Memory of a step between its products, shared by the threads.
template <typename S>
struct StepMemory {
  StepMemory(const Stack<S>& stack, long rows, long threads, Workspace& memory)
      : hidden(memory.take<S>(rows * stack.width)),
        cos(memory.take<S>(rows * stack.layers[0].block.shape.dim)),
        sin(memory.take<S>(rows * stack.layers[0].block.shape.dim)),
        normed{memory.take<S>(Rows<S>::values(rows, stack.width)), rows, stack.width},
        delta(memory.take<S>(rows * stack.width)),
        block(stack.layers[0].block, rows, memory),
        mlp(stack.mlp(stack.layers[0]), rows, memory) {
    if (stack.mixture == nullptr) return;
    mixture.emplace(*stack.mixture, rows, threads, memory);
  }
  S *hidden, *cos, *sin;
  Rows<S> normed;
  S* delta;
  BlockRows<S> block;
  MlpRows<S> mlp;
  std::optional<MixtureRows<S>> mixture;
};

// From normed rows to the output of a layer's attention, whole on return. `next`: what is read then.
template <typename S>
void run_attention(const Layer<S>& layer, const Step& step, const std::vector<Task>& tasks,
                   const Rows<S>& input, const StepMemory<S>& memory, const EarlyReads& next,
                   Part part, Watch& watch) {
  const Block<S>& block = layer.block;
  multiply(input, block.into(), memory.block.qkv, part);
  clear_tails(memory.block.attended, part);
  wait(part, EarlyReads(block.out_of(), part));
  watch.count(kQkv);
  attend_all(block, step, tasks, memory.block, layer.cache, part);
  watch.count(kAttention);
  multiply(memory.block.attended, block.out_of(), memory.delta, part);
  wait(part, next);
  watch.count(kOut);
}

// From normed rows to the output of a dense layer's MLP, whole on return.
template <typename S>
const S* run_mlp(const Mlp<S>& mlp, const Rows<S>& input, const StepMemory<S>& memory,
                 const EarlyReads& next, Part part, Watch& watch) {
  gate_and_up(input, mlp, memory.mlp, part);
  watch.count(kUp);
  multiply(memory.mlp.gated, mlp.down, memory.delta, part);
  wait(part, next);
  watch.count(kDown);
  return memory.delta;
}

// The same of a mixture; on return the rows are there that this thread adds to the residual stream.
template <typename S>
const S* run_mixture(const Mixture<S>& mixture, const Rows<S>& input, const StepMemory<S>& memory,
                     const Residual<S>& residual, const EarlyReads& next, Part part, Watch& watch) {
  MixturePass<S> pass(mixture, *memory.mixture, input, residual.alone(), residual.own(), part);
  pass.route();
  pass.shared_experts();
  watch.count(kRoutes);
  const S* output = pass.routed_experts(memory.delta, next, [&] { watch.count(kUp); });
  watch.count(kDown);
  return output;
}

template <typename S>
void run_layers(const Stack<S>& stack, Step step, const Inputs<S>& inputs, S* y, void* workspace,
                int threads) {
  Workspace pieces(workspace);
  const StepMemory<S> memory(stack, step.rows, threads, pieces);
  step.cos = inputs.cos == nullptr ? nullptr : memory.cos;
  step.sin = inputs.cos == nullptr ? nullptr : memory.sin;
  const std::vector<Task> tasks = tasks_of(stack.layers[0].block.shape, step, threads);
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    Watch watch(stack.seconds, part.index == 0 && stack.seconds != nullptr);
    begin_rows(inputs, step.rows, stack.width, memory.hidden, memory.cos, memory.sin, part);
    wait(part, EarlyReads(stack.layers[0].block.into(), part));
    Residual<S> residual(memory.hidden, memory.normed, part);
    const S* added = nullptr;
    for (long index = 0; index < stack.count; ++index) {
      const Layer<S>& layer = stack.layers[index];
      const Rows<S>& input = residual.add_norm(added, layer.attention_norm, stack.eps);
      watch.count(kNorms);
      const Mlp<S> mlp = stack.mlp(layer);
      const bool dense = layer.mixture == nullptr, is_last = index + 1 == stack.count;
      run_attention(layer, step, tasks, input, memory,
                    dense ? early_gate_and_up(mlp, part) : EarlyReads(), part, watch);
      const Rows<S>& attended = residual.add_norm(memory.delta, layer.mlp_norm, stack.eps);
      watch.count(kNorms);
      const EarlyReads next =
          is_last ? EarlyReads() : EarlyReads(stack.layers[index + 1].block.into(), part);
      added = dense ? run_mlp(mlp, attended, memory, next, part, watch)
                    : run_mixture(*layer.mixture, attended, memory, residual, next, part, watch);
    }
    residual.last_norm(added, stack.last_norm, stack.eps, y);
    watch.count(kNorms);
  }
}

template <typename S>
long layers_bytes(const Stack<S>& stack, long rows, long threads) {
  Workspace counted(nullptr);
  const StepMemory<S> memory(stack, rows, threads, counted);
  return counted.taken();
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;
using penstock::Inputs;
using penstock::Stack;
using penstock::Step;

#define PK_LAYERS(suffix, S)                                                                       \
  bool pk_layers_##suffix(const Stack<S>* stack, const Step* step, const Inputs<S>* inputs, S* y,  \
                          void* workspace, int threads) {                                          \
    if (!inputs->known(step->rows)) return false;                                                  \
    penstock::run_layers(*stack, *step, *inputs, y, workspace, threads);                           \
    return true;                                                                                   \
  }                                                                                                \
  long pk_layers_bytes_##suffix(const Stack<S>* stack, long rows, long threads) {                  \
    return penstock::layers_bytes(*stack, rows, threads);                                          \
  }

extern "C" {

PK_LAYERS(bf16, Bf16)
PK_LAYERS(f32, float)

}  // extern "C"
