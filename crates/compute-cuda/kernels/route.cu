// The choice of experts and the lists of rows that they get. Reads no weights and moves no row.
//
// As the reference backend: softmax over all experts, the top_k largest probabilities (of equals the lowest id; what is NaN
// counts as least), ascending by id, each over the sum of those chosen (added ascending). One warp per row, so the batch has no
// part in it. Lists are in the order of rows within an expert, whoever writes them.
//
// choose: grid (rows at most / 8, up), block 256. lists: grid 1, block up to 1024 (a multiple of 32). route (both): grid 1, block
// 1024, for up to a few hundred rows. Shared bytes: choose 0, the others ROUTE_SHARED_BYTES = 4 * (EXPERTS_MAX + 1).

constexpr u32 EXPERTS_MAX = 256;
constexpr u32 EXPERTS_PER_LANE = EXPERTS_MAX / 32;
constexpr u32 CHOOSE_THREADS = 256;
constexpr u32 ROUTE_THREADS = 1024;

struct RouteArgs {
    u32 *topk_ids;        // [rows, top_k]
    float *topk_weights;  // [rows, top_k]
    u32 *offsets;         // [num_experts + 1]: expert e has slots offsets[e] to offsets[e + 1]
    u32 *row_of;          // [slots]
    u32 *slot_of;         // [rows, top_k]
    const float *scores;  // [rows, num_experts]; null for a dense model: expert 0 with weight 1
    const u32 *num_rows;
    u32 *chosen;          // [num_experts]: rows that chose an expert are added, modulo 2^32; null: not counted
    u32 num_experts, top_k;
};
static_assert(sizeof(RouteArgs) == 72, "as the host has them");

/// Softmax of a row; lane l has experts l, l + 32, ... Behind the last expert -1, which is never chosen.
__device__ __forceinline__ void probabilities(float (&p)[EXPERTS_PER_LANE], const float *scores, u32 num_experts) {
    const u32 lane = threadIdx.x % 32;
    float largest = __uint_as_float(0xFF800000U);
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        const u32 expert = 32 * i + lane;
        p[i] = expert < num_experts ? scores[expert] : 0.0f;
        largest = expert < num_experts ? fmaxf(largest, p[i]) : largest;
    }
    largest = warp_max(largest);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        if (32 * i + lane < num_experts) {
            p[i] = expf(__fsub_rn(p[i], largest));
            sum = __fadd_rn(sum, p[i]);
        }
    }
    sum = warp_sum(sum);
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        p[i] = 32 * i + lane < num_experts ? __fdiv_rn(p[i], sum) : -1.0f;
    }
}

/// The lane's best expert that is not taken: its probability, and the id.
struct Candidate {
    float p;
    u32 expert;
};

__device__ __forceinline__ bool is_better(Candidate a, Candidate b) { return a.p > b.p || (a.p == b.p && a.expert < b.expert); }

__device__ __forceinline__ u32 best_left(const float (&p)[EXPERTS_PER_LANE], u32 taken) {
    const u32 lane = threadIdx.x % 32;
    Candidate best = {-2.0f, 0xFFFFFFFFU};
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        const float value = p[i] == p[i] ? p[i] : -0.5f; // NaN: behind all numbers, before what is no expert
        const Candidate candidate = {value, 32 * i + lane};
        if (!(taken >> i & 1) && is_better(candidate, best)) {
            best = candidate;
        }
    }
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        const Candidate other = {__shfl_xor_sync(~0U, best.p, bits), __shfl_xor_sync(~0U, best.expert, bits)};
        best = is_better(other, best) ? other : best;
    }
    return best.expert;
}

/// The experts of a row, by a warp.
__device__ __forceinline__ void choose_row(const RouteArgs &a, u32 row) {
    const u32 lane = threadIdx.x % 32;
    u32 *ids = a.topk_ids + static_cast<size_t>(row) * a.top_k;
    float *weights = a.topk_weights + static_cast<size_t>(row) * a.top_k;
    if (a.scores == nullptr) {
        if (lane == 0) {
            ids[0] = 0;
            weights[0] = 1.0f;
        }
        return;
    }
    float p[EXPERTS_PER_LANE];
    probabilities(p, a.scores + static_cast<size_t>(row) * a.num_experts, a.num_experts);
    u32 taken = 0; // bit i: expert 32 i + lane
    for (u32 k = 0; k < a.top_k; ++k) {
        const u32 expert = best_left(p, taken);
        taken |= expert % 32 == lane ? 1U << expert / 32 : 0;
    }
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        for (u32 left = __ballot_sync(~0U, taken >> i & 1); left != 0; left &= left - 1) {
            sum = __fadd_rn(sum, __shfl_sync(~0U, p[i], __ffs(left) - 1));
        }
    }
    u32 before = 0;
#pragma unroll
    for (u32 i = 0; i < EXPERTS_PER_LANE; ++i) {
        const u32 chosen = __ballot_sync(~0U, taken >> i & 1);
        if (taken >> i & 1) {
            const u32 k = before + __popc(chosen & ((1U << lane) - 1));
            ids[k] = 32 * i + lane;
            weights[k] = __fdiv_rn(p[i], sum);
        }
        before += __popc(chosen);
    }
}

/// Which of a row's choices an expert is; top_k when it is none. Rows from `end` on have none.
__device__ __forceinline__ u32 choice_of(const RouteArgs &a, u32 row, u32 end, u32 expert) {
    const u32 *ids = a.topk_ids + static_cast<size_t>(row) * a.top_k;
    if (row >= end) {
        return a.top_k;
    }
    if (a.top_k == 2) { // one load, so that those of several rows are under way
        const uint2 pair = *reinterpret_cast<const uint2 *>(ids);
        return pair.x == expert ? 0 : pair.y == expert ? 1 : 2;
    }
    u32 found = a.top_k;
    for (u32 k = 0; k < a.top_k; ++k) {
        found = ids[k] == expert ? k : found;
    }
    return found;
}

/// Rows that a warp looks at together.
constexpr u32 SCAN_ROWS = 128;

/// Goes through rows `begin` to `end`, one warp: `visit(row, k, before)` for each that chose the expert as its k-th, with the number of those
/// before it. Returns how many there are.
template <class Visit>
__device__ __forceinline__ u32 scan_rows(const RouteArgs &a, u32 begin, u32 end, u32 expert, Visit visit) {
    const u32 lane = threadIdx.x % 32;
    u32 count = 0;
    for (; begin < end; begin += SCAN_ROWS) {
        u32 k[SCAN_ROWS / 32];
#pragma unroll
        for (u32 j = 0; j < SCAN_ROWS / 32; ++j) {
            k[j] = choice_of(a, begin + 32 * j + lane, end, expert);
        }
#pragma unroll
        for (u32 j = 0; j < SCAN_ROWS / 32; ++j) {
            const u32 chosen = __ballot_sync(~0U, k[j] < a.top_k);
            if (k[j] < a.top_k) {
                visit(begin + 32 * j + lane, k[j], count + __popc(chosen & ((1U << lane) - 1)));
            }
            count += __popc(chosen);
        }
    }
    return count;
}

/// Counts become the sums of those before them, by one warp; the sum of all is behind the last.
__device__ __forceinline__ void sum_up(u32 *counts, u32 num) {
    const u32 lane = threadIdx.x % 32;
    u32 before = 0;
    for (u32 begin = 0; begin < num; begin += 32) {
        const u32 own = begin + lane < num ? counts[begin + lane] : 0;
        u32 sum = own;
#pragma unroll
        for (u32 delta = 1; delta < 32; delta *= 2) {
            const u32 left = __shfl_up_sync(~0U, sum, delta);
            sum += lane >= delta ? left : 0;
        }
        if (begin + lane < num) {
            counts[begin + lane] = before + sum - own;
        }
        before += __shfl_sync(~0U, sum, 31);
    }
    if (lane == 0) {
        counts[num] = before;
    }
}

/// Counts, then lists. A warp has an expert and, where there are more warps than experts, a part of the rows; it goes through them twice.
/// `counts`: one per expert and part, and one more: EXPERTS_MAX + 1 at most.
__device__ __forceinline__ void build_lists(const RouteArgs &a, u32 *counts) {
    const u32 warp = threadIdx.x / 32, num_warps = blockDim.x / 32, num_rows = *a.num_rows;
    const u32 num_parts = max(num_warps / a.num_experts, 1U), num_pieces = a.num_experts * num_parts;
    const u32 part_rows = (num_rows + num_parts - 1) / num_parts;
    for (u32 piece = warp; piece < num_pieces; piece += num_warps) {
        const u32 begin = piece % num_parts * part_rows, end = min(begin + part_rows, num_rows);
        const u32 count = scan_rows(a, begin, end, piece / num_parts, [](u32, u32, u32) {});
        if (threadIdx.x % 32 == 0) {
            counts[piece] = count;
        }
    }
    __syncthreads();
    if (warp == 0) {
        sum_up(counts, num_pieces);
    }
    __syncthreads();
    for (u32 expert = threadIdx.x; expert <= a.num_experts; expert += blockDim.x) {
        a.offsets[expert] = counts[expert * num_parts];
        if (a.chosen != nullptr && expert < a.num_experts) {
            a.chosen[expert] += counts[(expert + 1) * num_parts] - counts[expert * num_parts];
        }
    }
    for (u32 piece = warp; piece < num_pieces; piece += num_warps) {
        const u32 begin = piece % num_parts * part_rows, end = min(begin + part_rows, num_rows), first = counts[piece];
        scan_rows(a, begin, end, piece / num_parts, [&](u32 row, u32 k, u32 before) {
            a.row_of[first + before] = row;
            a.slot_of[static_cast<size_t>(row) * a.top_k + k] = first + before;
        });
    }
}

extern "C" __global__ void __launch_bounds__(CHOOSE_THREADS) tr_choose_experts(RouteArgs a) {
    grid_begin();
    const u32 row = (blockIdx.x * CHOOSE_THREADS + threadIdx.x) / 32;
    if (row < *a.num_rows) {
        choose_row(a, row);
    }
}

extern "C" __global__ void __launch_bounds__(ROUTE_THREADS, 1) tr_expert_lists(RouteArgs a) {
    grid_begin();
    build_lists(a, reinterpret_cast<u32 *>(tr_shared()));
}

extern "C" __global__ void __launch_bounds__(ROUTE_THREADS, 1) tr_route(RouteArgs a) {
    grid_begin();
    for (u32 row = threadIdx.x / 32; row < *a.num_rows; row += blockDim.x / 32) {
        choose_row(a, row);
    }
    __syncthreads();
    build_lists(a, reinterpret_cast<u32 *>(tr_shared()));
}
