// Small kernels, right and wrong, that show what the emulator does and what it notices.

/// C [16, 8] = A [16, k] B [8, k]^T by mma_bf16, B through shared memory and ldmatrix.
extern "C" __global__ void tr_selftest_mma(const u16 *a, const u16 *b, float *c, int k) {
    int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
    auto *shared = reinterpret_cast<u16 *>(tr_shared()); // [8, 16]
    float d[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < k; k0 += 16) {
        if (lane < 16) {
            cp_async_16(shared_address(shared + lane * 8), b + lane / 2 * k + k0 + lane % 2 * 8, 16);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncwarp();
        u32 bf[2];
        ldmatrix_x2(bf, shared_address(shared + lane % 8 * 16 + lane / 8 % 2 * 8));
        const u16 *row = a + g * k + k0 + t * 2;
        u32 af[4] = {load_4(row), load_4(row + 8 * k), load_4(row + 8), load_4(row + 8 * k + 8)};
        mma_bf16(d, af, bf);
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) {
        c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
    }
}

/// Reverses `n` ints through shared memory; without `sync` it is wrong.
extern "C" __global__ void tr_selftest_reverse(int *x, int n, int sync) {
    auto *shared = reinterpret_cast<int *>(tr_shared());
    int i = static_cast<int>(threadIdx.x);
    shared[i] = x[i];
    if (sync) {
        __syncthreads();
    }
    x[i] = shared[n - 1 - i];
}

/// out[block] = sum of a block's x by shuffles and ballots.
extern "C" __global__ void tr_selftest_sum(const int *x, int *out) {
    int value = x[blockIdx.x * 32 + threadIdx.x];
    u32 odd = __ballot_sync(~0U, value & 1);
    for (int bits = 16; bits > 0; bits /= 2) {
        value += __shfl_xor_sync(~0U, value, bits);
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x] = value * 100 + __popc(odd);
    }
}

/// Writes one element behind the end.
extern "C" __global__ void tr_selftest_overrun(int *x, int n) { x[n] = 1; }

/// Half of a warp waits for the other half.
extern "C" __global__ void tr_selftest_divergence(int *x) {
    if (threadIdx.x < 16) {
        x[threadIdx.x] = __shfl_sync(~0U, 1, 0);
    }
}

// Clusters.

constexpr int RING_STAGES = 2;
/// Words that a block sends in a round.
constexpr int RING_WORDS = 64;
/// What a ring leaves out, in the order of selftest_clusters.cpp.
enum RingFault { RING_RIGHT, RING_OWN_EMPTY, RING_NO_FIRST_SYNC, RING_NO_LAST_SYNC };

/// Every round each of the `C` blocks of a cluster sends its part of the words to all of them. All threads but the first
/// warp's hash the words of a stage, and give it back to all senders: with RING_OWN_EMPTY to their own block's alone.
template <int C> __device__ void ring(const u32 *x, u32 *out, int rounds, int fault) {
    int thread = static_cast<int>(threadIdx.x), consumers = static_cast<int>(blockDim.x) - 32;
    u32 rank = cluster_rank(), stages = shared_address(tr_shared());
    u32 full = stages + RING_STAGES * C * RING_WORDS * 4, empty = full + RING_STAGES * 8;
    u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    x += ((blockIdx.z * gridDim.y / C + blockIdx.y / C) * gridDim.x + blockIdx.x) * static_cast<u32>(rounds) * C * RING_WORDS;
    bool is_own_only = fault == RING_OWN_EMPTY;
    if (thread == 0) {
        for (u32 stage = 0; stage < RING_STAGES; ++stage) {
            mbarrier_init(full + stage * 8, 1);
            mbarrier_init(empty + stage * 8, is_own_only ? 1 : C);
        }
        fence_mbarrier_init();
    }
    if (fault == RING_NO_FIRST_SYNC) {
        __syncthreads();
    } else {
        cluster_sync();
    }
    for (int i = 0; thread == 0 && i < rounds; ++i) {
        u32 stage = static_cast<u32>(i) % RING_STAGES, lap = static_cast<u32>(i) / RING_STAGES;
        if (lap > 0) {
            mbarrier_wait(empty + stage * 8, (lap - 1) & 1);
        }
        mbarrier_arrive_expect(full + stage * 8, C * RING_WORDS * 4);
        bulk_copy_to_all(stages + (stage * C + rank) * RING_WORDS * 4, x + (static_cast<u32>(i) * C + rank) * RING_WORDS,
                         RING_WORDS * 4, full + stage * 8, static_cast<u16>((1 << C) - 1));
    }
    u32 hash = rank;
    for (int i = 0; thread >= 32 && i < rounds; ++i) {
        u32 stage = static_cast<u32>(i) % RING_STAGES, lap = static_cast<u32>(i) / RING_STAGES;
        mbarrier_wait(full + stage * 8, lap & 1);
        const auto *words = reinterpret_cast<const u32 *>(tr_shared()) + stage * C * RING_WORDS;
        for (int word = thread - 32; word < C * RING_WORDS; word += consumers) {
            hash = hash * 31 + words[word];
        }
        bar_sync(1, consumers);
        for (u32 to = 0; thread == 32 && to < C; ++to) {
            if (to == rank || !is_own_only) {
                mbarrier_arrive_at(empty + stage * 8, to);
            }
        }
    }
    if (fault != RING_NO_LAST_SYNC) {
        cluster_sync();
    }
    out[block * blockDim.x + threadIdx.x] = hash;
}
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(512)
    tr_selftest_ring_2(const u32 *x, u32 *out, int rounds, int fault) { ring<2>(x, out, rounds, fault); }
extern "C" __global__ void __cluster_dims__(1, 4, 1) __launch_bounds__(512)
    tr_selftest_ring_4(const u32 *x, u32 *out, int rounds, int fault) { ring<4>(x, out, rounds, fault); }
extern "C" __global__ void __cluster_dims__(1, 8, 1) __launch_bounds__(512)
    tr_selftest_ring_8(const u32 *x, u32 *out, int rounds, int fault) { ring<8>(x, out, rounds, fault); }

/// Of each block its rank, what its shared memory held, and what it holds when all blocks of its cluster have written.
extern "C" __global__ void __cluster_dims__(1, 2, 1) tr_selftest_cluster_memory(u32 *out) {
    auto *shared = reinterpret_cast<u32 *>(tr_shared());
    u32 block = blockIdx.y * gridDim.x + blockIdx.x;
    out[block * 3] = cluster_rank();
    out[block * 3 + 1] = shared[0];
    shared[0] = block;
    cluster_sync();
    out[block * 3 + 2] = shared[0];
}

/// Products of ones and of each block's rank + 1, under way in all blocks of a cluster at once: [block, thread].
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(128) tr_selftest_cluster_wgmma(float *out) {
    constexpr u32 ONES = 0x3F803F80;
    u32 factor = bf16_from(static_cast<float>(cluster_rank() + 1));
    auto *b = reinterpret_cast<u32 *>(tr_shared()); // [8, 64] of bf16
    b[threadIdx.x] = b[threadIdx.x + 128] = factor | factor << 16;
    __syncthreads();
    const u32 a[4] = {ONES, ONES, ONES, ONES};
    float d[1][4] = {};
    wgmma_fence();
    wgmma_bf16(d, a, wgmma_descriptor(shared_address(b)));
    wgmma_commit();
    cluster_sync();
    wgmma_wait<0>();
    out[blockIdx.y * 128 + threadIdx.x] = d[0][0] + d[0][1] + d[0][2] + d[0][3];
}

/// Each block of 32 threads copies its 128 words by cp.async, whose arrivals it waits for at an mbarrier, `rounds` times.
extern "C" __global__ void __cluster_dims__(1, 2, 1) tr_selftest_cluster_copied(const u32 *x, u32 *out, int rounds) {
    auto *shared = reinterpret_cast<u32 *>(tr_shared()); // [rounds, 128], and the mbarrier
    u32 barrier = shared_address(shared + rounds * 128);
    int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) {
        mbarrier_init(barrier, 32);
    }
    __syncwarp();
    u32 hash = 0;
    for (int i = 0; i < rounds; ++i) {
        int mine = i * 128 + lane * 4, other = i * 128 + (31 - lane) * 4;
        cp_async_16(shared_address(shared + mine), x + blockIdx.y * static_cast<u32>(rounds) * 128 + mine, 16);
        mbarrier_arrive_copied(barrier);
        mbarrier_wait(barrier, static_cast<u32>(i) & 1);
        hash = hash * 31 + shared[other];
    }
    out[blockIdx.y * 32 + threadIdx.x] = hash;
}

/// Waits for the second of two copies and takes a word of the first, which may not have arrived: wrong.
extern "C" __global__ void __cluster_dims__(1, 2, 1) tr_selftest_cluster_order(const u32 *x, u32 *out) {
    auto *shared = reinterpret_cast<u32 *>(tr_shared()); // two mbarriers, two copies
    u32 base = shared_address(shared);
    mbarrier_init(base, 1);
    mbarrier_init(base + 8, 1);
    mbarrier_arrive_expect(base, 16);
    mbarrier_arrive_expect(base + 8, 16);
    fence_mbarrier_init();
    cluster_sync();
    if (cluster_rank() == 0) {
        bulk_copy_to_all(base + 16, x, 16, base, 3);
        bulk_copy_to_all(base + 32, x, 16, base + 8, 3);
    }
    mbarrier_wait(base + 8, 0);
    out[blockIdx.y] = shared[4];
    mbarrier_wait(base, 0);
}

/// What is wrong, in the order of selftest_clusters.cpp.
enum ClusterFault {
    ENDS_WITHOUT_SYNC,
    ARRIVES_TOO_LATE,
    COPIES_TOO_LATE,
    ENDS_TOO_EARLY,
    ARRIVES_OUTSIDE,
    COPIES_OUTSIDE,
    COPIES_NOWHERE,
    WRITES_OUTSIDE,
    WAITS_FOR_EVER,
    ARRIVES_AT_NONE,
    ARRIVES_TOO_OFTEN,
    COPIES_TOO_FAR,
};

/// Blocks of one thread; that of rank 1 is wrong, or waits until that of rank 0 has ended. `flag` is 0.
extern "C" __global__ void __cluster_dims__(1, 2, 1) tr_selftest_cluster_fault(volatile int *flag, const u32 *x, int fault) {
    u32 barrier = shared_address(tr_shared()), to = barrier + 16;
    bool is_wrong = cluster_rank() == 1;
    auto until_flag = [flag] {
        while (*flag == 0) {
            __threadfence();
        }
    };
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    if (fault == ENDS_WITHOUT_SYNC && is_wrong) {
        return;
    }
    cluster_sync();
    if (fault == ARRIVES_TOO_LATE || fault == COPIES_TOO_LATE) {
        if (!is_wrong) {
            *flag = 1;
            return;
        }
        until_flag();
        fault == ARRIVES_TOO_LATE ? mbarrier_arrive_at(barrier, 0) : bulk_copy_to_all(to, x, 16, barrier, 1);
    }
    if (fault == ENDS_TOO_EARLY) {
        if (!is_wrong) {
            until_flag();
            return;
        }
        for (int i = 0; i < 16; ++i) {
            bulk_copy_to_all(to, x, 16, barrier, 1);
        }
        *flag = 1;
        return;
    }
    if (is_wrong) {
        switch (fault) {
        case ARRIVES_OUTSIDE: mbarrier_arrive_at(barrier, 2); break;
        case COPIES_OUTSIDE: bulk_copy_to_all(to, x, 16, barrier, 4); break;
        case COPIES_NOWHERE: bulk_copy_to_all(to, x, 16, barrier, 0); break;
        case WRITES_OUTSIDE: tr_shared()[32] = 0; break;
        case WAITS_FOR_EVER: mbarrier_wait(barrier, 0); break;
        case ARRIVES_AT_NONE: mbarrier_arrive_at(to, 0); break;
        case ARRIVES_TOO_OFTEN: mbarrier_arrive_expect(barrier, 16), mbarrier_arrive_at(barrier, 1); break;
        case COPIES_TOO_FAR: bulk_copy_to_all(barrier + 32, x, 16, barrier, 3); break;
        default: break;
        }
    }
    cluster_sync();
}
