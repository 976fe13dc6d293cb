// Embeddings, all layers of a model and its last norm in one parallel region: between two products there is a
// barrier, and nothing else. The bits are those of the layers' separate calls, whose functions run.

#include <chrono>
#include <optional>

#include "block.h"
#include "inputs.h"
#include "largest.h"
#include "mixture.h"
#include "mlp.h"
#include "residual.h"

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

// What greedy decoding wants behind the layers, see `HeadShape` in Python: of the first `count` columns of
// a packed (n, width) weight each row's largest. `sign` is called when the layers are computed; `seconds`:
// what came after that.
template <typename S>
struct Head {
  const S* packed;
  int64_t* places;
  void (*sign)();
  long n, count;
  int64_t are_finite;
  double seconds;

  Matrix<S> matrix(long width) const { return {packed, nullptr, n, width}; }
};

inline double seconds_now() {
  using Clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

enum Kind { kNorms, kQkv, kAttention, kOut, kUp, kDown, kRoutes };

// Time since the last call, on the thread that began it.
class Watch {
 public:
  Watch(double* seconds, bool runs) : seconds_(seconds), runs_(runs) {
    if (runs_) last_s_ = seconds_now();
  }
  void count(Kind kind) {
    if (!runs_) return;
    const double now_s = seconds_now();
    seconds_[kind] += now_s - last_s_;
    last_s_ = now_s;
  }

 private:
  double* seconds_;
  bool runs_;
  double last_s_ = 0.0;
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

// From the shared rows `y` to this thread's finds. The thread that called gives the sign; until it is back
// the others go on with its share.
template <typename S>
void run_head(const Head<S>& head, const S* y, const Rows<S>& arranged, Largest* found, Part part,
              double& computed_s) {
  const Matrix<S> weight = head.matrix(arranged.k);
  arrange(y, arranged.k, arranged, part);
  wait(part, EarlyReads(weight, part));
  if (part.index == 0) {
    computed_s = seconds_now();
    if (head.sign != nullptr) head.sign();
  }
  find_own_largest(arranged, weight, head.count, found + part.index * arranged.rows, part);
}

// `head`: null where hidden states are all that is wanted.
template <typename S>
void run_layers(const Stack<S>& stack, Step step, const Inputs<S>& inputs, S* y, Head<S>* head,
                void* workspace, int threads) {
  Workspace pieces(workspace);
  const StepMemory<S> memory(stack, step.rows, threads, pieces);
  step.cos = inputs.cos == nullptr ? nullptr : memory.cos;
  step.sin = inputs.cos == nullptr ? nullptr : memory.sin;
  const std::vector<Task> tasks = tasks_of(stack.layers[0].block.shape, step, threads);
  double computed_s = 0.0;
  std::vector<Largest> found(head == nullptr ? 0 : threads * step.rows);
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
    if (head != nullptr) run_head(*head, y, memory.normed, found.data(), part, computed_s);
  }
  if (head == nullptr) return;
  head->are_finite = settle_largest(found, step.rows, head->places);
  head->seconds = seconds_now() - computed_s;
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
                          penstock::Head<S>* head, void* workspace, int threads) {                 \
    if (!inputs->known(step->rows)) return false;                                                  \
    penstock::run_layers(*stack, *step, *inputs, y, head, workspace, threads);                     \
    return true;                                                                                   \
  }                                                                                                \
  long pk_layers_bytes_##suffix(const Stack<S>* stack, long rows, long threads) {                  \
    return penstock::layers_bytes(*stack, rows, threads);                                          \
  }

extern "C" {

PK_LAYERS(bf16, Bf16)
PK_LAYERS(f32, float)

}  // extern "C"
