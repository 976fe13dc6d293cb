// Packing, linears and gated MLPs, and rows of a packed table read back for embeddings.

#include <cstdlib>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "matrix.h"
#include "rows.h"

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
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part();
    if (!alias) {
      arrange(x, w.k, input, part);
#pragma omp barrier
    }
    multiply(input, w, y, part);
  }
}

// down(silu(gate) * up) with gate and up fused; one parallel region.
template <typename S>
void gated_mlp(const S* x, const Matrix<S>& up, const Matrix<S>& down, S* y, long rows,
               void* memory, int threads) {
  Workspace workspace(memory);
  const bool alias = can_alias<S>(rows, up.k);
  const Rows<S> input{alias ? const_cast<S*>(x) : workspace.take<S>(Rows<S>::values(rows, up.k)),
                      rows, up.k};
  S* both = workspace.take<S>(rows * up.n);
  const Rows<S> gated{workspace.take<S>(Rows<S>::values(rows, down.k)), rows, down.k};
#pragma omp parallel num_threads(threads)
  {
    const Part part = own_part();
    if (!alias) {
      arrange(x, up.k, input, part);
#pragma omp barrier
    }
    multiply(input, up, both, part);
#pragma omp barrier
    const long lines = gated.lines(), dim = down.k;
    const Range own = share(Rows<S>::padded(rows) * lines, part);
    for (long unit = own.begin; unit < own.end; ++unit) {
      const long row = unit / lines, index = unit % lines, at = index * gated.kLine;
      const long count = row < rows ? std::min(gated.kLine, dim - at) : 0;
      S* line = gated.line(row, index);
      const S* gate = both + row * up.n + at;
      if (count) gate_values(gate, gate + dim, line, count);
      if (count < gated.kLine && Rows<S>::kTiled)
        std::memset(static_cast<void*>(line + count), 0, (gated.kLine - count) * sizeof(S));
    }
#pragma omp barrier
    multiply(gated, down, y, part);
  }
}

template <typename S>
void embed(const int64_t* ids, const Matrix<S>& table, S* y, long rows, int threads) {
  const long k = table.k;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 4)
  for (long row = 0; row < rows; ++row) {
    const S* column = table.block(ids[row] / kLanes) + ids[row] % kLanes * kPack<S>;
    for (long i = 0; i < k; ++i)
      y[row * k + i] = column[i / kPack<S> * kLanes * kPack<S> + i % kPack<S>];
  }
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
    penstock::gated_mlp(x, Matrix<S>{up, up_bias, 2 * ffn, in},                                    \
                        Matrix<S>{down, down_bias, out, ffn}, y, rows, workspace, threads);        \
  }                                                                                                \
  long pk_rows_values_##suffix(long rows, long k) { return penstock::Rows<S>::values(rows, k); }   \
  PK_LINEAR(pk_linear_##suffix, S, S)

extern "C" {

int pk_abi() { return 2; }

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
