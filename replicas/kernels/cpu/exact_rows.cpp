// Exact sums on their way between ranks: fp64 rows to integers with one exponent, and back into sums.
#include <vector>

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

// Whether bits are left over.
bool pack_row(const double* x, int32_t* packed, long dim) {
  const uint64_t most = largest_bits(x, dim);
  const int above = static_cast<int>(most >> 52) - (kBias - 1);
  int32_t* values = packed + 1;
  if (most >> 52 == 2047) {
    packed[0] = kNoNumbers;
    std::memset(values, 0, dim * sizeof(int32_t));
    return false;
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
  return lost;
}

// Of `count` elements of a row.
void add_row(const int32_t* packed, long first, long count, double* y) {
  const int32_t head = packed[0];
  const double scale = head & kNoNumbers ? NAN : power((head >> 2) - kBits);
  const int32_t* values = packed + 1 + first;
  for (long i = 0; i < count; ++i) y[first + i] += values[i] * scale;
}

// Packed copies in pieces of memory, by the row that each belongs to.
struct Copies {
  std::vector<long> starts;            // of each row in `copies`, and the end
  std::vector<const int32_t*> copies;  // ascending by row, then as they came
  bool lack_bits = false;

  Copies(const int32_t* const* pieces, const int64_t* counts, long num_pieces, const int64_t* to,
         long rows, long dim)
      : starts(rows + 1) {
    long total = 0;
    for (long piece = 0; piece < num_pieces; ++piece) total += counts[piece];
    copies.resize(total);
    for (long i = 0; i < total; ++i) ++starts[to[i] + 1];
    for (long row = 0; row < rows; ++row) starts[row + 1] += starts[row];
    std::vector<long> next(starts.begin(), starts.end() - 1);
    for (long piece = 0, i = 0; piece < num_pieces; ++piece)
      for (long own = 0; own < counts[piece]; ++own, ++i) {
        const int32_t* copy = pieces[piece] + own * (dim + 1);
        lack_bits |= (copy[0] & kMore) != 0;
        copies[next[to[i]]++] = copy;
      }
  }

  // The sum of a row's copies; `y` holds one row and stays in the nearest cache.
  void sum(long row, double* y, long dim) const {
    std::memset(y, 0, dim * sizeof(double));
    for (long i = starts[row]; i < starts[row + 1]; ++i) add_row(copies[i], 0, dim, y);
  }
};

}  // namespace
}  // namespace penstock

extern "C" {

// x (rows, dim) fp64 to (rows, 1 + dim); whether some rows have bits left over.
int pk_pack_sums(const double* x, int32_t* packed, long rows, long dim, int threads) {
  int lost = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : lost) \
    if (rows * dim > 16384)
  for (long row = 0; row < rows; ++row)
    lost |= penstock::pack_row(x + row * dim, packed + row * (dim + 1), dim);
  return lost;
}

// The sum of each row's copies: packed again, or rounded to fp32 (the other is null). Copy i of all
// pieces in order belongs to row to[i]. Whether bits are missing or left over; then the sums are
// not to be used.
int pk_join_sums(const int32_t* const* pieces, const int64_t* counts, long num_pieces,
                 const int64_t* to, long rows, long dim, int32_t* packed, float* rounded,
                 int threads) {
  const penstock::Copies copies(pieces, counts, num_pieces, to, rows, dim);
  if (copies.lack_bits) return 1;
  int lost = 0;
#pragma omp parallel num_threads(threads) reduction(| : lost) if (rows * dim > 16384)
  {
    std::vector<double> sum(dim);
#pragma omp for schedule(static)
    for (long row = 0; row < rows; ++row) {
      copies.sum(row, sum.data(), dim);
      if (packed) {
        lost |= penstock::pack_row(sum.data(), packed + row * (dim + 1), dim);
      } else {
        for (long i = 0; i < dim; ++i) rounded[row * dim + i] = static_cast<float>(sum[i]);
      }
    }
  }
  return lost;
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
