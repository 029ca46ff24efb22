// Warp-group products of Hopper, D (registers) += A (registers) B (shared memory), and copies that arrive on their own.
// Only sm_90a knows them; the emulator has its own version in emulator/ptx.h. Asks nothing of kernels but order:
// wgmma_fence, any number of products, wgmma_commit, wgmma_wait, wgmma_settle.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits for all groups but the youngest `LEFT`.
template <int LEFT> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/// Keeps the compiler from reading sums before the wait that stands in front of this.
template <int COLUMNS> __device__ __forceinline__ void wgmma_settle(float (&d)[COLUMNS][4]) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
    }
}

/// Describes N rows of 128 bytes with the 128-byte swizzle, eight rows 1024 bytes apart, 1024-byte aligned. 32 bytes
/// further along K is 2 more.
__device__ __forceinline__ u64 wgmma_descriptor(u32 stage) {
    return static_cast<u64>(stage >> 4 & 0x3FFF) | 1ULL << 16 | 64ULL << 32 | 1ULL << 62;
}

/// Gives registers of this warp group back, or takes what others gave back: `COUNT` per thread, a multiple of 8.
template <int COUNT> __device__ __forceinline__ void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Barriers in shared memory (8 bytes each), for copies that arrive on their own.

__device__ __forceinline__ void mbarrier_init(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

/// Makes initialised barriers visible to bulk copies; a __syncthreads must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Arrives, and adds `bytes` to what the phase waits for.
__device__ __forceinline__ void mbarrier_arrive_expect(u32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

/// Waits for the end of the phase with this parity. A barrier that was just made has ended a phase of parity 1.
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra over;\n"
                 "bra again;\n"
                 "over:\n"
                 "}" ::"r"(barrier), "r"(parity)
                 : "memory");
}

/// Arrives when all copies that this thread began with cp.async are there; one of the arrivals that were counted.
__device__ __forceinline__ void mbarrier_arrive_copied(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/// Copies `bytes` (a multiple of 16, both ends aligned to 16) and reports to the barrier. One thread calls.
__device__ __forceinline__ void bulk_copy(u32 to, const void *from, int bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// Clusters: blocks that run together, next to each other in the grid's y, and reach into each other's shared memory.

/// This block's number in its cluster.
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// Waits for all threads of the cluster, and shows each what the others wrote.
__device__ __forceinline__ void cluster_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// Arrives at the barrier that block `rank` has at this address.
__device__ __forceinline__ void mbarrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile("{\n"
                 ".reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
                 "}" ::"r"(barrier), "r"(rank)
                 : "memory");
}

/// As bulk_copy, into every block of `mask` at the same address, and reports to each one's barrier.
__device__ __forceinline__ void bulk_copy_to_all(u32 to, const void *from, int bytes, u32 barrier, u16 mask) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier), "h"(mask)
                 : "memory");
}

__device__ __forceinline__ uint4 shared_load_16(u32 address) {
    uint4 out;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "r"(address)
                 : "memory");
    return out;
}

#define TR_D1(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define TR_D2(d, j) TR_D1(d, j), TR_D1(d, j + 1)
#define TR_D4(d, j) TR_D2(d, j), TR_D2(d, j + 2)
#define TR_D8(d, j) TR_D4(d, j), TR_D4(d, j + 4)
#define TR_D16(d, j) TR_D8(d, j), TR_D8(d, j + 8)
#define TR_D32(d, j) TR_D16(d, j), TR_D16(d, j + 16)

/// Operand numbers: the sums, then the four registers of A, then B's descriptor.
#define TR_WGMMA(N, COLUMNS, SUMS, A0, A1, A2, A3, B)                                                                    \
    __device__ __forceinline__ void wgmma_bf16(float (&d)[COLUMNS][4], const u32 (&a)[4], u64 b) {                       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" SUMS "}, {" A0 ", " A1 ", " A2 ", " A3 \
                     "}, " B ", 1, 1, 1, 0;"                                                                             \
                     : TR_D##COLUMNS(d, 0)                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }                                                                                                                    \
    __device__ __forceinline__ void wgmma_e4m3(float (&d)[COLUMNS][4], const u32 (&a)[4], u64 b) {                       \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" SUMS "}, {" A0 ", " A1 ", " A2 ", " A3 \
                     "}, " B ", 1, 1, 1;"                                                                                \
                     : TR_D##COLUMNS(d, 0)                                                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
    }

#define TR_SUMS_8 "%0, %1, %2, %3"
TR_WGMMA(8, 1, TR_SUMS_8, "%4", "%5", "%6", "%7", "%8")
#define TR_SUMS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
TR_WGMMA(16, 2, TR_SUMS_16, "%8", "%9", "%10", "%11", "%12")
#define TR_SUMS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
TR_WGMMA(32, 4, TR_SUMS_32, "%16", "%17", "%18", "%19", "%20")
#define TR_SUMS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
TR_WGMMA(64, 8, TR_SUMS_64, "%32", "%33", "%34", "%35", "%36")
#define TR_SUMS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
TR_WGMMA(128, 16, TR_SUMS_128, "%64", "%65", "%66", "%67", "%68")
#define TR_SUMS_256 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
TR_WGMMA(256, 32, TR_SUMS_256, "%128", "%129", "%130", "%131", "%132")

#endif
