// Products with packed weights by mma.sync: dense matrices and grouped experts, sm_80 and later; the kernels are in
// gemm_<format>.cu. The weights go
// from memory to registers, once; only tokens pass through shared memory. walk_wgmma.cuh has the same for Hopper.
//
// One output element: its parts (tile.cuh) each from zero, k ascending, one mma after another; then the tree. All
// variants of a format (n8 to n128) do just that, so they give the same bits: `emulator/tests/gemm.cpp`.
//
// Two ways to cut the work of a matrix with 8 parts:
//   by parts   (n8, n16)  8 warps, each sums its own part of the same rows; the tree runs over shared memory.
//                         For few tokens: a matrix of 4096 rows makes 256 blocks, all parts of K at work at once.
//   in turn    (n32, n64) 4 warps of 16 rows walk over all parts; sums that wait for their right half are parked in
//                         shared memory. For more tokens: 64 rows share each token tile that is read from L2.
//
// Bytes in flight (what decides the speed for few tokens): a warp keeps AHEAD steps of MT x 2 KiB under way. The device needs
// bandwidth x 0.9 us: an A100 17 KiB per SM, an H200 29 KiB.
//   by parts n8       8 warps x 2 steps x 2 KiB = 32 KiB a block, about 104 registers: 2 blocks per SM, 64 KiB
//   by parts n16      8 warps x 1 step x 2 x 2 KiB = 32 KiB a block, 1 to 2 blocks per SM
//   in turn n32, n64  4 warps x 2 KiB = 8 KiB a block, 4 and 2 blocks per SM by shared memory: 32, 16 KiB
//   gate_up n8 to n64 4 warps x 2 steps (n64: 1) x 2 KiB, 3 to 5 blocks per SM: 32 to 80 KiB
// So an A100 can be held busy by all but `in turn n64`, which is at the edge; tokens add N / rows to the traffic of L2 (50 % by parts n8 and n16,
// 50 and 100 % in turn). Expected 0.8 to 0.9 of a plain read stream on sm_80 for n8; not run.

/// Waits for the threads that share a token stage.
template <int THREADS> __device__ __forceinline__ void group_sync(int barrier) {
    if constexpr (THREADS == 32) {
        __syncwarp();
    } else {
        bar_sync(barrier, THREADS);
    }
}

/// One step of MT strips by N tokens. `lane_offset`: see first_offset.
template <class Step, int N, int MT>
__device__ __forceinline__ void multiply_step(float (&sum)[MT][N / 8][4], const Step (&weights)[MT], u32 stage,
                                              u32 lane_offset, int count) {
    u32 pair[4]; // N == 8: the B fragments of two tiles
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) {
            fragment(weights[m], tile, a[m]);
        }
        if constexpr (N == 8) {
            if (tile % 2 == 0) {
                ldmatrix_x4(pair, (stage + lane_offset) ^ (tile << 5));
            }
            u32 b[2] = {pair[tile % 2 * 2], pair[tile % 2 * 2 + 1]};
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma_step(weights[m], sum[m][0], a[m], b);
            }
        } else {
#pragma unroll
            for (int n = 0; n < N / 16; ++n) {
                if (n * 16 < count) {
                    u32 both[4];
                    ldmatrix_x4(both, (stage + lane_offset + n * 16 * TOKEN_STEP_BYTES) ^ (tile << 5));
                    u32 b0[2] = {both[0], both[1]}, b1[2] = {both[2], both[3]};
#pragma unroll
                    for (int m = 0; m < MT; ++m) {
                        mma_step(weights[m], sum[m][2 * n], a[m], b0);
                        mma_step(weights[m], sum[m][2 * n + 1], a[m], b1);
                    }
                }
            }
        }
    }
}

/// Where a lane's ldmatrix row lies in a stage, for tile 0. Matrices: k low and high half of tokens 0 to 7, then of
/// 8 to 15; for N == 8 the two halves of tile 0, then of tile 1. Tile t is at `^ t << 5`.
template <int N> __device__ __forceinline__ u32 first_offset(int lane) {
    int matrix = lane / 8, row = lane % 8;
    if constexpr (N == 8) {
        return row * TOKEN_STEP_BYTES + ((matrix ^ row) << 4);
    }
    return (matrix / 2 * 8 + row) * TOKEN_STEP_BYTES + ((matrix % 2 ^ row) << 4);
}

/// Walks over `parts` with MT strips of this warp and calls `finish(part, sum)` after each part.
/// `strip_of(part)`: the first of the warp's strips. `thread` of THREADS that share the token stages.
template <class Step, int N, int MT, int THREADS, int STAGES, int AHEAD, class StripOf, class Finish>
__device__ __forceinline__ void walk(const Tokens &tokens, const Parts &parts, u32 stages, int thread, int barrier,
                                     StripOf strip_of, Finish finish) {
    constexpr int RING = AHEAD + 1;
    constexpr u32 STAGE_BYTES = N * TOKEN_STEP_BYTES;
    int lane = thread % 32, total = total_steps<Step>(parts);
    u32 lane_offset = first_offset<N>(lane);
    Step ring[RING][MT];
    Cursor loads = first_step<Step>(parts), copies = loads, at = loads;
    const u8 *strip = nullptr;
    auto load = [&](Step(&to)[MT]) {
        if (loads.part < parts.end) {
            strip = loads.step == 0 ? strip_of(loads.part) : strip + GROUP_STEP<Step>;
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                load_step(to[m], strip + m * Step::BYTES, lane);
            }
            advance<Step>(loads, parts);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        load(ring[i]);
    }
    TokenRows<N, THREADS> rows;
    find_rows(rows, tokens, thread);
    auto copy = [&](int slot) {
        copy_step<Step, N, THREADS>(stages + slot * STAGE_BYTES, rows, tokens, parts, copies, thread);
        cp_async_commit(); // even when there is nothing left to copy, so that groups can be counted
        if (copies.part < parts.end) {
            advance<Step>(copies, parts);
        }
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        copy(i);
    }
    float sum[MT][N / 8][4] = {};
    int slot = 0, free_slot = STAGES - 1;
    for (int first = 0; first < total; first += RING) {
#pragma unroll
        for (int r = 0; r < RING; ++r) {
            if (first + r < total) {
                cp_async_wait<STAGES - 2>();
                group_sync<THREADS>(barrier);
                load(ring[(r + AHEAD) % RING]);
                copy(free_slot);
                multiply_step<Step, N, MT>(sum, ring[r], stages + slot * STAGE_BYTES, lane_offset, tokens.count);
                free_slot = slot;
                slot = slot + 1 == STAGES ? 0 : slot + 1;
                int part = at.part;
                advance<Step>(at, parts);
                if (at.part != part) {
                    finish(part, sum);
#pragma unroll
                    for (int i = 0; i < MT * (N / 8) * 4; ++i) {
                        sum[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0.0F;
                    }
                }
            }
        }
    }
    cp_async_wait<0>();
}

// ---- A matrix with a tree.

/// By parts: 8 warps, MT strips each. Shared: 8 x STAGES x N x 128, then 8 x N x (MT x 16 + 4) f32.
template <class Step, int N, int MT, int STAGES, class Scales, class StripOf, class ScalesOf>
__device__ __forceinline__ void tree_by_parts(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                              const Output &output, const Scales &scales, StripOf strip_of,
                                              ScalesOf scales_of) {
    constexpr int ROWS = MT * 16;
    constexpr u32 STAGE_BYTES = STAGES * N * TOKEN_STEP_BYTES;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto *slots = reinterpret_cast<float *>(tr_shared() + 8 * STAGE_BYTES); // see slot_at
    Parts own = {parts.cols, parts.part_cols, warp, min(warp + 1, parts.end)};
    if (warp >= parts.begin && warp < parts.end) {
        auto finish = [&](int part, float(&sum)[MT][N / 8][4]) {
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                scale_sums<Step, N>(sum[m], scales_of(part) + m * 16, scales, tokens, part, lane);
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        int column = j * 8 + lane % 4 * 2 + i % 2, row = m * 16 + lane / 4 + i / 2 * 8;
                        slots[slot_at<N, ROWS>(part, column, row)] = sum[m][j][i];
                    }
                }
            }
        };
        u32 stages = shared_address(tr_shared()) + warp * STAGE_BYTES;
        walk<Step, N, MT, 32, STAGES, MT == 1 ? 2 : 1>(tokens, own, stages, lane, 0, strip_of, finish);
    }
    __syncthreads();
    put_tree<N, ROWS, 256, 1>(slots, tokens.count, parts, num_segments, first_row, output);
}

/// In turn: 4 warps of one strip each. Shared: STAGES x N x 128, then 3 x 64 x N f32.
template <class Step, int N, int STAGES, class Scales, class StripOf, class ScalesOf>
__device__ __forceinline__ void tree_in_turn(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                             const Output &output, const Scales &scales, StripOf strip_of,
                                             ScalesOf scales_of) {
    constexpr int VALUES = N / 2;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, node = 0;
    auto *places = reinterpret_cast<float *>(tr_shared() + STAGES * N * TOKEN_STEP_BYTES);
    Parked parked = {places + threadIdx.x, 128, 0};
    auto emit = [&](float(&value)[VALUES]) {
        Output here = output;
        here.vectors = computed_here(output.vectors);
        int row = computed_here(first_row) + warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            if (column < tokens.count) {
                put(here, column, node, row + i / 2 % 2 * 8, value[i]);
            }
        }
        node += 1;
    };
    auto finish = [&](int part, float(&sum)[1][N / 8][4]) {
        scale_sums<Step, N>(sum[0], scales_of(part), scales, tokens, part, lane);
        float value[VALUES];
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            value[i] = sum[0][i / 4][i % 4];
        }
        climb(parked, value, part, part + 1 == parts.end, parts.end >= num_segments, emit);
    };
    walk<Step, N, 1, 128, STAGES, 1>(tokens, parts, shared_address(tr_shared()), threadIdx.x, 1, strip_of, finish);
}

template <class Step, int N, int MT, class Scales, class StripOf, class ScalesOf>
__device__ __forceinline__ void tree_product(const Tokens &tokens, const Parts &parts, int num_segments, int first_row,
                                             const Output &output, const Scales &scales, StripOf strip_of,
                                             ScalesOf scales_of) {
    if constexpr (N <= 16) {
        tree_by_parts<Step, N, MT, 3>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
    } else {
        tree_in_turn<Step, N, 3>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
    }
}

/// Rows of one block of a product with a tree.
template <int N> constexpr int TREE_ROWS = N == 8 ? 16 : N == 16 ? 32 : 64;

// ---- Dense.

template <class Step, int N> __device__ __forceinline__ void linear(const Linear &call) {
    grid_begin();
    constexpr int ROWS = TREE_ROWS<N>;
    int column = blockIdx.x * N, first_row = blockIdx.y * ROWS, warp = threadIdx.x / 32;
    Tokens tokens = {call.x, call.row_ids, column, min(N, call.num_tokens - column), call.x_stride};
    Parts parts = parts_between(call.cols, 0, 8);
    int strips = divide_up(call.rows, 64) * 4, strip = first_row / 16 + (N <= 16 ? 0 : warp);
    long long part_bytes = static_cast<long long>(strips) * steps_of<Step>(parts.part_cols) * Step::BYTES;
    auto strip_of = [&](int part) {
        int steps = steps_of<Step>(cols_of(parts, part));
        return call.weights + part * part_bytes + strip_offset<Step>(strip, steps);
    };
    auto scales_of = [&](int part) { return call.weight_scales + static_cast<long long>(part) * strips * 16 + strip * 16; };
    long long at = static_cast<long long>(column) * call.out_stride;
    Output output = {call.out + at, 1, call.out_stride, call.rows, call.is_added != 0};
    TokenScales<1> scales = {call.x_scales};
    tree_product<Step, N, ROWS / 16>(tokens, parts, parts.end, first_row, output, scales, strip_of, scales_of);
}

// ---- Experts.

/// 4 warps of one strip: 32 columns of the intermediate row. Shared: STAGES x N x 128.
template <class Step, int N, int STAGES, int AHEAD> __device__ __forceinline__ void gate_up(const GateUp &call) {
    grid_begin();
    Job job = call.jobs[blockIdx.z];
    int first = call.offsets[blockIdx.z] + blockIdx.x * N, left = call.offsets[blockIdx.z + 1] - first;
    int part_cols = segment_cols(call.ff), tiles = part_cols / 32;
    int segment = blockIdx.y / tiles, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (left <= 0 || segment < job.begin || segment >= job.end
        || static_cast<int>(blockIdx.y % tiles) * 32 >= cols_of({call.ff, part_cols, 0, 8}, segment)) {
        return;
    }
    Tokens tokens = {call.x, call.row_ids, first, min(N, left), call.x_stride};
    Parts parts = {call.hidden, call.hidden, 0, 1};
    const Expert *expert = call.experts + job.expert;
    int strip = blockIdx.y % tiles * 4 + warp;
    auto strip_of = [&](int) {
        return expert->gate_up[segment] + strip_offset<Step>(strip, steps_of<Step>(call.hidden));
    };
    auto finish = [&](int part, float(&sum)[1][N / 8][4]) {
        TokenScales<1> scales = {call.x_scales};
        scale_sums<Step, N>(sum[0], expert->gate_up_scales[segment] + strip * 16, scales, tokens, part, lane);
        put_activation<N, false>(call, sum[0], tokens, first, segment * part_cols + strip * 8, lane);
    };
    walk<Step, N, 1, 128, STAGES, AHEAD>(tokens, parts, shared_address(tr_shared()), threadIdx.x, 1, strip_of, finish);
}

template <class Step, int N> __device__ __forceinline__ void down(const Down &call) {
    grid_begin();
    constexpr int ROWS = TREE_ROWS<N>;
    Job job = call.jobs[blockIdx.z];
    int begin = call.offsets[blockIdx.z], column = blockIdx.x * N, left = call.offsets[blockIdx.z + 1] - begin - column;
    if (left <= 0) {
        return;
    }
    int first_row = blockIdx.y * ROWS, warp = threadIdx.x / 32;
    Tokens tokens = {call.x, nullptr, begin + column, min(N, left), call.x_stride};
    Parts parts = parts_between(call.ff, job.begin, job.end);
    int num_segments = num_parts(parts);
    const Expert *expert = call.experts + job.expert;
    int strip = first_row / 16 + (N <= 16 ? 0 : warp);
    auto strip_of = [&](int part) {
        int steps = steps_of<Step>(cols_of(parts, part));
        return expert->down[part] + strip_offset<Step>(strip, steps);
    };
    auto scales_of = [&](int part) { return expert->down_scales[part] + strip * 16; };
    int vectors = num_nodes(job.begin, job.end, num_segments);
    long long out = job.out < 0 ? begin : job.out;
    float *at = call.out + (out + static_cast<long long>(column) * vectors) * call.hidden;
    Output output = {at, vectors, call.hidden, call.hidden, false};
    TokenScales<8> scales = {call.x_scales};
    tree_product<Step, N, ROWS / 16>(tokens, parts, num_segments, first_row, output, scales, strip_of, scales_of);
}
