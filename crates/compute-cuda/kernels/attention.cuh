// What narrow and wide attention tiles share: the fragments, the running softmax, masks, chunks and their merge. attention.cu says how
// they fit together. Holds no shared memory and no barrier but that of the last part.

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
    const u16 *q;          // [rows, num_heads, HD] f16
    const u8 *pages;       // this layer's, see attention.cu
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

namespace attention {

constexpr u32 THREADS = 128;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 PAGE_TOKENS = 64;
constexpr u32 CHUNK_PAGES = 8;
constexpr u32 NOWHERE = 0xFFFFFFFFU;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000U); }

// ---- formats of the cache ---------------------------------------------------------------------------------------------

/// KvFormat::F16.
struct F16 {
    static constexpr u32 BYTES = 2;
    static constexpr u32 SCALES = 0;
    static constexpr float OUT_SCALE = 1.0F;
    using Raw = uint4; // 8 elements
};

/// KvFormat::Q8: bytes that are exact in f16, and an f32 scale per token and head. A score is scaled behind the product, a weight before
/// it: P' = 2^8 P scale, so that values of 1e-2 to 30,000 at most leave P' its bits in f16 (of 1e-4 two thirds of them); the output is divided by 2^8.
struct Q8 {
    static constexpr u32 BYTES = 1;
    static constexpr u32 SCALES = 2 * PAGE_TOKENS; // of the keys, of the values
    static constexpr float OUT_SCALE = 1.0F / 256.0F;
    using Raw = uint2;
};

template <class F, u32 HD> constexpr u32 KEY_BYTES = PAGE_TOKENS *HD *F::BYTES;
template <class F, u32 HD> constexpr u32 HEAD_BYTES = 2 * KEY_BYTES<F, HD> + 4 * F::SCALES;

__device__ __forceinline__ uint4 load_raw(F16, const u8 *p) { return load_stream_16(p); }
__device__ __forceinline__ uint2 load_raw(Q8, const u8 *p) { return load_stream_8(p); }

/// Two signed bytes as f16: 0x6400 + u is 1024 + u.
__device__ __forceinline__ u32 f16x2_of_bytes(u32 biased, u32 selector) {
    return f16x2_sub(__byte_perm(biased, 0x64646464U, selector), 0x64806480U); // 1024 + 128
}

__device__ __forceinline__ uint4 widen(uint4 raw) { return raw; }
__device__ __forceinline__ uint4 widen(uint2 raw) {
    const u32 x = raw.x ^ 0x80808080U, y = raw.y ^ 0x80808080U;
    return make_uint4(f16x2_of_bytes(x, 0x4140), f16x2_of_bytes(x, 0x4342), f16x2_of_bytes(y, 0x4140), f16x2_of_bytes(y, 0x4342));
}

/// The pages of a key head in the order of a sequence.
struct HeadPages {
    const u8 *base;
    size_t stride; // from page to page
    const u32 *table;
};

template <class F, u32 HD> __device__ __forceinline__ HeadPages head_pages(const AttendArgs &a, u32 sequence, u32 kv_head) {
    constexpr size_t HEAD = HEAD_BYTES<F, HD>;
    return {a.pages + kv_head * HEAD, a.num_kv_heads * HEAD, a.tables + static_cast<size_t>(sequence) * a.table_stride};
}

/// The keys of a page; values and scales follow.
__device__ __forceinline__ const u8 *keys_of(const HeadPages &pages, u32 page) {
    return pages.base + load_4(pages.table + page) * pages.stride;
}

// ---- tiles ---------------------------------------------------------------------------------------------------------------

/// The two rows g and g + 8 of a warp's product that a lane holds.
struct Pair {
    float low, high;
};

/// The tile that an item belongs to, as one lane sees it.
struct Tile {
    u32 first, end;                  // union of the visible positions
    u32 low_position, high_position; // of this lane's rows
    u32 low, high;                   // row of the step * num_heads + head; NOWHERE where there is no (row, head)
};

__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
    return position + 1 > window ? position + 1 - window : 0;
}

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

/// Whether a row of the tile does not see all of a page. The same for all lanes.
__device__ __forceinline__ bool is_edge(const AttendItem &item, const Tile &tile, u32 page_position) {
    const u32 last_first = tile.first + item.num_rows - 1; // at least the first position that the last row sees
    return page_position < last_first || page_position + PAGE_TOKENS > tile.end - item.num_rows + 1;
}

/// Chunks of all parts of an item's tile, or pages of them.
struct Range {
    u32 begin, end;
};

__device__ __forceinline__ Range chunks_of(const Tile &tile) {
    constexpr u32 CHUNK_TOKENS = CHUNK_PAGES * PAGE_TOKENS;
    return {tile.first / CHUNK_TOKENS, (tile.end + CHUNK_TOKENS - 1) / CHUNK_TOKENS};
}

/// The pages that an item reads.
__device__ __forceinline__ Range pages_of(const AttendItem &item, const Tile &tile) {
    const Range chunks = item.num_parts > 1 ? Range{item.chunk_begin, item.chunk_end} : chunks_of(tile);
    return {max(tile.first / PAGE_TOKENS, chunks.begin * CHUNK_PAGES),
            min((tile.end + PAGE_TOKENS - 1) / PAGE_TOKENS, chunks.end * CHUNK_PAGES)};
}

// ---- products ------------------------------------------------------------------------------------------------------------

/// Some of the scores or outputs of 16 (row, head): `N` fragments of 8 columns.
template <u32 N> __device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.0F;
    }
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    mma_f16(c, a, b);
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
__device__ __forceinline__ void add_scores(float (&c)[4], const Queries &q, const uint4 &k) {
    const u32 first[4] = {q.low.x, q.high.x, q.low.y, q.high.y};
    const u32 second[4] = {q.low.z, q.high.z, q.low.w, q.high.w};
    multiply(c, first, k.x, k.y);
    multiply(c, second, k.z, k.w);
}

/// Adds 64 tokens to 8 columns of the outputs; `v[b]` is the lane's 8 tokens of block b.
__device__ __forceinline__ void add_values(float (&o)[4], const u32 (&p)[4][4], const uint4 (&v)[2]) {
#pragma unroll
    for (u32 b = 0; b < 2; ++b) {
        multiply(o, p[2 * b], v[b].x, v[b].y);
        multiply(o, p[2 * b + 1], v[b].z, v[b].w);
    }
}

/// Adds 16 weights to l: their product with ones.
__device__ __forceinline__ void add_ones(float (&l)[4], const u32 (&p)[4]) { multiply(l, p, 0x3C003C00U, 0x3C003C00U); }

/// The tokens of column 2t and 2t + 1 of tile `j` of block `b` of a page.
__device__ __forceinline__ u32 token_of(u32 b, u32 j, u32 t) { return 32 * b + 8 * t + 2 * j; }

/// The scales of the two tokens of a lane's columns.
__device__ __forceinline__ float2 scales_at(const u8 *scales, u32 token) {
    const uint2 bits = load_8(scales + 4 * token);
    return make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
}

__device__ __forceinline__ void scale_scores(float (&c)[4], float2 by) {
    c[0] = __fmul_rn(c[0], by.x);
    c[1] = __fmul_rn(c[1], by.y);
    c[2] = __fmul_rn(c[2], by.x);
    c[3] = __fmul_rn(c[3], by.y);
}

// ---- masks ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float visible(float s, u32 token, u32 position, u32 window) {
    return token <= position && position - token < window ? s : minus_infinity();
}

__device__ __forceinline__ void mask_scores(float (&c)[4], const Tile &tile, u32 token, u32 window) {
    c[0] = visible(c[0], token, tile.low_position, window);
    c[1] = visible(c[1], token + 1, tile.low_position, window);
    c[2] = visible(c[2], token, tile.high_position, window);
    c[3] = visible(c[3], token + 1, tile.high_position, window);
}

/// Zero where a pair of tokens is seen by no row: what is there may be NaN.
__device__ __forceinline__ u32 visible_values(u32 pair, u32 position, u32 first, u32 end) {
    const u32 low = position >= first && position < end ? 0x0000FFFFU : 0;
    const u32 high = position + 1 >= first && position + 1 < end ? 0xFFFF0000U : 0;
    return pair & (low | high);
}

__device__ __forceinline__ void mask_values(uint4 &v, const Tile &tile, u32 position) {
    v.x = visible_values(v.x, position, tile.first, tile.end);
    v.y = visible_values(v.y, position + 2, tile.first, tile.end);
    v.z = visible_values(v.z, position + 4, tile.first, tile.end);
    v.w = visible_values(v.w, position + 6, tile.first, tile.end);
}

// ---- softmax -------------------------------------------------------------------------------------------------------------

/// The running softmax of a lane's two rows; the outputs are elsewhere.
struct Softmax {
    Pair m;
    float l[4]; // the C fragment of P 1: all columns are equal
};

__device__ __forceinline__ void clear(Softmax &s) {
    s.m = {minus_infinity(), minus_infinity()};
    s.l[0] = s.l[1] = s.l[2] = s.l[3] = 0.0F;
}

/// What is subtracted from scores whose largest is `m`.
__device__ __forceinline__ float base_of(float m) { return m == minus_infinity() ? 0.0F : m; }

/// Takes the largest scores of more tokens; returns the factors of what came before. `base` is for the new scores.
__device__ __forceinline__ Pair raise(Softmax &s, Pair largest, Pair &base) {
    largest = {fmaxf(largest.low, s.m.low), fmaxf(largest.high, s.m.high)};
    base = {base_of(largest.low), base_of(largest.high)};
    const Pair factors = {exp2_fast(__fsub_rn(s.m.low, base.low)), exp2_fast(__fsub_rn(s.m.high, base.high))};
    s.m = largest;
    return factors;
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0U, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0U, x, 2));
}

__device__ __forceinline__ void scale_rows(float (&c)[4], Pair factors) {
    c[0] = __fmul_rn(c[0], factors.low);
    c[1] = __fmul_rn(c[1], factors.low);
    c[2] = __fmul_rn(c[2], factors.high);
    c[3] = __fmul_rn(c[3], factors.high);
}

/// Scores become weights, in place.
__device__ __forceinline__ void exponents(float (&c)[4], Pair base) {
    c[0] = exp2_fast(__fsub_rn(c[0], base.low));
    c[1] = exp2_fast(__fsub_rn(c[1], base.low));
    c[2] = exp2_fast(__fsub_rn(c[2], base.high));
    c[3] = exp2_fast(__fsub_rn(c[3], base.high));
}

/// Two neighbouring tiles of weights as an A fragment.
__device__ __forceinline__ void fragment_of(u32 (&p)[4], const float (&c0)[4], const float (&c1)[4]) {
    p[0] = f16x2_from(c0[0], c0[1]);
    p[1] = f16x2_from(c0[2], c0[3]);
    p[2] = f16x2_from(c1[0], c1[1]);
    p[3] = f16x2_from(c1[2], c1[3]);
}

/// 2^8 P scale; 0 where P is 0, also when the scale is NaN: then the token is not seen.
__device__ __forceinline__ float weigh(float p, float scale) { return p == 0.0F ? 0.0F : __fmul_rn(p, __fmul_rn(scale, 256.0F)); }

__device__ __forceinline__ void weigh(float (&c)[4], float2 scales) {
    c[0] = weigh(c[0], scales.x);
    c[1] = weigh(c[1], scales.y);
    c[2] = weigh(c[2], scales.x);
    c[3] = weigh(c[3], scales.y);
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

/// The same for a lane's two rows.
struct PairJoin {
    Join low, high;
};

/// `total` becomes the softmax of a further chunk, too.
__device__ __forceinline__ PairJoin join_chunk(Softmax &total, const Softmax &chunk) {
    const PairJoin by = {join(total.m.low, chunk.m.low), join(total.m.high, chunk.m.high)};
    total.m = {by.low.m, by.high.m};
    total.l[0] = joined(by.low, total.l[0], chunk.l[0]);
    total.l[2] = joined(by.high, total.l[2], chunk.l[2]);
    return by;
}

__device__ __forceinline__ float4 joined(const PairJoin &by, float4 x, const float (&y)[4]) {
    return make_float4(joined(by.low, x.x, y[0]), joined(by.low, x.y, y[1]), joined(by.high, x.z, y[2]), joined(by.high, x.w, y[3]));
}

// ---- outputs -------------------------------------------------------------------------------------------------------------

/// What outputs are multiplied with at the end.
template <class F> __device__ __forceinline__ float inverse_of(float l) { return __fmul_rn(reciprocal_fast(l), F::OUT_SCALE); }

/// `at` is row of the step * num_heads + head.
__device__ __forceinline__ void write_output(const AttendArgs &a, u32 at, u32 dim, float x, float y) {
    if (at != NOWHERE && dim < a.head_dim) {
        u16 *out = a.out + static_cast<size_t>(at / a.num_heads) * a.out_stride + at % a.num_heads * a.head_dim + dim;
        *reinterpret_cast<u32 *>(out) = bf16x2_from(x, y);
    }
}

/// Divides and writes one fragment.
template <class F>
__device__ __forceinline__ void write_outputs(const AttendArgs &a, const Tile &tile, const Softmax &s, float4 o, u32 dim) {
    const Pair inverse = {inverse_of<F>(s.l[0]), inverse_of<F>(s.l[2])};
    write_output(a, tile.low, dim, __fmul_rn(o.x, inverse.low), __fmul_rn(o.y, inverse.low));
    write_output(a, tile.high, dim, __fmul_rn(o.z, inverse.high), __fmul_rn(o.w, inverse.high));
}

/// Index of a slot and head; `at` is row of the step * num_heads + head.
__device__ __forceinline__ size_t slot_of(const AttendArgs &a, const AttendItem &item, Range chunks, u32 at, u32 chunk) {
    const u32 row = at / a.num_heads - item.row_begin;
    const size_t slot = item.slot_begin + row * (chunks.end - chunks.begin) + chunk - chunks.begin;
    return slot * a.num_heads + at % a.num_heads;
}

/// Puts one row's chunk where the last part to arrive will find it: columns `column` and the next of `N` fragments from dim `first` on.
/// `with_softmax`: this lane writes m and l, too.
template <u32 HD, u32 N>
__device__ __forceinline__ void keep_chunk(const AttendArgs &a, size_t slot, float2 softmax, const float (&o)[N][4], u32 column, u32 first,
                                           bool with_softmax) {
#pragma unroll
    for (u32 i = 0; i < N; ++i) {
        *reinterpret_cast<float2 *>(a.slot_outputs + slot * HD + first + 8 * i) = make_float2(o[i][column], o[i][column + 1]);
    }
    if (with_softmax) {
        *reinterpret_cast<float2 *>(a.slot_softmax + slot * 2) = softmax;
    }
}

/// Both rows of a lane.
template <u32 HD, u32 N>
__device__ __forceinline__ void keep_chunks(const AttendArgs &a, const AttendItem &item, const Tile &tile, u32 chunk, const Softmax &s,
                                            const float (&o)[N][4], u32 first, bool with_softmax) {
    const Range chunks = chunks_of(tile);
    if (tile.low != NOWHERE) {
        const size_t slot = slot_of(a, item, chunks, tile.low, chunk);
        keep_chunk<HD>(a, slot, make_float2(s.m.low, s.l[0]), o, 0, first, with_softmax);
    }
    if (tile.high != NOWHERE) {
        const size_t slot = slot_of(a, item, chunks, tile.high, chunk);
        keep_chunk<HD>(a, slot, make_float2(s.m.high, s.l[2]), o, 2, first, with_softmax);
    }
}

/// Merges the chunks of a tile, in the order in which one part would have.
template <class F, u32 HD>
__device__ __forceinline__ void merge_slots(const AttendArgs &a, const AttendItem &item, const Tile &tile, u32 kv_head) {
    const u32 group = a.num_heads / a.num_kv_heads;
    const Range chunks = chunks_of(tile);
    for (u32 at = threadIdx.x; at < item.num_rows * group * (HD / 2); at += THREADS) {
        const u32 dim = at % (HD / 2) * 2, m = at / (HD / 2);
        const u32 output = (item.row_begin + m / group) * a.num_heads + kv_head * group + m % group;
        float largest = minus_infinity(), l = 0.0F;
        float2 o = {0.0F, 0.0F};
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
        const float inverse = inverse_of<F>(l);
        write_output(a, output, dim, __fmul_rn(o.x, inverse), __fmul_rn(o.y, inverse));
    }
}

/// Says that this part is done; true in all threads of the last one, which sees what the others kept. `arrived` is shared.
__device__ __forceinline__ bool is_last_part(const AttendArgs &a, const AttendItem &item, u32 kv_head, u32 &arrived) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 *counter = a.counters + static_cast<size_t>(item.counter) * a.num_kv_heads + kv_head;
        arrived = atomicAdd(counter, 1U) + 1;
        if (arrived == item.num_parts) {
            *counter = 0; // for the next launch
        }
    }
    __syncthreads();
    const bool is_last = arrived == item.num_parts;
    __threadfence();
    return is_last;
}

} // namespace attention
