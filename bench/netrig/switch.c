// A switch between namespaces: one TUN device per node; delays, paces and counts what passes.
//
//   switch CONTROL_FILE TUN...
//
// CONTROL_FILE is shared memory, see rig.py: its beginning sets the link at any moment, the rest are
// counters. A packet occupies its node's way out for `occupancy` (if it carries data) plus its
// bytes at `rate`, then travels for `delay`, then passes the way in of the other node at the same
// rate. Runs in user space because kernels without sch_netem cannot delay packets.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <malloc.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { MAX_NODES = 16, MAX_PACKET = 65536 + 64 };

struct control {
    volatile uint64_t delay_ns, occupancy_ns, bytes_per_s, ready;
    struct { volatile uint64_t messages, bytes, packets; } node[MAX_NODES];
};

struct packet {
    uint64_t due_ns, order;
    int target, length;
    unsigned char data[];
};

static struct packet **heap;
static size_t heap_size, heap_room;
static uint64_t num_packets;

static int before(const struct packet *a, const struct packet *b) {
    return a->due_ns < b->due_ns || (a->due_ns == b->due_ns && a->order < b->order);
}

static void push(struct packet *packet) {
    if (heap_size == heap_room) {
        heap_room = heap_room ? 2 * heap_room : 1024;
        heap = realloc(heap, heap_room * sizeof *heap);
        if (!heap) exit(3);
    }
    size_t i = heap_size++;
    for (; i && before(packet, heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = packet;
}

static struct packet *pop(void) {
    struct packet *first = heap[0], *last = heap[--heap_size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < heap_size; i = child) {
        if (child + 1 < heap_size && before(heap[child + 1], heap[child])) child++;
        if (!before(heap[child], last)) break;
        heap[i] = heap[child];
    }
    heap[i] = last;
    return first;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t later(uint64_t a, uint64_t b) { return a > b ? a : b; }

// TCP data bytes of an IPv4 packet; 0 for a bare acknowledgement and for anything else.
static int data_bytes(const unsigned char *p, int length) {
    int header = (p[0] & 15) * 4;
    if (p[9] != 6 || length < header + 20) return 0;
    return length - header - (p[header + 12] >> 4) * 4;
}

static int open_tun(const char *name) {
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &request) < 0) {
        perror(name);
        exit(2);
    }
    return fd;
}

static void take(struct control *control, int source, int num_nodes, const unsigned char *data,
                 int length) {
    static uint64_t out_free[MAX_NODES], in_free[MAX_NODES];
    int target = data[19] - 1;  // node n has the address 10.77.0.(n + 1)
    if (length < 20 || data[0] >> 4 != 4 || target < 0 || target >= num_nodes) return;
    int carried = data_bytes(data, length);
    uint64_t busy_ns = carried ? control->occupancy_ns : 0;
    if (control->bytes_per_s) busy_ns += (uint64_t)length * 1000000000u / control->bytes_per_s;
    uint64_t left_ns = later(now_ns(), out_free[source]) + busy_ns;
    out_free[source] = left_ns;
    uint64_t due_ns = later(left_ns + control->delay_ns, in_free[target] + busy_ns);
    in_free[target] = due_ns;
    control->node[source].packets++;
    if (carried) {
        control->node[source].messages++;
        control->node[source].bytes += (uint64_t)carried;
    }
    struct packet *packet = malloc(sizeof *packet + (size_t)length);
    if (!packet) exit(3);
    *packet = (struct packet){due_ns, num_packets++, target, length};
    memcpy(packet->data, data, (size_t)length);
    push(packet);
}

int main(int argc, char **argv) {
    static unsigned char buffer[MAX_PACKET];
    struct pollfd polled[MAX_NODES];
    int num_nodes = argc - 2;
    if (num_nodes < 1 || num_nodes > MAX_NODES) return 2;
    int file = open(argv[1], O_RDWR);
    struct control *control =
        mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || control == MAP_FAILED) return 2;
    // Freed packets stay with the process: else the system zeroes their pages anew for each.
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    for (int i = 0; i < num_nodes; i++)
        polled[i] = (struct pollfd){open_tun(argv[i + 2]), POLLIN, 0};
    control->ready = 1;
    for (;;) {
        uint64_t now = now_ns();
        while (heap_size && heap[0]->due_ns <= now) {
            struct packet *packet = pop();
            // A full device queue drops, as a network would; TCP sends again.
            if (write(polled[packet->target].fd, packet->data, (size_t)packet->length) < 0 &&
                errno != EAGAIN && errno != EIO) return 4;
            free(packet);
        }
        struct timespec wait = {3600, 0};
        if (heap_size) {
            uint64_t left = heap[0]->due_ns > now ? heap[0]->due_ns - now : 0;
            wait = (struct timespec){(time_t)(left / 1000000000u), (long)(left % 1000000000u)};
        }
        if (ppoll(polled, (nfds_t)num_nodes, &wait, NULL) <= 0) continue;
        for (int i = 0; i < num_nodes; i++) {
            ssize_t length;
            if (!(polled[i].revents & POLLIN)) continue;
            while ((length = read(polled[i].fd, buffer, sizeof buffer)) > 0)
                take(control, i, num_nodes, buffer, (int)length);
        }
    }
}
