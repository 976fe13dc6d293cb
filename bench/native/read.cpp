// Reads memory as fast as it comes: plain loads over 2 MiB pages, each thread its own slice of the
// buffer, cut into streams that are walked side by side so that more requests are on their way.
// Nothing is written while it reads; the sum is returned so that no load can be left out.

#include <cstddef>
#include <cstdint>
#include <sys/mman.h>

namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLine = 64;
constexpr long kMaxStreams = 8;

// One vector register's worth on AVX-512; the compiler splits it where registers are narrower.
typedef uint64_t Line __attribute__((vector_size(kLine), aligned(kLine)));

template <long kStreams>
uint64_t read_slice(const char* data, size_t bytes) {
    const size_t lines = bytes / kStreams / kLine;
    Line sums[kStreams] = {};
    for (size_t line = 0; line < lines; ++line)
        for (long stream = 0; stream < kStreams; ++stream)
            sums[stream] += *(const Line*)(data + (stream * lines + line) * kLine);
    uint64_t total = 0;
    for (long stream = 0; stream < kStreams; ++stream)
        for (size_t lane = 0; lane < kLine / sizeof(uint64_t); ++lane) total += sums[stream][lane];
    return total;
}

}  // namespace

extern "C" {

// A zeroed buffer, on 2 MiB pages where the system grants them; null when there is no memory.
void* probe_open(size_t bytes) {
    void* base = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    char* data = (char*)(((uintptr_t)base + kHugePage - 1) / kHugePage * kHugePage);
    madvise(data, bytes, MADV_HUGEPAGE);
    for (size_t at = 0; at < bytes; at += 4096) data[at] = 1;
    return data;
}

void probe_close(void* data, size_t bytes) { munmap(data, bytes); }

// Reads the first `bytes` of an open buffer once.
uint64_t probe_read(const char* data, size_t bytes, long streams, int threads) {
    uint64_t total = 0;
    const size_t slice = bytes / threads / (kMaxStreams * kLine) * (kMaxStreams * kLine);
#pragma omp parallel for num_threads(threads) reduction(+ : total) schedule(static, 1)
    for (int thread = 0; thread < threads; ++thread) {
        const char* mine = data + thread * slice;
        total += streams == 1   ? read_slice<1>(mine, slice)
                 : streams == 4 ? read_slice<4>(mine, slice)
                                : read_slice<kMaxStreams>(mine, slice);
    }
    return total;
}
}
