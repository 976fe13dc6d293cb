// Packing, linears and gated MLPs, and rows of a packed table read back for embeddings.

#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "inputs.h"
#include "mlp.h"

namespace penstock {
namespace {

template <typename S>
void pack(const S* weight, const Matrix<S>& to, S* packed, int threads) {
  const long k = to.k;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long b = 0; b < to.blocks(); ++b) {
    S* block = packed + b * to.block_values();
    std::memset(static_cast<void*>(block), 0, to.block_values() * sizeof(S));
    for (long column = 0; column < std::min<long>(kLanes, to.n - b * kLanes); ++column) {
      const S* row = weight + (b * kLanes + column) * k;
      for (long i = 0; i < k; ++i)
        block[(i / kPack<S> * kLanes + column) * kPack<S> + i % kPack<S>] = row[i];
    }
  }
}

template <typename S, typename Y>
void linear(const S* x, const Matrix<S>& w, Y* y, long rows, S* workspace, int threads) {
  const bool alias = can_alias<S>(rows, w.k);
  const Rows<S> input{alias ? const_cast<S*>(x) : workspace, rows, w.k};
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    if (!alias) {
      arrange(x, w.k, input, part);
      wait(part);
    }
    multiply(input, w, y, part);
  }
}

// One parallel region.
template <typename S>
void gated_mlp(const S* x, const Mlp<S>& mlp, S* y, long rows, void* memory, int threads) {
  Workspace workspace(memory);
  const long width = mlp.up.k;
  const bool alias = can_alias<S>(rows, width);
  const Rows<S> input{alias ? const_cast<S*>(x) : workspace.take<S>(Rows<S>::values(rows, width)),
                      rows, width};
  const MlpRows<S> between(mlp, rows, workspace);
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part(team);
    if (!alias) {
      arrange(x, width, input, part);
      wait(part);
    }
    gate_and_up(input, mlp, between, part);
    multiply(between.gated, mlp.down, y, part);
  }
}

template <typename S>
void embed(const int64_t* ids, const Matrix<S>& table, S* y, long rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
  for (long row = 0; row < rows; ++row) unpack_row(table, ids[row], y + row * table.k);
}

}  // namespace
}  // namespace penstock

using penstock::Bf16;
using penstock::Matrix;

#define PK_LINEAR(name, S, Y)                                                                      \
  void name(const S* x, const S* packed, const S* bias, Y* y, long rows, long n, long k,           \
            S* workspace, int threads) {                                                           \
    penstock::linear(x, Matrix<S>{packed, bias, n, k}, y, rows, workspace, threads);               \
  }

#define PK_MATRIX(suffix, S)                                                                       \
  void pk_pack_##suffix(const S* weight, long n, long k, S* packed, int threads) {                 \
    penstock::pack(weight, Matrix<S>{packed, nullptr, n, k}, packed, threads);                     \
  }                                                                                                \
  void pk_embed_##suffix(const int64_t* ids, const S* packed, S* y, long rows, long k,             \
                         int threads) {                                                            \
    penstock::embed(ids, Matrix<S>{packed, nullptr, 0, k}, y, rows, threads);                      \
  }                                                                                                \
  void pk_gated_mlp_##suffix(const S* x, const S* up, const S* up_bias, const S* down,             \
                             const S* down_bias, S* y, long rows, long ffn, long in, long out,     \
                             void* workspace, int threads) {                                       \
    const penstock::Mlp<S> mlp{{up, up_bias, 2 * ffn, in}, {down, down_bias, out, ffn}};           \
    penstock::gated_mlp(x, mlp, y, rows, workspace, threads);                                      \
  }                                                                                                \
  long pk_rows_values_##suffix(long rows, long k) { return penstock::Rows<S>::values(rows, k); }   \
  PK_LINEAR(pk_linear_##suffix, S, S)

extern "C" {

int pk_abi() { return 7; }

// Makes the process ready. False: the system keeps the matrix tiles, that this library was built for,
// to itself.
int pk_start() {
#if defined(__GLIBC__)
  // A step's large tensors come and go: memory that went back to the system each time would cost a
  // page fault for every 4 KiB again (measured: 1.3 ms for two of 4 MB, against 0.5).
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 512 << 20);
#endif
  return penstock::ask_for_tiles();
}

int pk_block_width() { return penstock::kLanes; }

const char* pk_isa() {
#if defined(PENSTOCK_AMX)
  return "amx_bf16";
#elif defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

PK_MATRIX(bf16, Bf16)
PK_MATRIX(f32, float)
PK_LINEAR(pk_linear_bf16_f32, Bf16, float)

}  // extern "C"
