// See runner.h. The C interface at the end (ABI.md) is what tests and the Rust device call.
#include "runner.h"

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <sys/mman.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {
namespace {

constexpr size_t PAGE = 4096;
constexpr size_t STACK_BYTES = 128 * 1024;
constexpr size_t SHARED_MAX = 227 * 1024;
/// Bytes behind a block's shared memory that must keep their poison.
constexpr size_t SHARED_CANARY = 4096;
constexpr size_t ALIGN = 256;
constexpr size_t CANARY = 256;
constexpr unsigned char CANARY_BYTE = 0xA5;
/// NaN as bf16, f32 and e4m3; -1 as an integer.
constexpr int POISON = 0xFF;

enum class State { Ready, Warp, Group, Barrier, Event, Done };

struct Copy {
    void *to;
    const void *from;
    int bytes;
    bool done;
};

struct Fiber {
    void *stack_pointer;
    State state;
    int rank;
    Place place;
    const char *what;
    uint32_t lanes;
    void *slot;
    int barrier;
    std::vector<std::vector<Copy>> groups; // cp.async: the last is open
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};

struct BulkCopy {
    void *to;
    const void *from;
    size_t bytes, filled; // zero behind `bytes`
    void (*arrived)(void *); // or null
    void *context;
};

struct Barrier {
    int arrived, expected;
};

struct Allocation {
    unsigned char *map;
    size_t map_bytes, bytes;
};

struct Device {
    std::mutex mutex;
    std::map<std::string, Invoke> kernels;
    std::map<uintptr_t, Allocation> allocations; // by first byte
    std::string error;
    uint64_t random = 1, block_serial = 0;
    unsigned char *stacks = nullptr;
    unsigned char *shared = nullptr; // SHARED_MAX, SHARED_CANARY and a guard page
    std::vector<Fiber> fibers;
    // The running launch.
    Invoke invoke = nullptr;
    void **args = nullptr;
    int threads = 0, live = 0;
    uint32_t shared_bytes = 0;
    Barrier barriers[BARRIERS];
    std::vector<BulkCopy> copies; // under way
    Fiber *current = nullptr;
    void *scheduler = nullptr;
#if !defined(__x86_64__)
    ucontext_t scheduler_context;
#endif
    sigjmp_buf escape;
};

Device &device() {
    static Device *device = new Device;
    return *device;
}

// Not a local static: every access goes through it.
Device *const D = &device();

#if defined(__x86_64__)
extern "C" void emu_switch(void **save, void *load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");
#endif

void to_fiber(void **save, Fiber *fiber) {
    D->current = fiber;
#if defined(__x86_64__)
    emu_switch(save, fiber->stack_pointer);
#else
    ucontext_t *from = save == &D->scheduler ? &D->scheduler_context
                                             : &reinterpret_cast<Fiber *>(save)->context;
    swapcontext(from, &fiber->context);
#endif
}

void to_scheduler(Fiber *fiber) {
#if defined(__x86_64__)
    emu_switch(&fiber->stack_pointer, D->scheduler);
#else
    swapcontext(&fiber->context, &D->scheduler_context);
#endif
}

/// The running fiber waits: another lane of its warp runs, or else the scheduler.
void wait() {
    Fiber *self = D->current;
    int first = self->rank / WARP * WARP;
    int count = D->threads - first < WARP ? D->threads - first : WARP;
    for (int i = 1; i < count; ++i) {
        Fiber *next = &D->fibers[first + (self->rank - first + i) % count];
        if (next->state == State::Ready) {
            to_fiber(&self->stack_pointer, next);
            return;
        }
    }
    to_scheduler(self);
}

void release_barriers() {
    for (int id = 0; id < BARRIERS; ++id) {
        Barrier &barrier = D->barriers[id];
        int expected = barrier.expected == 0 ? D->live : barrier.expected;
        if (barrier.arrived == 0 || barrier.arrived < expected) {
            continue;
        }
        barrier.arrived = 0;
        for (int i = 0; i < D->threads; ++i) {
            if (D->fibers[i].state == State::Barrier && D->fibers[i].barrier == id) {
                D->fibers[i].state = State::Ready;
            }
        }
    }
}

void fiber_main() {
    D->invoke(D->args);
    Fiber *self = D->current;
    self->state = State::Done;
    D->live -= 1;
    release_barriers();
    wait();
    abort(); // nothing switches to a fiber that is done
}

void prepare(Fiber &fiber, int rank) {
    unsigned char *top = D->stacks + (rank + 1) * (STACK_BYTES + PAGE);
#if defined(__x86_64__)
    void **sp = reinterpret_cast<void **>(top) - 2;
    *sp = reinterpret_cast<void *>(&fiber_main);
    sp -= 6; // what emu_switch pops; their values do not matter
    fiber.stack_pointer = sp;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = top - STACK_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, &fiber_main, 0);
#endif
    fiber.state = State::Ready;
    if (fiber.groups.size() != 1 || !fiber.groups.front().empty()) {
        fiber.groups.assign(1, {});
    }
}

/// Lets the oldest copy under way arrive; false when there is none.
bool finish_copy() {
    if (D->copies.empty()) {
        return false;
    }
    BulkCopy copy = D->copies.front();
    D->copies.erase(D->copies.begin());
    if (copy.to != nullptr) {
        memset(copy.to, 0, copy.filled);
        memcpy(copy.to, copy.from, copy.bytes);
    }
    if (copy.arrived != nullptr) {
        copy.arrived(copy.context);
    }
    return true;
}

std::string describe_waiters() {
    std::string text;
    for (int i = 0; i < D->threads && text.size() < 600; ++i) {
        const Fiber &fiber = D->fibers[i];
        const char *what = fiber.state == State::Done ? "ended" : fiber.what;
        char line[96];
        snprintf(line, sizeof line, "%s thread %d: %s", text.empty() ? "" : ",", i, what);
        text += line;
    }
    return text;
}

void check_shared_canary() {
    static const std::vector<unsigned char> poison(SHARED_CANARY, POISON);
    const unsigned char *canary = D->shared + D->shared_bytes;
    if (memcmp(canary, poison.data(), SHARED_CANARY) == 0) {
        return;
    }
    size_t at = 0;
    while (canary[at] == POISON) {
        at += 1;
    }
    stop("writes byte %zu of %u bytes of shared memory", D->shared_bytes + at, D->shared_bytes);
}

void run_block() {
    D->block_serial += 1;
    D->live = D->threads;
    memset(D->barriers, 0, sizeof D->barriers);
    D->copies.clear();
    memset(D->shared, POISON, D->shared_bytes + SHARED_CANARY);
    for (int i = 0; i < D->threads; ++i) {
        prepare(D->fibers[i], i);
    }
    int warps = (D->threads + WARP - 1) / WARP;
    while (D->live > 0) {
        int first_warp = static_cast<int>(choose(warps));
        Fiber *next = nullptr;
        for (int w = 0; w < warps && next == nullptr; ++w) {
            int first = (first_warp + w) % warps * WARP;
            int count = D->threads - first < WARP ? D->threads - first : WARP;
            int lane = static_cast<int>(choose(count));
            for (int i = 0; i < count && next == nullptr; ++i) {
                Fiber *fiber = &D->fibers[first + (lane + i) % count];
                next = fiber->state == State::Ready ? fiber : nullptr;
            }
        }
        if (next == nullptr && finish_copy()) {
            continue;
        }
        if (next == nullptr) {
            stop("no thread can go on:%s", describe_waiters().c_str());
        }
        to_fiber(&D->scheduler, next);
    }
    if (!D->copies.empty()) {
        stop("a block ends before its copies arrived");
    }
    check_shared_canary();
}

void on_fault(int signal, siginfo_t *info, void *) {
    char text[160];
    snprintf(text, sizeof text, "signal %d at address %p", signal, info->si_addr);
    D->error = text;
    siglongjmp(D->escape, 1);
}

void set_up() {
    if (D->stacks != nullptr) {
        return;
    }
    size_t bytes = (STACK_BYTES + PAGE) * BLOCK_THREADS_MAX + PAGE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    size_t shared_pages = (SHARED_MAX + SHARED_CANARY + PAGE - 1) / PAGE * PAGE;
    void *shared = mmap(nullptr, shared_pages + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (stacks == MAP_FAILED || shared == MAP_FAILED) {
        perror("emulator: mmap");
        abort();
    }
    D->stacks = static_cast<unsigned char *>(stacks);
    for (int i = 0; i <= BLOCK_THREADS_MAX; ++i) {
        mprotect(D->stacks + i * (STACK_BYTES + PAGE), PAGE, PROT_NONE);
    }
    D->shared = static_cast<unsigned char *>(shared);
    mprotect(D->shared + shared_pages, PAGE, PROT_NONE);
    D->fibers.resize(BLOCK_THREADS_MAX);
}

/// The allocation that holds an address, or none.
const Allocation *allocation_at(const void *pointer, size_t bytes) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    auto after = D->allocations.upper_bound(address);
    if (after == D->allocations.begin()) {
        return nullptr;
    }
    auto found = std::prev(after);
    bool inside = address + bytes <= found->first + found->second.bytes;
    return inside ? &found->second : nullptr;
}

bool canaries_live(uintptr_t first, const Allocation &allocation) {
    const auto *data = reinterpret_cast<const unsigned char *>(first);
    for (const unsigned char *p = data - CANARY; p < data; ++p) {
        if (*p != CANARY_BYTE) {
            return false;
        }
    }
    const unsigned char *end = allocation.map + allocation.map_bytes - PAGE;
    for (const unsigned char *p = data + allocation.bytes; p < end; ++p) {
        if (*p != CANARY_BYTE) {
            return false;
        }
    }
    return true;
}

void check_canaries() {
    for (const auto &[first, allocation] : D->allocations) {
        if (!canaries_live(first, allocation)) {
            stop("wrote outside an allocation of %zu bytes", allocation.bytes);
        }
    }
}

void run_grid(const Index3 &grid, const Index3 &block) {
    size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
    // An affine walk visits every block once, in an order that depends on the seed.
    size_t step = blocks < 2 ? 1 : 1 + choose(static_cast<uint32_t>(blocks - 1));
    for (auto gcd = [](size_t a, size_t b) { while (b) { size_t t = a % b; a = b; b = t; } return a; };
         blocks > 1 && gcd(step, blocks) != 1;) {
        step += 1;
    }
    size_t at = choose(static_cast<uint32_t>(blocks));
    for (size_t i = 0; i < blocks; ++i, at = (at + step) % blocks) {
        auto rank = static_cast<unsigned>(at);
        Index3 index = {rank % grid.x, rank / grid.x % grid.y, rank / grid.x / grid.y};
        for (int t = 0; t < D->threads; ++t) {
            auto u = static_cast<unsigned>(t);
            Fiber &fiber = D->fibers[t];
            fiber.rank = t;
            fiber.place = {{u % block.x, u / block.x % block.y, u / block.x / block.y}, index, block, grid};
        }
        run_block();
    }
    check_canaries();
}

/// What the driver would refuse.
bool is_refused(const Index3 &grid, const Index3 &block, size_t shared_bytes) {
    size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
    bool grid_fits = grid.x >= 1 && grid.x <= 0x7FFFFFFF && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1
                     && grid.z <= 65535;
    return !grid_fits || threads < 1 || threads > BLOCK_THREADS_MAX || block.z > 64 || shared_bytes > SHARED_MAX;
}

bool launch(const char *name, const Index3 &grid, const Index3 &block, size_t shared_bytes, void **args) {
    set_up();
    auto kernel = D->kernels.find(name);
    if (kernel == D->kernels.end()) {
        D->error = "no such kernel";
        return false;
    }
    if (is_refused(grid, block, shared_bytes)) {
        D->error = "a grid, block or size of shared memory that a device refuses";
        return false;
    }
    D->invoke = kernel->second;
    D->args = args;
    D->threads = static_cast<int>(block.x * block.y * block.z);
    D->shared_bytes = static_cast<uint32_t>(shared_bytes);
    struct sigaction fault = {}, before_segv, before_bus;
    fault.sa_sigaction = &on_fault;
    fault.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &fault, &before_segv);
    sigaction(SIGBUS, &fault, &before_bus);
    D->error.clear();
    if (sigsetjmp(D->escape, 1) == 0) {
        run_grid(grid, block);
    }
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    D->current = nullptr;
    return D->error.empty();
}

} // namespace

const Place &place() { return D->current->place; }
uint64_t block_serial() { return D->block_serial; }
int thread_rank() { return D->current->rank; }
unsigned char *shared() { return D->shared; }

void stop(const char *format, ...) {
    char text[1024];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    char where[160] = "";
    if (D->current != nullptr) {
        const Place &p = D->current->place;
        snprintf(where, sizeof where, " (block %u,%u,%u thread %d)", p.block.x, p.block.y, p.block.z,
                 D->current->rank);
    }
    D->error = std::string(text) + where;
    siglongjmp(D->escape, 1);
}

uint32_t choose(uint32_t below) {
    D->random = D->random * 6364136223846793005ULL + 1442695040888963407ULL;
    return below == 0 ? 0 : static_cast<uint32_t>((D->random >> 33) % below);
}

/// All of `lanes` from thread `first` on wait for the same operation.
static bool all_wait(int first, int count, uint32_t lanes, State state, const Fiber *self) {
    for (int i = 0; i < count; ++i) {
        if (count <= WARP && !(lanes >> i & 1)) {
            continue;
        }
        if (first + i >= D->threads) {
            stop("%s names lane %d, which does not exist", self->what, i);
        }
        const Fiber &fiber = D->fibers[first + i];
        if (fiber.state == State::Done) {
            stop("%s waits for thread %d, which has ended", self->what, first + i);
        }
        if (fiber.state != state) {
            return false;
        }
        if (fiber.what != self->what || fiber.lanes != lanes) {
            stop("threads of a warp are at %s and %s", self->what, fiber.what);
        }
    }
    return true;
}

static void collective(const char *what, uint32_t lanes, void *slot, WarpAct act, State state) {
    Fiber *self = D->current;
    int width = state == State::Warp ? WARP : 4 * WARP;
    int first = self->rank / width * width;
    if (state == State::Warp && !(lanes >> (self->rank - first) & 1)) {
        stop("%s without its own lane in the mask", what);
    }
    self->what = what;
    self->lanes = lanes;
    self->slot = slot;
    self->state = state;
    if (!all_wait(first, width, lanes, state, self)) {
        wait();
        return;
    }
    void *slots[4 * WARP] = {};
    for (int i = 0; i < width; ++i) {
        bool is_in = state == State::Group || (lanes >> i & 1);
        slots[i] = is_in ? D->fibers[first + i].slot : nullptr;
    }
    act(slots, lanes);
    for (int i = 0; i < width; ++i) {
        if (state == State::Group || (lanes >> i & 1)) {
            D->fibers[first + i].state = State::Ready;
        }
    }
}

void warp_collective(const char *what, uint32_t lanes, void *slot, WarpAct act) {
    collective(what, lanes, slot, act, State::Warp);
}

void group_collective(const char *what, void *slot, WarpAct act) {
    collective(what, ~0U, slot, act, State::Group);
}

void barrier(int id, int threads) {
    if (id < 0 || id >= BARRIERS || threads < 0 || threads > D->threads) {
        stop("barrier %d of %d threads", id, threads);
    }
    Fiber *self = D->current;
    self->what = "barrier";
    self->state = State::Barrier;
    self->barrier = id;
    Barrier &barrier = D->barriers[id];
    if (barrier.arrived > 0 && barrier.expected != threads) {
        stop("barrier %d of %d and of %d threads", id, barrier.expected, threads);
    }
    barrier.expected = threads;
    barrier.arrived += 1;
    release_barriers();
    if (self->state == State::Barrier || choose(2) == 0) {
        wait();
    }
}

void yield() {
    if (choose(4) == 0) {
        to_scheduler(D->current);
    }
}

void wait_event(const char *what) {
    D->current->what = what;
    D->current->state = State::Event;
    wait();
}

void signal() {
    for (int i = 0; i < D->threads; ++i) {
        if (D->fibers[i].state == State::Event) {
            D->fibers[i].state = State::Ready;
        }
    }
}

void bulk_copy(void *to, const void *from, size_t bytes, void (*arrived)(void *), void *context) {
    D->copies.push_back({to, from, bytes, bytes, arrived, context});
    if (choose(2) == 0) {
        finish_copy();
    }
}

void *shared_at(uint32_t address, uint32_t bytes, uint32_t align, const char *what) {
    uint32_t offset = address - SHARED_BASE;
    if (address < SHARED_BASE || offset + bytes > D->shared_bytes || address % align != 0) {
        stop("%s of %u bytes at shared byte %d of %u", what, bytes, static_cast<int>(offset), D->shared_bytes);
    }
    return D->shared + offset;
}

uint32_t shared_address(const void *pointer) {
    auto offset = static_cast<const unsigned char *>(pointer) - D->shared;
    if (offset < 0 || offset > D->shared_bytes) {
        stop("a shared address of something that is not in shared memory");
    }
    return static_cast<uint32_t>(offset) + SHARED_BASE;
}

void check_global(const void *pointer, size_t bytes, size_t align, const char *what) {
    if (reinterpret_cast<uintptr_t>(pointer) % align != 0) {
        stop("%s of %zu bytes at the misaligned address %p", what, bytes, pointer);
    }
    if (bytes != 0 && allocation_at(pointer, bytes) == nullptr) {
        stop("%s of %zu bytes at %p, which no allocation holds", what, bytes, pointer);
    }
}

/// The bytes of a copy arrive at once or when they are waited for: both are allowed to the hardware.
void copy_async(void *to, const void *from, int bytes_read) {
    Copy copy = {to, from, bytes_read, choose(2) == 0};
    if (copy.done) {
        memset(to, 0, 16);
        memcpy(to, from, static_cast<size_t>(bytes_read));
    }
    D->current->groups.back().push_back(copy);
}

void copy_async_commit() { D->current->groups.emplace_back(); }

void copy_async_wait(int groups_left) {
    auto &groups = D->current->groups;
    while (static_cast<int>(groups.size()) - 1 > groups_left) {
        for (const Copy &copy : groups.front()) {
            if (!copy.done) {
                memset(copy.to, 0, 16);
                memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
            }
        }
        groups.erase(groups.begin());
    }
}

void copy_async_then(void (*arrived)(void *), void *context) {
    auto &open = D->current->groups.back();
    for (const Copy &copy : open) {
        if (!copy.done) {
            D->copies.push_back({copy.to, copy.from, static_cast<size_t>(copy.bytes), 16, nullptr, nullptr});
        }
    }
    open.clear();
    D->copies.push_back({nullptr, nullptr, 0, 0, arrived, context});
}

Registrar::Registrar(const char *name, Invoke invoke) {
    bool is_new = device().kernels.emplace(name, invoke).second;
    if (!is_new) {
        fprintf(stderr, "emulator: two kernels are named %s\n", name);
        abort();
    }
}

} // namespace emu

using emu::D;

extern "C" {

int tr_emulator_abi(void) { return 1; }

/// Poisoned device memory, 256-byte aligned, with canaries on both sides and a guard page behind.
void *tr_emulator_alloc(size_t bytes) {
    std::lock_guard<std::mutex> lock(D->mutex);
    size_t data = (bytes + emu::ALIGN - 1) / emu::ALIGN * emu::ALIGN;
    size_t pages = (data + emu::CANARY + emu::PAGE - 1) / emu::PAGE * emu::PAGE;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    void *map = mmap(nullptr, pages + emu::PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (map == MAP_FAILED) {
        return nullptr;
    }
    auto *begin = static_cast<unsigned char *>(map);
    unsigned char *first = begin + pages - data;
    mprotect(begin + pages, emu::PAGE, PROT_NONE);
    memset(first - emu::CANARY, emu::CANARY_BYTE, emu::CANARY);
    memset(first, emu::CANARY_BYTE, data);
    memset(first, emu::POISON, bytes);
    D->allocations[reinterpret_cast<uintptr_t>(first)] = {begin, pages + emu::PAGE, bytes};
    return first;
}

/// 0; 1 when a canary was overwritten; 2 when it is no allocation.
int tr_emulator_free(void *pointer) {
    std::lock_guard<std::mutex> lock(D->mutex);
    auto found = D->allocations.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == D->allocations.end()) {
        return 2;
    }
    bool intact = emu::canaries_live(found->first, found->second);
    munmap(found->second.map, found->second.map_bytes);
    D->allocations.erase(found);
    return intact ? 0 : 1;
}

/// Decides the order in which warps and blocks run, and when asynchronous copies arrive.
void tr_emulator_seed(unsigned long long seed) {
    std::lock_guard<std::mutex> lock(D->mutex);
    D->random = seed * 2 + 1;
}

/// Runs a kernel to its end; `args[i]` points at argument i. 0, or not 0 and a sentence in `error`.
int tr_emulator_launch(const char *name, const unsigned grid[3], const unsigned block[3], size_t shared_bytes,
                       void **args, char *error, size_t error_len) {
    std::lock_guard<std::mutex> lock(D->mutex);
    bool is_done = emu::launch(name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, args);
    if (!is_done) {
        snprintf(error, error_len, "%s: %s", name, D->error.c_str());
    }
    return is_done ? 0 : 1;
}
}
