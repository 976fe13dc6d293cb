// All layers of a dense model and its last norm in one parallel region: between two products there is
// a barrier, and nothing else. The bits are those of the layers' separate calls, whose functions run.

#include <chrono>

#include "block.h"
#include "mlp.h"

namespace penstock {
namespace {

template <typename S>
struct Layer {
  Block<S> block;
  const S *attention_norm, *mlp_norm, *up, *up_bias, *down, *down_bias;
  S* cache;
};

// `seconds`: what each kind of work took, added up; see `Kind`.
template <typename S>
struct Stack {
  const Layer<S>* layers;
  const S* last_norm;
  double* seconds;
  long count, width, ffn;
  float eps;

  Mlp<S> mlp(const Layer<S>& layer) const {
    return {{layer.up, layer.up_bias, 2 * ffn, width}, {layer.down, layer.down_bias, width, ffn}};
  }
};

enum Kind { kNorms, kQkv, kAttention, kOut, kUp, kDown };

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

template <typename S>
void run_layers(const Stack<S>& stack, const Step& step, S* hidden, S* y, void* memory,
                int threads) {
  Workspace workspace(memory);
  const long rows = step.rows;
  const Rows<S> normed{workspace.take<S>(Rows<S>::values(rows, stack.width)), rows, stack.width};
  S* delta = workspace.take<S>(rows * stack.width);
  const BlockRows<S> block_rows(stack.layers[0].block, rows, workspace);
  const MlpRows<S> mlp_rows(stack.mlp(stack.layers[0]), rows, workspace);
  const std::vector<Task> tasks = tasks_of(stack.layers[0].block.shape, step, threads);
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    Watch watch(stack.seconds, part.index == 0 && stack.seconds != nullptr);
    Residual<S> residual(hidden, normed, part);
    const S* added = nullptr;
    for (long index = 0; index < stack.count; ++index, added = delta) {
      const Layer<S>& layer = stack.layers[index];
      const Block<S>& block = layer.block;
      const Rows<S>& input = residual.add_norm(added, layer.attention_norm, stack.eps);
      watch.count(kNorms);
      multiply(input, block.into(), block_rows.qkv, part);
      clear_tails(block_rows.attended, part);
      wait(part, EarlyReads(block.out_of(), part));
      watch.count(kQkv);
      attend_all(block, step, tasks, block_rows, layer.cache, part);
      watch.count(kAttention);
      multiply(block_rows.attended, block.out_of(), delta, part);
      const Mlp<S> mlp = stack.mlp(layer);
      wait(part, early_gate_and_up(mlp, part));
      watch.count(kOut);
      const Rows<S>& attended = residual.add_norm(delta, layer.mlp_norm, stack.eps);
      watch.count(kNorms);
      gate_and_up(attended, mlp, mlp_rows, part);
      watch.count(kUp);
      multiply(mlp_rows.gated, mlp.down, delta, part);
      const bool is_last = index + 1 == stack.count;
      wait(part, is_last ? EarlyReads() : EarlyReads(stack.layers[index + 1].block.into(), part));
      watch.count(kDown);
    }
    residual.last_norm(delta, stack.last_norm, stack.eps, y);
    watch.count(kNorms);
  }
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;
using penstock::Stack;
using penstock::Step;

#define PK_LAYERS(suffix, S)                                                                       \
  void pk_layers_##suffix(const Stack<S>* stack, const Step* step, S* hidden, S* y,                \
                          void* workspace, int threads) {                                          \
    penstock::run_layers(*stack, *step, hidden, y, workspace, threads);                            \
  }

extern "C" {

PK_LAYERS(bf16, Bf16)
PK_LAYERS(f32, float)

}  // extern "C"
