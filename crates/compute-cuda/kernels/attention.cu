// Paged attention of a step, all its rows in one batch. Plans nothing: the host lists the tiles (README.md, "Attention items").
//
// Flash attention (Dao et al., arXiv 2205.14135) with the split of Flash-Decoding. A tile is some consecutive rows of one
// sequence times the query heads that share a key head; each (row, head) is one row of an m16n8k16 product:
//   S = Q K^T   with A = Q (16 x k), B = K (k x 8 tokens)          scores in units of log2, the scale is in Q already
//   O = P V     with A = P (16 x 16 tokens), B = V (16 tokens x 8)  P = 2^(S - m), rounded; l = P 1 by the same instruction
// The order is fixed by the position alone and is that of the CPU backend: pages of 64 tokens ascending inside chunks of 8
// pages, each with its own (m, l, o); chunks merged ascending. `narrow` tiles (<= 16 (row, head)) spread one page over
// four warps, `wide` tiles (<= 64) have 16 (row, head) per warp: the same instructions in the same order for a (row, head),
// so its bits do not depend on the tile it is in. Tokens that no row of a tile sees are never multiplied (they may be NaN);
// a token that only some rows see is multiplied by 0 for the others, so tiles end with the page (README.md).
//
// A K page is [64 tokens][HD], a V page [HD][64 tokens]: then one 16-byte load is the B fragment of two k-steps without
// ldmatrix. Lane 4g+t loads k = 8t..8t+7 of a block of 32, and uses (0,1 | 2,3) for the first step and (4,5 | 6,7) for the
// second; Q is loaded by the same rule, so every product meets its partner. Tile j of a block of 32 tokens has token
// 8 (n / 2) + 2 j + n % 2 in column n, which makes the C fragment of S the A fragment of P for V's rule.
//
// Bytes: K and V of the visible context once per tile: 4 HD per token and key head. Decode at 4k and one sequence is 64 CTAs
// of 512 tokens (128 KiB + 128 KiB each), 32 KiB in flight per CTA.

constexpr u32 ATTEND_THREADS = 128;
constexpr u32 ATTEND_WARPS = 4;
constexpr u32 PAGE_TOKENS = 64;
constexpr u32 CHUNK_PAGES = 8;
#define MINUS_INFINITY __uint_as_float(0xFF800000U)

/// A tile's share of the work, see README.md.
struct AttendItem {
    u32 row_begin, num_rows; // rows of one sequence, at consecutive positions
    u32 sequence;
    u32 chunk_begin, chunk_end; // this item's part of the tile's chunks
    u32 num_parts;              // items of the tile: with 1 the other fields are not read
    u32 slot_begin;             // slots of the tile: row-major [num_rows][chunks of the tile]
    u32 counter;                // counters[counter * num_kv_heads + kv_head]
};

struct AttendArgs {
    u16 *out;              // [rows, out_stride] bf16, the first num_heads * head_dim written
    const u16 *q;          // [rows, num_heads, HD]
    const u16 *pages;      // this layer: [page][kv_head] K [64][HD], V [HD][64]
    const u32 *positions;  // [rows]
    const u32 *tables;     // [sequences, table_stride]: page ids
    const AttendItem *items;
    const u32 *num_items;
    float *slot_outputs;   // [slots, num_heads, HD]
    float *slot_softmax;   // [slots, num_heads, 2]: m, l
    u32 *counters;         // 0 before and after
    u32 out_stride, table_stride, num_heads, num_kv_heads, head_dim;
    u32 window;            // tokens that a row sees; 0xFFFFFFFF: all
};
static_assert(sizeof(AttendItem) == 32 && sizeof(AttendArgs) == 104, "as the host has them");

/// What Q, K, V and P are rounded to.
struct Bf16 {
    static constexpr u32 ONES = 0x3F803F80;
};
struct F16 {
    static constexpr u32 ONES = 0x3C003C00;
};

__device__ __forceinline__ u32 pack(Bf16, float low, float high) { return bf16x2_from(low, high); }
__device__ __forceinline__ u32 pack(F16, float low, float high) { return f16x2_from(low, high); }
__device__ __forceinline__ void multiply(Bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    mma_bf16(c, a, b);
}
__device__ __forceinline__ void multiply(F16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    mma_f16(c, a, b);
}

/// The two rows g and g + 8 of a warp's product that a lane holds.
struct Pair {
    float low, high;
};

/// The tile that an item belongs to, as one lane sees it.
struct Tile {
    u32 first, end;                   // union of the visible positions
    u32 low_position, high_position;  // of this lane's rows
    u32 low, high;                    // row of the step * num_heads + head; NOWHERE where there is no (row, head)
};

constexpr u32 NOWHERE = 0xFFFFFFFFu;

__device__ __forceinline__ u32 first_visible(u32 position, u32 window) { return position + 1 > window ? position + 1 - window : 0; }

__device__ __forceinline__ Tile tile_of(const AttendArgs &a, const AttendItem &item, u32 kv_head, u32 m) {
    const u32 group = a.num_heads / a.num_kv_heads, valid = item.num_rows * group;
    const u32 position = a.positions[item.row_begin];
    const u32 low = m < valid ? m / group : 0, high = m + 8 < valid ? (m + 8) / group : 0;
    Tile tile;
    tile.first = first_visible(position, a.window);
    tile.end = position + item.num_rows;
    tile.low_position = position + low;
    tile.high_position = position + high;
    tile.low = m < valid ? (item.row_begin + low) * a.num_heads + kv_head * group + m - low * group : NOWHERE;
    tile.high = m + 8 < valid ? (item.row_begin + high) * a.num_heads + kv_head * group + m + 8 - high * group : NOWHERE;
    return tile;
}

/// Some of the scores or outputs of 16 (row, head): `N` fragments of 8 columns.
template <u32 N> __device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0f;
    }
}

/// A lane's Q for a block of 32 dims: 16 bytes of row g and of row g + 8.
struct Queries {
    uint4 low, high;
};

template <u32 HD> __device__ __forceinline__ Queries load_queries(const AttendArgs &a, const Tile &tile, u32 b, u32 t) {
    const u16 *q = a.q + 32 * b + 8 * t;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    return {tile.low != NOWHERE ? load_16(q + static_cast<size_t>(tile.low) * HD) : zeros,
            tile.high != NOWHERE ? load_16(q + static_cast<size_t>(tile.high) * HD) : zeros};
}

/// Adds a block of 32 dims to the scores of 8 tokens.
template <class E> __device__ __forceinline__ void add_scores(float (&c)[4], const Queries &q, const uint4 &k) {
    const u32 first[4] = {q.low.x, q.high.x, q.low.y, q.high.y};
    const u32 second[4] = {q.low.z, q.high.z, q.low.w, q.high.w};
    multiply(E{}, c, first, k.x, k.y);
    multiply(E{}, c, second, k.z, k.w);
}

/// Adds 64 tokens to 8 columns of the outputs; `v[b]` is the lane's 16 bytes of token block b.
template <class E> __device__ __forceinline__ void add_values(float (&o)[4], const u32 (&p)[4][4], const uint4 (&v)[2]) {
#pragma unroll
    for (u32 b = 0; b < 2; ++b) {
        multiply(E{}, o, p[2 * b], v[b].x, v[b].y);
        multiply(E{}, o, p[2 * b + 1], v[b].z, v[b].w);
    }
}

/// The tokens of column 2t and 2t + 1 of tile `j` of block `b` of a page.
__device__ __forceinline__ u32 token_of(u32 b, u32 j, u32 t) { return 32 * b + 8 * t + 2 * j; }

__device__ __forceinline__ float visible(float s, u32 token, u32 position, u32 window) {
    return token <= position && position - token < window ? s : MINUS_INFINITY;
}

__device__ __forceinline__ void mask_scores(float (&c)[4], const Tile &tile, u32 token, u32 window) {
    c[0] = visible(c[0], token, tile.low_position, window);
    c[1] = visible(c[1], token + 1, tile.low_position, window);
    c[2] = visible(c[2], token, tile.high_position, window);
    c[3] = visible(c[3], token + 1, tile.high_position, window);
}

/// Zero where a pair of tokens is seen by no row: what is there may be NaN.
__device__ __forceinline__ u32 visible_values(u32 pair, u32 position, u32 first, u32 end) {
    const u32 low = position >= first && position < end ? 0x0000FFFFu : 0;
    const u32 high = position + 1 >= first && position + 1 < end ? 0xFFFF0000u : 0;
    return pair & (low | high);
}

__device__ __forceinline__ void mask_values(uint4 &v, const Tile &tile, u32 position) {
    v.x = visible_values(v.x, position, tile.first, tile.end);
    v.y = visible_values(v.y, position + 2, tile.first, tile.end);
    v.z = visible_values(v.z, position + 4, tile.first, tile.end);
    v.w = visible_values(v.w, position + 6, tile.first, tile.end);
}

/// Whether a row of the tile does not see all of a page. The same for all lanes.
__device__ __forceinline__ bool is_edge(const AttendItem &item, const Tile &tile, u32 page_position) {
    const u32 last_first = tile.first + item.num_rows - 1; // at least the first position that the last row sees
    return page_position < last_first || page_position + PAGE_TOKENS > tile.end - item.num_rows + 1;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0U, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0U, x, 2));
}

/// The running softmax of a lane's two rows; the outputs are elsewhere.
struct Softmax {
    Pair m;
    float l[4]; // the C fragment of P 1: all columns are equal
};

__device__ __forceinline__ void clear(Softmax &s) {
    s.m = {MINUS_INFINITY, MINUS_INFINITY};
    s.l[0] = s.l[1] = s.l[2] = s.l[3] = 0.0f;
}

/// What is subtracted from scores whose largest is `m`.
__device__ __forceinline__ float base_of(float m) { return m == MINUS_INFINITY ? 0.0f : m; }

/// Takes the largest scores of more tokens; returns the factors of what came before. `base` is for the new scores.
__device__ __forceinline__ Pair raise(Softmax &s, Pair largest, Pair &base) {
    largest = {fmaxf(largest.low, s.m.low), fmaxf(largest.high, s.m.high)};
    base = {base_of(largest.low), base_of(largest.high)};
    const Pair factors = {exp2_fast(__fsub_rn(s.m.low, base.low)), exp2_fast(__fsub_rn(s.m.high, base.high))};
    s.m = largest;
    return factors;
}

__device__ __forceinline__ void scale_rows(float (&c)[4], Pair factors) {
    c[0] = __fmul_rn(c[0], factors.low);
    c[1] = __fmul_rn(c[1], factors.low);
    c[2] = __fmul_rn(c[2], factors.high);
    c[3] = __fmul_rn(c[3], factors.high);
}

/// Scores of two neighbouring tiles become the A fragment of P.
template <class E> __device__ __forceinline__ void weights(u32 (&p)[4], const float (&c0)[4], const float (&c1)[4], Pair base) {
    p[0] = pack(E{}, exp2_fast(__fsub_rn(c0[0], base.low)), exp2_fast(__fsub_rn(c0[1], base.low)));
    p[1] = pack(E{}, exp2_fast(__fsub_rn(c0[2], base.high)), exp2_fast(__fsub_rn(c0[3], base.high)));
    p[2] = pack(E{}, exp2_fast(__fsub_rn(c1[0], base.low)), exp2_fast(__fsub_rn(c1[1], base.low)));
    p[3] = pack(E{}, exp2_fast(__fsub_rn(c1[2], base.high)), exp2_fast(__fsub_rn(c1[3], base.high)));
}

/// How two softmaxes over different tokens become one: `x = x a + y b`, and the common maximum.
struct Join {
    float m, a, b;
};

__device__ __forceinline__ Join join(float m, float n) {
    const float largest = fmaxf(m, n), base = base_of(largest);
    return {largest, exp2_fast(__fsub_rn(m, base)), exp2_fast(__fsub_rn(n, base))};
}

__device__ __forceinline__ float joined(Join by, float x, float y) { return __fmaf_rn(y, by.b, __fmul_rn(x, by.a)); }

/// How a lane's two rows take a chunk. `s` becomes the softmax of all chunks so far.
struct PairJoin {
    Join low, high;
};

__device__ __forceinline__ PairJoin join_chunk(Softmax &total, const Softmax &chunk) {
    const PairJoin by = {join(total.m.low, chunk.m.low), join(total.m.high, chunk.m.high)};
    total.m = {by.low.m, by.high.m};
    total.l[0] = joined(by.low, total.l[0], chunk.l[0]);
    total.l[2] = joined(by.high, total.l[2], chunk.l[2]);
    return by;
}

__device__ __forceinline__ float4 joined(const PairJoin &by, float4 x, const float (&y)[4]) {
    return make_float4(joined(by.low, x.x, y[0]), joined(by.low, x.y, y[1]), joined(by.high, x.z, y[2]),
                       joined(by.high, x.w, y[3]));
}

/// `at` is row of the step * num_heads + head.
__device__ __forceinline__ void write_output(const AttendArgs &a, u32 at, u32 dim, float x, float y) {
    if (at != NOWHERE && dim < a.head_dim) {
        u16 *out = a.out + static_cast<size_t>(at / a.num_heads) * a.out_stride + at % a.num_heads * a.head_dim + dim;
        *reinterpret_cast<u32 *>(out) = bf16x2_from(x, y);
    }
}

/// Divides and writes one fragment.
__device__ __forceinline__ void write_outputs(const AttendArgs &a, const Tile &tile, const Softmax &s, float4 o, u32 dim) {
    const Pair inverse = {reciprocal_fast(s.l[0]), reciprocal_fast(s.l[2])};
    write_output(a, tile.low, dim, __fmul_rn(o.x, inverse.low), __fmul_rn(o.y, inverse.low));
    write_output(a, tile.high, dim, __fmul_rn(o.z, inverse.high), __fmul_rn(o.w, inverse.high));
}

/// Chunks of all parts of an item's tile.
struct Chunks {
    u32 begin, end;
};

__device__ __forceinline__ Chunks chunks_of(const Tile &tile) {
    constexpr u32 CHUNK_TOKENS = CHUNK_PAGES * PAGE_TOKENS;
    return {tile.first / CHUNK_TOKENS, (tile.end + CHUNK_TOKENS - 1) / CHUNK_TOKENS};
}

/// Index of a slot and head; `at` is row of the step * num_heads + head.
__device__ __forceinline__ size_t slot_of(const AttendArgs &a, const AttendItem &item, Chunks chunks, u32 at, u32 chunk) {
    const u32 row = at / a.num_heads - item.row_begin;
    const size_t slot = item.slot_begin + row * (chunks.end - chunks.begin) + chunk - chunks.begin;
    return slot * a.num_heads + at % a.num_heads;
}

/// Puts a chunk where the last part to arrive will find it. `with_softmax`: this lane writes m and l, too.
template <u32 HD, u32 N>
__device__ __forceinline__ void keep_chunk(const AttendArgs &a, size_t slot, float m, float l, const float (&o)[N][4], u32 column, u32 first,
                           bool with_softmax) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        *reinterpret_cast<float2 *>(a.slot_outputs + slot * HD + first + 8 * i) = make_float2(o[i][column], o[i][column + 1]);
    }
    if (with_softmax) {
        *reinterpret_cast<float2 *>(a.slot_softmax + slot * 2) = make_float2(m, l);
    }
}

/// Both rows of a lane.
template <u32 HD, u32 N>
__device__ __forceinline__ void keep_chunks(const AttendArgs &a, const AttendItem &item, const Tile &tile, u32 chunk, const Softmax &s,
                            const float (&o)[N][4], u32 first, bool with_softmax) {
    const Chunks chunks = chunks_of(tile);
    if (tile.low != NOWHERE) {
        keep_chunk<HD>(a, slot_of(a, item, chunks, tile.low, chunk), s.m.low, s.l[0], o, 0, first, with_softmax);
    }
    if (tile.high != NOWHERE) {
        keep_chunk<HD>(a, slot_of(a, item, chunks, tile.high, chunk), s.m.high, s.l[2], o, 2, first, with_softmax);
    }
}

/// Merges the chunks of a tile, in the order in which one part would have.
template <u32 HD>
__device__ __forceinline__ void merge_slots(const AttendArgs &a, const AttendItem &item, const Tile &tile, u32 kv_head) {
    const u32 group = a.num_heads / a.num_kv_heads;
    const Chunks chunks = chunks_of(tile);
    for (u32 at = threadIdx.x; at < item.num_rows * group * (HD / 2); at += ATTEND_THREADS) {
        const u32 dim = at % (HD / 2) * 2, m = at / (HD / 2);
        const u32 output = (item.row_begin + m / group) * a.num_heads + kv_head * group + m % group;
        float largest = MINUS_INFINITY, l = 0.0f;
        float2 o = {0.0f, 0.0f};
#pragma unroll 4
        for (u32 chunk = chunks.begin; chunk < chunks.end; ++chunk) {
            const size_t slot = slot_of(a, item, chunks, output, chunk);
            const float2 s = load_fresh_8(a.slot_softmax + slot * 2);
            const float2 c = load_fresh_8(a.slot_outputs + slot * HD + dim);
            const Join by = join(largest, s.x);
            largest = by.m;
            l = joined(by, l, s.y);
            o = {joined(by, o.x, c.x), joined(by, o.y, c.y)};
        }
        const float inverse = reciprocal_fast(l);
        write_output(a, output, dim, __fmul_rn(o.x, inverse), __fmul_rn(o.y, inverse));
    }
}

/// Says that this part is done; true in all threads of the last one, which sees what the others kept.
__device__ __forceinline__ bool is_last_part(const AttendArgs &a, const AttendItem &item, u32 kv_head, u32 &arrived) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *counter = a.counters + item.counter * a.num_kv_heads + kv_head;
        arrived = atomicAdd(counter, 1u) + 1;
        if (arrived == item.num_parts) {
            *counter = 0; // for the next launch
        }
    }
    __syncthreads();
    const bool is_last = arrived == item.num_parts;
    __threadfence();
    return is_last;
}

/// The pages of a key head in the order of a sequence.
struct HeadPages {
    const u16 *base;
    size_t stride; // from page to page
    const u32 *table;
};

template <u32 HD> __device__ __forceinline__ HeadPages head_pages(const AttendArgs &a, u32 sequence, u32 kv_head) {
    constexpr size_t HEAD = 2 * PAGE_TOKENS * HD;
    return {a.pages + kv_head * HEAD, a.num_kv_heads * HEAD, a.tables + static_cast<size_t>(sequence) * a.table_stride};
}

/// The keys of a page; its values follow.
__device__ __forceinline__ const u16 *keys_of(const HeadPages &pages, u32 page) { return pages.base + load_4(pages.table + page) * pages.stride; }

// ---- narrow: at most 16 (row, head); a page is spread over the warps, twice: by tokens for S, by dims for O -------------

/// Shared memory of a narrow tile. One of each is enough: between two writes all threads pass the barrier of the other.
struct NarrowShared {
    uint4 weights[ATTEND_WARPS][32]; // A fragments of P
    Pair maxima[ATTEND_WARPS][8];    // of the warp's 16 tokens
    u32 arrived;
};

/// A lane's keys: the two tiles of 8 tokens of its warp.
template <u32 HD> __device__ __forceinline__ void load_keys(uint4 (&k)[2][HD / 32], const u16 *keys, u32 warp, u32 g, u32 t) {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        const u32 token = 32 * (warp / 2) + 8 * (g / 2) + 2 * (2 * (warp % 2) + j) + g % 2;
#pragma unroll
        for (u32 b = 0; b < HD / 32; ++b) {
            k[j][b] = load_stream_16(keys + token * HD + 32 * b + 8 * t);
        }
    }
}

/// A lane's values: all 64 tokens for the HD / 4 dims of its warp.
template <u32 HD> __device__ __forceinline__ void load_values(uint4 (&v)[HD / 32][2], const u16 *values, u32 warp, u32 g, u32 t) {
#pragma unroll
    for (u32 i = 0; i < HD / 32; ++i) {
        const u32 dim = warp * (HD / 4) + 8 * i + g;
#pragma unroll
        for (u32 b = 0; b < 2; ++b) {
            v[i][b] = load_stream_16(values + dim * PAGE_TOKENS + 32 * b + 8 * t);
        }
    }
}

/// Scores of a page become the whole tile's P; returns the factors of what came before.
template <class E, u32 HD>
__device__ __forceinline__ Pair narrow_weights(u32 (&p)[4][4], float (&c)[2][4], Softmax &s, NarrowShared &shared) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const Pair own = {quad_max(fmaxf(fmaxf(c[0][0], c[0][1]), fmaxf(c[1][0], c[1][1]))),
                      quad_max(fmaxf(fmaxf(c[0][2], c[0][3]), fmaxf(c[1][2], c[1][3])))};
    if (lane % 4 == 0) {
        shared.maxima[warp][g] = own;
    }
    __syncthreads();
    Pair largest = shared.maxima[0][g];
#pragma unroll
    for (u32 w = 1; w < ATTEND_WARPS; ++w) {
        const Pair other = shared.maxima[w][g];
        largest = {fmaxf(largest.low, other.low), fmaxf(largest.high, other.high)};
    }
    Pair base;
    const Pair factors = raise(s, largest, base);
    u32 mine[4];
    weights<E>(mine, c[0], c[1], base);
    shared.weights[warp][lane] = {mine[0], mine[1], mine[2], mine[3]};
    __syncthreads();
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        const uint4 fragment = shared.weights[step][lane];
        p[step][0] = fragment.x;
        p[step][1] = fragment.y;
        p[step][2] = fragment.z;
        p[step][3] = fragment.w;
    }
    return factors;
}

template <class E, u32 HD>
__device__ __forceinline__ void attend_narrow_item(const AttendArgs &a, const AttendItem &item, u32 kv_head, NarrowShared &shared) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Tile tile = tile_of(a, item, kv_head, g);
    const HeadPages pages = head_pages<HD>(a, item.sequence, kv_head);
    const bool is_split = item.num_parts > 1;
    const Chunks chunks = is_split ? Chunks{item.chunk_begin, item.chunk_end} : chunks_of(tile);
    u32 page = max(tile.first / PAGE_TOKENS, chunks.begin * CHUNK_PAGES);
    const u32 end = min((tile.end + PAGE_TOKENS - 1) / PAGE_TOKENS, chunks.end * CHUNK_PAGES);
    const u32 dim = warp * (HD / 4) + 2 * t;

    Queries q[HD / 32];
    uint4 k[2][HD / 32], v[HD / 32][2];
    float o[HD / 32][4];
    float4 totals[HD / 32];
    Softmax chunk, total;
#pragma unroll
    for (u32 b = 0; b < HD / 32; ++b) {
        q[b] = load_queries<HD>(a, tile, b, t);
    }
    clear(o);
#pragma unroll
    for (u32 i = 0; i < HD / 32; ++i) {
        totals[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    clear(chunk);
    clear(total);
    load_keys<HD>(k, keys_of(pages, page), warp, g, t);
    load_values<HD>(v, keys_of(pages, page) + PAGE_TOKENS * HD, warp, g, t);
    for (; page < end; ++page) {
        const u32 position = page * PAGE_TOKENS;
        const bool edge = is_edge(item, tile, position);
        const u16 *next = keys_of(pages, page + 1 < end ? page + 1 : page);
        float c[2][4];
        clear(c);
#pragma unroll
        for (u32 b = 0; b < HD / 32; ++b) {
            add_scores<E>(c[0], q[b], k[0][b]);
            add_scores<E>(c[1], q[b], k[1][b]);
        }
        if (page + 1 < end) {
            load_keys<HD>(k, next, warp, g, t);
        }
        if (edge) {
            mask_scores(c[0], tile, position + token_of(warp / 2, 2 * (warp % 2), t), a.window);
            mask_scores(c[1], tile, position + token_of(warp / 2, 2 * (warp % 2) + 1, t), a.window);
        }
        u32 p[4][4];
        const Pair factors = narrow_weights<E, HD>(p, c, chunk, shared);
        scale_rows(chunk.l, factors);
#pragma unroll
        for (u32 step = 0; step < 4; ++step) {
            multiply(E{}, chunk.l, p[step], E::ONES, E::ONES);
        }
#pragma unroll
        for (u32 i = 0; i < HD / 32; ++i) {
            if (edge) {
                mask_values(v[i][0], tile, position + 8 * t);
                mask_values(v[i][1], tile, position + 32 + 8 * t);
            }
            scale_rows(o[i], factors);
            add_values<E>(o[i], p, v[i]);
        }
        if (page + 1 < end) {
            load_values<HD>(v, next + PAGE_TOKENS * HD, warp, g, t);
        }
        if (page + 1 == end || (page + 1) % CHUNK_PAGES == 0) {
            if (is_split) {
                keep_chunks<HD>(a, item, tile, page / CHUNK_PAGES, chunk, o, dim, warp == 0 && t == 0);
            } else {
                const PairJoin by = join_chunk(total, chunk);
#pragma unroll
                for (u32 i = 0; i < HD / 32; ++i) {
                    totals[i] = joined(by, totals[i], o[i]);
                }
            }
            clear(o);
            clear(chunk);
        }
    }
    if (!is_split) {
#pragma unroll
        for (u32 i = 0; i < HD / 32; ++i) {
            write_outputs(a, tile, total, totals[i], dim + 8 * i);
        }
    } else if (is_last_part(a, item, kv_head, shared.arrived)) {
        merge_slots<HD>(a, item, tile, kv_head);
    }
}

template <class E, u32 HD> __device__ __forceinline__ void attend_narrow(const AttendArgs &a) {
    NarrowShared &shared = *reinterpret_cast<NarrowShared *>(tr_shared());
    for (u32 i = blockIdx.x; i < *a.num_items; i += gridDim.x) {
        attend_narrow_item<E, HD>(a, a.items[i], blockIdx.y, shared);
    }
}

// ---- wide: at most 64 (row, head), 16 per warp; a page is in shared memory for all warps --------------------------------

template <u32 HD> struct WideShared {
    uint4 keys[PAGE_TOKENS * HD / 8];   // [64][HD / 8], swizzled
    uint4 values[PAGE_TOKENS * HD / 8]; // [HD][8], swizzled
    float4 totals[HD / 8 * ATTEND_THREADS]; // outputs of the chunks so far: registers are scarce, and this is rare
    u32 arrived;
};

/// Where 16 bytes of a row are: the rows that two quads of a warp read together lie in different banks.
template <u32 PER_ROW> __device__ __forceinline__ u32 place(u32 row, u32 at) {
    return row * PER_ROW + (PER_ROW < 8 ? at : at ^ (row % 2 * 4));
}

/// Starts copying half of a page: rows of `PER_ROW` times 16 bytes. Rows that are an even number apart have one swizzle.
template <u32 HD, u32 PER_ROW> __device__ __forceinline__ void fetch(uint4 *to, const u16 *from) {
    const u32 first = shared_address(to + place<PER_ROW>(threadIdx.x / PER_ROW, threadIdx.x % PER_ROW));
#pragma unroll
    for (u32 i = 0; i < PAGE_TOKENS * HD / 8 / ATTEND_THREADS; ++i) {
        cp_async_16(first + i * ATTEND_THREADS * 16, from + (i * ATTEND_THREADS + threadIdx.x) * 8, 16);
    }
    cp_async_commit();
}

/// The scores of a page, 8 tiles of 8 tokens. Q comes from the L1 cache again for every page: there are no registers for it.
template <class E, u32 HD>
__device__ __forceinline__ void wide_scores(float (&c)[8][4], const AttendArgs &a, const Tile &tile, const uint4 *keys, u32 g, u32 t) {
    clear(c);
#pragma unroll 1
    for (u32 b = 0; b < HD / 32; ++b) {
        const Queries q = load_queries<HD>(a, tile, b, t);
        const uint4 *k = keys + place<HD / 8>(8 * (g / 2) + g % 2, 4 * b + t);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            add_scores<E>(c[j], q, k[(32 * (j / 4) + 2 * (j % 4)) * (HD / 8)]);
        }
    }
}

/// Scores become P; returns the factors of what came before.
template <class E> __device__ __forceinline__ Pair wide_weights(u32 (&p)[4][4], const float (&c)[8][4], Softmax &s) {
    Pair largest = {fmaxf(c[0][0], c[0][1]), fmaxf(c[0][2], c[0][3])};
#pragma unroll
    for (u32 j = 1; j < 8; ++j) {
        largest = {fmaxf(largest.low, fmaxf(c[j][0], c[j][1])), fmaxf(largest.high, fmaxf(c[j][2], c[j][3]))};
    }
    Pair base;
    const Pair factors = raise(s, {quad_max(largest.low), quad_max(largest.high)}, base);
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        weights<E>(p[step], c[2 * step], c[2 * step + 1], base);
    }
    return factors;
}

template <class E, u32 HD>
__device__ __forceinline__ void attend_wide_item(const AttendArgs &a, const AttendItem &item, u32 kv_head, WideShared<HD> &shared) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Tile tile = tile_of(a, item, kv_head, 16 * warp + g);
    const HeadPages pages = head_pages<HD>(a, item.sequence, kv_head);
    const bool is_split = item.num_parts > 1;
    const bool is_idle = 16 * warp >= item.num_rows * (a.num_heads / a.num_kv_heads); // of all lanes
    const Chunks chunks = is_split ? Chunks{item.chunk_begin, item.chunk_end} : chunks_of(tile);
    u32 page = max(tile.first / PAGE_TOKENS, chunks.begin * CHUNK_PAGES);
    const u32 end = min((tile.end + PAGE_TOKENS - 1) / PAGE_TOKENS, chunks.end * CHUNK_PAGES);

    float4 *totals = shared.totals + threadIdx.x; // only this thread's
    float o[HD / 8][4];
    Softmax chunk, total;
    clear(o);
    for (u32 i = 0; i < HD / 8; ++i) {
        totals[i * ATTEND_THREADS] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    clear(chunk);
    clear(total);
    fetch<HD, HD / 8>(shared.keys, keys_of(pages, page));
    fetch<HD, 8>(shared.values, keys_of(pages, page) + PAGE_TOKENS * HD);
    for (; page < end; ++page) {
        const u32 position = page * PAGE_TOKENS;
        const bool edge = is_edge(item, tile, position);
        const u16 *next = keys_of(pages, page + 1 < end ? page + 1 : page);
        float c[8][4];
        u32 p[4][4];
        Pair factors = {1.0f, 1.0f};
        cp_async_wait<1>();
        __syncthreads(); // the keys are there
        if (!is_idle) {
            wide_scores<E, HD>(c, a, tile, shared.keys, g, t);
        }
        __syncthreads(); // and read
        // Behind the last page this one again: it keeps the count of groups.
        fetch<HD, HD / 8>(shared.keys, next);
        if (!is_idle) {
            if (edge) {
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    mask_scores(c[j], tile, position + token_of(j / 4, j % 4, t), a.window);
                }
            }
            factors = wide_weights<E>(p, c, chunk);
        }
        cp_async_wait<1>();
        __syncthreads(); // the values are there
        if (!is_idle) {
            scale_rows(chunk.l, factors);
#pragma unroll
            for (u32 step = 0; step < 4; ++step) {
                multiply(E{}, chunk.l, p[step], E::ONES, E::ONES);
            }
#pragma unroll
            for (u32 i = 0; i < HD / 8; ++i) {
                uint4 v[2] = {shared.values[64 * i + place<8>(g, t)], shared.values[64 * i + place<8>(g, 4 + t)]};
                if (edge) {
                    mask_values(v[0], tile, position + 8 * t);
                    mask_values(v[1], tile, position + 32 + 8 * t);
                }
                scale_rows(o[i], factors);
                add_values<E>(o[i], p, v);
            }
        }
        __syncthreads(); // and read
        fetch<HD, 8>(shared.values, next + PAGE_TOKENS * HD);
        if (page + 1 == end || (page + 1) % CHUNK_PAGES == 0) {
            if (is_split) {
                keep_chunks<HD>(a, item, tile, page / CHUNK_PAGES, chunk, o, 2 * t, t == 0);
            } else {
                const PairJoin by = join_chunk(total, chunk);
#pragma unroll
                for (u32 i = 0; i < HD / 8; ++i) {
                    totals[i * ATTEND_THREADS] = joined(by, totals[i * ATTEND_THREADS], o[i]);
                }
            }
            clear(o);
            clear(chunk);
        }
    }
    cp_async_wait<0>();
    if (!is_split) {
        for (u32 i = 0; i < HD / 8; ++i) {
            write_outputs(a, tile, total, totals[i * ATTEND_THREADS], 2 * t + 8 * i);
        }
    } else if (is_last_part(a, item, kv_head, shared.arrived)) {
        merge_slots<HD>(a, item, tile, kv_head);
    }
}

template <class E, u32 HD> __device__ __forceinline__ void attend_wide(const AttendArgs &a) {
    WideShared<HD> &shared = *reinterpret_cast<WideShared<HD> *>(tr_shared());
    for (u32 i = blockIdx.x; i < *a.num_items; i += gridDim.x) {
        attend_wide_item<E, HD>(a, a.items[i], blockIdx.y, shared);
    }
}

// ---- kernels: grid (any, num_kv_heads), the blocks share the items; 128 threads --------------------------------------------
// Shared bytes: narrow 2,320; wide 512 HD + 16 (65,552 for 128: more than 48 KiB must be asked for).

extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_bf16_32(AttendArgs a) {
    attend_narrow<Bf16, 32>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_bf16_64(AttendArgs a) {
    attend_narrow<Bf16, 64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_bf16_128(AttendArgs a) {
    attend_narrow<Bf16, 128>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_f16_32(AttendArgs a) {
    attend_narrow<F16, 32>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_f16_64(AttendArgs a) {
    attend_narrow<F16, 64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, 2) tr_attend_narrow_f16_128(AttendArgs a) {
    attend_narrow<F16, 128>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_bf16_32(AttendArgs a) {
    attend_wide<Bf16, 32>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_bf16_64(AttendArgs a) {
    attend_wide<Bf16, 64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_bf16_128(AttendArgs a) {
    attend_wide<Bf16, 128>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_f16_32(AttendArgs a) {
    attend_wide<F16, 32>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_f16_64(AttendArgs a) {
    attend_wide<F16, 64>(a);
}
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS) tr_attend_wide_f16_128(AttendArgs a) {
    attend_wide<F16, 128>(a);
}
