// Reads pieces of one file into memory with a few threads that know nothing of Python.
//
// A slot has at most one read at a time. A read is cut into chunks that the threads take in order, so
// that one read uses them all; its result is the number of bytes or the first error, negative.

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <memory>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

struct Chunk {
  int slot;
  char* memory;
  int64_t offset;
  int64_t bytes;
};

struct Slot {
  int64_t chunks_left = 0;
  int64_t bytes_read = 0;
  int error = 0;
};

struct State {
  std::mutex mutex;
  std::condition_variable work;
  std::condition_variable done;
  std::deque<Chunk> queue;
  std::vector<Slot> slots;
  int file = -1;
  int busy = 0;
  bool closing = false;

  ~State() {
    if (file >= 0) close(file);
  }
};

int64_t read_chunk(int file, const Chunk& chunk, int* error) {
  int64_t total = 0;
  while (total < chunk.bytes) {
    const ssize_t got = pread(file, chunk.memory + total, chunk.bytes - total, chunk.offset + total);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      *error = errno;
      break;
    }
    if (got == 0) break;
    total += got;
  }
  return total;
}

void serve(std::shared_ptr<State> state) {
  std::unique_lock<std::mutex> lock(state->mutex);
  while (true) {
    state->work.wait(lock, [&] { return state->closing || !state->queue.empty(); });
    if (state->queue.empty()) return;
    const Chunk chunk = state->queue.front();
    state->queue.pop_front();
    ++state->busy;
    lock.unlock();
    int error = 0;
    const int64_t got = read_chunk(state->file, chunk, &error);
    lock.lock();
    --state->busy;
    Slot& slot = state->slots[chunk.slot];
    slot.bytes_read += got;
    if (error != 0 && slot.error == 0) slot.error = error;
    --slot.chunks_left;
    state->done.notify_all();
  }
}

struct Reader {
  std::shared_ptr<State> state;
  int64_t chunk_bytes;
};

template <typename Condition>
bool wait_for(State& state, std::unique_lock<std::mutex>& lock, long timeout_ms, Condition met) {
  return state.done.wait_for(lock, std::chrono::milliseconds(timeout_ms), met);
}

}  // namespace

extern "C" {

int pk_reader_abi() { return 1; }

// Null on failure, with errno in *error.
void* pk_reader_open(const char* path, int slots, int threads, long chunk_bytes, int* error) {
  auto state = std::make_shared<State>();
  state->file = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (state->file < 0) {
    *error = errno;
    return nullptr;
  }
  state->slots.resize(slots);
  for (int i = 0; i < threads; ++i) std::thread(serve, state).detach();
  return new Reader{state, chunk_bytes};
}

// 0, or -EBUSY while the slot still reads.
int pk_reader_submit(void* handle, int slot, void* memory, long offset, long bytes) {
  auto* reader = static_cast<Reader*>(handle);
  State& state = *reader->state;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    if (state.slots[slot].chunks_left != 0) return -EBUSY;
    state.slots[slot] = Slot{};
    for (int64_t at = 0; at < bytes; at += reader->chunk_bytes) {
      const int64_t size = std::min<int64_t>(reader->chunk_bytes, bytes - at);
      state.queue.push_back({slot, static_cast<char*>(memory) + at, offset + at, size});
      ++state.slots[slot].chunks_left;
    }
  }
  state.work.notify_all();
  return 0;
}

// Bytes read, or a negative errno; -ETIMEDOUT when it is not done yet.
long pk_reader_wait(void* handle, int slot, long timeout_ms) {
  State& state = *static_cast<Reader*>(handle)->state;
  std::unique_lock<std::mutex> lock(state.mutex);
  if (!wait_for(state, lock, timeout_ms, [&] { return state.slots[slot].chunks_left == 0; }))
    return -ETIMEDOUT;
  const Slot& result = state.slots[slot];
  return result.error != 0 ? -result.error : result.bytes_read;
}

// Drops what has not begun and waits for what has; -ETIMEDOUT when a read hangs, whose memory must
// then stay.
int pk_reader_close(void* handle, long timeout_ms) {
  auto* reader = static_cast<Reader*>(handle);
  bool idle;
  {
    State& state = *reader->state;
    std::unique_lock<std::mutex> lock(state.mutex);
    state.closing = true;
    state.queue.clear();
    idle = wait_for(state, lock, timeout_ms, [&] { return state.busy == 0; });
  }
  reader->state->work.notify_all();
  delete reader;
  return idle ? 0 : -ETIMEDOUT;
}

}  // extern "C"
