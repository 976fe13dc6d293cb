// The threads of one parallel region: how they share out work and wait for each other, and where rows
// of activations lie in between.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "vec.h"

// Declared here, so that a compiler without OpenMP's header will do.
extern "C" int omp_get_thread_num(void) noexcept;
extern "C" int omp_get_num_threads(void) noexcept;

namespace penstock {

struct Range {
  long begin, end;
};

class Team;

// One thread among those of a region; without a team a share of work is cut off and nobody waits.
struct Part {
  int index, count;
  Team* team = nullptr;
};

// This thread's contiguous share of `units`: memory is read in few long streams.
inline Range share(long units, Part part) {
  return {units * part.index / part.count, units * (part.index + 1) / part.count};
}

// What the threads of a region have in common: a barrier and how much of each one's share is taken.
//
// OpenMP's own barrier holds a core for as long as a thread has to wait. Where cores are shared, that
// may be the very core that the awaited thread needs: here a thread gives way after a moment.
class Team {
 public:
  explicit Team(int most_threads) : taken_(most_threads) {}

  // Returns once all threads are here, shares whole again; until then `meanwhile` is called.
  template <typename Work>
  void wait(int count, Work meanwhile) {
    const uint32_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
      arrived_.store(0, std::memory_order_relaxed);
      for (Taken& taken : taken_) taken.units.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (long turn = 0; round_.load(std::memory_order_acquire) == round; ++turn) {
      if (turn > kPatience)
        std::this_thread::yield();
      else if (!meanwhile())
        breathe();
    }
  }

  // The next unit of a share, from its begin or from its end; -1 when none is left.
  long take(int owner, Range share, bool from_end) {
    const uint64_t step = from_end ? kOneFromEnd : 1;
    const uint64_t before = taken_[owner].units.fetch_add(step, std::memory_order_relaxed);
    const long front = static_cast<long>(before % kOneFromEnd);
    const long back = static_cast<long>(before / kOneFromEnd);
    if (front + back >= share.end - share.begin) return -1;
    return from_end ? share.end - 1 - back : share.begin + front;
  }

 private:
  static constexpr uint64_t kOneFromEnd = uint64_t(1) << 32;
  static constexpr long kPatience = 500;  // about 20 us

  static void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  struct alignas(64) Taken {
    std::atomic<uint64_t> units{0};
  };
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  std::vector<Taken> taken_;
};

inline Part own_part() { return {omp_get_thread_num(), omp_get_num_threads()}; }
inline Part own_part(Team& team) { return {omp_get_thread_num(), omp_get_num_threads(), &team}; }

template <typename Work>
inline void wait(Part part, Work meanwhile) {
  part.team->wait(part.count, meanwhile);
}
inline void wait(Part part) {
  wait(part, [] { return false; });
}

// Hands a thread units of work: its share one by one, then what the others have not begun, from the
// end. One such division between two waits.
class Units {
 public:
  Units(long units, Part part) : units_(units), part_(part), own_(share(units, part)) {}

  // The next one, or -1.
  long next() {
    if (part_.team == nullptr) return own_.begin < own_.end ? own_.begin++ : -1;
    for (; helped_ < part_.count; ++helped_) {
      const int owner = (part_.index + helped_) % part_.count;
      const Part of{owner, part_.count};
      const long unit = part_.team->take(owner, share(units_, of), helped_ > 0);
      if (unit >= 0) return unit;
    }
    return -1;
  }

 private:
  long units_;
  Part part_;
  Range own_;
  int helped_ = 0;  // how many threads' shares are used up
};

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
  // Without memory it only counts.
  explicit Workspace(void* memory)
      : next_(reinterpret_cast<intptr_t>(memory)), begin_(next_) {}
  template <typename T>
  T* take(long count) {
    const intptr_t piece = next_;
    next_ += round_up(count * static_cast<long>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  long taken() const { return next_ - begin_; }

 private:
  intptr_t next_, begin_;
};

}  // namespace penstock
