// y = x W^T + bias of a quantised weight: a panel of a few columns is brought back into the layout of
// the matrix kernels, in this core's cache, and multiplied there by those very kernels, so a row's bits
// are those that they give for the whole weight.

#include "codes.h"
#include "matrix.h"

namespace {

using penstock::Bf16;
using penstock::kLanes;
using penstock::Matrix;
using penstock::Part;
using penstock::Rows;

constexpr long kManyRows = 64;
constexpr long kPanelBytes = 1 << 20;  // for many rows, which have to be read again for each panel

struct Panel;
struct Product;
struct Input;

inline float* plain(float* values) { return values; }
inline uint16_t* plain(Bf16* values) { return &values->bits; }

// Columns that are worked on at one time: what a kernel takes together, in the first-level cache's
// neighbourhood, or many where the rows do not fit beside them.
template <typename S>
long blocks_of_panel(const Matrix<S>& w, long rows) {
  const long least = Rows<S>::kTiled ? 2 : penstock::kVectors;
  if (rows <= kManyRows) return least;
  const long most = kPanelBytes / (w.block_values() * static_cast<long>(sizeof(S)));
  return std::max(least, most / least * least);
}

template <typename S, typename Y, int kBits>
void multiply_panels(const Rows<S>& x, const Matrix<S>& w, const penstock_codes::Layout& at,
                     const uint8_t* codes, const uint16_t* scales, Y* y, Part part) {
  const long size = blocks_of_panel(w, x.rows), groups = at.groups();
  const long columns = size * kLanes;
  const penstock::Range own = share((w.blocks() + size - 1) / size, part);
  S* panel = reinterpret_cast<S*>(
      penstock::thread_scratch_of<Panel>(size * w.block_values() * sizeof(S)));
  Y* product =
      reinterpret_cast<Y*>(penstock::thread_scratch_of<Product>(x.rows * columns * sizeof(Y)));
  for (long index = own.begin; index < own.end; ++index) {
    const long first = index * size, count = std::min(size, w.blocks() - first);
    const long left = first * kLanes, width = std::min(columns, w.n - left);
    for (long group = 0; group < count * groups; ++group)
      penstock_codes::dequantise_group<std::remove_pointer_t<decltype(plain(panel))>, kBits>(
          at, codes + first * at.lines * at.line() * kBits / 8,
          scales + first * groups * 2 * at.width, plain(panel), group);
    const Matrix<S> part_of_w{panel, w.bias ? w.bias + left : nullptr, width, w.k};
    multiply(x, part_of_w, product, Part{0, 1});
    for (long row = 0; row < x.rows; ++row)
      std::memcpy(static_cast<void*>(y + row * w.n + left), product + row * width,
                  width * sizeof(Y));
  }
}

template <typename S, typename Y, int kBits>
void coded_linear(const S* x, const uint8_t* codes, const uint16_t* scales, const S* bias, Y* y,
                  long rows, long n, long k, long group_lines, int threads) {
  constexpr long depth = 4 / sizeof(S);
  const penstock_codes::Layout at{(k + depth - 1) / depth, kLanes, depth, group_lines};
  const bool alias = penstock::can_alias<S>(rows, k);
  S* arranged = const_cast<S*>(x);
  if (!alias)
    arranged = reinterpret_cast<S*>(
        penstock::thread_scratch_of<Input>(Rows<S>::values(rows, k) * sizeof(S)));
  const Rows<S> input{arranged, rows, k};
#pragma omp parallel num_threads(threads)
  {
    const Part part = penstock::own_part();
    if (!alias) {
      arrange(x, k, input, part);
#pragma omp barrier
    }
    multiply_panels<S, Y, kBits>(input, Matrix<S>{nullptr, bias, n, k}, at, codes, scales, y, part);
  }
}

}  // namespace

#define PK_CODED(name, S, Y, bits)                                                                \
  void name(const S* x, const uint8_t* codes, const uint16_t* scales, const S* bias, Y* y,        \
            long rows, long n, long k, long group_lines, int threads) {                           \
    coded_linear<S, Y, bits>(x, codes, scales, bias, y, rows, n, k, group_lines, threads);        \
  }

extern "C" {

PK_CODED(pk_coded_linear_int8_bf16, Bf16, Bf16, 8)
PK_CODED(pk_coded_linear_int8_bf16_f32, Bf16, float, 8)
PK_CODED(pk_coded_linear_int8_f32, float, float, 8)
PK_CODED(pk_coded_linear_int4_bf16, Bf16, Bf16, 4)
PK_CODED(pk_coded_linear_int4_bf16_f32, Bf16, float, 4)
PK_CODED(pk_coded_linear_int4_f32, float, float, 4)

// 0 when the system does not grant the matrix tiles that this was built for.
int pk_coded_start() { return penstock::ask_for_tiles() ? 1 : 0; }

int pk_coded_width() { return kLanes; }

}  // extern "C"
