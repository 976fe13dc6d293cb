// Exact sums on their way between ranks: fp64 rows to integers with one exponent, and back into sums.
#include "exact.h"

namespace penstock {
namespace {

constexpr int kBits = 31, kLeastExponent = -200, kBias = 1023;
constexpr int32_t kMore = 1, kNoNumbers = 2;
constexpr long kStretch = 512;  // elements of a thread's share at least

inline double power(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + kBias) << 52;
  return load_as<double>(&bits);
}

inline uint64_t largest_bits(const double* x, long count) {
  uint64_t most = 0;
  for (long i = 0; i < count; ++i) {
    const uint64_t bits = load_as<uint64_t>(x + i) & ~(uint64_t{1} << 63);
    most = bits > most ? bits : most;
  }
  return most;
}

void pack_row(const double* x, int32_t* packed, long dim) {
  const uint64_t most = largest_bits(x, dim);
  const int above = static_cast<int>(most >> 52) - (kBias - 1);
  int32_t* values = packed + 1;
  if (most >> 52 == 2047) {
    packed[0] = kNoNumbers;
    std::memset(values, 0, dim * sizeof(int32_t));
    return;
  }
  const int exponent = std::max(above, kLeastExponent);
  const double scale = power(kBits - exponent);
  int lost = 0;
  for (long i = 0; i < dim; ++i) {
    const double scaled = x[i] * scale;
    const int32_t whole = static_cast<int32_t>(scaled);
    values[i] = whole;
    lost |= static_cast<double>(whole) != scaled;
  }
  packed[0] = 4 * exponent + (lost ? kMore : 0);
}

// Of `count` elements of a row.
void add_row(const int32_t* packed, long first, long count, double* y) {
  const int32_t head = packed[0];
  const double scale = head & kNoNumbers ? NAN : power((head >> 2) - kBits);
  const int32_t* values = packed + 1 + first;
  for (long i = 0; i < count; ++i) y[first + i] += values[i] * scale;
}

}  // namespace
}  // namespace penstock

extern "C" {

// x (rows, dim) fp64 to (rows, 1 + dim).
void pk_pack_sums(const double* x, int32_t* packed, long rows, long dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * dim > 16384)
  for (long row = 0; row < rows; ++row)
    penstock::pack_row(x + row * dim, packed + row * (dim + 1), dim);
}

// y[to[i]] += packed row i, fp64.
void pk_add_sums(const int32_t* packed, const int64_t* to, double* y, long rows, long dim,
                 int threads) {
  using namespace penstock;
  const long stretches = (dim + kStretch - 1) / kStretch;
#pragma omp parallel num_threads(threads) if (rows * dim > 16384)
  {
    const Range own = share(stretches, own_part());
    const long first = own.begin * kStretch, count = std::min(own.end * kStretch, dim) - first;
    for (long row = 0; row < rows; ++row)
      add_row(packed + row * (dim + 1), first, count, y + to[row] * dim);
  }
}

}  // extern "C"
