// Expert outputs join the residual stream, and rows are gathered for other workers. Computes no expert.
//
// The one order of `tramontane_compute::combine`: for each row its experts ascending; for each expert its pieces along the
// summation tree (docs/adr/0001); then residual += weight * expert, product and sum rounded each. So a host that combines and a device
// that combines agree to the bit. tr_combine_norm_bf16 (norm.cu) is tr_combine with the next norm behind it.
//
// grid (rows at most, ceil(hidden / 1024)), block 256, no shared memory. Bytes per row: 4 hidden (2 + pieces), read and written once.

constexpr u32 COMBINE_THREADS = 256;

/// residual [rows, hidden] += outputs [slots, hidden] of the row's experts; slot_of and weights are [rows, top_k].
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    tr_combine(float *residual, const float *outputs, const u32 *slot_of, const float *weights, const u32 *num_rows, u32 top_k,
               u32 hidden) {
    grid_begin();
    const u32 row = blockIdx.x, i = 4 * (blockIdx.y * COMBINE_THREADS + threadIdx.x);
    if (row >= *num_rows || i >= hidden) {
        return;
    }
    float *x = residual + static_cast<size_t>(row) * hidden;
    float4 sum = load_four(x, i, hidden);
    for (u32 k = 0; k < top_k; ++k) {
        const size_t at = static_cast<size_t>(row) * top_k + k;
        sum = plus(sum, times(weights[at], load_four(outputs + static_cast<size_t>(slot_of[at]) * hidden, i, hidden)));
    }
    store_four(x, i, hidden, sum);
}

/// Partial sums of the tree at most one per level: that of 1, 2 and 4 segments whose right half has not come yet.
struct Levels {
    float4 one, two, four;
    bool has_one, has_two, has_four;
};

/// Adds a node of `len` segments, as a binary counter carries; returns true when it completes the tree.
__device__ __forceinline__ bool push(Levels &levels, float4 &x, u32 len) {
    if (len == 1) {
        if (!levels.has_one) {
            levels.one = x;
            levels.has_one = true;
            return false;
        }
        x = plus(levels.one, x);
        levels.has_one = false;
        len = 2;
    }
    if (len == 2) {
        if (!levels.has_two) {
            levels.two = x;
            levels.has_two = true;
            return false;
        }
        x = plus(levels.two, x);
        levels.has_two = false;
        len = 4;
    }
    if (len == 4) {
        if (!levels.has_four) {
            levels.four = x;
            levels.has_four = true;
            return false;
        }
        x = plus(levels.four, x);
        levels.has_four = false;
    }
    return true;
}

/// What is left over are nodes whose right sibling is behind the last column: they join from the right.
__device__ __forceinline__ float4 join_rest(const Levels &levels) {
    float4 x = levels.has_one ? levels.one : levels.has_two ? levels.two : levels.four;
    if (levels.has_one && levels.has_two) {
        x = plus(levels.two, x);
    }
    if (levels.has_four && (levels.has_one || levels.has_two)) {
        x = plus(levels.four, x);
    }
    return x;
}

/// The pieces of other workers (`Contributions`). Sum s = row * top_k + k has pieces sum_begins[s] to sum_begins[s + 1], ascending
/// and from segment 0 to the last: `hidden` f32 from outputs[piece_offsets[p]] on, of a node of piece_lens[p] segments (1, 2, 4 or 8).
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    tr_combine_pieces(float *residual, const float *outputs, const u32 *sum_begins, const u64 *piece_offsets, const u32 *piece_lens,
                      const float *weights, const u32 *num_rows, u32 top_k, u32 hidden) {
    grid_begin();
    const u32 row = blockIdx.x, i = 4 * (blockIdx.y * COMBINE_THREADS + threadIdx.x);
    if (row >= *num_rows || i >= hidden) {
        return;
    }
    float *x = residual + static_cast<size_t>(row) * hidden;
    float4 sum = load_four(x, i, hidden);
    for (u32 k = 0; k < top_k; ++k) {
        const size_t at = static_cast<size_t>(row) * top_k + k;
        Levels levels = {};
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        bool is_whole = false;
        for (u32 piece = sum_begins[at]; piece < sum_begins[at + 1]; ++piece) {
            const float *vector = outputs + piece_offsets[piece];
            total = load_four_singly(vector, i, hidden);
            is_whole = push(levels, total, piece_lens[piece]);
        }
        sum = plus(sum, times(weights[at], is_whole ? total : join_rest(levels)));
    }
    store_four(x, i, hidden, sum);
}

/// to [ids, words] = from [rows, words] at ids; a word is 4 bytes. grid (ids at most, 1 or more), block 256.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    tr_gather_rows(u32 *to, const u32 *from, const u32 *ids, const u32 *num_ids, u32 words) {
    grid_begin();
    if (blockIdx.x >= *num_ids) {
        return;
    }
    const u32 *source = from + static_cast<size_t>(ids[blockIdx.x]) * words;
    u32 *target = to + static_cast<size_t>(blockIdx.x) * words;
    const u32 first = blockIdx.y * COMBINE_THREADS + threadIdx.x, step = gridDim.y * COMBINE_THREADS;
    if (words % 4 == 0) {
        for (u32 i = first; i < words / 4; i += step) {
            reinterpret_cast<uint4 *>(target)[i] = load_16(source + 4 * i);
        }
        return;
    }
    for (u32 i = first; i < words; i += step) {
        target[i] = source[i];
    }
}

/// Where the nodes of every expert are that the ranks of an island have computed: node n of a slot is vector begins[n] + slot.
struct NodeParts {
    float *out;            // [slots, hidden]: whole experts
    const float *vectors;  // [any, hidden]
    const u32 *num_rows;
    u32 top_k, hidden, num_nodes, zero;
    u32 lens[8];           // segments of each node, ascending; together the whole tree
    unsigned long long begins[8];
};
static_assert(sizeof(NodeParts) == 136, "as the host has it");

/// out [rows * top_k, hidden] = the sums of the nodes along the tree. grid (slots at most, ceil(hidden / 1024)), block 256.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS) tr_sum_nodes(NodeParts a) {
    grid_begin();
    const u32 slot = blockIdx.x, i = 4 * (blockIdx.y * COMBINE_THREADS + threadIdx.x);
    if (slot >= *a.num_rows * a.top_k || i >= a.hidden) {
        return;
    }
    Levels levels = {};
    float4 total = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    bool is_whole = false;
#pragma unroll
    for (u32 node = 0; node < 8; ++node) {
        if (node < a.num_nodes) {
            total = load_four(a.vectors + (a.begins[node] + slot) * a.hidden, i, a.hidden);
            is_whole = push(levels, total, a.lens[node]);
        }
    }
    store_four(a.out + static_cast<size_t>(slot) * a.hidden, i, a.hidden, is_whole ? total : join_rest(levels));
}
