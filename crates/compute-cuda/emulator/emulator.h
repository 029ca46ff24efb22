// CUDA C++ for the host: what a kernel's source needs to be compiled by g++ and run by runner.cpp, and the
// emulator's version of every function of ptx.cuh, by the fragment layouts of the PTX ISA (section 9.7).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runner.h"

#define TR_EMULATOR 1
#define __global__
#define __device__ static
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...) // TR_EMULATOR_REGISTER has it
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define threadIdx (emu::place().thread)
#define blockIdx (emu::place().block)
#define blockDim (emu::place().block_dim)
#define gridDim (emu::place().grid_dim)

/// `cluster`: the blocks of a cluster of this kernel, 1 without __cluster_dims__.
#define TR_EMULATOR_REGISTER(name, cluster) \
    static const emu::Registrar emu_register_##name(#name, &emu::invoke<&name>, cluster);

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;

// Vector types.
struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Bits and arithmetic.
static inline u32 __float_as_uint(float x) { u32 u; memcpy(&u, &x, 4); return u; }
static inline float __uint_as_float(u32 u) { float x; memcpy(&x, &u, 4); return x; }
static inline int __float_as_int(float x) { int u; memcpy(&u, &x, 4); return u; }
static inline float __int_as_float(int u) { float x; memcpy(&x, &u, 4); return x; }
static inline double __longlong_as_double(long long u) { double x; memcpy(&x, &u, 8); return x; }
static inline long long __double_as_longlong(double x) { long long u; memcpy(&u, &x, 8); return u; }
/// Byte i of the result is byte `selector >> 4 i & 7` of y:x.
static inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    u64 both = static_cast<u64>(y) << 32 | x;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) {
        out |= static_cast<u32>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    }
    return out;
}
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __ffs(u32 x) { return __builtin_ffs(static_cast<int>(x)); }
static inline int __clz(u32 x) { return x == 0 ? 32 : __builtin_clz(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// glibc has declared these names.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)
static inline float rsqrtf(float x) { return 1.0F / sqrtf(x); }
static inline float fdividef(float a, float b) { return a / b; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T __ldg(const T *p) {
    emu::check_global(p, sizeof(T), alignof(T), "__ldg");
    return *p;
}
[[noreturn]] static inline void __trap() { emu::stop("trap"); }

// Synchronisation.
static inline void __syncthreads() { emu::barrier(0, 0); }
static inline void __syncwarp(u32 mask = ~0U) {
    emu::warp_collective("__syncwarp", mask, nullptr, [](void *const *, u32) {});
}
static inline void __threadfence() { emu::yield(); }
static inline void __threadfence_block() { emu::yield(); }

// Atomics: fibers do not run at the same time, so a plain update is one.
template <class T, class U> static inline T emu_atomic(T *p, U update) {
    emu::yield();
    T before = *p;
    *p = update(before);
    return before;
}
template <class T> static inline T atomicAdd(T *p, T x) { return emu_atomic(p, [x](T a) { return a + x; }); }
template <class T> static inline T atomicSub(T *p, T x) { return emu_atomic(p, [x](T a) { return a - x; }); }
template <class T> static inline T atomicMax(T *p, T x) { return emu_atomic(p, [x](T a) { return a < x ? x : a; }); }
template <class T> static inline T atomicMin(T *p, T x) { return emu_atomic(p, [x](T a) { return x < a ? x : a; }); }
template <class T> static inline T atomicOr(T *p, T x) { return emu_atomic(p, [x](T a) { return a | x; }); }
template <class T> static inline T atomicExch(T *p, T x) { return emu_atomic(p, [x](T) { return x; }); }
template <class T> static inline T atomicCAS(T *p, T expected, T x) {
    return emu_atomic(p, [=](T a) { return a == expected ? x : a; });
}
static inline u32 atomicInc(u32 *p, u32 limit) {
    return emu_atomic(p, [limit](u32 a) { return a >= limit ? 0 : a + 1; });
}

// Shuffles and votes.
template <class T> struct EmuShuffle {
    T value, result;
    int source;
};
template <class T> static inline T emu_shuffle(const char *what, u32 mask, T value, int source) {
    EmuShuffle<T> slot = {value, value, source};
    emu::warp_collective(what, mask, &slot, [](void *const *slots, u32 lanes) {
        for (int i = 0; i < 32; ++i) {
            auto *lane = static_cast<EmuShuffle<T> *>(slots[i]);
            if (lane == nullptr) {
                continue;
            }
            if (!(lanes >> lane->source & 1)) {
                emu::stop("a shuffle reads lane %d, which is not in its mask", lane->source);
            }
            lane->result = static_cast<EmuShuffle<T> *>(slots[lane->source])->value;
        }
    });
    return slot.result;
}
static inline int emu_lane() { return emu::thread_rank() % 32; }
template <class T> static inline T __shfl_sync(u32 mask, T value, int lane, int width = 32) {
    return emu_shuffle("__shfl_sync", mask, value, emu_lane() / width * width + (lane & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32) {
    int source = emu_lane() ^ bits;
    bool is_inside = source / width == emu_lane() / width;
    return emu_shuffle("__shfl_xor_sync", mask, value, is_inside ? source : emu_lane());
}
template <class T> static inline T __shfl_down_sync(u32 mask, T value, unsigned delta, int width = 32) {
    int source = emu_lane() + static_cast<int>(delta);
    bool is_inside = source / width == emu_lane() / width;
    return emu_shuffle("__shfl_down_sync", mask, value, is_inside ? source : emu_lane());
}
template <class T> static inline T __shfl_up_sync(u32 mask, T value, unsigned delta, int width = 32) {
    int source = emu_lane() - static_cast<int>(delta);
    bool is_inside = source >= 0 && source / width == emu_lane() / width;
    return emu_shuffle("__shfl_up_sync", mask, value, is_inside ? source : emu_lane());
}
static inline u32 __ballot_sync(u32 mask, int predicate) {
    u32 slot = predicate != 0;
    emu::warp_collective("__ballot_sync", mask, &slot, [](void *const *slots, u32) {
        u32 ballot = 0;
        for (int i = 0; i < 32; ++i) {
            ballot |= slots[i] == nullptr ? 0 : *static_cast<u32 *>(slots[i]) << i;
        }
        for (int i = 0; i < 32; ++i) {
            if (slots[i] != nullptr) {
                *static_cast<u32 *>(slots[i]) = ballot;
            }
        }
    });
    return slot;
}
static inline int __any_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline u32 __match_any_sync(u32 mask, u32 value) {
    u32 same = 0;
    for (int i = 0; i < 32; ++i) {
        if (mask >> i & 1) {
            same |= static_cast<u32>(__shfl_sync(mask, value, i) == value) << i;
        }
    }
    return same;
}

#include "ptx.h"
#include "../kernels/attention.cuh"
#include "../kernels/rows.cuh"
#include "../kernels/tile.cuh"
#include "../kernels/tree.cuh"
#include "../kernels/walk_mma.cuh"
#include "../kernels/walk_wgmma.cuh"
