// Image -> record, block by block, each by a thread.

#include <algorithm>
#include <vector>

#include "block.h"

#ifdef __AVX512VBMI2__
#include <immintrin.h>
#endif

namespace {

using namespace penstock_lossless;

// Bits one after another, the lowest of a byte first.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* to) : to_(to) {}

  // The lowest `count` bits, at most 64; the others are zero.
  void put(uint64_t bits, long count) {
    word_ |= bits << filled_;
    if (filled_ + count >= 64) {
      std::memcpy(to_ + num_bytes_, &word_, 8);
      num_bytes_ += 8;
      word_ = filled_ ? bits >> (64 - filled_) : 0;
      filled_ -= 64;
    }
    filled_ += count;
  }

  long finish() {
    const long left = (filled_ + 7) / 8;
    std::memcpy(to_ + num_bytes_, &word_, left);
    return num_bytes_ + left;
  }

 private:
  uint8_t* to_;
  long num_bytes_ = 0;
  long filled_ = 0;
  uint64_t word_ = 0;
};

// The most frequent exponents, the most frequent first; of equals the smaller.
void choose_exponents(const uint16_t* weights, long count, uint8_t* exponents) {
  uint32_t seen[4][256] = {};  // four: neighbours are often equal, and each would wait for the last
  for (long i = 0; i < count; ++i) ++seen[i & 3][exponent_of(weights[i])];
  uint32_t totals[256];
  for (int e = 0; e < 256; ++e) totals[e] = seen[0][e] + seen[1][e] + seen[2][e] + seen[3][e];
  uint8_t order[256];
  for (int e = 0; e < 256; ++e) order[e] = uint8_t(e);
  std::partial_sort(order, order + kNamed, order + 256, [&](uint8_t a, uint8_t b) {
    return totals[a] != totals[b] ? totals[a] > totals[b] : a < b;
  });
  std::copy(order, order + kNamed, exponents);
}

// Appends one block's payload; returns its entry.
class BlockEncoder {
 public:
  BlockEncoder() : levels_(kLevels, std::vector<uint8_t>(kBlock / 4)), escapes_(kBlock) {}

  Entry encode(const uint16_t* weights, long count, std::vector<uint8_t>* payload) {
    Entry entry = {};
    choose_exponents(weights, count, entry.exponents);
    split(weights, count, &entry);
    const long first = count / 4;
    const long coded = aligned(first + entry.bytes_2 + entry.bytes_3 + entry.num_escapes, kLine);
    if (coded + count >= 2 * count) return raw(weights, count, payload);
    payload->assign(coded + count, 0);
    uint8_t* to = payload->data();
    to = std::copy_n(levels_[0].data(), first, to);
    to = std::copy_n(levels_[1].data(), entry.bytes_2, to);
    to = std::copy_n(levels_[2].data(), entry.bytes_3, to);
    std::copy_n(escapes_.data(), entry.num_escapes, to);
    to = payload->data() + coded;
    for (long start = 0; start < count; start += kChunk)
      for (long i = 0; i < kChunk; ++i) to[start + i] = rest_of(weights[start + weight_at(i)]);
    return sealed(entry, kCoded, *payload);
  }

 private:
  void split(const uint16_t* weights, long count, Entry* entry) {
    uint8_t rank_of[256];
    std::fill_n(rank_of, 256, uint8_t(kNamed));
    for (int rank = kNamed - 1; rank >= 0; --rank) rank_of[entry->exponents[rank]] = uint8_t(rank);
    BitWriter writers[kLevels] = {BitWriter(levels_[0].data()), BitWriter(levels_[1].data()),
                                  BitWriter(levels_[2].data())};
    num_escapes_ = 0;
    for (long start = 0; start < count; start += kChunk) {
      Chunk chunk;
      for (long i = 0; i < kChunk; ++i) {
        chunk.exponents[i] = exponent_of(weights[start + weight_at(i)]);
        chunk.ranks[i] = rank_of[chunk.exponents[i]];
      }
      for (BitWriter& writer : writers) put_level(&chunk, &writer);
      std::copy_n(chunk.exponents, chunk.count, &escapes_[num_escapes_]);
      num_escapes_ += chunk.count;
    }
    writers[0].finish();
    entry->bytes_2 = uint16_t(writers[1].finish());
    entry->bytes_3 = uint16_t(writers[2].finish());
    entry->num_escapes = uint16_t(num_escapes_);
  }

  // Weights of a chunk that no level has named yet.
  struct Chunk {
    long count = kChunk;
    uint8_t ranks[kChunk];  // among the exponents that are left to name
    uint8_t exponents[kChunk];
  };

  // One level of a chunk; what goes on stays, with the ranks that the next level counts.
  static void put_level(Chunk* chunk, BitWriter* writer) {
    const long count = chunk->count;
    uint64_t low = 0, high = 0;
#ifdef __AVX512VBMI2__
    const uint64_t all = count == kChunk ? ~0ull : (1ull << count) - 1;
    const __m512i ranks = _mm512_loadu_si512(chunk->ranks);
    const uint64_t deeper = all & _mm512_cmpge_epu8_mask(ranks, _mm512_set1_epi8(kPerLevel));
    low = deeper | (all & _mm512_cmpeq_epi8_mask(ranks, _mm512_set1_epi8(1)));
    high = deeper | (all & _mm512_cmpeq_epi8_mask(ranks, _mm512_set1_epi8(2)));
    const __m512i left = _mm512_sub_epi8(ranks, _mm512_set1_epi8(kPerLevel));
    const __m512i exponents = _mm512_loadu_si512(chunk->exponents);
    _mm512_storeu_si512(chunk->ranks, _mm512_maskz_compress_epi8(deeper, left));
    _mm512_storeu_si512(chunk->exponents, _mm512_maskz_compress_epi8(deeper, exponents));
    chunk->count = __builtin_popcountll(deeper);
#else
    long deeper = 0;
    for (long i = 0; i < count; ++i) {
      const uint8_t rank = chunk->ranks[i], code = std::min<uint8_t>(rank, kPerLevel);
      low |= uint64_t(code & 1) << i;
      high |= uint64_t(code >> 1) << i;
      chunk->ranks[deeper] = uint8_t(rank - kPerLevel);
      chunk->exponents[deeper] = chunk->exponents[i];
      deeper += rank >= kPerLevel;
    }
    chunk->count = deeper;
#endif
    writer->put(low, count);
    writer->put(high, count);
  }

  static Entry raw(const uint16_t* weights, long count, std::vector<uint8_t>* payload) {
    payload->resize(2 * count);
    std::memcpy(payload->data(), weights, 2 * count);
    return sealed(Entry{}, kRaw, *payload);
  }

  static Entry sealed(Entry entry, uint8_t kind, const std::vector<uint8_t>& payload) {
    entry.kind = kind;
    entry.num_bytes = uint32_t(payload.size());
    const Sums sums = sums_of(entry, payload.data());
    entry.sum = sums.sum;
    entry.sum_of_sums = sums.sum_of_sums;
    return entry;
  }

  std::vector<std::vector<uint8_t>> levels_;
  std::vector<uint8_t> escapes_;
  long num_escapes_ = 0;
};

}  // namespace

extern "C" {

int pk_lossless_abi() { return 2; }

// Encodes an image of whole pages into `record` (as many bytes); the record's length, or 0 where it
// would not be shorter.
long pk_lossless_encode(const uint8_t* image, long image_bytes, uint8_t* record, int threads) {
  const long blocks = num_blocks(image_bytes);
  std::vector<Entry> entries(blocks);
  std::vector<std::vector<uint8_t>> payloads(blocks);
#pragma omp parallel num_threads(threads)
  {
    BlockEncoder encoder;
#pragma omp for schedule(static)
    for (long block = 0; block < blocks; ++block) {
      const uint16_t* weights = reinterpret_cast<const uint16_t*>(image) + block * kBlock;
      entries[block] = encoder.encode(weights, weights_of(image_bytes, block), &payloads[block]);
    }
  }
  const long head = blocks * long(sizeof(Entry));
  long total = 0;
  for (const auto& payload : payloads) total += long(payload.size());
  const long record_bytes = aligned(head + total, kPage);
  if (record_bytes >= image_bytes) return 0;
  std::memset(record, 0, record_bytes - total);
  std::memcpy(record, entries.data(), head);
  uint8_t* to = record + record_bytes - total;
  for (const auto& payload : payloads) to = std::copy(payload.begin(), payload.end(), to);
  return record_bytes;
}

}  // extern "C"
