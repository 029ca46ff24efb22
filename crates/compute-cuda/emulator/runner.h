// The emulator's runner: a grid's clusters (of one block, unless a kernel says more) run one after another, the threads
// of a cluster's blocks as fibers. It never runs two fibers at once, and it never knows a kernel: emulator.h gives kernels their CUDA names in terms of this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace emu {

constexpr int WARP = 32;
constexpr int BLOCK_THREADS_MAX = 1024;
constexpr int BARRIERS = 16;
/// Blocks of a cluster: what every device with clusters takes.
constexpr int CLUSTER_BLOCKS_MAX = 8;
/// Where shared memory begins in the 32-bit shared address space: not 0, so that nothing relies on it.
constexpr uint32_t SHARED_BASE = 1024;

struct Index3 {
    unsigned x, y, z;
};

/// What a fiber sees as threadIdx and blockIdx, and the launch's blockDim and gridDim.
struct Place {
    Index3 thread, block, block_dim, grid_dim;
};

/// The running fiber's place.
const Place &place();
/// Its number in the block, x fastest.
int thread_rank();
/// Its block's number in the cluster.
int cluster_rank();

/// Waits for `lanes` of the warp (bit per lane) to come to the same operation; the last to come runs
/// `act(slots, lanes)`, where `slots[lane]` is what that lane passed.
using WarpAct = void (*)(void *const *slots, uint32_t lanes);
void warp_collective(const char *what, uint32_t lanes, void *slot, WarpAct act);
/// The same for the four warps of a warp group (128 consecutive threads).
void group_collective(const char *what, void *slot, WarpAct act);
/// Changes with every block that runs: what is kept for a block's threads is of this block only.
uint64_t block_serial();
/// Waits until `threads` threads came to barrier `id`; 0 stands for all that have not ended.
void barrier(int id, int threads);
/// Waits until all threads of the cluster came. PTX waits only for those that have not ended; here one that ended
/// without it stops the launch: what others of its cluster send to its block would come too late.
void cluster_sync();
/// Lets another warp run: where the order of warps could matter (atomics, fences).
void yield();

/// The block's dynamic shared memory.
unsigned char *shared();
/// The bytes behind a shared address; stops the launch when they do not exist or are misaligned.
void *shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char *what);
/// The same in block `rank` of the cluster, which must not have ended.
void *shared_of(int rank, uint32_t address, uint32_t bytes, uint32_t align, const char *what);
uint32_t shared_address(const void *pointer);
/// Stops the launch when the bytes are in no allocation or misaligned.
void check_global(const void *pointer, size_t bytes, size_t align, const char *what);
/// Ends the launch with an error.
[[noreturn]] void stop(const char *format, ...) __attribute__((format(printf, 1, 2)));
/// A seeded choice between 0 and `below` - 1.
uint32_t choose(uint32_t below);

/// One thread's cp.async queue.
void copy_async(void *to, const void *from, int bytes_read);
void copy_async_commit();
void copy_async_wait(int groups_left);
/// Calls `arrived(context)` when the copies of this thread that no group holds yet are there: by themselves.
void copy_async_then(void (*arrived)(void *), void *context);

/// Waits until `signal`, or until a copy of bulk_copy arrived; the caller looks again at what it waits for.
void wait_event(const char *what);
void signal();
/// A copy that nobody's thread makes, into shared memory of block `rank` of the cluster: arrives at some time, then
/// `arrived(context)`. That block must not end before.
void bulk_copy(int rank, void *to, const void *from, size_t bytes, void (*arrived)(void *), void *context);

using Invoke = void (*)(void **args);
/// Puts a kernel into the launch table; `cluster` is the blocks of its clusters, which lie along y.
struct Registrar {
    Registrar(const char *name, Invoke invoke, int cluster);
};

template <class... Args, size_t... I>
void call(void (*kernel)(Args...), void **args, std::index_sequence<I...>) {
    kernel(*static_cast<Args *>(args[I])...);
}
template <class... Args> void call(void (*kernel)(Args...), void **args) {
    call(kernel, args, std::index_sequence_for<Args...>{});
}
template <auto KERNEL> void invoke(void **args) { call(KERNEL, args); }

} // namespace emu
