// Which rows go where, and rows taken apart that came in pieces. moe/row_moves.py says what for, and
// is what this is tested against.
#include <cstdint>
#include <cstring>
#include <vector>

extern "C" {

// Copies of rows by member, then by row. experts (rows, top_k): indices into `member_of`, which has
// one entry more, reached by anything negative; negative members are nowhere. `row_of` has room for
// every row at every member. The number of copies; -1 if an expert is none.
long pk_plan_rows(const int64_t* experts, long rows, long top_k, const int64_t* member_of,
                  long num_experts, long num_members, int64_t* row_of, int64_t* counts) {
  std::vector<unsigned char> goes(rows * num_members);
  for (long i = 0; i < rows * top_k; ++i) {
    if (experts[i] >= num_experts) return -1;
    const int64_t member = member_of[experts[i] < 0 ? num_experts : experts[i]];
    if (member >= num_members) return -1;
    if (member >= 0) goes[member * rows + i / top_k] = 1;
  }
  int64_t* next = row_of;
  for (long member = 0; member < num_members; ++member) {
    const int64_t* first = next;
    for (long row = 0; row < rows; ++row)
      if (goes[member * rows + row]) *next++ = row;
    counts[member] = next - first;
  }
  return next - row_of;
}

// | hidden | weights: top_k fp32 | experts: top_k int32 | a row; hidden and weights may be null.
// picks[piece]: the numbers of its rows that are meant; null: the first `counts[piece]`, in order.
void pk_split_rows(const unsigned char* const* pieces, const int64_t* const* picks,
                   const int64_t* counts, long num_pieces, long hidden_bytes, long top_k,
                   unsigned char* hidden, float* weights, int64_t* experts) {
  const long width = hidden_bytes + 8 * top_k;
  for (long piece = 0; piece < num_pieces; ++piece)
    for (long i = 0; i < counts[piece]; ++i) {
      const unsigned char* row = pieces[piece] + (picks[piece] ? picks[piece][i] : i) * width;
      if (hidden) {
        std::memcpy(hidden, row, hidden_bytes);
        hidden += hidden_bytes;
        std::memcpy(weights, row + hidden_bytes, 4 * top_k);
        weights += top_k;
      }
      int32_t ids[64];
      for (long first = 0; first < top_k; first += 64) {
        const long count = top_k - first < 64 ? top_k - first : 64;
        std::memcpy(ids, row + hidden_bytes + 4 * (top_k + first), 4 * count);
        for (long k = 0; k < count; ++k) *experts++ = ids[k];
      }
    }
}

}  // extern "C"
