// What the threads of one parallel region share out, and where rows of activations lie in between.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "vec.h"

// Declared here, so that a compiler without OpenMP's header will do.
extern "C" int omp_get_thread_num(void) noexcept;
extern "C" int omp_get_num_threads(void) noexcept;

namespace penstock {

// One thread among those of a region.
struct Part {
  int index, count;
};

struct Range {
  long begin, end;
};

inline Part own_part() { return {omp_get_thread_num(), omp_get_num_threads()}; }

// This thread's contiguous share of `units`: memory is read in few long streams.
inline Range share(long units, Part part) {
  return {units * part.index / part.count, units * (part.index + 1) / part.count};
}

inline long round_up(long value, long unit) { return (value + unit - 1) / unit * unit; }

// Memory of one thread, kept from call to call.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  char* at_least(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = round_up(bytes, 4096);
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (data_ == nullptr) std::abort();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

inline char* thread_scratch(size_t bytes) {
  static thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

// The same for a use of its own, whose pieces live while others come and go.
template <typename Use>
inline char* thread_scratch_of(size_t bytes) {
  static thread_local Scratch scratch;
  return scratch.at_least(bytes);
}

// Hands out aligned pieces of a caller's memory.
class Workspace {
 public:
  explicit Workspace(void* memory) : next_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(long count) {
    char* taken = next_;
    next_ += round_up(count * static_cast<long>(sizeof(T)), 64);
    return reinterpret_cast<T*>(taken);
  }

 private:
  char* next_;
};

}  // namespace penstock
