// A record of bf16 weights without the bits that their exponents do not need.
//
// The image (the record as it is computed with) is cut into blocks of kBlock weights of 16 bits:
//
//   | entry of each block | zeros to a page | payload 0 | payload 1 | ...    ends with the record
//
// A weight's sign and mantissa are noise and kept as a byte. Its exponent is one of three frequent
// ones or something else (2 bits), then one of three others or something else (2 bits, for a
// quarter of the weights), once more (for a twentieth), or a byte. Which exponents those are each
// entry says. Every level is two bit planes, a word of 64 weights at a time, and a deeper level has
// bits only for weights that the one above calls "something else":
//
//   payload = | level 1 | level 2 | level 3 | bytes | zeros to 64 | signs and mantissas |
//
// A block that would not get smaller is stored as it is (kRaw).
//
// No payload is longer than its part of the image. So a record whose end lies at the end of the
// image's memory can be decoded in place, front to back: what is written never passes what is still
// to be read. Signs and mantissas are last for the same reason; the rest is copied out first.

#pragma once

#include <cstdint>
#include <cstring>

namespace penstock_lossless {

constexpr long kBlock = 16384;    // weights
constexpr long kChunk = 64;       // weights that share a word of each bit plane
constexpr long kLine = 64;        // bytes that payloads are a multiple of
constexpr long kPage = 4096;      // bytes that images and records are a multiple of
constexpr int kLevels = 3;        // of two bits
constexpr int kPerLevel = 3;      // exponents that a level names; the fourth code goes on
constexpr int kNamed = kLevels * kPerLevel;
constexpr uint8_t kCoded = 0, kRaw = 1;

struct Entry {
  uint32_t num_bytes;  // of the payload
  uint32_t sum;        // of its 32-bit words, in lanes of a line
  uint32_t sum_of_sums;
  uint16_t bytes_2;  // of level 2
  uint16_t bytes_3;
  uint16_t num_escapes;  // exponents kept as a byte
  uint8_t kind;
  uint8_t exponents[kNamed];
  uint8_t zero[4];
};
static_assert(sizeof(Entry) == 32, "entries are written as they lie in memory");

inline long aligned(long size, long to) { return (size + to - 1) / to * to; }

inline long num_blocks(long image_bytes) { return (image_bytes / 2 + kBlock - 1) / kBlock; }

inline long weights_of(long image_bytes, long block) {
  const long left = image_bytes / 2 - block * kBlock;
  return left < kBlock ? left : kBlock;
}

// Which weight of a chunk a place in it holds. So ordered, bytes that are interleaved by halves of
// 16 (`punpck`) come out in the order of the image.
inline long weight_at(long place) {
  return place / 16 * 8 + place % 8 + (place % 16 < 8 ? 0 : kChunk / 2);
}

inline uint8_t exponent_of(uint16_t weight) { return uint8_t(weight >> 7); }

inline uint8_t rest_of(uint16_t weight) { return uint8_t((weight >> 8 & 0x80) | (weight & 0x7f)); }

inline uint16_t joined(uint8_t rest, uint8_t exponent) {
  return uint16_t((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
}

// Sums of a block, its entry's other fields included: a changed bit changes the first, words that
// changed places the second.
struct Sums {
  uint32_t sum, sum_of_sums;
};

inline Sums sums_of(const Entry& entry, const uint8_t* payload) {
  constexpr long kLanes = kLine / 4;
  uint32_t first[kLanes] = {}, second[kLanes] = {};
  for (long at = 0; at < long(entry.num_bytes); at += kLine) {
    uint32_t words[kLanes];
    std::memcpy(words, payload + at, kLine);
    for (long lane = 0; lane < kLanes; ++lane) {
      first[lane] += words[lane];
      second[lane] += first[lane];
    }
  }
  uint32_t fields[sizeof(Entry) / 4], one = 0, two = 0;
  std::memcpy(fields, &entry, sizeof fields);
  fields[1] = fields[2] = 0;  // the sums themselves
  for (uint32_t i = 0; i < sizeof(Entry) / 4; ++i) one += fields[i] * (2 * i + 1);
  for (long lane = 0; lane < kLanes; ++lane) {
    one += first[lane];
    two += second[lane] * uint32_t(2 * lane + 1) + first[lane] * uint32_t(lane);
  }
  return {one, two};
}

}  // namespace penstock_lossless
