// What every test of the emulator needs: device memory, launches, a seeded source of numbers, and checks that end
// the test with a sentence.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

extern "C" {
void *tr_emulator_alloc(size_t bytes);
int tr_emulator_free(void *pointer);
void tr_emulator_seed(unsigned long long seed);
int tr_emulator_launch(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes,
                       void **args, char *error, size_t error_len);
}

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char *format, ...) {
    va_list list;
    va_start(list, format);
    vfprintf(stderr, format, list);
    va_end(list);
    fputc('\n', stderr);
    exit(1);
}

/// The error of a launch; empty when it went well.
template <class... Args> const char *try_launch(const char *name, Dim grid, Dim block, size_t shared, Args... args) {
    static char error[2048];
    void *pointers[] = {&args...};
    const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    error[0] = 0;
    int status = tr_emulator_launch(name, g, b, shared, pointers, error, sizeof error);
    if (status != 0 && error[0] == 0) {
        fail("%s: status %d without an error", name, status);
    }
    return error;
}

inline void expect_error(const char *error, const char *part) {
    if (strstr(error, part) == nullptr) {
        fail("expected an error with \"%s\", got \"%s\"", part, error);
    }
}

template <class... Args> void launch(const char *name, Dim grid, Dim block, size_t shared, Args... args) {
    const char *error = try_launch(name, grid, block, shared, args...);
    if (error[0] != 0) {
        fail("%s", error);
    }
}

/// Device memory of `count` T, poisoned; freed with its canaries checked.
template <class T> struct Buffer {
    size_t count;
    T *data;

    explicit Buffer(size_t count) : count(count), data(static_cast<T *>(tr_emulator_alloc(count * sizeof(T)))) {
        if (data == nullptr) {
            fail("no memory for %zu bytes", count * sizeof(T));
        }
    }
    explicit Buffer(const std::vector<T> &values) : Buffer(values.size()) {
        memcpy(data, values.data(), count * sizeof(T));
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() {
        if (tr_emulator_free(data) != 0) {
            fail("a canary of a buffer of %zu bytes was overwritten", count * sizeof(T));
        }
    }
    T &operator[](size_t i) { return data[i]; }
};

/// Numbers that are the same in every run.
struct Random {
    uint64_t state;

    uint32_t next() {
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        return static_cast<uint32_t>(state >> 33);
    }
    uint32_t below(uint32_t n) { return next() % n; }
    /// Close to normally distributed.
    float normal() {
        float sum = 0;
        for (int i = 0; i < 6; ++i) {
            sum += static_cast<float>(next() & 0xFFFF) / 65536.0F - 0.5F;
        }
        return sum * 1.4142F;
    }
};

inline uint16_t to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) {
    uint32_t u = static_cast<uint32_t>(x) << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
}

inline uint16_t to_f16(float x) {
    auto half = static_cast<_Float16>(x);
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline float from_f16(uint16_t bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}

inline void check_close(const char *what, size_t at, double got, double expected, double tolerance) {
    if (!(std::fabs(got - expected) <= tolerance)) {
        fail("%s: element %zu is %g, expected %g within %g", what, at, got, expected, tolerance);
    }
}
