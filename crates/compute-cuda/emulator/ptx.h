// The emulator's version of kernels/ptx.cuh: the same names, the same fragments.
#pragma once

#include <vector>

/// The block's dynamic shared memory, 1024-byte aligned.
static inline unsigned char *tr_shared() { return emu::shared(); }
static inline u32 shared_address(const void *p) { return emu::shared_address(p); }

// Conversions.
static inline u16 bf16_from(float x) {
    u32 u = __float_as_uint(x);
    return x != x ? 0x7FFF : static_cast<u16>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}
static inline float bf16_to(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }
static inline u32 bf16x2_from(float low, float high) {
    return bf16_from(low) | static_cast<u32>(bf16_from(high)) << 16;
}
static inline float bf16x2_low(u32 x) { return __uint_as_float(x << 16); }
static inline float bf16x2_high(u32 x) { return __uint_as_float(x & 0xFFFF0000U); }

static inline u32 bf16x2_fma(u32 a, u32 b, u32 c) {
    // Rounded twice (f32, then bf16), which the device does not: a difference in ties only.
    auto fma_one = [](u32 x, u32 y, u32 z) { return bf16_from(fmaf(bf16_to(u16(x)), bf16_to(u16(y)), bf16_to(u16(z)))); };
    return fma_one(a, b, c) | static_cast<u32>(fma_one(a >> 16, b >> 16, c >> 16)) << 16;
}
static inline u32 bf16x2_repeat_low(u32 x) { return (x & 0xFFFF) | x << 16; }
static inline u32 bf16x2_repeat_high(u32 x) { return x >> 16 | (x & 0xFFFF0000U); }
static inline void bar_sync(int id, int threads) { emu::barrier(id, threads); }

// Global memory.
static inline uint4 load_stream_16(const void *p) {
    emu::check_global(p, 16, 16, "a load");
    return *static_cast<const uint4 *>(p);
}
static inline uint4 load_16(const void *p) { return load_stream_16(p); }
static inline uint2 load_8(const void *p) {
    emu::check_global(p, 8, 8, "a load");
    return *static_cast<const uint2 *>(p);
}
static inline int computed_here(int x) { return x; }
static inline float load_in_place(const float *p) {
    emu::check_global(p, 4, 4, "a load");
    return *p;
}
static inline uint4 load_16_in_place(const void *p) {
    emu::check_global(p, 16, 16, "a load");
    return *static_cast<const uint4 *>(p);
}
static inline float2 load_two_in_place(const float *p) {
    emu::check_global(p, 8, 8, "a load");
    return make_float2(p[0], p[1]);
}
static inline u32 load_4(const void *p) {
    emu::check_global(p, 4, 4, "a load");
    return *static_cast<const u32 *>(p);
}

// Asynchronous copies to shared memory.
static inline void cp_async_16(u32 to, const void *from, int bytes) {
    if (bytes < 0 || bytes > 16) {
        emu::stop("cp.async of %d bytes", bytes);
    }
    emu::check_global(from, static_cast<size_t>(bytes), 16, "cp.async");
    emu::copy_async(emu::shared_at(to, 16, 16, "cp.async"), from, bytes);
}
static inline void cp_async_commit() { emu::copy_async_commit(); }
template <int LEFT> static inline void cp_async_wait() { emu::copy_async_wait(LEFT); }
static inline void fence_proxy_async() {}

// ldmatrix: matrix `i` of 8 x 8 b16 has its row addresses in lanes 8 i to 8 i + 7; lane `l` receives elements
// 2 (l % 4) and the next of row l / 4, or with .trans those of column l / 4.
struct EmuMatrix {
    u32 address;
    u32 *to;
};
template <int COUNT, bool TRANS> static inline void emu_ldmatrix(u32 *to, u32 address) {
    EmuMatrix slot = {address, to};
    emu::warp_collective(TRANS ? "ldmatrix.trans" : "ldmatrix", ~0U, &slot, [](void *const *slots, u32) {
        for (int m = 0; m < COUNT; ++m) {
            const u16 *rows[8];
            for (int r = 0; r < 8; ++r) {
                u32 at = static_cast<EmuMatrix *>(slots[m * 8 + r])->address;
                rows[r] = static_cast<const u16 *>(emu::shared_at(at, 16, 16, "ldmatrix"));
            }
            for (int l = 0; l < 32; ++l) {
                int a = l / 4, b = l % 4 * 2;
                u32 low = TRANS ? rows[b][a] : rows[a][b];
                u32 high = TRANS ? rows[b + 1][a] : rows[a][b + 1];
                static_cast<EmuMatrix *>(slots[l])->to[m] = low | high << 16;
            }
        }
    });
}
static inline void ldmatrix_x4(u32 (&to)[4], u32 address) { emu_ldmatrix<4, false>(to, address); }
static inline void ldmatrix_x2(u32 (&to)[2], u32 address) { emu_ldmatrix<2, false>(to, address); }
static inline void ldmatrix_x4_trans(u32 (&to)[4], u32 address) { emu_ldmatrix<4, true>(to, address); }
static inline void ldmatrix_x2_trans(u32 (&to)[2], u32 address) { emu_ldmatrix<2, true>(to, address); }

static inline float f16_to(u16 x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return static_cast<float>(half);
}
static inline u8 emu_e4m3_from(float x) {
    u8 sign = std::signbit(x) ? 0x80 : 0;
    float magnitude = fabsf(x);
    if (x != x) {
        return 0x7F;
    }
    if (magnitude >= 464) {
        return sign | 0x7E; // 448; 464 is the tie with 480, which does not exist
    }
    int exponent = magnitude < 0x1p-6F ? -6 : ilogbf(magnitude);
    auto steps = static_cast<u32>(nearbyintf(ldexpf(magnitude, 3 - exponent)));
    // A mantissa of 8 carries into the exponent by itself.
    u32 code = (exponent == -6 ? 0 : static_cast<u32>(exponent + 6) * 8) + steps;
    return sign | static_cast<u8>(code > 0x7E ? 0x7E : code);
}
static inline u16 e4m3x2_from(float low, float high) {
    return static_cast<u16>(emu_e4m3_from(low) | emu_e4m3_from(high) << 8);
}

// mma.sync m16n8: lane l has rows l / 4 and l / 4 + 8 of A and D, column l / 4 of B, and columns 2 (l % 4) and the
// next of D. A register holds 32 bits of k: those at (l % 4), and those 4 registers further.
struct EmuMma {
    float *d;
    const u32 *a;
    const u32 *b;
};
static inline float emu_e4m3(u32 x) {
    static float table[256];
    if (table[1] == 0) {
        for (u32 code = 0; code < 256; ++code) {
            u32 exponent = code >> 3 & 15, mantissa = code & 7;
            float value = ldexpf(static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa), static_cast<int>(max(exponent, 1U)) - 10);
            value = exponent == 15 && mantissa == 7 ? NAN : value;
            table[code] = code & 0x80 ? -value : value;
        }
    }
    return table[x];
}
/// Element `i` of a register of elements of `BITS` bits.
template <int BITS> static inline float emu_element(u32 word, int i) {
    return BITS == 16 ? bf16_to(static_cast<u16>(word >> (16 * i))) : emu_e4m3(word >> (8 * i) & 255);
}
template <int PER, class Element> static inline void emu_mma_of(void *const *slots, Element element) {
    float a[16][8 * PER], b[8][8 * PER];
    for (int l = 0; l < 32; ++l) {
        const auto *lane = static_cast<EmuMma *>(slots[l]);
        for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < PER; ++i) {
                a[l / 4 + r % 2 * 8][(l % 4 + r / 2 * 4) * PER + i] = element(lane->a[r], i);
            }
        }
        for (int r = 0; r < 2; ++r) {
            for (int i = 0; i < PER; ++i) {
                b[l / 4][(l % 4 + r * 4) * PER + i] = element(lane->b[r], i);
            }
        }
    }
    for (int l = 0; l < 32; ++l) {
        float *d = static_cast<EmuMma *>(slots[l])->d;
        for (int i = 0; i < 4; ++i) {
            double sum = d[i];
            for (int k = 0; k < 8 * PER; ++k) {
                sum += static_cast<double>(a[l / 4 + i / 2 * 8][k]) * b[l % 4 * 2 + i % 2][k];
            }
            d[i] = static_cast<float>(sum);
        }
    }
}
template <int BITS> static inline void emu_mma(void *const *slots) {
    emu_mma_of<32 / BITS>(slots, emu_element<BITS>);
}
static inline void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    EmuMma slot = {d, a, b};
    emu::warp_collective("mma.bf16", ~0U, &slot, [](void *const *slots, u32) { emu_mma<16>(slots); });
}
static inline void mma_e4m3(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    EmuMma slot = {d, a, b};
    emu::warp_collective("mma.e4m3", ~0U, &slot, [](void *const *slots, u32) { emu_mma<8>(slots); });
}

// f16.
static inline u16 emu_f16_from(float x) {
    _Float16 half = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline float emu_f16_to(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}
static inline u32 f16x2_from(float low, float high) {
    return emu_f16_from(low) | static_cast<u32>(emu_f16_from(high)) << 16;
}
static inline void mma_f16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    EmuMma slot = {d, a, b};
    emu::warp_collective("mma.f16", ~0U, &slot, [](void *const *slots, u32) {
        emu_mma_of<2>(slots, [](u32 word, int i) { return emu_f16_to(static_cast<u16>(word >> (16 * i))); });
    });
}
static inline float exp2_fast(float x) { return exp2f(x); }
static inline float2 load_fresh_8(const void *p) {
    emu::check_global(p, 8, 8, "a load");
    return *static_cast<const float2 *>(p);
}
static inline float reciprocal_fast(float x) { return 1.0F / x; }
static inline float reciprocal_sqrt(float x) { return reciprocal_fast(sqrtf(x)); }

// wgmma: the sums of a group of 128 threads change when they are waited for, and B is read then and no sooner: what
// overwrites it before the wait gives a wrong result here. A is taken at once: the compiler orders registers.
struct EmuProduct {
    u32 a[128][4];
    float *d[128];
    u64 b;
    int columns, bits;
};
struct EmuGroup {
    u64 block = 0;
    std::vector<std::vector<EmuProduct>> groups; // the last is open
};
static inline EmuGroup &emu_group() {
    static EmuGroup groups[emu::CLUSTER_BLOCKS_MAX][8];
    EmuGroup &group = groups[emu::cluster_rank()][emu::thread_rank() / 128];
    if (group.block != emu::block_serial()) {
        group.block = emu::block_serial();
        group.groups.assign(1, {});
    }
    return group;
}
/// One byte of row `n` of B: the swizzle exclusive-ors bits 4 to 6 of the address with bits 7 to 9.
static inline u32 emu_b_word(u64 descriptor, int n, int byte) {
    u32 start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0 || (start & 1023) >= 128) {
        emu::stop("wgmma with a descriptor %llx that is not of the 128-byte swizzle", descriptor);
    }
    u32 address = start + static_cast<u32>(n / 8) * stride + static_cast<u32>(n % 8 * 128 + byte);
    return *static_cast<u32 *>(emu::shared_at(address ^ (address >> 7 & 7) << 4, 4, 4, "wgmma"));
}
template <int BITS> static inline void emu_run(const EmuProduct &product) {
    constexpr int PER = 32 / BITS, K = 8 * PER;
    static float a[64][K], b[256][K];
    for (int n = 0; n < product.columns * 8; ++n) {
        for (int k = 0; k < K; ++k) {
            b[n][k] = emu_element<BITS>(emu_b_word(product.b, n, k / PER * 4), k % PER);
        }
    }
    for (int l = 0; l < 128; ++l) {
        for (int r = 0; r < 4; ++r) {
            for (int i = 0; i < PER; ++i) {
                int row = l / 32 * 16 + l % 32 / 4 + r % 2 * 8;
                a[row][(l % 4 + r / 2 * 4) * PER + i] = emu_element<BITS>(product.a[l][r], i);
            }
        }
    }
    for (int l = 0; l < 128; ++l) {
        for (int j = 0; j < product.columns * 4; ++j) {
            int row = l / 32 * 16 + l % 32 / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + l % 4 * 2 + j % 2;
            double sum = product.d[l][j];
            for (int k = 0; k < K; ++k) {
                sum += static_cast<double>(a[row][k]) * b[column][k];
            }
            product.d[l][j] = static_cast<float>(sum);
        }
    }
}
struct EmuWgmma {
    float *d;
    const u32 *a;
    u64 b;
    int columns, bits;
};
template <int BITS, int COLUMNS> static inline void emu_wgmma(float (&d)[COLUMNS][4], const u32 (&a)[4], u64 b) {
    EmuWgmma slot = {&d[0][0], a, b, COLUMNS, BITS};
    emu::group_collective("wgmma", &slot, [](void *const *slots, u32) {
        const auto *first = static_cast<EmuWgmma *>(slots[0]);
        EmuProduct product = {{}, {}, first->b, first->columns, first->bits};
        for (int l = 0; l < 128; ++l) {
            const auto *lane = static_cast<EmuWgmma *>(slots[l]);
            if (lane->b != first->b) {
                emu::stop("wgmma with different descriptors");
            }
            memcpy(product.a[l], lane->a, sizeof product.a[l]);
            product.d[l] = lane->d;
        }
        emu_group().groups.back().push_back(product);
    });
}
template <int COLUMNS> static inline void wgmma_bf16(float (&d)[COLUMNS][4], const u32 (&a)[4], u64 b) {
    emu_wgmma<16>(d, a, b);
}
template <int COLUMNS> static inline void wgmma_e4m3(float (&d)[COLUMNS][4], const u32 (&a)[4], u64 b) {
    emu_wgmma<8>(d, a, b);
}
static inline void wgmma_fence() {}
static inline void wgmma_commit() {
    emu::group_collective("wgmma.commit", nullptr, [](void *const *, u32) { emu_group().groups.emplace_back(); });
}
template <int LEFT> static inline void wgmma_wait() {
    emu::group_collective("wgmma.wait", nullptr, [](void *const *, u32) {
        auto &groups = emu_group().groups;
        while (static_cast<int>(groups.size()) - 1 > LEFT) {
            for (const EmuProduct &product : groups.front()) {
                product.bits == 16 ? emu_run<16>(product) : emu_run<8>(product);
            }
            groups.erase(groups.begin());
        }
    });
}
template <int COLUMNS> static inline void wgmma_settle(float (&)[COLUMNS][4]) {}
static inline u64 wgmma_descriptor(u32 stage) {
    return static_cast<u64>(stage >> 4 & 0x3FFF) | 1ULL << 16 | 64ULL << 32 | 1ULL << 62;
}

// mbarrier: 64 bits of shared memory, here the phase, the arrivals of a phase, those still missing, and the bytes.
struct EmuMbarrier {
    u32 phase : 1, count : 15, missing : 16;
    int32_t bytes;
};
/// The mbarrier at `address` in a block of the cluster. Poison is none: fewer arrivals are missing than are counted.
static inline EmuMbarrier *emu_mbarrier_of(int rank, u32 address, const char *what) {
    auto *barrier = static_cast<EmuMbarrier *>(emu::shared_of(rank, address, 8, 8, what));
    if (barrier->missing > barrier->count) {
        emu::stop("%s at shared byte %u of block %d of the cluster, where no mbarrier was initialised", what,
                  address - emu::SHARED_BASE, rank);
    }
    return barrier;
}
static inline EmuMbarrier *emu_mbarrier(u32 address, const char *what) {
    return emu_mbarrier_of(emu::cluster_rank(), address, what);
}
static inline void emu_complete(EmuMbarrier *barrier) {
    if (barrier->missing == 0 && barrier->bytes == 0) {
        barrier->phase ^= 1;
        barrier->missing = barrier->count;
        emu::signal();
    }
}
static inline void mbarrier_init(u32 address, int count) {
    *static_cast<EmuMbarrier *>(emu::shared_at(address, 8, 8, "mbarrier.init")) = {0, static_cast<u32>(count), static_cast<u32>(count), 0};
}
static inline void fence_mbarrier_init() {}
static inline void emu_arrive(EmuMbarrier *barrier, int bytes) {
    if (barrier->missing == 0) {
        emu::stop("an arrival at an mbarrier that expects no more in this phase");
    }
    barrier->bytes += bytes;
    barrier->missing -= 1;
    emu_complete(barrier);
}
static inline void mbarrier_arrive(u32 address) { emu_arrive(emu_mbarrier(address, "mbarrier.arrive"), 0); }
static inline void mbarrier_arrive_expect(u32 address, int bytes) {
    emu_arrive(emu_mbarrier(address, "mbarrier.arrive"), bytes);
}
static inline void mbarrier_wait(u32 address, u32 parity) {
    while (emu_mbarrier(address, "mbarrier.wait")->phase == parity) {
        emu::wait_event("mbarrier.wait");
    }
}
static inline void mbarrier_arrive_copied(u32 address) {
    auto arrived = [](void *barrier) {
        auto *at = static_cast<EmuMbarrier *>(barrier);
        at->missing -= 1;
        emu_complete(at);
    };
    emu::copy_async_then(arrived, emu_mbarrier(address, "cp.async.mbarrier.arrive"));
}
struct EmuBulk {
    EmuMbarrier *barrier;
    int bytes;
};
static inline void emu_bulk_copy(int rank, u32 to, const void *from, int bytes, u32 mbarrier) {
    void *target = emu::shared_of(rank, to, static_cast<u32>(bytes), 16, "cp.async.bulk");
    auto *context = new EmuBulk{emu_mbarrier_of(rank, mbarrier, "cp.async.bulk"), bytes};
    emu::bulk_copy(rank, target, from, static_cast<size_t>(bytes), [](void *p) {
        auto *copy = static_cast<EmuBulk *>(p);
        copy->barrier->bytes -= copy->bytes;
        emu_complete(copy->barrier);
        delete copy;
    }, context);
}
static inline void emu_check_bulk(const void *from, int bytes) {
    if (bytes <= 0 || bytes % 16 != 0) {
        emu::stop("cp.async.bulk of %d bytes", bytes);
    }
    emu::check_global(from, static_cast<size_t>(bytes), 16, "cp.async.bulk");
}
static inline void bulk_copy(u32 to, const void *from, int bytes, u32 mbarrier) {
    emu_check_bulk(from, bytes);
    emu_bulk_copy(emu::cluster_rank(), to, from, bytes, mbarrier);
}

// Clusters.
static inline u32 cluster_rank() { return static_cast<u32>(emu::cluster_rank()); }
static inline void cluster_sync() { emu::cluster_sync(); }
static inline void mbarrier_arrive_at(u32 address, u32 rank) {
    emu::yield();
    emu_arrive(emu_mbarrier_of(static_cast<int>(rank), address, "mbarrier.arrive"), 0);
}
/// A copy for each block of the mask, from a seeded one on: they arrive apart from each other.
static inline void bulk_copy_to_all(u32 to, const void *from, int bytes, u32 mbarrier, u16 mask) {
    emu::yield();
    emu_check_bulk(from, bytes);
    if (mask == 0) {
        emu::stop("cp.async.bulk to no block");
    }
    int ranks[16], count = 0;
    for (int rank = 0; rank < 16; ++rank) {
        if (mask >> rank & 1) {
            ranks[count++] = rank;
        }
    }
    u32 first = emu::choose(static_cast<u32>(count));
    for (int i = 0; i < count; ++i) {
        emu_bulk_copy(ranks[(first + static_cast<u32>(i)) % static_cast<u32>(count)], to, from, bytes, mbarrier);
    }
}
template <int COUNT> static inline void registers_down() {}
template <int COUNT> static inline void registers_up() {}
static inline uint4 shared_load_16(u32 address) { return *static_cast<uint4 *>(emu::shared_at(address, 16, 16, "a shared load")); }
static inline uint2 load_stream_8(const void *p) {
    emu::check_global(p, 8, 8, "a load");
    return *static_cast<const uint2 *>(p);
}
static inline u32 f16x2_sub(u32 a, u32 b) {
    return f16x2_from(emu_f16_to(static_cast<u16>(a)) - emu_f16_to(static_cast<u16>(b)),
                      emu_f16_to(static_cast<u16>(a >> 16)) - emu_f16_to(static_cast<u16>(b >> 16)));
}
static inline int load_fresh(const int *p) {
    emu::check_global(p, 4, 4, "a load");
    return *p;
}
// Kernels run one after another here.
static inline void grid_wait() {}
static inline void grid_begin() {}
static inline void prefetch_line(const void *p) { emu::check_global(p, 128, 128, "a prefetch"); }
