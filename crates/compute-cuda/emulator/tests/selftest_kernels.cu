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
