// The gate of a mixture for rows whose logits are there.

#include "gate.h"

extern "C" {

// `bias` may be null.
void pk_route_f32(const float* logits, const float* bias, const penstock::Gate* gate, long rows,
                  int64_t* ids, float* weights, int threads) {
#pragma omp parallel num_threads(threads) if (rows * gate->experts > 2048)
  {
    const penstock::Room room = penstock::take_room(*gate);
    const penstock::Range own = penstock::share(rows, penstock::own_part());
    for (long row = own.begin; row < own.end; ++row)
      penstock::route_row(*gate, logits + row * gate->experts, bias, room,
                          ids + row * gate->top_k, weights + row * gate->top_k);
  }
}

}  // extern "C"
