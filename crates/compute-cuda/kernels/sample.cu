// The best tokens of a row of logits, what their log probabilities need, and tokens that are drawn. What is chosen, and in which order
// sums are added, is defined by crates/compute/src/sampling.
//
// argmax: highest logit, lowest id, and the first id whose logit is NaN or infinite: such a row is refused.
// group_sums, then draw: weights e^((logit - max) / temperature) of groups of 1024 tokens; where a number falls, by group, chunk, token.
// top: the n best by f32's total order, then id; and sum(exp(logit - max)) in f64, by the sampler's polynomial; the order of its terms is
// not the host's: the sum has 53 bits, a log probability keeps 24.
//
// grid (rows at most), group_sums (rows at most, groups or fewer); block 1024. Shared bytes: SAMPLE_SHARED_BYTES = 512, of group_sums and
// draw DRAW_SHARED_BYTES = 8456. Bytes: 4 vocab per row for argmax and for group_sums, times n + 2 for top (L2).

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

/// e^x for x <= 0: the host's bits, so no product and sum are fused.
__device__ __forceinline__ double exp_below_one(double x) {
    constexpr double ROUND = 6755399441055744.0; // 1.5 * 2^52
    constexpr double COEFFICIENTS[13] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
                                         1.0 / 5040.0,      1.0 / 720.0,      1.0 / 120.0,     1.0 / 24.0,     1.0 / 6.0,
                                         0.5,               1.0,              1.0};
    if (!(x >= -700.0)) {
        return 0.0;
    }
    const double shifted = __dadd_rn(__dmul_rn(x, 1.4426950408889634), ROUND), k = __dsub_rn(shifted, ROUND);
    const double r = __dsub_rn(__dsub_rn(x, __dmul_rn(k, 6.931471803691238e-1)), __dmul_rn(k, 1.9082149292705877e-10));
    double sum = 1.0 / 6227020800.0;
#pragma unroll
    for (u32 i = 0; i < 13; ++i) {
        sum = __dadd_rn(__dmul_rn(sum, r), COEFFICIENTS[i]);
    }
    const u64 scale = (static_cast<u64>(__double_as_longlong(shifted)) + 1023) << 52; // 2^k
    return __dmul_rn(sum, __longlong_as_double(static_cast<long long>(scale)));
}

/// Of the line of a chunk in shared memory: its weights, and then their sum. Odd, so that lines lie in different banks.
constexpr u32 CHUNK = 32, LINE = CHUNK + 1;
static_assert(CHUNK * CHUNK == SAMPLE_THREADS, "a group is a weight for each thread");

/// How a token is drawn.
struct Draw {
    double per_temperature; // 0: it is not
    double min_weight;
    double uniform; // in [0, 1)
};
static_assert(sizeof(Draw) == 24, "as the host has it");

__device__ __forceinline__ bool is_drawn(const Draw &draw, const Best &best) {
    return draw.per_temperature > 0.0 && best.bad_id == NO_TOKEN && best.logit > __uint_as_float(0xFF800000U);
}

/// The lines of a group's chunks; all threads come here, and all see them.
__device__ __forceinline__ void fill_group(double *lines, const float *row, u32 group, u32 vocab, const Draw &draw, float max) {
    const u32 id = group * SAMPLE_THREADS + threadIdx.x;
    double weight = 0.0;
    if (id < vocab) {
        const double x = __dsub_rn(static_cast<double>(row[id]), static_cast<double>(max));
        weight = exp_below_one(__dmul_rn(x, draw.per_temperature));
        weight = weight >= draw.min_weight ? weight : 0.0;
    }
    __syncthreads(); // what was there has been read
    lines[threadIdx.x / CHUNK * LINE + threadIdx.x % CHUNK] = weight;
    __syncthreads();
    if (threadIdx.x < CHUNK) {
        double *line = lines + threadIdx.x * LINE, sum = 0.0;
#pragma unroll 8
        for (u32 i = 0; i < CHUNK; ++i) {
            sum = __dadd_rn(sum, line[i]);
        }
        line[CHUNK] = sum;
    }
    __syncthreads();
}

/// sums [rows, groups]: the weights of each group, of rows whose token is drawn. Blocks of a row share its groups in turn.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    tr_group_sums(double *sums, const float *logits, const Best *best, const Draw *draws, const u32 *num_rows, u32 groups, u32 vocab) {
    grid_begin();
    auto *lines = reinterpret_cast<double *>(tr_shared());
    if (blockIdx.x >= *num_rows || !is_drawn(draws[blockIdx.x], best[blockIdx.x])) {
        return;
    }
    const float *row = logits + static_cast<size_t>(blockIdx.x) * vocab;
    for (u32 group = blockIdx.y; group < groups; group += gridDim.y) {
        fill_group(lines, row, group, vocab, draws[blockIdx.x], best[blockIdx.x].logit);
        if (threadIdx.x == 0) {
            double sum = 0.0;
            for (u32 chunk = 0; chunk < CHUNK; ++chunk) {
                sum = __dadd_rn(sum, lines[chunk * LINE + CHUNK]);
            }
            sums[static_cast<size_t>(blockIdx.x) * groups + group] = sum;
        }
    }
}

/// The first of n weights, each `stride` behind the one before, that brings the sum beyond `target`, or the last that is not 0. `below` is
/// the sum before the first, then that before the one that was found. Some weight is not 0: the best token's is 1.
__device__ __forceinline__ u32 find_weight(const double *weights, u32 stride, u32 n, double target, double *below) {
    double sum = *below;
    u32 found = 0;
    for (u32 i = 0; i < n && !(sum > target); ++i) {
        const double weight = weights[i * stride];
        if (weight > 0.0) {
            found = i;
            *below = sum;
            sum = __dadd_rn(sum, weight);
        }
    }
    return found;
}

/// best [rows]: where a token is drawn, its id takes the place of the best one's. After tr_group_sums.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS)
    tr_draw(Best *best, const double *sums, const float *logits, const Draw *draws, const u32 *num_rows, u32 groups, u32 vocab) {
    grid_begin();
    auto *lines = reinterpret_cast<double *>(tr_shared());
    auto *shared_group = reinterpret_cast<u32 *>(lines + CHUNK * LINE);
    if (blockIdx.x >= *num_rows || !is_drawn(draws[blockIdx.x], best[blockIdx.x])) {
        return;
    }
    const Draw draw = draws[blockIdx.x];
    const double *row_sums = sums + static_cast<size_t>(blockIdx.x) * groups;
    double target = 0.0, below = 0.0;
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (u32 group = 0; group < groups; ++group) {
            total = __dadd_rn(total, row_sums[group]);
        }
        target = __dmul_rn(draw.uniform, total);
        *shared_group = find_weight(row_sums, 1, groups, target, &below);
    }
    __syncthreads();
    const u32 group = *shared_group;
    const float *row = logits + static_cast<size_t>(blockIdx.x) * vocab;
    fill_group(lines, row, group, vocab, draw, best[blockIdx.x].logit);
    if (threadIdx.x == 0) {
        const u32 chunk = find_weight(lines + CHUNK, LINE, CHUNK, target, &below);
        const u32 place = find_weight(lines + chunk * LINE, 1, CHUNK, target, &below);
        best[blockIdx.x].id = group * SAMPLE_THREADS + chunk * CHUNK + place;
    }
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
