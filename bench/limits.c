// The physical limits of this machine as one JSON object: read bandwidth (GB/s) and peak multiply-add rates (Gop/s, a
// multiply and an add are two), each for 1 thread and for all of them. Never uses an instruction that the compiler's
// -march=native does not know of.
//
//   cc -O3 -march=native -pthread limits.c -o limits && ./limits

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { THREADS_MAX = 64, ROUNDS = 9, PEAK_LOOPS = 20000000, AMX_LOOPS = 2000000 };
static const size_t READ_BYTES = 1UL << 30;

typedef uint64_t line __attribute__((vector_size(64)));

// A piece of work: what one thread does, and how much of it (bytes or operations) one call is.
typedef struct {
    const char *name;
    void (*work)(int thread);
    double amount;
} piece;

static char *buffers[THREADS_MAX];
static int num_threads;
static volatile uint64_t sink;

// Reads this thread's part of READ_BYTES as `streams` interleaved streams, prefetching 4 KiB ahead: the fastest of the
// variants differs between machines, so several are tried and the best counts.
static inline void read_streams(int thread, size_t streams) {
    const size_t part = READ_BYTES / num_threads / streams / 256 * 256;
    line sum[4] = {0};
    for (size_t at = 0; at < part; at += 256) {
        for (size_t s = 0; s < streams; s++) {
            const char *p = buffers[thread] + s * part + at;
            for (int k = 0; k < 4; k++) {
                __builtin_prefetch(p + 4096 + 64 * k);
                sum[k] += *(const line *)(p + 64 * k);
            }
        }
    }
    line all = sum[0] + sum[1] + sum[2] + sum[3];
    sink += all[0];
}

static void read_1(int thread) { read_streams(thread, 1); }
static void read_2(int thread) { read_streams(thread, 2); }
static void read_4(int thread) { read_streams(thread, 4); }
static void read_8(int thread) { read_streams(thread, 8); }

// Assembly, so that nothing is folded away: twelve independent accumulators hide the latency.
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define CLOBBERED                                                                                                      \
    "rcx", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",     \
        "xmm12", "xmm13"
#define PEAK(function, body, width)                                                                                    \
    static void function(int thread) {                                                                                 \
        (void)thread;                                                                                                  \
        __asm__ volatile("mov %0, %%rcx\n vpxor %%xmm12, %%xmm12, %%xmm12\n vpxor %%xmm13, %%xmm13, %%xmm13\n1:\n"     \
                         TWELVE(body) "dec %%rcx\n jnz 1b\n" ::"r"((long)PEAK_LOOPS)                                   \
                         : CLOBBERED);                                                                                 \
    }
#define PEAK_OPS(bits, operations_per_32_bits) (12.0 * PEAK_LOOPS * (bits) / 32 * (operations_per_32_bits))

#ifdef __AVX512F__
#define F32(i) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #i "\n"
PEAK(peak_f32, F32, 512)
#define F32_BITS 512
#elif defined(__FMA__)
#define F32(i) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #i "\n"
PEAK(peak_f32, F32, 256)
#define F32_BITS 256
#endif

#ifdef __AVX512VNNI__
#define INT8(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n"
PEAK(peak_int8, INT8, 512)
#define INT8_BITS 512
#elif defined(__AVXVNNI__)
#define INT8(i) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" #i "\n"
PEAK(peak_int8, INT8, 256)
#define INT8_BITS 256
#endif

#ifdef __AVX512BF16__
#define BF16(i) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" #i "\n"
PEAK(peak_bf16, BF16, 512)
#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
// Linux hands out the tile registers on request (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static int amx_allowed(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Eight tiles of 16 rows x 64 bytes: four accumulators, two left and two right operands.
static void amx_configure(void) {
    static const struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

#define AMX_PEAK(function, instruction)                                                                                \
    static void function(int thread) {                                                                                 \
        (void)thread;                                                                                                  \
        amx_configure();                                                                                               \
        __asm__ volatile("mov %0, %%rcx\n1:\n" instruction " %%tmm6, %%tmm4, %%tmm0\n" instruction                     \
                         " %%tmm7, %%tmm4, %%tmm1\n" instruction " %%tmm6, %%tmm5, %%tmm2\n" instruction               \
                         " %%tmm7, %%tmm5, %%tmm3\ndec %%rcx\n jnz 1b\n tilerelease\n" ::"r"((long)AMX_LOOPS)          \
                         : "rcx", "cc");                                                                               \
    }
AMX_PEAK(amx_int8, "tdpbssd")
AMX_PEAK(amx_bf16, "tdpbf16ps")
#endif

static const piece READS[] = {
    {"read", read_1, 1UL << 30},
    {"read", read_2, 1UL << 30},
    {"read", read_4, 1UL << 30},
    {"read", read_8, 1UL << 30},
};

static const piece PEAKS[] = {
#ifdef F32_BITS
    {"f32", peak_f32, PEAK_OPS(F32_BITS, 2)},
#endif
#ifdef INT8_BITS
    {"int8", peak_int8, PEAK_OPS(INT8_BITS, 8)},
#endif
#ifdef __AVX512BF16__
    {"bf16", peak_bf16, PEAK_OPS(512, 4)},
#endif
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
    {"amx_int8", amx_int8, 4.0 * AMX_LOOPS * 16 * 16 * 64 * 2},
    {"amx_bf16", amx_bf16, 4.0 * AMX_LOOPS * 16 * 16 * 32 * 2},
#endif
};

static const piece *current;
static pthread_barrier_t start;
static double begin[THREADS_MAX], end[THREADS_MAX];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *one_thread(void *argument) {
    int thread = (int)(intptr_t)argument;
    pthread_barrier_wait(&start);
    begin[thread] = now();
    current->work(thread);
    end[thread] = now();
    return NULL;
}

// Seconds from the first start to the last end of `threads` threads.
static double seconds(const piece *p, int threads) {
    pthread_t handles[THREADS_MAX];
    current = p;
    num_threads = threads;
    pthread_barrier_init(&start, NULL, threads);
    for (int i = 0; i < threads; i++) pthread_create(&handles[i], NULL, one_thread, (void *)(intptr_t)i);
    double first = 1e300, last = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(handles[i], NULL);
        if (begin[i] < first) first = begin[i];
        if (end[i] > last) last = end[i];
    }
    pthread_barrier_destroy(&start);
    return last - first;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Median rate in 1e9 per second.
static double rate(const piece *p, int threads, double amount) {
    double rates[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) rates[i] = amount / seconds(p, threads) / 1e9;
    qsort(rates, ROUNDS, sizeof *rates, ascending);
    return rates[ROUNDS / 2];
}

static double best_read(int threads) {
    double best = 0;
    for (size_t i = 0; i < sizeof READS / sizeof *READS; i++) {
        double r = rate(&READS[i], threads, READS[i].amount);
        if (r > best) best = r;
    }
    return best;
}

int main(void) {
    int threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (threads > THREADS_MAX) threads = THREADS_MAX;
    for (int i = 0; i < threads; i++) {
        // A page more than is read, for the prefetches behind the end. One thread alone reads all of its buffer.
        size_t bytes = (i == 0 ? READ_BYTES : READ_BYTES / 2) + (1 << 16);
        buffers[i] = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (buffers[i] == MAP_FAILED) return perror("mmap"), 1;
        madvise(buffers[i], bytes, MADV_HUGEPAGE);
        memset(buffers[i], 1, bytes);
    }
    printf("{\"threads\": %d, \"read\": [%.1f, %.1f]", threads, best_read(1), best_read(threads));
    for (size_t i = 0; i < sizeof PEAKS / sizeof *PEAKS; i++) {
        const piece *p = &PEAKS[i];
#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
        if (strncmp(p->name, "amx", 3) == 0 && !amx_allowed()) continue;
#endif
        printf(", \"%s\": [%.0f, %.0f]", p->name, rate(p, 1, p->amount), rate(p, threads, threads * p->amount));
    }
    printf("}\n");
    return 0;
}
