// What the products of walk_mma.cuh and walk_wgmma.cuh share: packed weights in steps, tokens in shared memory, the
// summation tree. Stands in front of every source, behind ptx.cuh.
//
// Weights are the A operand (rows), tokens the B operand (columns). A *part* is a range of K that is summed on its
// own, from zero, k ascending; a matrix has 1 to 8 parts. Parts are summed along the binary tree of
// docs/adr/0001-summation-tree.md. So an output element's bits depend on its row, its token and nothing else.
//
// A packed part: strips of 16 rows (their number a multiple of 4), cut along K into *steps*. The four strips of 64 rows lie
// side by side, step after step, so that a warp group's step is one run of memory. A strip's step is 16 rows by
// 128 bytes of a token's row (64 bf16 or 128 e4m3), zero where the matrix ends; a part has an even number of steps:
//   bf16   4 tiles of 16 x 16; a tile is 32 lanes x 16 bytes, lane l's A fragment of m16n8k16 (registers 0 to 3:
//          row l/4, row l/4+8, then both 8 columns further; each 2 columns from 2 (l%4))
//   e4m3   4 tiles of 16 x 32, the A fragment of m16n8k32 (4 columns from 4 (l%4), then 16 columns further)
//   q4     32 lanes x 16 bytes of nibbles, then 8 x 16 bytes: for rows l/4 and l/4+8 and both blocks of 32 columns
//          a bf16 scale and minimum (see Q4Step)

// ---- Steps of packed weights.

struct Bf16Step {
    static constexpr int BYTES = 2048, K = 64, WEIGHT = 16;
    uint4 tile[4];
};

struct Fp8Step {
    static constexpr int BYTES = 2048, K = 128, WEIGHT = 8;
    uint4 tile[4];
};

/// A lane's 32 nibbles: word `i` has the 8 of tile `i`; nibble `2 r + 0..1` is not adjacent but at bits 4 r and
/// 4 r + 16: the low and the high element of A register `r`. Scales: x = row l/4 block 0, y = row l/4+8 block 0,
/// z, w the same of block 1; low half the scale, high half the minimum.
struct Q4Step {
    static constexpr int BYTES = 640, K = 64, WEIGHT = 4;
    uint4 nibbles, scales;
};

__device__ __forceinline__ void load_step(Bf16Step &to, const u8 *step, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to.tile[i] = load_stream_16(step + i * 512 + lane * 16);
    }
}

__device__ __forceinline__ void load_step(Fp8Step &to, const u8 *step, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to.tile[i] = load_stream_16(step + i * 512 + lane * 16);
    }
}

__device__ __forceinline__ void load_step(Q4Step &to, const u8 *step, int lane) {
    to.nibbles = load_stream_16(step + lane * 16);
    to.scales = load_stream_16(step + 512 + lane / 4 * 16);
}

__device__ __forceinline__ void fragment(const Bf16Step &step, int tile, u32 (&a)[4]) {
    a[0] = step.tile[tile].x;
    a[1] = step.tile[tile].y;
    a[2] = step.tile[tile].z;
    a[3] = step.tile[tile].w;
}

__device__ __forceinline__ void fragment(const Fp8Step &step, int tile, u32 (&a)[4]) {
    a[0] = step.tile[tile].x;
    a[1] = step.tile[tile].y;
    a[2] = step.tile[tile].z;
    a[3] = step.tile[tile].w;
}

/// `q * scale + min` in bf16 arithmetic: 128 + q is exact in bf16, so is the difference; then one rounding.
__device__ __forceinline__ void fragment(const Q4Step &step, int tile, u32 (&a)[4]) {
    u32 word = tile == 0 ? step.nibbles.x : tile == 1 ? step.nibbles.y : tile == 2 ? step.nibbles.z : step.nibbles.w;
    u32 low = tile < 2 ? step.scales.x : step.scales.z, high = tile < 2 ? step.scales.y : step.scales.w;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        u32 line = r % 2 == 0 ? low : high;
        u32 q = (word >> (4 * r) & 0x000F000FU) | 0x43004300U; // 128 + q
        q = bf16x2_fma(q, 0x3F803F80U, 0xC300C300U);           // - 128
        a[r] = bf16x2_fma(q, bf16x2_repeat_low(line), bf16x2_repeat_high(line));
    }
}

__device__ __forceinline__ void mma_step(const Bf16Step &, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_bf16(d, a, b);
}
__device__ __forceinline__ void mma_step(const Q4Step &, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_bf16(d, a, b);
}
#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)
__device__ __forceinline__ void mma_step(const Fp8Step &, float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    mma_e4m3(d, a, b);
}
#endif

/// Bytes of a step of the four strips of 64 rows: from one step of a strip to its next.
template <class Step> constexpr int GROUP_STEP = 4 * Step::BYTES;

/// Where strip `strip` begins in a packed part of so many steps.
template <class Step> __device__ __forceinline__ long long strip_offset(int strip, int steps) {
    return static_cast<long long>(strip / 4) * steps * GROUP_STEP<Step> + strip % 4 * Step::BYTES;
}

// ---- The walk along K.

/// How K is cut: parts of `part_cols` columns, the last shorter; the walk covers parts `begin` to `end`.
struct Parts {
    int cols, part_cols, begin, end;
};

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

/// Columns of one part; 0 behind the last.
__device__ __forceinline__ int cols_of(const Parts &parts, int part) {
    return max(0, min(parts.part_cols, parts.cols - part * parts.part_cols));
}

/// Steps of a part: an even number, so that a loop can take two at a time.
template <class Step> __device__ __forceinline__ int steps_of(int cols) { return divide_up(cols, 2 * Step::K) * 2; }

/// A place on the walk: a step of a part.
struct Cursor {
    int part, step, steps;
};

template <class Step> __device__ __forceinline__ Cursor first_step(const Parts &parts) {
    Cursor at = {parts.begin, 0, steps_of<Step>(cols_of(parts, parts.begin))};
    return at;
}

template <class Step> __device__ __forceinline__ void advance(Cursor &at, const Parts &parts) {
    at.step += 1;
    if (at.step == at.steps) {
        at.part += 1;
        at.step = 0;
        at.steps = steps_of<Step>(cols_of(parts, at.part));
    }
}

template <class Step> __device__ __forceinline__ int total_steps(const Parts &parts) {
    int total = 0;
    for (int part = parts.begin; part < parts.end; ++part) {
        total += steps_of<Step>(cols_of(parts, part));
    }
    return total;
}

// ---- Tokens in shared memory: a stage is N rows of 128 bytes, 16-byte chunk c of row r at place c ^ (r % 8): the
// 128-byte swizzle that wgmma knows, and free of bank conflicts for ldmatrix.

constexpr int TOKEN_STEP_BYTES = 128;

/// The tokens of one tile. `ids` names rows of `x`, or is null when they lie one after another from `first`.
struct Tokens {
    const u8 *x;
    const int *ids;
    int first, count;
    long long stride; // bytes, a multiple of 16
};

/// Which rows a thread copies: N * 8 chunks over THREADS threads. Offsets in units of 16 bytes; ~0 behind the last.
template <int N, int THREADS> struct TokenRows {
    static constexpr int COUNT = N * 8 < THREADS ? 1 : N * 8 / THREADS;
    u32 offset[COUNT];
};

template <int N, int THREADS>
__device__ __forceinline__ void find_rows(TokenRows<N, THREADS> &rows, const Tokens &tokens, int thread) {
#pragma unroll
    for (int i = 0; i < rows.COUNT; ++i) {
        int row = thread / 8 + i * (THREADS / 8);
        rows.offset[i] = ~0U;
        if (row < N && row < tokens.count) {
            long long at = tokens.first + row;
            at = tokens.ids == nullptr ? at : tokens.ids[at];
            rows.offset[i] = static_cast<u32>(at * (tokens.stride / 16));
        }
    }
}

/// Starts the copy of one step of every token; absent tokens and what lies behind the part's end become zero.
template <class Step, int N, int THREADS>
__device__ __forceinline__ void copy_step(u32 stage, const TokenRows<N, THREADS> &rows, const Tokens &tokens,
                                          const Parts &parts, const Cursor &at, int thread) {
    if (at.part < parts.end) {
        constexpr int ELEMENT = TOKEN_STEP_BYTES / Step::K;
        int chunk = thread % 8;
        int from = at.step * TOKEN_STEP_BYTES + chunk * 16;
        int left = max(0, min(16, cols_of(parts, at.part) * ELEMENT - from));
        const u8 *column = tokens.x + static_cast<long long>(at.part) * parts.part_cols * ELEMENT + from;
#pragma unroll
        for (int i = 0; i < rows.COUNT; ++i) {
            int row = thread / 8 + i * (THREADS / 8);
            bool is_live = rows.offset[i] != ~0U && left > 0;
            const u8 *source = is_live ? column + static_cast<u64>(rows.offset[i]) * 16 : tokens.x;
            if (row < N) {
                cp_async_16(stage + row * TOKEN_STEP_BYTES + ((chunk ^ (row % 8)) << 4), source, is_live ? left : 0);
            }
        }
    }
}
