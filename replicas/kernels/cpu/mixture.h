// A mixture of experts from a layer's normed rows to its output, inside a parallel region: the gate, the
// experts that rows visit and those that all do, their sum. The bits are those of the separate calls.
#pragma once

#include "experts.h"
#include "gate.h"
#include "mlp.h"

namespace penstock {

// What one layer's mixture is made of; see `MixtureShape` in Python. Its experts are all there are, by
// number.
template <typename S>
struct Mixture {
  Experts<S> experts;
  Gate gate;
  const S *router, *router_bias;
  const float* correction;
  const S *shared_up, *shared_down, *shared_gate;  // of the experts that all rows visit
  long shared_ffn;                                 // 0: there are none

  Matrix<S> gate_weight() const { return {router, router_bias, gate.experts, experts.dim}; }
  Mlp<S> shared() const {
    const long dim = experts.dim;
    return {{shared_up, nullptr, 2 * shared_ffn, dim}, {shared_down, nullptr, dim, shared_ffn}};
  }
  bool has_shared_gate() const { return shared_ffn && shared_gate != nullptr; }
};

constexpr long kOwnRoutes = 64;          // rows that every thread routes for itself, rather than wait
constexpr long kOwnGateBytes = 64 << 10;  // of a router that every thread then multiplies with

// Memory of a mixture, shared by the threads.
template <typename S>
struct MixtureRows {
  MixtureRows(const Mixture<S>& mixture, long rows, long threads, Workspace& memory)
      : shared(mixture.shared(), rows, memory) {
    const Experts<S>& experts = mixture.experts;
    logits = memory.take<float>(rows * mixture.gate.experts);
    slots = memory.take<int64_t>(rows * mixture.gate.top_k);
    weights = memory.take<float>(rows * mixture.gate.top_k);
    buffers = take_buffers<S>(memory, rows * mixture.gate.top_k, experts.dim, experts.ffn, threads);
    sums = memory.take<double>(rows * experts.dim);
    shared_products = memory.take<float>(mixture.shared_ffn ? rows * experts.dim : 0);
    shared_logits = memory.take<float>(mixture.shared_ffn ? rows : 0);
  }
  MlpRows<S> shared;
  float *logits, *weights, *shared_products, *shared_logits;
  double* sums;
  int64_t* slots;
  Buffers<S> buffers;
};

// One thread's way through a mixture. Of few rows it has its own input (`alone`) and makes its own
// output; else it makes the rows `own` of a shared one.
template <typename S>
class MixturePass {
 public:
  MixturePass(const Mixture<S>& mixture, const MixtureRows<S>& memory, const Rows<S>& input,
              bool alone, Range own, Part part)
      : mixture_(mixture), input_(input), alone_(alone), own_(own), part_(part), memory_(memory) {
    const long rows = input.rows, all = rows * mixture.gate.top_k, dim = mixture.experts.dim;
    Workspace counted(nullptr);
    take_own(counted, rows, all, dim);
    Workspace own_memory(thread_scratch_of<MixturePass>(counted.taken()));
    take_own(own_memory, rows, all, dim);
  }

  // Which experts each row visits.
  void route() {
    const Gate& gate = mixture_.gate;
    const Matrix<S> weight = mixture_.gate_weight();
    const long bytes = weight.blocks() * weight.block_values() * static_cast<long>(sizeof(S));
    const bool own_logits = input_.rows <= kOwnRoutes && bytes <= kOwnGateBytes;
    multiply(input_, weight, own_logits ? logits_ : memory_.logits, own_logits ? Part{0, 1} : part_);
    if (!own_logits) wait(part_);
    const float* logits = own_logits ? logits_ : memory_.logits;
    const bool own_routes = input_.rows <= kOwnRoutes;
    int64_t* slots = own_routes ? slots_ : memory_.slots;
    float* weights = own_routes ? weights_ : memory_.weights;
    const Range rows = own_routes ? Range{0, input_.rows} : share(input_.rows, part_);
    const Room room = take_room(gate);
    for (long row = rows.begin; row < rows.end; ++row)
      route_row(gate, logits + row * gate.experts, mixture_.correction, room,
                slots + row * gate.top_k, weights + row * gate.top_k);
    if (!own_routes) wait(part_);
    pairs_.count = pairs_.num_pieces = 0;
    sort_pairs({slots, weights, input_.rows, gate.top_k}, mixture_.experts.order,
               mixture_.experts.slots, pairs_);
  }

  // The MLP that all rows visit, whole on return.
  void shared_experts() {
    if (!mixture_.shared_ffn) return;
    const Mlp<S> mlp = mixture_.shared();
    if (mixture_.has_shared_gate())
      multiply(input_, Matrix<S>{mixture_.shared_gate, nullptr, 1, mixture_.experts.dim},
               memory_.shared_logits, Part{part_.index, part_.count});
    gate_and_up(input_, mlp, memory_.shared, part_);
    multiply(memory_.shared.gated, mlp.down, memory_.shared_products, part_);
    wait(part_);
  }

  // The output of `own` rows; the other threads' are not there yet. `next`: what is read then;
  // `halfway` is called between the experts' two products.
  template <typename Halfway>
  const S* routed_experts(S* output, const EarlyReads& next, const Halfway& halfway) {
    const Experts<S>& experts = mixture_.experts;
    Buffers<S> buffers = memory_.buffers;
    if (alone_) buffers.input = input_copy_, output = output_;
    double* sums = alone_ ? sums_ : memory_.sums;
    std::fill(sums + own_.begin * experts.dim, sums + own_.end * experts.dim, 0.0);
    for (long from = 0; from < pairs_.num_pieces;) {
      const Wave wave = place_wave<S>(pairs_, from);
      from += wave.count;
      gather([&](long row, long index) { return input_.line(row, index); }, pairs_, wave,
             experts.dim, buffers.input, alone_ ? Part{0, 1} : part_);
      if (!alone_) wait(part_);
      const bool is_last = from == pairs_.num_pieces;
      expert_products(experts, wave, buffers, part_, is_last ? next : EarlyReads(), halfway);
      for (long pair = wave.first(); pair < wave.end(); ++pair) {
        const long row = pairs_.row[pair];
        if (row < own_.begin || row >= own_.end) continue;
        const float* product = buffers.products + (pair - wave.first()) * experts.dim;
        add_pair(pairs_, pair, product, experts.dim, 0, experts.dim, sums + row * experts.dim);
      }
    }
    for (long row = own_.begin; row < own_.end; ++row) {
      const double* sum = sums + row * experts.dim;
      for (long i = 0; i < experts.dim; ++i) sum_[i] = static_cast<float>(sum[i]);
      finish_row(sum_, row, output + row * experts.dim);
    }
    return output;
  }

 private:
  void take_own(Workspace& memory, long rows, long pairs, long dim) {
    const bool routes = rows <= kOwnRoutes;
    logits_ = memory.take<float>(routes ? rows * mixture_.gate.experts : 0);
    slots_ = memory.take<int64_t>(routes ? pairs : 0);
    weights_ = memory.take<float>(routes ? pairs : 0);
    pairs_ = take_pairs(memory, pairs, mixture_.experts.slots);
    input_copy_ = memory.take<S>(alone_ ? wave_rows(pairs) * round_up(dim, Rows<S>::kLine) : 0);
    sums_ = memory.take<double>(alone_ ? rows * dim : 0);
    sum_ = memory.take<float>(dim);
    output_ = memory.take<S>(alone_ ? rows * dim : 0);
  }

  // The sum of both kinds of experts, rounded once.
  void finish_row(const float* sum, long row, S* output) const {
    const long dim = mixture_.experts.dim;
    if (!mixture_.shared_ffn) return write_rows<S>(sum, dim, nullptr, 1, dim, output, dim);
    const float* shared = memory_.shared_products + row * dim;
    const float factor =
        mixture_.has_shared_gate() ? exact_sigmoid(memory_.shared_logits[row]) : 1.0f;
    long i = 0;
    for (; i + kLanes <= dim; i += kLanes)
      store(load(sum + i) + settled(load(shared + i) * factor), output + i);
    for (; i < dim; ++i) {
      float value = shared[i] * factor;
      asm("" : "+m"(value));
      from_float(sum[i] + value, output + i);
    }
  }

  const Mixture<S>& mixture_;
  const Rows<S>& input_;
  bool alone_;
  Range own_;
  Part part_;
  const MixtureRows<S>& memory_;
  Pairs pairs_;
  float *logits_, *weights_, *sum_;
  double* sums_;
  int64_t* slots_;
  S *input_copy_, *output_;
};

}  // namespace penstock
