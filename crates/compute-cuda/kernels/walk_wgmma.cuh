// The products of walk_mma.cuh by wgmma, for sm_90a: the same packed weights, arguments and tree, another numeric class.
// Weights are A, from registers; tokens are B, from swizzled shared memory. A warp group has 64 rows.
//
// A block is one or more warp groups that multiply and some threads that fetch: weights by bulk copies (one per 64 rows
// and step), tokens by cp.async, because the rows of an expert lie anywhere. What is under way is shared memory, not
// registers. wgmma reads shared memory by another path than cp.async writes it, so a fence (a MEMBAR) stands between them:
// in the warps that multiply, which have no loads of their own under way that it could wait for. It costs 1 to 2 %.
//
// Measured on one H200 (docs/perf/cuda.md): while tokens are few all products of experts read 3.9 to 4.4 TB/s. What decided that:
//   one bulk copy per 64 rows and step, not one per 16: a copy takes its thread about 50 ns;
//   enough threads for the tokens: with 32 for 64 tokens they, not the weights, set the pace;
//   all parts of K at work side by side while a matrix has few rows: latency times steps is a block's time.
// Long batches, gate_up n256: 128 x 256 x 64 per step and block takes 1,024 cycles of the tensor cores and 48 KiB from L2, of which
// a cluster of two asks for 32: it takes 1,150 cycles with clusters, 1,350 without.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(TR_EMULATOR)

template <int N> __device__ __forceinline__ void wgmma_step(const Bf16Step &, float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {
    wgmma_bf16(d, a, b);
}
template <int N> __device__ __forceinline__ void wgmma_step(const Q4Step &, float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {
    wgmma_bf16(d, a, b);
}
template <int N> __device__ __forceinline__ void wgmma_step(const Fp8Step &, float (&d)[N / 8][4], const u32 (&a)[4], u64 b) {
    wgmma_e4m3(d, a, b);
}

__device__ __forceinline__ void load_shared_step(Bf16Step &to, u32 step, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to.tile[i] = shared_load_16(step + i * 512 + lane * 16);
    }
}
__device__ __forceinline__ void load_shared_step(Fp8Step &to, u32 step, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to.tile[i] = shared_load_16(step + i * 512 + lane * 16);
    }
}
__device__ __forceinline__ void load_shared_step(Q4Step &to, u32 step, int lane) {
    to.nibbles = shared_load_16(step + lane * 16);
    to.scales = shared_load_16(step + 512 + lane / 4 * 16);
}

/// A ring of stages between producer threads and the warp groups that they feed. A stage: one step of every warp's
/// strip, then the tokens' step. The blocks of a CLUSTER give each other their tokens, from panels (panels.cu).
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER = 1> struct Ring {
    static constexpr int WARPS = GROUPS * 4;
    static constexpr int COPIED = GROUPS * GROUP_STEP<Step> + (CLUSTER > 1 ? N * TOKEN_STEP_BYTES : 0); // by bulk copies
    static constexpr u32 TOKENS_AT = (GROUPS * GROUP_STEP<Step> + 1023) / 1024 * 1024;
    static constexpr u32 STAGE_BYTES = TOKENS_AT + N * TOKEN_STEP_BYTES;
    static constexpr u32 BYTES = STAGES * STAGE_BYTES;
    u32 stages;   // shared address, 1024-byte aligned
    u32 barriers; // STAGES x (full, empty), 16 bytes per stage
};

/// One thread, before a __syncthreads.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER>
__device__ __forceinline__ void start_ring(const Ring<Step, N, GROUPS, STAGES, PRODUCERS, CLUSTER> &ring) {
    for (int i = 0; i < STAGES; ++i) {
        mbarrier_init(ring.barriers + 16 * i, CLUSTER > 1 ? 1 : PRODUCERS + 1);
        mbarrier_init(ring.barriers + 16 * i + 8, ring.WARPS * CLUSTER);
    }
    fence_mbarrier_init();
}

/// Where the weights of GROUPS groups of 64 rows are read.
template <int GROUPS> struct WeightStream {
    Cursor at;
    const u8 *groups[GROUPS];
};

/// Asks for the next step's weights, by one bulk copy for each group. One thread.
/// `group_of(parts, part, group)`: where the rows of a consumer group begin.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER, class GroupOf>
__device__ __forceinline__ void next_weights(WeightStream<GROUPS> &from, const Ring<Step, N, GROUPS, STAGES, PRODUCERS, CLUSTER> &ring,
                                             const Parts &parts, int slot, const GroupOf &group_of) {
    u32 stage = ring.stages + slot * ring.STAGE_BYTES, full = ring.barriers + 16 * slot;
    mbarrier_arrive_expect(full, ring.COPIED);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        from.groups[g] = from.at.step == 0 ? group_of(parts, from.at.part, g) : from.groups[g] + GROUP_STEP<Step>;
        bulk_copy(stage + g * GROUP_STEP<Step>, from.groups[g], GROUP_STEP<Step>, full);
    }
    advance<Step>(from.at, parts);
}

/// Fills the stages, `thread` of PRODUCERS. Weights come by bulk copies; tokens, which may lie anywhere, by cp.async. Nothing
/// here waits for a copy: both kinds report to the stage's barrier. Weights are nobody's work and are asked for before the
/// kernel in front has ended.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, class GroupOf>
__device__ __forceinline__ void produce(const Ring<Step, N, GROUPS, STAGES, PRODUCERS> &ring, const Tokens &tokens,
                                        const Parts &parts, int thread, const GroupOf &group_of) {
    int slot = 0, total = total_steps<Step>(parts);
    u32 parity = 0;
    Cursor at = first_step<Step>(parts);
    WeightStream<GROUPS> weights = {at, {}};
    if (thread == 0) {
        for (int i = 0; i < min(STAGES, total); ++i) {
            next_weights(weights, ring, parts, i, group_of);
        }
    }
    grid_wait();
    TokenRows<N, PRODUCERS> rows;
    find_rows(rows, tokens, thread);
    for (int i = 0; i < total; ++i) {
        u32 stage = ring.stages + slot * ring.STAGE_BYTES, full = ring.barriers + 16 * slot;
        if (i >= STAGES) {
            mbarrier_wait(full + 8, parity);
            if (thread == 0) {
                next_weights(weights, ring, parts, slot, group_of);
            }
        }
        copy_step<Step, N, PRODUCERS>(stage + ring.TOKENS_AT, rows, tokens, parts, at, thread);
        mbarrier_arrive_copied(full);
        advance<Step>(at, parts);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        parity ^= slot == 0 && i >= STAGES;
    }
}

/// The same from panels (panels.cu): tokens too come by bulk copies, each block of the cluster copies its share to all. Threads but the
/// first have nothing to do.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER, class GroupOf>
__device__ __forceinline__ void produce(const Ring<Step, N, GROUPS, STAGES, PRODUCERS, CLUSTER> &ring, const Tokens &tokens,
                                        const Parts &parts, int thread, const GroupOf &group_of) {
    if (thread != 0) {
        return;
    }
    constexpr int SHARE = N / CLUSTER * TOKEN_STEP_BYTES;
    int slot = 0, total = total_steps<Step>(parts), rank = static_cast<int>(cluster_rank());
    u32 parity = 0, at = ring.TOKENS_AT + rank * SHARE;
    WeightStream<GROUPS> weights = {first_step<Step>(parts), {}};
    for (int i = 0; i < min(STAGES, total); ++i) {
        next_weights(weights, ring, parts, i, group_of);
    }
    grid_wait();
    long long first_of_part = static_cast<long long>(parts.begin) * steps_of<Step>(parts.part_cols) * tokens.stride;
    const u8 *panel = tokens.x + first_of_part + static_cast<long long>(tokens.first) * TOKEN_STEP_BYTES + rank * SHARE;
    for (int i = 0; i < total; ++i) {
        u32 stage = ring.stages + slot * ring.STAGE_BYTES, full = ring.barriers + 16 * slot;
        if (i >= STAGES) {
            mbarrier_wait(full + 8, parity);
            next_weights(weights, ring, parts, slot, group_of);
        }
        bulk_copy_to_all(stage + at, panel, SHARE, full, (1 << CLUSTER) - 1);
        panel += tokens.stride;
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        parity ^= slot == 0 && i >= STAGES;
    }
}

/// Waits for the block, or for all blocks of the cluster.
template <int CLUSTER> __device__ __forceinline__ void blocks_sync() {
    if constexpr (CLUSTER == 1) {
        __syncthreads();
    } else {
        cluster_sync();
    }
}

/// A block of a cluster ends when no other writes into it any more.
template <int CLUSTER> __device__ __forceinline__ void end_cluster() {
    if constexpr (CLUSTER > 1) {
        cluster_sync();
    }
}

/// A block of 384 threads begins with 168 registers each: 64,512. Producers need fewer, sums of many tokens more.
constexpr int PRODUCER_REGISTERS = 88, CONSUMER_REGISTERS = 208;

template <int N> __device__ __forceinline__ void become_producer() {
    if constexpr (N >= 128) {
        registers_down<PRODUCER_REGISTERS>();
    }
}

template <int N> __device__ __forceinline__ void become_consumer() {
    if constexpr (N >= 128) {
        registers_up<CONSUMER_REGISTERS>();
    }
}

/// A stage may be filled again: says so to the blocks that write there, lane `rank` to each.
template <int CLUSTER> __device__ __forceinline__ void give_back(u32 empty, int rank) {
    if constexpr (CLUSTER == 1) {
        mbarrier_arrive(empty);
    } else {
        mbarrier_arrive_at(empty, rank);
    }
}

/// Multiplies what comes through the ring and calls `finish(part, sum)` after each part: a warp of 4 x GROUPS.
/// One step's products stay under way while the next is read: its stage is given back one step later.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER, class Finish>
__device__ __forceinline__ void consume(const Ring<Step, N, GROUPS, STAGES, PRODUCERS, CLUSTER> &ring, const Parts &parts, int warp, int lane,
                                        Finish finish) {
    int slot = 0, before = -1;
    u32 parity = 0;
    for (int part = parts.begin; part < parts.end; ++part) {
        float sum[N / 8][4] = {};
        wgmma_settle(sum);
        int steps = steps_of<Step>(cols_of(parts, part));
        for (int step = 0; step < steps; step += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 stage = ring.stages + slot * ring.STAGE_BYTES;
                mbarrier_wait(ring.barriers + 16 * slot, parity);
                if constexpr (CLUSTER == 1) {
                    fence_proxy_async(); // between the writes of cp.async, which the barrier has shown, and wgmma
                }
                Step weights;
                load_shared_step(weights, stage + warp * Step::BYTES, lane);
                u32 a[4][4];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    fragment(weights, tile, a[tile]);
                }
                u64 b = wgmma_descriptor(stage + ring.TOKENS_AT);
                wgmma_fence();
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    wgmma_step<N>(weights, sum, a[tile], b + 2 * tile);
                }
                wgmma_commit();
                wgmma_wait<1>();
                __syncwarp(); // one lane gives back what all have read
                if (lane < CLUSTER && before >= 0) {
                    give_back<CLUSTER>(ring.barriers + 16 * before + 8, lane);
                }
                before = slot;
                slot = slot + 1 == STAGES ? 0 : slot + 1;
                parity ^= slot == 0;
            }
        }
        wgmma_wait<0>();
        wgmma_settle(sum);
        finish(part, sum);
    }
}

// ---- A matrix with a tree.

/// By parts: 4 groups of the same 64 rows, two parts each, and a producer warp for each group. Block 640.
/// Shared: 4 rings, then 4 x N x 68 f32, then 4 x STAGES x 16.
template <class Step, int N, int STAGES, class Scales, class GroupOf, class ScalesOf>
__device__ __forceinline__ void group_tree_by_parts(const Tokens &tokens, const Parts &parts, int first_row, const Output &output,
                                                    const Scales &scales, GroupOf group_of, ScalesOf scales_of) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, is_producer = warp >= 16;
    int group = is_producer ? warp - 16 : warp / 4, in_group = warp % 4;
    Ring<Step, N, 1, STAGES, 32> ring;
    u32 shared = shared_address(tr_shared());
    ring.stages = shared + group * ring.BYTES;
    ring.barriers = shared + 4 * ring.BYTES + 4 * N * 68 * 4 + group * STAGES * 16;
    auto *slots = reinterpret_cast<float *>(tr_shared() + 4 * ring.BYTES); // see slot_at
    if (is_producer && lane == 0) {
        start_ring(ring);
    }
    __syncthreads();
    Parts own = {parts.cols, parts.part_cols, max(parts.begin, 2 * group), min(parts.end, 2 * group + 2)};
    if (own.begin < own.end) {
        if (is_producer) {
            produce(ring, tokens, own, lane, group_of);
        } else {
            grid_begin();
            auto finish = [&](int part, float(&sum)[N / 8][4]) {
                scale_sums<Step, N>(sum, scales_of(part, in_group), scales, tokens, part, lane);
#pragma unroll
                for (int i = 0; i < N / 2; ++i) {
                    int column = i / 4 * 8 + lane % 4 * 2 + i % 2, row = in_group * 16 + lane / 4 + i / 2 % 2 * 8;
                    float *slot = slots + slot_at<N, 64>(group, column, row);
                    *slot = part == own.begin ? sum[i / 4][i % 4] : __fadd_rn(*slot, sum[i / 4][i % 4]);
                }
            };
            consume(ring, own, in_group, lane, finish);
        }
    }
    __syncthreads();
    put_tree<N, 64, 640, 2>(slots, tokens.count, parts, num_parts(parts), first_row, output);
}

/// In turn, for whole products only: 2 groups of 64 rows each and PRODUCERS threads, which `fill(ring, thread)`. Block 256 + PRODUCERS.
/// Shared: the ring, then LEVELS x 128 x N f32 (2, or 1 for N = 128), then STAGES x 16.
template <class Step, int N, int TILE, int STAGES, int PRODUCERS, int CLUSTER, class PartsOf, class Scales, class Fill, class ScalesOf>
__device__ __forceinline__ void group_tree_in_turn(const Tokens &tokens, PartsOf parts_of, int first_row, const Output &output,
                                                   const Scales &scales, Fill fill, ScalesOf scales_of) {
    constexpr int VALUES = N / 2, KEPT = N == 128 ? VALUES : 1, LEVELS = N == 128 ? 1 : 2;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Ring<Step, N, 2, STAGES, PRODUCERS, CLUSTER> ring;
    ring.stages = shared_address(tr_shared());
    ring.barriers = ring.stages + ring.BYTES + LEVELS * 128 * N * 4;
    if (threadIdx.x == 0) {
        start_ring(ring);
    }
    blocks_sync<CLUSTER>();
    if (warp >= 8) {
        become_producer<TILE>();
        fill(ring, threadIdx.x - 256);
        return;
    }
    become_consumer<TILE>();
    grid_begin();
    Parts parts = parts_of();
    Halves<VALUES, KEPT> halves;
    halves.place = reinterpret_cast<float *>(tr_shared() + ring.BYTES) + threadIdx.x;
    auto finish = [&](int part, float(&sum)[N / 8][4]) {
        scale_sums<Step, N>(sum, scales_of(part, warp), scales, tokens, part, lane);
        float value[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            value[i] = sum[i / 4][i % 4];
        }
        if (!climb_whole<256>(halves, value, part, part + 1 == parts.end)) {
            return;
        }
        int column = computed_here(lane) % 4 * 2, row = computed_here(first_row) + warp * 16 + lane / 4;
        float *to = output.out + static_cast<long long>(column) * output.stride + row;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (column + i / 4 * 8 + i % 2 < tokens.count && row + i / 2 % 2 * 8 < output.rows) {
                float *at = to + (i % 2 * output.stride + i / 2 % 2 * 8);
                *at = output.is_added ? __fadd_rn(*at, value[i]) : value[i];
            }
            to += i % 4 == 3 ? 8 * output.stride : 0;
        }
    };
    consume(ring, parts, warp, lane, finish);
}

/// Rows of a block; 64 where parts are summed side by side, which wins while tokens are few or there are few rows.
template <int N> constexpr int LINEAR_ROWS = N <= 64 ? 64 : 128;
template <int N> constexpr int DOWN_ROWS = N <= 32 ? 64 : 128;
/// Stages that there is room for.
template <int N> constexpr int BY_PARTS_STAGES = N <= 16 ? 5 : N == 32 ? 4 : 2;

/// `parts_of()`: the parts, computed anew for producers and consumers, or they would be kept for both all the time.
template <class Step, int N, int TILE, int ROWS, int CLUSTER, class PartsOf, class Scales, class GroupOf, class ScalesOf>
__device__ __forceinline__ void group_tree(const Tokens &tokens, PartsOf parts_of, int first_row, const Output &output,
                                           const Scales &scales, GroupOf group_of, ScalesOf scales_of) {
    if constexpr (ROWS == 64) {
        group_tree_by_parts<Step, N, BY_PARTS_STAGES<N>>(tokens, parts_of(), first_row, output, scales, group_of, scales_of);
    } else {
        constexpr int STAGES = N <= 64 ? 6 : 5;
        auto fill = [&](const Ring<Step, N, 2, STAGES, 128, CLUSTER> &ring, int thread) { produce(ring, tokens, parts_of(), thread, group_of); };
        group_tree_in_turn<Step, N, TILE, STAGES, 128, CLUSTER>(tokens, parts_of, first_row, output, scales, fill, scales_of);
        end_cluster<CLUSTER>();
    }
}

template <class Step, int N, int CLUSTER = 1> __device__ __forceinline__ void linear_group(const Linear &call) {
    int column = blockIdx.x * N, first_row = blockIdx.y * LINEAR_ROWS<N>;
    Tokens tokens = {call.x, call.row_ids, column, min(N, call.num_tokens - column), call.x_stride};
    auto parts_of = [&]() { return parts_between(computed_here(call.cols), 0, 8); };
    int strips = divide_up(call.rows, 64) * 4;
    // Of a block that reaches behind the last rows, a group there computes the last again and writes nothing.
    auto group_of = [&](const Parts &parts, int part, int group) {
        int strip = min(first_row / 16 + 4 * group, strips - 4), steps = steps_of<Step>(cols_of(parts, part));
        long long part_bytes = static_cast<long long>(strips) * steps_of<Step>(parts.part_cols) * Step::BYTES;
        return call.weights + part * part_bytes + strip_offset<Step>(strip, steps);
    };
    auto scales_of = [&](int part, int warp) {
        int strip = min(first_row / 16 + warp / 4 * 4, strips - 4) + warp % 4;
        return call.weight_scales + (static_cast<long long>(part) * strips + strip) * 16;
    };
    long long at = static_cast<long long>(column) * call.out_stride;
    Output output = {call.out + at, 1, call.out_stride, call.rows, call.is_added != 0};
    TokenScales<1, CLUSTER != 1> scales = {call.x_scales};
    group_tree<Step, N, N, LINEAR_ROWS<N>, CLUSTER>(tokens, parts_of, first_row, output, scales, group_of, scales_of);
}

template <class Step, int N, int CLUSTER = 1, int TILE = N> __device__ __forceinline__ void down_group(const Down &call) {
    // Written before the kernel that this one follows, which let this one begin only then: see grid_begin.
    const Job *at_job = call.jobs + blockIdx.z;
    Job job = {load_fresh(&at_job->expert), load_fresh(&at_job->begin), load_fresh(&at_job->end), load_fresh(&at_job->out)};
    int begin = load_fresh(call.offsets + blockIdx.z), column = blockIdx.x * TILE;
    int left = load_fresh(call.offsets + blockIdx.z + 1) - begin - column;
    if (left <= 0) {
        grid_begin();
        return;
    }
    int first_row = blockIdx.y * DOWN_ROWS<TILE>, strips = divide_up(call.hidden, 64) * 4;
    int first = (CLUSTER > 1 ? first_slot(call.offsets, blockIdx.z) : begin) + column;
    Tokens tokens = {call.x, nullptr, first, min(N, left), call.x_stride};
    auto parts_of = [&]() { return parts_between(computed_here(call.ff), job.begin, job.end); };
    const Expert *expert = call.experts + job.expert;
    auto group_of = [&](const Parts &parts, int part, int group) {
        int strip = min(first_row / 16 + 4 * group, strips - 4);
        return expert->down[part] + strip_offset<Step>(strip, steps_of<Step>(cols_of(parts, part)));
    };
    auto scales_of = [&](int part, int warp) {
        return expert->down_scales[part] + (min(first_row / 16 + warp / 4 * 4, strips - 4) + warp % 4) * 16;
    };
    int vectors = num_nodes(job.begin, job.end, num_parts(parts_of()));
    long long out = job.out < 0 ? begin : job.out;
    float *at = call.out + (out + static_cast<long long>(column) * vectors) * call.hidden;
    Output output = {at, vectors, call.hidden, call.hidden, false};
    TokenScales<8, CLUSTER != 1> scales = {call.x_scales};
    group_tree<Step, N, TILE, DOWN_ROWS<TILE>, CLUSTER>(tokens, parts_of, first_row, output, scales, group_of, scales_of);
}

/// GROUPS groups of 64 packed rows (32 columns of the intermediate row) of one segment and PRODUCERS threads.
/// Block GROUPS x 128 + PRODUCERS. Shared: the ring, then STAGES x 16.
/// TILE: tokens from block to block, N of them at most are there.
template <class Step, int N, int GROUPS, int STAGES, int PRODUCERS, int CLUSTER = 1, int TILE = N>
__device__ __forceinline__ void gate_up_group(const GateUp &call) {
    grid_begin();
    Job job = call.jobs[blockIdx.z];
    int begin = call.offsets[blockIdx.z], left = call.offsets[blockIdx.z + 1] - begin - blockIdx.x * TILE;
    int part_cols = segment_cols(call.ff), blocks = divide_up(part_cols / 32, GROUPS);
    int segment = blockIdx.y / blocks, first_tile = blockIdx.y % blocks * GROUPS;
    int tiles = divide_up(cols_of({call.ff, part_cols, 0, 8}, segment), 32);
    if (left <= 0 || segment < job.begin || segment >= job.end || first_tile >= tiles) {
        return;
    }
    int first = (CLUSTER > 1 ? first_slot(call.offsets, blockIdx.z) : begin) + blockIdx.x * TILE;
    Tokens tokens = {call.x, call.row_ids, first, min(N, left), call.x_stride};
    Parts parts = {call.hidden, call.hidden, 0, 1};
    const Expert *expert = call.experts + job.expert;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // A group behind the last tile computes that again and writes nothing.
    auto strip_at = [&](int w) { return min(first_tile + w / 4, tiles - 1) * 4 + w % 4; };
    Ring<Step, N, GROUPS, STAGES, PRODUCERS, CLUSTER> ring;
    ring.stages = shared_address(tr_shared());
    ring.barriers = ring.stages + ring.BYTES;
    if (threadIdx.x == 0) {
        start_ring(ring);
    }
    blocks_sync<CLUSTER>();
    if (warp >= GROUPS * 4) {
        become_producer<TILE>();
        auto group_of = [&](const Parts &, int, int group) {
            return expert->gate_up[segment] + strip_offset<Step>(strip_at(4 * group), steps_of<Step>(call.hidden));
        };
        produce(ring, tokens, parts, threadIdx.x - GROUPS * 128, group_of);
        end_cluster<CLUSTER>();
        return;
    }
    become_consumer<TILE>();
    // One register until the sums are there, not one for each number that it comes from.
    int ff_column = segment * part_cols + strip_at(warp) * 8;
    auto finish = [&](int part, float(&sum)[N / 8][4]) {
        TokenScales<1, CLUSTER != 1> scales = {call.x_scales};
        scale_sums<Step, N>(sum, expert->gate_up_scales[segment] + strip_at(warp) * 16, scales, tokens, part, lane);
        if (first_tile + warp / 4 < tiles) {
            put_activation<N, CLUSTER != 1>(call, sum, tokens, computed_here(first), computed_here(ff_column), lane);
        }
    };
    consume(ring, parts, warp, lane, finish);
    end_cluster<CLUSTER>();
}

/// The products of long batches. The last tile of a job is seldom full: it takes the time of what it has.
template <class Step, int CLUSTER> __device__ __forceinline__ void gate_up_cluster(const GateUp &call) {
    grid_begin();
    int left = call.offsets[blockIdx.z + 1] - call.offsets[blockIdx.z] - blockIdx.x * 256;
    if (left > 128) {
        gate_up_group<Step, 256, 2, 4, 128, CLUSTER, 256>(call);
    } else if (left > 64) {
        gate_up_group<Step, 128, 2, 4, 128, CLUSTER, 256>(call);
    } else {
        gate_up_group<Step, 64, 2, 4, 128, CLUSTER, 256>(call);
    }
}

template <class Step, int CLUSTER> __device__ __forceinline__ void down_cluster(const Down &call) {
    int left = load_fresh(call.offsets + blockIdx.z + 1) - load_fresh(call.offsets + blockIdx.z) - blockIdx.x * 128;
    if (left > 64) {
        down_group<Step, 128, CLUSTER, 128>(call);
    } else {
        down_group<Step, 64, CLUSTER, 128>(call);
    }
}

#endif
