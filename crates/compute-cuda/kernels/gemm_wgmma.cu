// The products of gemm.cu by wgmma, for sm_90a: the same packed weights, arguments and tree, another numeric class.
// Weights are A, from registers; tokens are B, from swizzled shared memory. A warp group has 64 rows.
//
// Bytes in flight: a warp keeps AHEAD steps of 2 KiB under way. An H200 needs 4.3 TB/s x 0.9 us / 132 = 29 KiB per SM.
//   down n8      4 groups x 4 warps x 2 steps = 64 KiB, one block per SM; B = 1 makes 64 x 2 = 128 blocks for 132 SMs.
//   gate_up n8   32 KiB... per block 4 warps x 2 x 2 KiB = 16 KiB, five blocks per SM: 80 KiB; B = 1 makes 896 blocks.
//   down n64     2 groups x 4 warps x 3 steps = 48 KiB, one block per SM.
// So the expected fraction is that of a plain read stream less the tail of the last blocks (about 0.9 of it); not run.
//
// Prefill: gate_up n256 does 128 x 256 x 64 per step and block: 16 KiB of weights and 32 KiB of tokens from L2 in 1024 cycles of the
// tensor cores, 48 bytes a cycle. At 60 % of 989 TFLOP/s that is 29 bytes a cycle and SM, 6.7 TB/s of L2 over all: near what L2 gives,
// so L2 and not the tensor cores may be the limit (multicast in a cluster would halve the token part; not done).
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

/// Walks over `parts` with one strip per warp and calls `finish(part, sum)` after each part. `thread` of THREADS (whole
/// warp groups) that share the token stages; `barrier` is theirs. For few tokens: waits for a step's products before
/// the next, other groups fill the gap.
template <class Step, int N, int THREADS, int STAGES, int AHEAD, class StripOf, class Finish>
__device__ __forceinline__ void walk_group(const Tokens &tokens, const Parts &parts, u32 stages, int thread, int barrier,
                                           StripOf strip_of, Finish finish) {
    constexpr int RING = AHEAD + 1;
    constexpr u32 STAGE_BYTES = N * TOKEN_STEP_BYTES;
    int lane = thread % 32, total = total_steps<Step>(parts);
    Step ring[RING];
    Cursor loads = first_step<Step>(parts), copies = loads, at = loads;
    const u8 *strip = nullptr;
    auto load = [&](Step &to) {
        if (loads.part < parts.end) {
            strip = loads.step == 0 ? strip_of(loads.part) : strip + Step::BYTES;
            load_step(to, strip, lane);
            advance<Step>(loads, parts);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        load(ring[i]);
    }
    TokenRows<N, THREADS> rows;
    find_rows(rows, tokens, thread);
    int slot = 0, copy_slot = 0;
    auto copy = [&]() {
        copy_step<Step, N, THREADS>(stages + copy_slot * STAGE_BYTES, rows, tokens, parts, copies, thread);
        copy_slot = copy_slot + 1 == STAGES ? 0 : copy_slot + 1;
        if (copies.part < parts.end) {
            advance<Step>(copies, parts);
        }
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        copy();
    }
    float sum[N / 8][4] = {};
    for (int first = 0; first < total; first += RING) {
#pragma unroll
        for (int r = 0; r < RING; ++r) {
            if (first + r < total) {
                cp_async_wait<STAGES - 2>();
                fence_proxy_async();
                bar_sync(barrier, THREADS);
                load(ring[(r + AHEAD) % RING]);
                copy();
                u32 a[4][4];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    fragment(ring[r], tile, a[tile]);
                }
                u64 b = wgmma_descriptor(stages + slot * STAGE_BYTES);
                wgmma_settle(sum);
                wgmma_fence();
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    wgmma_step<N>(ring[r], sum, a[tile], b + 2 * tile);
                }
                wgmma_commit();
                slot = slot + 1 == STAGES ? 0 : slot + 1;
                int part = at.part;
                advance<Step>(at, parts);
                wgmma_wait<0>();
                wgmma_settle(sum);
                if (at.part != part) {
                    finish(part, sum);
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) {
                        sum[i / 4][i % 4] = 0.0F;
                    }
                }
            }
        }
    }
    cp_async_wait<0>();
}

/// The next step of the walk; the last again at its end. Without a branch around what products under way could use.
template <class Step, class StripOf>
__device__ __forceinline__ void advance_to_last(Cursor &at, const Parts &parts, const u8 *&strip, StripOf strip_of) {
    bool is_end = at.step + 1 == at.steps, is_last = is_end && at.part + 1 >= parts.end;
    if (is_end && !is_last) {
        at.part += 1;
        at.step = 0;
        at.steps = steps_of<Step>(cols_of(parts, at.part));
        strip = strip_of(at.part);
    } else if (!is_last) {
        at.step += 1;
        strip += Step::BYTES;
    }
}

/// As walk_group, for many tokens: one step's products stay under way, so a stage and a ring place are free one step
/// later. No branch stands between products: the compiler would wait for them there.
template <class Step, int N, int THREADS, int STAGES, class StripOf, class Finish>
__device__ __forceinline__ void walk_group_deep(const Tokens &tokens, const Parts &parts, u32 stages, int thread,
                                                int barrier, StripOf strip_of, Finish finish) {
    constexpr int COPIES = STAGES - 2;
    constexpr u32 STAGE_BYTES = N * TOKEN_STEP_BYTES;
    static_assert(COPIES >= 1, "a stage that is read, one that may still be, and one for the next");
    int lane = thread % 32;
    Step ring[2];
    Cursor loads = first_step<Step>(parts), copies = loads;
    const u8 *strip = strip_of(parts.begin), *no_strip = nullptr;
    load_step(ring[0], strip, lane);
    advance_to_last<Step>(loads, parts, strip, strip_of);
    TokenRows<N, THREADS> rows;
    find_rows(rows, tokens, thread);
    int slot = 0, copy_slot = 0;
    auto copy = [&]() {
        copy_step<Step, N, THREADS>(stages + copy_slot * STAGE_BYTES, rows, tokens, parts, copies, thread);
        copy_slot = copy_slot + 1 == STAGES ? 0 : copy_slot + 1;
        advance_to_last<Step>(copies, parts, no_strip, [](int) { return static_cast<const u8 *>(nullptr); });
    };
#pragma unroll
    for (int i = 0; i < COPIES; ++i) {
        copy();
    }
    for (int part = parts.begin; part < parts.end; ++part) {
        float sum[N / 8][4] = {};
        wgmma_settle(sum);
        int steps = steps_of<Step>(cols_of(parts, part));
        for (int step = 0; step < steps; step += 2) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                cp_async_wait<COPIES - 1>();
                fence_proxy_async();
                bar_sync(barrier, THREADS);
                u32 a[4][4];
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    fragment(ring[r], tile, a[tile]);
                }
                u64 b = wgmma_descriptor(stages + slot * STAGE_BYTES);
                wgmma_fence();
#pragma unroll
                for (int tile = 0; tile < 4; ++tile) {
                    wgmma_step<N>(ring[r], sum, a[tile], b + 2 * tile);
                }
                wgmma_commit();
                slot = slot + 1 == STAGES ? 0 : slot + 1;
                copy();
                wgmma_wait<1>();
                load_step(ring[1 - r], strip, lane);
                advance_to_last<Step>(loads, parts, strip, strip_of);
            }
        }
        wgmma_wait<0>();
        wgmma_settle(sum);
        finish(part, sum);
    }
    cp_async_wait<0>();
}

// ---- A matrix with a tree.

/// By parts: 4 groups, two parts each, the same 64 rows. Shared: 4 x 4 x N x 128, then 8 x N x 68 f32. Block 512.
template <class Step, int N, class StripOf, class ScalesOf>
__device__ __forceinline__ void group_tree_by_parts(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                                    const Output &output, const TokenScales &scales, StripOf strip_of,
                                                    ScalesOf scales_of) {
    constexpr int STAGES = 4;
    constexpr u32 STAGE_BYTES = STAGES * N * TOKEN_STEP_BYTES;
    int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    auto *slots = reinterpret_cast<float *>(tr_shared() + 4 * STAGE_BYTES); // see slot_at
    Parts own = {parts.cols, parts.part_cols, max(parts.begin, 2 * group), min(parts.end, 2 * group + 2)};
    if (own.begin < own.end) {
        auto finish = [&](int part, float(&sum)[N / 8][4]) {
            scale_sums<Step, N>(sum, scales_of(part), scales, tokens, part, lane);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                int column = i / 4 * 8 + lane % 4 * 2 + i % 2, row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
                slots[slot_at<N, 64>(part, column, row)] = sum[i / 4][i % 4];
            }
        };
        u32 stages = shared_address(tr_shared()) + group * STAGE_BYTES;
        walk_group<Step, N, 128, STAGES, 2>(tokens, own, stages, thread, 1 + group, strip_of, finish);
    }
    __syncthreads();
    put_tree<N, 64, 512>(slots, tokens.count, parts, num_segments, first_row, output);
}

/// In turn: 2 groups of 64 rows each. Shared: STAGES x N x 128, then LEVELS x 128 x N f32. Block 256.
template <class Step, int N, int STAGES, int AHEAD, class StripOf, class ScalesOf>
__device__ __forceinline__ void group_tree_in_turn(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                                   const Output &output, const TokenScales &scales, StripOf strip_of,
                                                   ScalesOf scales_of) {
    constexpr int VALUES = N / 2, KEPT = N == 128 ? VALUES : 1;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, node = 0;
    auto *places = reinterpret_cast<float *>(tr_shared() + STAGES * N * TOKEN_STEP_BYTES);
    Parked<KEPT> parked = {places + threadIdx.x, 256, 0, {}};
    int row = first_row + warp * 16 + lane / 4;
    auto emit = [&](float(&value)[VALUES]) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (column < tokens.count) {
                put(output, column, node, row + i / 2 % 2 * 8, value[i]);
            }
        }
        node += 1;
    };
    auto finish = [&](int part, float(&sum)[N / 8][4]) {
        scale_sums<Step, N>(sum, scales_of(part), scales, tokens, part, lane);
        float value[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            value[i] = sum[i / 4][i % 4];
        }
        climb(parked, value, part, part + 1 == parts.end, parts.end >= num_segments, emit);
    };
    u32 stages = shared_address(tr_shared());
    if constexpr (N >= 128) {
        walk_group_deep<Step, N, 256, STAGES>(tokens, parts, stages, threadIdx.x, 1, strip_of, finish);
    } else {
        walk_group<Step, N, 256, STAGES, AHEAD>(tokens, parts, stages, threadIdx.x, 1, strip_of, finish);
    }
}

template <class Step, int N, class StripOf, class ScalesOf>
__device__ __forceinline__ void group_tree(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                           const Output &output, const TokenScales &scales, StripOf strip_of, ScalesOf scales_of) {
    if constexpr (N <= 16) {
        group_tree_by_parts<Step, N>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
    } else {
        group_tree_in_turn<Step, N, 4, N == 64 ? 3 : 2>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
    }
}

/// Rows of one block of a product with a tree.
template <int N> constexpr int GROUP_TREE_ROWS = N <= 16 ? 64 : 128;

/// The packed strip of this warp; of a block that reaches behind the last strip, some strip that exists.
__device__ __forceinline__ int strip_of_warp(int first_row, int rows) {
    int warp = threadIdx.x / 32 % (blockDim.x == 512 ? 4 : 8), last = divide_up(rows, 64) * 4 - 1;
    return min(first_row / 16 + warp, last);
}

template <class Step, int N> __device__ __forceinline__ void linear_group(const Linear &call) {
    constexpr int ROWS = GROUP_TREE_ROWS<N>;
    int column = blockIdx.x * N, first_row = blockIdx.y * ROWS;
    Tokens tokens = {call.x, call.row_ids, column, min(N, call.num_tokens - column), call.x_stride};
    Parts parts = {call.cols, segment_cols(call.cols), 0, 0};
    parts.end = divide_up(call.cols, parts.part_cols);
    int strips = divide_up(call.rows, 64) * 4, strip = strip_of_warp(first_row, call.rows);
    long long part_bytes = static_cast<long long>(strips) * steps_of<Step>(parts.part_cols) * Step::BYTES;
    auto strip_of = [&](int part) {
        int steps = steps_of<Step>(cols_of(parts, part));
        return call.weights + part * part_bytes + static_cast<long long>(strip) * steps * Step::BYTES;
    };
    auto scales_of = [&](int part) { return call.weight_scales + static_cast<long long>(part) * strips * 16 + strip * 16; };
    Output output = {call.out, column, 1, call.out_stride, call.rows, call.is_added != 0};
    TokenScales scales = {call.x_scales, 1, 0};
    group_tree<Step, N>(tokens, parts, parts.end, first_row, output, scales, strip_of, scales_of);
}

template <class Step, int N> __device__ __forceinline__ void down_group(const Down &call) {
    constexpr int ROWS = GROUP_TREE_ROWS<N>;
    Job job = call.jobs[blockIdx.z];
    int begin = call.offsets[blockIdx.z], column = blockIdx.x * N, left = call.offsets[blockIdx.z + 1] - begin - column;
    if (left <= 0) {
        return;
    }
    int first_row = blockIdx.y * ROWS, strip = strip_of_warp(first_row, call.hidden);
    Tokens tokens = {call.x, nullptr, begin + column, min(N, left), call.x_stride};
    Parts parts = {call.ff, segment_cols(call.ff), job.begin, job.end};
    int num_segments = divide_up(call.ff, parts.part_cols);
    parts.end = min(parts.end, num_segments);
    const Expert *expert = call.experts + job.expert;
    auto strip_of = [&](int part) {
        int steps = steps_of<Step>(cols_of(parts, part));
        return expert->down[part] + static_cast<long long>(strip) * steps * Step::BYTES;
    };
    auto scales_of = [&](int part) { return expert->down_scales[part] + strip * 16; };
    int vectors = num_nodes(job.begin, job.end, num_segments);
    long long out = job.out < 0 ? begin : job.out;
    Output output = {call.out, out + static_cast<long long>(column) * vectors, vectors, call.hidden, call.hidden, false};
    TokenScales scales = {call.x_scales, 8, 1};
    group_tree<Step, N>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
}

/// GROUPS groups of 64 packed rows (32 columns of the intermediate row) of one segment. Shared: STAGES x N x 128. Block GROUPS x 128.
template <class Step, int N, int GROUPS, int STAGES, int AHEAD>
__device__ __forceinline__ void gate_up_group(const GateUp &call) {
    Job job = call.jobs[blockIdx.z];
    int first = call.offsets[blockIdx.z] + blockIdx.x * N, left = call.offsets[blockIdx.z + 1] - first;
    int part_cols = segment_cols(call.ff), blocks = divide_up(part_cols / 32, GROUPS);
    int segment = blockIdx.y / blocks, tile = blockIdx.y % blocks * GROUPS, lane = threadIdx.x % 32;
    int tiles = divide_up(cols_of({call.ff, part_cols, 0, 8}, segment), 32);
    if (left <= 0 || segment < job.begin || segment >= job.end || tile >= tiles) {
        return;
    }
    tile += threadIdx.x / 128;
    Tokens tokens = {call.x, call.row_ids, first, min(N, left), call.x_stride};
    Parts parts = {call.hidden, call.hidden, 0, 1};
    const Expert *expert = call.experts + job.expert;
    // A group behind the last tile computes that again and writes nothing.
    int strip = min(tile, tiles - 1) * 4 + threadIdx.x / 32 % 4;
    auto strip_of = [&](int) {
        return expert->gate_up[segment] + static_cast<long long>(strip) * steps_of<Step>(call.hidden) * Step::BYTES;
    };
    auto finish = [&](int part, float(&sum)[N / 8][4]) {
        TokenScales scales = {call.x_scales, 1, 0};
        scale_sums<Step, N>(sum, expert->gate_up_scales[segment] + strip * 16, scales, tokens, part, lane);
        if (tile < tiles) {
            put_activation<N>(call, sum, tokens, first, segment * part_cols + strip * 8, lane);
        }
    };
    u32 stages = shared_address(tr_shared());
    if constexpr (N >= 128) {
        walk_group_deep<Step, N, GROUPS * 128, STAGES>(tokens, parts, stages, threadIdx.x, 1, strip_of, finish);
    } else {
        walk_group<Step, N, GROUPS * 128, STAGES, AHEAD>(tokens, parts, stages, threadIdx.x, 1, strip_of, finish);
    }
}

extern "C" __global__ void __launch_bounds__(512) tr_linear_bf16_wg_n8(const Linear call) { linear_group<Bf16Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(512) tr_linear_bf16_wg_n16(const Linear call) { linear_group<Bf16Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_linear_bf16_wg_n32(const Linear call) { linear_group<Bf16Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_linear_bf16_wg_n64(const Linear call) { linear_group<Bf16Step, 64>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_linear_bf16_wg_n128(const Linear call) { linear_group<Bf16Step, 128>(call); }

extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_wg_n8(const GateUp call) { gate_up_group<Bf16Step, 8, 1, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(128) tr_gate_up_bf16_wg_n16(const GateUp call) { gate_up_group<Bf16Step, 16, 1, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_gate_up_bf16_wg_n32(const GateUp call) { gate_up_group<Bf16Step, 32, 2, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(512) tr_gate_up_bf16_wg_n64(const GateUp call) { gate_up_group<Bf16Step, 64, 4, 4, 2>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_gate_up_bf16_wg_n128(const GateUp call) { gate_up_group<Bf16Step, 128, 2, 4, 1>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_gate_up_bf16_wg_n256(const GateUp call) { gate_up_group<Bf16Step, 256, 2, 4, 1>(call); }

extern "C" __global__ void __launch_bounds__(512) tr_down_bf16_wg_n8(const Down call) { down_group<Bf16Step, 8>(call); }
extern "C" __global__ void __launch_bounds__(512) tr_down_bf16_wg_n16(const Down call) { down_group<Bf16Step, 16>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_down_bf16_wg_n32(const Down call) { down_group<Bf16Step, 32>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_down_bf16_wg_n64(const Down call) { down_group<Bf16Step, 64>(call); }
extern "C" __global__ void __launch_bounds__(256) tr_down_bf16_wg_n128(const Down call) { down_group<Bf16Step, 128>(call); }

#endif
