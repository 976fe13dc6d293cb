// Record -> image, in place: see block.h. A damaged record is an error, never a write elsewhere. The
// beginning of a record may lie in other memory, and is then decoded before the rest is there.

#include <vector>

#include "block.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && \
    defined(__BMI2__) && defined(__POPCNT__)
#include <immintrin.h>
#define PENSTOCK_WIDE 1
#endif

namespace {

using namespace penstock_lossless;

// Where the parts of a coded payload begin, in a copy that may be read some way past its end.
struct Streams {
  const uint8_t* level_1;
  const uint8_t* level_2;
  const uint8_t* level_3;
  const uint8_t* escapes;
};

// However damaged, levels and escapes are read no further than this from where they begin.
constexpr long kSlack = kBlock + 2 * kLine;

struct Ends {
  long bits_2 = 0, bits_3 = 0, num_escapes = 0;

  bool are(const Entry& entry) const {
    return (bits_2 + 7) / 8 == entry.bytes_2 && (bits_3 + 7) / 8 == entry.bytes_3 &&
           num_escapes == entry.num_escapes;
  }
};

#ifdef PENSTOCK_WIDE

// 64 bits that begin at bit `at`.
inline uint64_t bits_at(const uint8_t* from, long at) {
  uint64_t low, high;
  std::memcpy(&low, from + (at >> 3), 8);
  high = from[(at >> 3) + 8];
  const int shift = int(at & 7);
  return uint64_t((((unsigned __int128)high << 64) | low) >> shift);
}

// One level's planes of a chunk, spread over the weights that reach it.
struct Planes {
  uint64_t low, high;

  uint64_t both() const { return low & high; }
};

inline Planes spread(const uint8_t* level, long* at, uint64_t reach) {
  const long count = __builtin_popcountll(reach);
  const Planes planes{_pdep_u64(bits_at(level, *at), reach),
                      _pdep_u64(bits_at(level, *at + count), reach)};
  *at += 2 * count;
  return planes;
}

// Exponent of each six bits that the three levels make.
inline __m512i exponent_table(const uint8_t* exponents) {
  alignas(64) uint8_t table[64];
  for (int code = 0; code < 64; ++code) {
    table[code] = 0;
    for (int level = kLevels - 1; level >= 0; --level) {
      const int here = code >> (2 * level) & 3;
      if (here < kPerLevel) table[code] = exponents[level * kPerLevel + here];
    }
  }
  return _mm512_load_si512(table);
}

inline void store_joined(uint16_t* to, __m512i rest, __m512i exponents) {
  const __m512i top = _mm512_set1_epi8(int8_t(0x80));
  // top ? exponent << 7 : rest, and top ? rest : exponent >> 1
  const __m512i low =
      _mm512_ternarylogic_epi64(top, _mm512_slli_epi16(exponents, 7), rest, 0xca);
  const __m512i high =
      _mm512_ternarylogic_epi64(top, rest, _mm512_srli_epi16(exponents, 1), 0xca);
  // Past the caches: a record is larger than they are, and it is computed with a moment later.
  __m512i* lines = reinterpret_cast<__m512i*>(to);
  _mm512_stream_si512(lines, _mm512_unpacklo_epi8(low, high));
  _mm512_stream_si512(lines + 1, _mm512_unpackhi_epi8(low, high));
}

// The payload that follows, while this one is decoded: about 4/3 of a byte for each weight.
inline void prefetch_next(const uint8_t* payload, long at) {
  const uint8_t* from = payload + at + at / 2;
  __builtin_prefetch(from, 0, 2);
  __builtin_prefetch(from + kLine, 0, 2);
}

Ends decode_weights(const Entry& entry, const Streams& from, const uint8_t* rest, uint16_t* to,
                    long count) {
  const __m512i table = exponent_table(entry.exponents);
  const __m512i one = _mm512_set1_epi8(1);
  Ends ends;
  for (long at = 0; at < count; at += kChunk) {
    prefetch_next(rest + count, at);
    Planes first;
    std::memcpy(&first, from.level_1 + at / 4, 16);
    const Planes second = spread(from.level_2, &ends.bits_2, first.both());
    const Planes third = spread(from.level_3, &ends.bits_3, second.both());
    const uint64_t escaped = third.both();
    __m512i code = _mm512_maskz_mov_epi8(first.low, one);
    code = _mm512_mask_add_epi8(code, first.high, code, _mm512_set1_epi8(2));
    code = _mm512_mask_add_epi8(code, second.low, code, _mm512_set1_epi8(4));
    code = _mm512_mask_add_epi8(code, second.high, code, _mm512_set1_epi8(8));
    code = _mm512_mask_add_epi8(code, third.low, code, _mm512_set1_epi8(16));
    code = _mm512_mask_add_epi8(code, third.high, code, _mm512_set1_epi8(32));
    __m512i exponents = _mm512_permutexvar_epi8(code, table);
    const __m512i bytes = _mm512_loadu_si512(from.escapes + ends.num_escapes);
    exponents = _mm512_mask_expand_epi8(exponents, escaped, bytes);
    ends.num_escapes += __builtin_popcountll(escaped);
    store_joined(to + at, _mm512_loadu_si512(rest + at), exponents);
  }
  _mm_sfence();  // whoever is told that the image is there sees it
  return ends;
}

#else

inline int bit_at(const uint8_t* from, long at) { return from[at >> 3] >> (at & 7) & 1; }

Ends decode_weights(const Entry& entry, const Streams& from, const uint8_t* rest, uint16_t* to,
                    long count) {
  const uint8_t* levels[kLevels] = {from.level_1, from.level_2, from.level_3};
  long at[kLevels] = {};
  Ends ends;
  for (long start = 0; start < count; start += kChunk) {
    uint8_t exponents[kChunk], reach[kChunk];
    for (long i = 0; i < kChunk; ++i) reach[i] = uint8_t(i);
    long here = kChunk;
    for (int level = 0; level < kLevels; ++level) {
      long deeper = 0;
      for (long i = 0; i < here; ++i) {
        const int code = bit_at(levels[level], at[level] + i) |
                         bit_at(levels[level], at[level] + here + i) << 1;
        if (code < kPerLevel)
          exponents[reach[i]] = entry.exponents[level * kPerLevel + code];
        else
          reach[deeper++] = reach[i];
      }
      at[level] += 2 * here;
      here = deeper;
    }
    for (long i = 0; i < here; ++i) exponents[reach[i]] = from.escapes[ends.num_escapes++];
    uint16_t weights[kChunk];  // the image may begin to cover what is read here
    for (long i = 0; i < kChunk; ++i) weights[weight_at(i)] = joined(rest[start + i], exponents[i]);
    std::memcpy(to + start, weights, sizeof weights);
  }
  ends.bits_2 = at[1];
  ends.bits_3 = at[2];
  return ends;
}

#endif

// Whether the entry can be that of a block of so many weights.
bool is_possible(const Entry& entry, long count) {
  if (entry.kind == kRaw) return entry.num_bytes == 2 * count;
  const long before = count / 4 + entry.bytes_2 + entry.bytes_3 + entry.num_escapes;
  return entry.kind == kCoded && aligned(before, kLine) + count == long(entry.num_bytes) &&
         long(entry.num_bytes) < 2 * count;
}

bool decode_block(const Entry& entry, const uint8_t* payload, uint16_t* to, long count,
                  uint8_t* scratch) {
  const Sums sums = sums_of(entry, payload);
  if (sums.sum != entry.sum || sums.sum_of_sums != entry.sum_of_sums) return false;
  if (entry.kind == kRaw) {
    std::memmove(to, payload, 2 * count);
    return true;
  }
  const long before = entry.num_bytes - count;
  std::memcpy(scratch, payload, before);
  Streams from;
  from.level_1 = scratch;
  from.level_2 = from.level_1 + count / 4;
  from.level_3 = from.level_2 + entry.bytes_2;
  from.escapes = from.level_3 + entry.bytes_3;
  return decode_weights(entry, from, payload + before, to, count).are(entry);
}

// A record whose first bytes may lie elsewhere: `head` has so many of them, and what follows them
// lies where it belongs, at the end of the image's memory.
struct Source {
  const uint8_t* head;
  long head_bytes;
  const uint8_t* record;  // where all of it would begin

  // Bytes of the record in one piece: where they lie, or put together in `scratch`.
  const uint8_t* at(long offset, long num_bytes, uint8_t* scratch) const {
    if (offset >= head_bytes) return record + offset;
    if (offset + num_bytes <= head_bytes) return head + offset;
    const long in_head = head_bytes - offset;
    std::memcpy(scratch, head + offset, in_head);
    std::memcpy(scratch + in_head, record + head_bytes, num_bytes - in_head);
    return scratch;
  }
};

// Which blocks are decoded: those that the head alone tells, or the others.
enum Part : int { kInHead = 0, kTheRest = 1 };

}  // namespace

extern "C" {

// Decodes blocks of the record at the end of `memory` (image_bytes long), whose first head_bytes lie
// at `head` instead. kInHead needs nothing of `memory` and writes nothing where the rest belongs, so
// that may still be on its way. 0, or what is wrong: 1 + the first damaged block; `memory` is then
// neither.
long pk_lossless_decode(uint8_t* memory, long image_bytes, long record_bytes, const uint8_t* head,
                        long head_bytes, int part) {
  const long blocks = num_blocks(image_bytes), entry_bytes = blocks * long(sizeof(Entry));
  if (record_bytes >= image_bytes || entry_bytes > record_bytes) return 1;
  if (head_bytes < 0 || head_bytes > record_bytes) return 1;
  if (part == kInHead && head_bytes < entry_bytes) return 0;
  const Source source{head, head_bytes, memory + image_bytes - record_bytes};
  std::vector<uint8_t> copy(entry_bytes), scratch(kBlock + kSlack), joined_up(2 * kBlock);
  std::vector<Entry> entries(blocks);
  std::memcpy(entries.data(), source.at(0, entry_bytes, copy.data()), entry_bytes);
  long total = 0;
  for (long block = 0; block < blocks; ++block) {
    if (!is_possible(entries[block], weights_of(image_bytes, block))) return 1 + block;
    total += entries[block].num_bytes;
  }
  if (total > record_bytes - entry_bytes) return 1;
  const long in_head = head_bytes < entry_bytes ? 0 : head_bytes;
  long offset = record_bytes - total;
  uint16_t* to = reinterpret_cast<uint16_t*>(memory);
  for (long block = 0; block < blocks; ++block) {
    const Entry& entry = entries[block];
    const long count = weights_of(image_bytes, block), end = offset + entry.num_bytes;
    if ((end <= in_head) == (part == kInHead)) {
      const uint8_t* payload = source.at(offset, entry.num_bytes, joined_up.data());
      if (!decode_block(entry, payload, to, count, scratch.data())) return 1 + block;
    }
    offset = end;
    to += count;
  }
  return 0;
}

}  // extern "C"
