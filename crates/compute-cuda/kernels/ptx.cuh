// Stands in front of every source: the types that headers would bring, and all inline PTX. NVRTC gets no include
// path. emulator/ptx.h has the same functions for the host. Holds nothing that only one kernel could want.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern __shared__ __align__(1024) unsigned char tr_shared_memory[];

/// The block's dynamic shared memory, 1024-byte aligned. Kernels have no other shared memory.
__device__ __forceinline__ unsigned char *tr_shared() { return tr_shared_memory; }

/// The address that the shared-memory instructions take.
__device__ __forceinline__ u32 shared_address(const void *p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// bf16, to nearest, ties to even.

__device__ __forceinline__ u16 bf16_from(float x) {
    u16 out;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
    return out;
}

__device__ __forceinline__ float bf16_to(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }

__device__ __forceinline__ u32 bf16x2_from(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ float bf16x2_low(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float bf16x2_high(u32 x) { return __uint_as_float(x & 0xFFFF0000U); }

/// Two bf16 `a * b + c`, each rounded once.
__device__ __forceinline__ u32 bf16x2_fma(u32 a, u32 b, u32 c) {
    u32 out;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
    return out;
}

__device__ __forceinline__ u32 bf16x2_repeat_low(u32 x) { return __byte_perm(x, x, 0x1010); }
__device__ __forceinline__ u32 bf16x2_repeat_high(u32 x) { return __byte_perm(x, x, 0x3232); }

// Loads of what no kernel writes while this one runs.

/// 16 bytes that are read once: weights. They pass by the L1 cache. Not `.nc`: ptxas moves such loads behind barriers,
/// down to their first use, and a load that was meant to be early is late.
__device__ __forceinline__ uint4 load_stream_16(const void *p) {
    uint4 out;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(p)
                 : "memory");
    return out;
}

__device__ __forceinline__ uint4 load_16(const void *p) { return __ldg(static_cast<const uint4 *>(p)); }
__device__ __forceinline__ uint2 load_8(const void *p) { return __ldg(static_cast<const uint2 *>(p)); }
__device__ __forceinline__ u32 load_4(const void *p) { return __ldg(static_cast<const u32 *>(p)); }

/// Waits until `threads` threads (a multiple of 32) came to barrier `id`; 0 is the barrier of __syncthreads.
__device__ __forceinline__ void bar_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// A load that stays where it is written: for a loop of many whose values shall not all live at once.
__device__ __forceinline__ float load_in_place(const float *p) {
    float out;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(out) : "l"(p) : "memory");
    return out;
}

/// The same of 16 bytes: what the kernel in front wrote, where nothing but the order of instructions keeps the load behind the wait.
__device__ __forceinline__ uint4 load_16_in_place(const void *p) {
    uint4 out;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w) : "l"(p) : "memory");
    return out;
}

/// The same of two numbers, which lie on 8 bytes.
__device__ __forceinline__ float2 load_two_in_place(const float *p) {
    float2 out;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "l"(p) : "memory");
    return out;
}

/// `x`, of which the compiler knows nothing more: what is computed from it is not computed ahead of a loop, where it
/// would hold registers.
__device__ __forceinline__ int computed_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Asynchronous copies to shared memory.

/// Copies `bytes` (0 to 16) and fills the rest of 16 with zero.
__device__ __forceinline__ void cp_async_16(u32 to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits for all of this thread's groups but the youngest `LEFT`.
template <int LEFT> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/// Makes this thread's writes to shared memory visible to wgmma (and other asynchronous readers).
__device__ __forceinline__ void fence_proxy_async() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Matrices of 8 x 8 b16: matrix i has its row addresses in lanes 8 i to 8 i + 7.

__device__ __forceinline__ void ldmatrix_x4(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&to)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&to)[2], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
}

/// `d += a b` for 16 x 16 bf16 of A (rows) and 16 x 8 of B (columns), f32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// An f16 from the host's formats.
__device__ __forceinline__ float f16_to(u16 x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x));
    return out;
}

#if __CUDA_ARCH__ >= 890
/// Two e4m3, to nearest, ties to even; beyond 448 is 448, NaN is NaN.
__device__ __forceinline__ u16 e4m3x2_from(float low, float high) {
    u16 out;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
    return out;
}

/// `d += a b` for 16 x 32 e4m3 of A (rows) and 32 x 8 of B (columns), f32 sums.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// f16: keys and values, and what is multiplied with them.

__device__ __forceinline__ u32 f16x2_from(float low, float high) {
    u32 out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

/// `d += a b` for 16 x 16 f16 of A (rows) and 16 x 8 of B (columns), f32 sums.
__device__ __forceinline__ void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// 2^x to two units in the last place; exact at 0, 0 at minus infinity.
__device__ __forceinline__ float exp2_fast(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

/// What another block wrote in this launch, and a fence has shown to be there.
__device__ __forceinline__ float2 load_fresh_8(const void *p) {
    float2 out;
    asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(out.x), "=f"(out.y) : "l"(p) : "memory");
    return out;
}

/// 1 / x to one unit in the last place.
__device__ __forceinline__ float reciprocal_fast(float x) {
    float out;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

/// 1 / sqrt(x): the root to nearest, then its reciprocal as above.
__device__ __forceinline__ float reciprocal_sqrt(float x) {
    float root;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(root) : "f"(x));
    return reciprocal_fast(root);
}

/// 8 bytes that are read once, see load_stream_16.
__device__ __forceinline__ uint2 load_stream_8(const void *p) {
    uint2 out;
    asm volatile("ld.global.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(out.x), "=r"(out.y) : "l"(p) : "memory");
    return out;
}

/// Differences of two f16 each.
__device__ __forceinline__ u32 f16x2_sub(u32 a, u32 b) {
    u32 out;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    return out;
}

/// Asks for 128 bytes to be in the L2 cache.
__device__ __forceinline__ void prefetch_line(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// What a kernel wrote that is done, while the one behind it may still run.
__device__ __forceinline__ int load_fresh(const int *p) {
    int out;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(out) : "l"(p) : "memory");
    return out;
}

// Kernels of a stream overlap on sm_90 and later (programmatic dependent launch): one begins when all blocks of the one
// before it have begun and said so. So every kernel calls one of these before it touches what others write or
// read, but for what grid_begin allows.

/// Waits until the kernels before this one are done and what they wrote is seen.
__device__ __forceinline__ void grid_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// The same, and then lets the next kernel begin. It begins when every block has come here or has ended, so it may read at once
/// what was written by kernels before this one.
__device__ __forceinline__ void grid_begin() {
    grid_wait();
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
