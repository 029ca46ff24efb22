// The emulator against plain loops, and against kernels that are wrong.
#include "check.h"

static void mma_is_a_product() {
    Random random{1};
    const int k = 48;
    std::vector<uint16_t> a(16 * k), b(8 * k);
    for (auto &x : a) x = to_bf16(random.normal());
    for (auto &x : b) x = to_bf16(random.normal());
    Buffer<uint16_t> da(a), db(b);
    Buffer<float> c(16 * 8);
    launch("tr_selftest_mma", {1}, {32}, 256, da.data, db.data, c.data, k);
    for (int row = 0; row < 16; ++row) {
        for (int col = 0; col < 8; ++col) {
            double sum = 0;
            for (int i = 0; i < k; ++i) sum += from_bf16(a[row * k + i]) * from_bf16(b[col * k + i]);
            check_close("mma", row * 8 + col, c[row * 8 + col], sum, 1e-5);
        }
    }
}

static bool reverse_is_right(int sync, uint64_t seed) {
    const int n = 256;
    Buffer<int> x(n);
    for (int i = 0; i < n; ++i) x[i] = i;
    tr_emulator_seed(seed);
    launch("tr_selftest_reverse", {1}, {n}, n * 4, x.data, n, sync);
    for (int i = 0; i < n; ++i) {
        if (x[i] != n - 1 - i) return false;
    }
    return true;
}

static void a_missing_barrier_shows() {
    for (uint64_t seed = 0; seed < 8; ++seed) {
        if (!reverse_is_right(1, seed)) fail("a barrier does not hold, seed %d", static_cast<int>(seed));
        if (reverse_is_right(0, seed)) fail("a missing barrier was not noticed, seed %d", static_cast<int>(seed));
    }
}

static void shuffles_and_ballots() {
    const int blocks = 5;
    Buffer<int> x(blocks * 32), out(blocks);
    Random random{2};
    for (int i = 0; i < blocks * 32; ++i) x[i] = static_cast<int>(random.below(100));
    launch("tr_selftest_sum", {blocks}, {32}, 0, x.data, out.data);
    for (int b = 0; b < blocks; ++b) {
        int sum = 0, odd = 0;
        for (int i = 0; i < 32; ++i) {
            sum += x[b * 32 + i];
            odd += x[b * 32 + i] & 1;
        }
        if (out[b] != sum * 100 + odd) fail("sum of block %d is %d, expected %d", b, out[b], sum * 100 + odd);
    }
}

static void faults_are_errors() {
    Buffer<int> x(std::vector<int>(32, 7));
    auto *overrun = static_cast<int *>(tr_emulator_alloc(40 * sizeof(int)));
    expect_error(try_launch("tr_selftest_overrun", {1}, {1}, 0, overrun, 40), "outside an allocation");
    expect_error(try_launch("tr_selftest_overrun", {1}, {1}, 0, overrun, 1 << 20), "signal");
    if (tr_emulator_free(overrun) != 1) fail("a canary that was overwritten was not noticed");
    if (tr_emulator_free(overrun) != 2) fail("freed twice without notice");
    expect_error(try_launch("tr_selftest_divergence", {1}, {32}, 0, x.data), "ended");
    expect_error(try_launch("tr_selftest_reverse", {1}, {32}, 64, x.data, 32, 1), "shared memory");
    expect_error(try_launch("tr_no_such_kernel", {1}, {1}, 0), "no such kernel");
    expect_error(try_launch("tr_selftest_sum", {1}, {1025}, 0, x.data, x.data), "refuses");
}

int main() {
    mma_is_a_product();
    a_missing_barrier_shows();
    shuffles_and_ballots();
    faults_are_errors();
    puts("selftest: passed");
}
