// The best tokens of a row of logits, and what their log probabilities need. Draws nothing: that is the host's sampler.
//
// argmax: highest logit, lowest id (crates/compute/src/sampling), and the first id whose logit is NaN or infinite, which is refused.
// top: the n best by f32's total order, then id; and sum(exp(logit - max)) in f64, by the sampler's polynomial; the order of its terms is
// not the host's: the sum has 53 bits, a log probability keeps 24.
//
// grid (rows at most), block 1024. Shared bytes: SAMPLE_SHARED_BYTES = 512. Bytes: 4 vocab per row, times n + 2 for top (L2).

constexpr u32 SAMPLE_THREADS = 1024;
constexpr u32 SAMPLE_WARPS = SAMPLE_THREADS / 32;
constexpr u32 NO_TOKEN = 0xFFFFFFFFU;

/// What a row's argmax is.
struct Best {
    u32 id;      // NO_TOKEN when every logit is NaN
    float logit; // minus infinity: no token is left
    u32 bad_id;  // the first NaN or infinity; NO_TOKEN when there is none
    u32 zero;
};

/// The k best tokens of a row; what a host needs for their log probabilities: logit - (max + ln(sum)).
struct TopSum {
    double sum;
    float max;
    u32 zero;
};
static_assert(sizeof(Best) == 16 && sizeof(TopSum) == 16, "as the host has them");

/// Larger keys are better tokens: f32's total order, then the lower id.
__device__ __forceinline__ u64 key_of(float logit, u32 id) {
    const u32 bits = __float_as_uint(logit);
    const u32 ordered = bits & 0x80000000U ? ~bits : bits | 0x80000000U;
    return static_cast<u64>(ordered) << 32 | static_cast<u32>(~id);
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

/// The largest of all threads, in all threads. `shared` has room for one per warp.
__device__ __forceinline__ u64 block_max(u64 x, u64 *shared) {
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        x = larger(x, __shfl_xor_sync(~0U, x, bits));
    }
    __syncthreads(); // what was there has been read
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = shared[0];
    for (u32 w = 1; w < SAMPLE_WARPS; ++w) {
        x = larger(x, shared[w]);
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    tr_argmax(Best *out, const float *logits, const u32 *num_rows, u32 vocab) {
    grid_begin();
    auto *shared = reinterpret_cast<u64 *>(tr_shared());
    if (blockIdx.x >= *num_rows) {
        return;
    }
    const float *row = logits + static_cast<size_t>(blockIdx.x) * vocab;
    u64 best = 0, first_bad = 0;
#pragma unroll 4
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        const float logit = row[id];
        if (logit != logit || logit == __uint_as_float(0x7F800000U)) {
            first_bad = larger(first_bad, static_cast<u64>(~id));
        }
        if (logit == logit) {
            best = larger(best, key_of(__fadd_rn(logit, 0.0f), id)); // -0 and 0 are equal here
        }
    }
    best = block_max(best, shared);
    first_bad = block_max(first_bad, shared);
    if (threadIdx.x == 0) {
        const u32 id = best == 0 ? NO_TOKEN : ~static_cast<u32>(best);
        out[blockIdx.x] = {id, id == NO_TOKEN ? __uint_as_float(0x7FFFFFFFU) : row[id],
                           first_bad == 0 ? NO_TOKEN : ~static_cast<u32>(first_bad), 0};
    }
}

/// e^x for x <= 0, as crates/engine/src/sampler/softmax.rs.
__device__ __forceinline__ double exp_below_one(double x) {
    constexpr double ROUND = 6755399441055744.0; // 1.5 * 2^52
    constexpr double COEFFICIENTS[13] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                         1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                         0.5,               1.0,              1.0};
    if (!(x >= -700.0)) {
        return 0.0;
    }
    const double shifted = x * 1.4426950408889634 + ROUND, k = shifted - ROUND;
    const double r = (x - k * 6.931471803691238e-1) - k * 1.9082149292705877e-10;
    double sum = 1.0 / 6227020800.0;
#pragma unroll
    for (u32 i = 0; i < 13; ++i) {
        sum = sum * r + COEFFICIENTS[i];
    }
    return sum * __longlong_as_double((static_cast<long long>(k) + 1023) << 52); // 2^k
}

/// The sum of all threads, in all threads: butterflies, then warps ascending.
__device__ __forceinline__ double block_sum(double x, double *shared) {
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        x = x + __shfl_xor_sync(~0U, x, bits);
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    x = shared[0];
    for (u32 w = 1; w < SAMPLE_WARPS; ++w) {
        x = x + shared[w];
    }
    return x;
}

/// ids, values [rows, n]: the n best tokens and their logits, best first; n <= vocab. The logits have been checked.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    tr_top_logits(u32 *ids, float *values, TopSum *sums, const float *logits, const u32 *num_rows, u32 n, u32 vocab) {
    grid_begin();
    auto *shared = reinterpret_cast<u64 *>(tr_shared());
    if (blockIdx.x >= *num_rows) {
        return;
    }
    const float *row = logits + static_cast<size_t>(blockIdx.x) * vocab;
    u64 above = ~0ULL;
    float largest = 0.0f;
    for (u32 k = 0; k < max(n, 1U); ++k) {
        u64 best = 0;
#pragma unroll 4
        for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
            const u64 key = key_of(row[id], id);
            best = key < above ? larger(best, key) : best;
        }
        above = block_max(best, shared);
        const u32 id = ~static_cast<u32>(above);
        largest = k == 0 ? row[id] : largest;
        if (threadIdx.x == 0 && k < n) {
            ids[static_cast<size_t>(blockIdx.x) * n + k] = id;
            values[static_cast<size_t>(blockIdx.x) * n + k] = row[id];
        }
    }
    double sum = 0.0;
    for (u32 id = threadIdx.x; id < vocab; id += SAMPLE_THREADS) {
        sum += exp_below_one(static_cast<double>(row[id]) - static_cast<double>(largest));
    }
    sum = block_sum(sum, reinterpret_cast<double *>(shared));
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = {sum, largest, 0};
    }
}
