// The summation tree of docs/adr/0001-summation-tree.md and what products are given and write. Stands in front of
// every source, behind tile.cuh.

// ---- Experts.

/// An expert's packed segments on the device; null where a segment is not held. 256 bytes.
struct Expert {
    const u8 *gate_up[8];
    const u8 *down[8];
    const float *gate_up_scales[8]; // e4m3: one per packed row; otherwise null
    const float *down_scales[8];
};

/// A slice of an expert for `offsets[j + 1] - offsets[j]` rows. 16 bytes.
struct Job {
    int expert;     // index into the expert table
    int begin, end; // segments
    int out;        // index of its first output vector; -1 for offsets[j] (whole experts only)
};

/// Columns of a full segment (tramontane_types::slice::segment_len); also the part rule of dense matrices.
__device__ __forceinline__ int segment_cols(int cols) { return divide_up(divide_up(cols, 8), 32) * 32; }

/// Those of the parts `begin` to `end` of `cols` columns that have columns.
__device__ __forceinline__ Parts parts_between(int cols, int begin, int end) {
    Parts parts = {cols, segment_cols(cols), begin, 0};
    parts.end = min(end, num_parts(parts));
    return parts;
}

/// The arguments of tr_linear_*: see README.md.
struct Linear {
    const u8 *weights;
    const u8 *x;
    const int *row_ids;
    float *out;
    const float *weight_scales, *x_scales;
    int num_tokens, rows, cols, x_stride, out_stride, is_added;
};

/// The arguments of tr_gate_up_*: see README.md.
struct GateUp {
    u16 *out; // [assignments, out_stride]
    const Expert *experts;
    const Job *jobs;
    const int *offsets, *row_ids;
    const u8 *x;
    const float *x_scales;
    int hidden, ff, x_stride, out_stride;
};

/// The arguments of tr_down_*: see README.md.
struct Down {
    float *out;
    const Expert *experts;
    const Job *jobs;
    const int *offsets;
    const u8 *x;
    const float *x_scales;
    int hidden, ff, x_stride;
};

// ---- The summation tree.

/// The end of a range when empty segments behind the last count as held.
__device__ __forceinline__ int tree_end(int end, int num_segments) { return end >= num_segments ? 8 : end; }

/// Whether the node (begin, length) lies in the range but its parent does not: it is an output vector.
__device__ __forceinline__ bool is_node(int at, int length, int begin, int end) {
    bool is_inside = at >= begin && at + length <= end;
    int parent = at & ~(2 * length - 1);
    return is_inside && (length == 8 || parent < begin || parent + 2 * length > end);
}

/// Number of output vectors of a range (SegmentRange::num_nodes).
__device__ __forceinline__ int num_nodes(int begin, int end, int num_segments) {
    int count = 0;
    for (int length = 1; length <= 8; length *= 2) {
        for (int at = 0; at < num_segments; at += length) {
            count += is_node(at, length, begin, tree_end(end, num_segments));
        }
    }
    return count;
}

/// What a product writes: vector `column * vectors + node`, element `row`.
struct Output {
    float *out;
    int vectors, stride, rows;
    bool is_added;
};

__device__ __forceinline__ void put(const Output &output, int column, int node, int row, float value) {
    if (row < output.rows) {
        float *to = output.out + static_cast<long long>(column * output.vectors + node) * output.stride + row;
        *to = output.is_added ? __fadd_rn(*to, value) : value;
    }
}

/// Where a sum lies between the blocks' warps; four f32 more per column keep banks apart.
template <int N, int ROWS> __device__ __forceinline__ int slot_at(int slot, int column, int row) {
    return (slot * N + column) * (ROWS + 4) + row;
}

/// Adds the parts of every element along the tree and writes the nodes. All threads, after a barrier.
/// PER_SLOT: 1, or 2 where a slot has the sum of a pair of parts, or of the one that there is.
template <int N, int ROWS, int THREADS, int PER_SLOT>
__device__ __forceinline__ void put_tree(const float *slots, int count, const Parts &parts, int num_segments,
                                         int first_row, const Output &output) {
    int end = tree_end(parts.end, num_segments);
    for (int i = threadIdx.x; i < ROWS * N; i += THREADS) {
        int row = i % ROWS, column = i / ROWS, node = 0;
        if (column >= count) {
            break;
        }
        float value[8];
#pragma unroll
        for (int part = 0; part < 8; ++part) {
            bool is_kept = part >= parts.begin && part < parts.end && (PER_SLOT == 1 || part % 2 == 0 || part == parts.begin);
            value[part] = is_kept ? slots[slot_at<N, ROWS>(part / PER_SLOT, column, row)] : 0.0F;
        }
#pragma unroll
        for (int length = PER_SLOT; length < 8; length *= 2) {
#pragma unroll
            for (int at = 0; at < 8; at += 2 * length) {
                bool is_whole = at >= parts.begin && at + 2 * length <= end;
                if (is_whole && at + length < num_segments) {
                    value[at] = __fadd_rn(value[at], value[at + length]);
                }
            }
        }
#pragma unroll
        for (int at = 0; at < 8; ++at) {
            bool is_output = at < num_segments
                             && (is_node(at, 1, parts.begin, end) || (at % 2 == 0 && is_node(at, 2, parts.begin, end))
                                 || (at % 4 == 0 && is_node(at, 4, parts.begin, end)) || (at == 0 && is_node(at, 8, parts.begin, end)));
            if (is_output) {
                put(output, column, node, first_row + row, value[at]);
                node += 1;
            }
        }
    }
}

/// Sums that wait for their right half.
struct Parked {
    float *place; // this thread's in shared memory, [level][value][thread]
    int threads, occupied;
};

/// Takes the sum of `part` up the tree as far as its left halves are there; calls `emit` for every node that is an
/// output, ascending. `is_last`: no part follows; `is_tail_empty`: nor would any that has columns.
template <int VALUES, class Emit>
__device__ __forceinline__ void climb(Parked &parked, float (&value)[VALUES], int part, bool is_last,
                                      bool is_tail_empty, Emit emit) {
    auto place = [&](int level, int i) { return parked.place + (level * VALUES + i) * parked.threads; };
    int level = 0;
    bool is_output = false;
    while (true) {
        bool is_right = level < 3 && (part >> level & 1) != 0;
        if (level == 3 || (is_right && !(parked.occupied >> level & 1))) {
            is_output = true;
            break;
        }
        if (is_right) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                value[i] = __fadd_rn(*place(level, i), value[i]);
            }
            parked.occupied &= ~(1 << level);
        } else if (!(is_last && is_tail_empty)) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                *place(level, i) = value[i];
            }
            parked.occupied |= 1 << level;
            break;
        }
        level += 1;
    }
    level = 2;
    while (true) {
        if (is_output) {
            emit(value);
        }
        while (level >= 0 && !(parked.occupied >> level & 1)) {
            level -= 1;
        }
        if (!is_last || is_tail_empty || level < 0) {
            break;
        }
        is_output = true;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            value[i] = *place(level, i);
        }
        level -= 1;
    }
}

/// The same for all parts of a product with many tokens: one output, and no more code than that needs. Left halves wait in
/// registers (level 0, where KEPT has room for them), in shared memory, and in the thread's own memory behind the caches (level 2):
/// that is written and read once in a block's life, and leaves shared memory to the stages.
template <int VALUES, int KEPT> struct Halves {
    float *place; // this thread's in shared memory, [level][value][thread]; level 1 first when level 0 is kept
    float kept[KEPT];
    volatile float far[VALUES];
};

/// Takes the sum of `part` up the tree. True when it is the whole sum.
template <int THREADS, int VALUES, int KEPT>
__device__ __forceinline__ bool climb_whole(Halves<VALUES, KEPT> &halves, float (&value)[VALUES], int part, bool is_last) {
    constexpr bool IS_KEPT = VALUES == KEPT;
#pragma unroll
    for (int level = 0; level < 3; ++level) {
        float *place = halves.place + (IS_KEPT ? 0 : level % 2) * VALUES * THREADS;
        bool is_right = (part >> level & 1) != 0;
        if (!is_right && !is_last) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                if (level == 0 && IS_KEPT) {
                    halves.kept[i % KEPT] = value[i];
                } else if (level < 2) {
                    place[i * THREADS] = value[i];
                } else {
                    halves.far[i] = value[i];
                }
            }
            return false;
        }
        // A left half without a right one, because no columns are left, goes up as it is.
        if (is_right) {
#pragma unroll
            for (int i = 0; i < VALUES; ++i) {
                float left = level == 0 && IS_KEPT ? halves.kept[i % KEPT] : level < 2 ? place[i * THREADS] : halves.far[i];
                value[i] = __fadd_rn(left, value[i]);
            }
        }
    }
    return true;
}

// ---- Scales of e4m3.

/// The scales of tokens' rows: one for the row, or one for each of PARTS parts. IS_PANEL: of tokens in panels, by slot.
template <int PARTS, bool IS_PANEL = false> struct TokenScales {
    const float *scale; // [rows, PARTS]; IS_PANEL: [PARTS, slots]
};

/// Scales the sums of one strip and part: row scale times token scale, once each.
template <class Step, int N, int PARTS>
__device__ __forceinline__ void scale_sums(float (&sum)[N / 8][4], const float *row_scales, const TokenScales<PARTS, false> &scales,
                                           const Tokens &tokens, int part, int lane) {
    if constexpr (Step::WEIGHT == 8) {
        float low = load_in_place(row_scales + lane / 4), high = load_in_place(row_scales + lane / 4 + 8);
        int first = lane % 4 * 2;
        const int *ids = tokens.ids == nullptr ? nullptr : tokens.ids + tokens.first + first;
        const float *base = scales.scale + (PARTS == 1 ? 0 : part);
        base += ids == nullptr ? static_cast<long long>(tokens.first + first) * PARTS : 0;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                int column = j * 8 + i;
                float token = 0.0F;
                if (column + first < tokens.count) {
                    token = load_in_place(base + static_cast<long long>(ids == nullptr ? column : ids[column]) * PARTS);
                }
                sum[j][i] = __fmul_rn(__fmul_rn(sum[j][i], low), token);
                sum[j][2 + i] = __fmul_rn(__fmul_rn(sum[j][2 + i], high), token);
            }
        }
    }
}

/// The same from panels: a lane takes the scales of two neighbours at once, also where no token is, of which nothing is written.
template <class Step, int N, int PARTS>
__device__ __forceinline__ void scale_sums(float (&sum)[N / 8][4], const float *row_scales, const TokenScales<PARTS, true> &scales,
                                           const Tokens &tokens, int part, int lane) {
    if constexpr (Step::WEIGHT == 8) {
        float low = load_in_place(row_scales + lane / 4), high = load_in_place(row_scales + lane / 4 + 8);
        long long slots = tokens.stride / TOKEN_STEP_BYTES;
        const float *base = scales.scale + (PARTS == 1 ? 0 : part * slots) + tokens.first + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            float2 token = load_two_in_place(base + j * 8);
            sum[j][0] = __fmul_rn(__fmul_rn(sum[j][0], low), token.x);
            sum[j][1] = __fmul_rn(__fmul_rn(sum[j][1], low), token.y);
            sum[j][2] = __fmul_rn(__fmul_rn(sum[j][2], high), token.x);
            sum[j][3] = __fmul_rn(__fmul_rn(sum[j][3], high), token.y);
        }
    }
}

// ---- Panels.

/// Where chunk `chunk` (16 bytes) of a token's row lies in panels: [chunk / 8][slots][128 bytes], swizzled as in shared memory.
__device__ __forceinline__ long long panel_at(int chunk, int slot, int slots) {
    long long line = static_cast<long long>(chunk / 8) * slots + slot;
    return line * TOKEN_STEP_BYTES + ((chunk % 8 ^ slot % 8) << 4);
}

/// The slot of a job's first row in panels: jobs begin at multiples of 8.
__device__ __forceinline__ int first_slot(const int *offsets, int job) {
    int slot = 0;
    for (int j = 0; j < job; ++j) {
        slot += divide_up(load_fresh(offsets + j + 1) - load_fresh(offsets + j), 8) * 8;
    }
    return slot;
}

// ---- The activation.

/// x / (1 + e^-x), by the fast exponential and reciprocal: a few units in the last place of f32, of which bf16 sees none.
__device__ __forceinline__ float silu(float x) {
    return __fmul_rn(x, reciprocal_fast(__fadd_rn(1.0F, exp2_fast(__fmul_rn(x, -1.44269504F)))));
}

/// silu(gate) * up of one strip (8 columns of the intermediate row) for all tokens of the tile, the first of which has row
/// or slot `first`. IS_PANEL: into panels of `out_stride` slots, not rows.
template <int N, bool IS_PANEL>
__device__ __forceinline__ void put_activation(const GateUp &call, const float (&sum)[N / 8][4], const Tokens &tokens,
                                               int first, int ff_column, int lane) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        float even = __fmul_rn(silu(sum[j][0]), sum[j][2]), odd = __fmul_rn(silu(sum[j][1]), sum[j][3]);
        // The neighbour row's value, so that a lane writes two columns of one token.
        bool is_first = lane / 4 % 2 == 0;
        float other = __shfl_xor_sync(~0U, is_first ? odd : even, 4);
        int token = j * 8 + lane % 4 * 2 + (is_first ? 0 : 1);
        u32 both = is_first ? bf16x2_from(even, other) : bf16x2_from(other, odd);
        if (token < tokens.count) {
            auto *out = reinterpret_cast<u8 *>(call.out);
            out += IS_PANEL ? panel_at(ff_column / 8, first + token, call.out_stride)
                            : (static_cast<long long>(first + token) * call.out_stride + ff_column) * 2;
            *reinterpret_cast<u32 *>(out + lane / 8 * 4) = both;
        }
    }
}
