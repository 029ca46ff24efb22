// Clusters: blocks that send to each other, right and wrong. Every check runs with several seeds: the order of threads
// and of what is under way differs.
#include "check.h"

static const uint64_t SEEDS = 8;
static const int RING_WORDS = 64; // as selftest_kernels.cu has it

/// As selftest_kernels.cu has them.
enum RingFault { RING_RIGHT, RING_OWN_EMPTY, RING_NO_FIRST_SYNC, RING_NO_LAST_SYNC };

struct Ring {
    const char *kernel;
    int cluster;
    unsigned threads;
    int rounds;
};

/// What a thread of the block of rank `rank` hashes of its cluster's words.
static uint32_t hash_of(const Ring &ring, const uint32_t *words, int rank, int thread) {
    auto hash = static_cast<uint32_t>(rank);
    const int stage = ring.cluster * RING_WORDS, consumers = static_cast<int>(ring.threads) - 32;
    for (int i = 0; thread >= 32 && i < ring.rounds; ++i) {
        for (int word = thread - 32; word < stage; word += consumers) hash = hash * 31 + words[i * stage + word];
    }
    return hash;
}

/// Why a ring is wrong; empty when it is right.
static std::string ring_error(const Ring &ring, RingFault fault, uint64_t seed) {
    const Dim grid = {3, 2 * static_cast<unsigned>(ring.cluster), 2};
    const size_t blocks = grid.x * grid.y * grid.z, per_cluster = static_cast<size_t>(ring.rounds * ring.cluster * RING_WORDS);
    std::vector<uint32_t> words(blocks / static_cast<size_t>(ring.cluster) * per_cluster);
    Random random{seed};
    for (auto &word : words) word = random.next();
    Buffer<uint32_t> x(words), out(blocks * ring.threads);
    const size_t shared = static_cast<size_t>(2 * ring.cluster * RING_WORDS * 4 + 2 * 2 * 8);
    tr_emulator_seed(seed);
    std::string error = try_launch(ring.kernel, grid, {ring.threads}, shared, x.data, out.data, ring.rounds, fault);
    for (size_t at = 0; error.empty() && at < out.count; ++at) {
        size_t block = at / ring.threads, column = block % grid.x, row = block / grid.x; // z above y
        size_t cluster = row / static_cast<size_t>(ring.cluster) * grid.x + column;
        int rank = static_cast<int>(row) % ring.cluster, thread = static_cast<int>(at % ring.threads);
        if (out[at] != hash_of(ring, &words[cluster * per_cluster], rank, thread)) error = "a wrong hash";
    }
    return error;
}

static void rings_are_right() {
    const Ring rings[] = {
        {"tr_selftest_ring_2", 2, 64, 1},   {"tr_selftest_ring_2", 2, 96, 9},  {"tr_selftest_ring_2", 2, 384, 8},
        {"tr_selftest_ring_4", 4, 160, 11}, {"tr_selftest_ring_4", 4, 512, 6}, {"tr_selftest_ring_8", 8, 64, 7},
    };
    for (const Ring &ring : rings) {
        for (uint64_t seed = 0; seed < SEEDS; ++seed) {
            std::string error = ring_error(ring, RING_RIGHT, seed);
            if (!error.empty()) {
                fail("%s, %u threads, seed %d: %s", ring.kernel, ring.threads, static_cast<int>(seed), error.c_str());
            }
        }
    }
}

static void every_seed_shows(const Ring &ring, RingFault fault, const char *part) {
    for (uint64_t seed = 0; seed < SEEDS; ++seed) {
        std::string error = ring_error(ring, fault, seed);
        if (error.find(part) == std::string::npos) {
            fail("%s with fault %d, seed %d: expected an error with \"%s\", got \"%s\"", ring.kernel, fault,
                 static_cast<int>(seed), part, error.c_str());
        }
    }
}

/// What a ring is wrong without: remote arrivals, and a cluster_sync at both ends.
static void wrong_rings_show() {
    every_seed_shows({"tr_selftest_ring_2", 2, 96, 16}, RING_OWN_EMPTY, "a wrong hash");
    every_seed_shows({"tr_selftest_ring_4", 4, 160, 16}, RING_OWN_EMPTY, "a wrong hash");
    every_seed_shows({"tr_selftest_ring_2", 2, 96, 4}, RING_NO_FIRST_SYNC, "where no mbarrier was initialised");
    every_seed_shows({"tr_selftest_ring_2", 2, 96, 4}, RING_NO_LAST_SYNC, "which has ended");
}

static void blocks_have_their_own_memory_and_ranks() {
    const unsigned columns = 3, rows = 4;
    for (uint64_t seed = 0; seed < SEEDS; ++seed) {
        Buffer<uint32_t> out(columns * rows * 3);
        tr_emulator_seed(seed);
        launch("tr_selftest_cluster_memory", {columns, rows}, {1}, 4, out.data);
        for (uint32_t block = 0; block < columns * rows; ++block) {
            const uint32_t *got = &out[block * 3];
            if (got[0] != block / columns % 2) fail("block %u has rank %u", block, got[0]);
            if (got[1] != ~0U) fail("shared memory of block %u begins with %x", block, got[1]);
            if (got[2] != block) fail("shared memory of block %u holds %u", block, got[2]);
        }
    }
}

static void products_of_blocks_stay_apart() {
    for (uint64_t seed = 0; seed < SEEDS; ++seed) {
        Buffer<float> out(4 * 128);
        tr_emulator_seed(seed);
        launch("tr_selftest_cluster_wgmma", {1, 4}, {128}, 1024, out.data);
        for (size_t i = 0; i < out.count; ++i) {
            check_close("wgmma in a cluster", i, out[i], 4 * 16 * static_cast<double>(i / 128 % 2 + 1), 0);
        }
    }
}

static void copies_of_threads_arrive_before_their_arrivals() {
    const int rounds = 6;
    std::vector<uint32_t> words(2 * rounds * 128);
    Random random{3};
    for (auto &word : words) word = random.next();
    Buffer<uint32_t> x(words), out(64);
    for (uint64_t seed = 0; seed < SEEDS; ++seed) {
        tr_emulator_seed(seed);
        launch("tr_selftest_cluster_copied", {1, 2}, {32}, rounds * 512 + 8, x.data, out.data, rounds);
        for (size_t at = 0; at < out.count; ++at) {
            uint32_t hash = 0;
            for (size_t i = 0; i < rounds; ++i) hash = hash * 31 + words[(at / 32 * rounds + i) * 128 + (31 - at % 32) * 4];
            if (out[at] != hash) fail("thread %zu copied something else, seed %d", at, static_cast<int>(seed));
        }
    }
}

static void copies_overtake_each_other() {
    const uint64_t seeds = 4 * SEEDS;
    Buffer<uint32_t> x(std::vector<uint32_t>(4, 7)), out(2);
    uint64_t overtaken[2] = {};
    for (uint64_t seed = 0; seed < seeds; ++seed) {
        tr_emulator_seed(seed);
        launch("tr_selftest_cluster_order", {1, 2}, {1}, 48, x.data, out.data);
        for (int block = 0; block < 2; ++block) overtaken[block] += out[block] != 7;
    }
    for (int block = 0; block < 2; ++block) {
        bool is_both_seen = overtaken[block] > 0 && overtaken[block] < seeds;
        if (!is_both_seen) fail("copies to block %d: %d overtaken", block, static_cast<int>(overtaken[block]));
    }
}

static void faults_are_errors() {
    // In the order of ClusterFault of selftest_kernels.cu.
    const char *const errors[] = {
        "cluster_sync",
        "mbarrier.arrive into block 0,0,0, which has ended",
        "cp.async.bulk into block 0,0,0, which has ended",
        "a block ends before its copies arrived (block 0,0,0 thread 0)",
        "mbarrier.arrive into block 2 of a cluster of 2",
        "cp.async.bulk into block 2 of a cluster of 2",
        "cp.async.bulk to no block",
        "block 0,1,0 writes byte 32 of 32 bytes",
        "block 0,0,0: threads 0 to 0 at cluster_sync; block 0,1,0: threads 0 to 0 at mbarrier.wait",
        "mbarrier.arrive at shared byte 16 of block 0 of the cluster, where no mbarrier",
        "an arrival at an mbarrier that expects no more",
        "cp.async.bulk of 16 bytes at shared byte 32 of 32",
    };
    Buffer<uint32_t> x(std::vector<uint32_t>(4, 7));
    for (int fault = 0; fault < static_cast<int>(std::size(errors)); ++fault) {
        for (uint64_t seed = 0; seed < SEEDS; ++seed) {
            Buffer<int> flag(std::vector<int>(1, 0));
            tr_emulator_seed(seed);
            expect_error(try_launch("tr_selftest_cluster_fault", {1, 2}, {1}, 32, flag.data, x.data, fault), errors[fault]);
        }
    }
    Buffer<uint32_t> out(9);
    expect_error(try_launch("tr_selftest_cluster_memory", {1, 3}, {1}, 4, out.data), "a grid of 3 rows, no multiple");
    launch("tr_selftest_cluster_memory", {1, 2}, {1}, 4, out.data); // what failed leaves nothing behind
}

int main() {
    blocks_have_their_own_memory_and_ranks();
    products_of_blocks_stay_apart();
    copies_of_threads_arrive_before_their_arrivals();
    rings_are_right();
    wrong_rings_show();
    copies_overtake_each_other();
    faults_are_errors();
    puts("selftest_clusters: passed");
}
