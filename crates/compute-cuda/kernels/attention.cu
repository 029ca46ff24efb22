// Paged attention of a step, all its rows in one batch: what both kernels are about, and the narrow one. Plans nothing: the host lists the
// tiles (README.md, "Attention items").
//
// Flash attention (Dao et al., arXiv 2205.14135) with the split of Flash-Decoding. A tile is some consecutive rows of one
// sequence times the query heads that share a key head; each (row, head) is one row of an m16n8k16 product:
//   S = Q K^T   with A = Q (16 x k), B = K (k x 8 tokens)           scores in units of log2, the scale is in Q already
//   O = P V     with A = P (16 x 16 tokens), B = V (16 tokens x 8)  P = 2^(S - m), rounded to f16; l = P 1 by the same instruction
// The order is fixed by the position alone and is that of the CPU backend: pages of 64 tokens ascending inside chunks of 8
// pages, each with its own (m, l, o); chunks merged ascending. `narrow` tiles (<= 16 (row, head)) spread one page over
// four warps, `wide` tiles (<= 128, attention_wide.cu) have strips of 16 (row, head) in every warp: the same instructions in the same
// order for a (row, head), so its bits do not depend on the tile it is in. Tokens that no row of a tile sees are never multiplied (they
// may be NaN); a token that only some rows see is multiplied by 0 for the others, so tiles end with the page (README.md).
//
// Pages of a layer: [page][kv_head] K [64 tokens][HD], V [HD][64 tokens], with Q8 then 64 scales of K and 64 of V. So one load is
// the B fragment of two k-steps without ldmatrix. Lane 4g+t loads k = 8t..8t+7 of a block of 32, and uses (0,1 | 2,3) for
// the first step and (4,5 | 6,7) for the second; Q is loaded by the same rule, so every product meets its partner. Tile j of
// a block of 32 tokens has token 8 (n / 2) + 2 j + n % 2 in column n: the C fragment of S is the A fragment of P for V's rule.
//
// Bytes: K and V of the visible context once per tile: 4 HD (Q8: 2 HD + 8) per token and key head. Narrow tiles hold a page in
// registers and ask for the next keys when these are multiplied, for values likewise: up to 32 KiB (16) under way per block, at 2
// blocks per SM 64 KiB (32); an H200 needs 29 KiB per SM (4.3 TB/s, 0.9 us). One sequence at 4k is 64 blocks of 512 tokens: there
// what counts is how long 8 pages take one after another, so those PREFETCH_PAGES further are on their way to L2 by then (two
// pages in 264 blocks are 17 MiB of it).

using namespace attention;

// ---- narrow: at most 16 (row, head); a page is spread over the warps, twice: by tokens for S, by dims for O -------------

/// How far ahead of the page that is multiplied pages are asked for.
constexpr u32 PREFETCH_PAGES = 3;

template <class F, u32 HD> __device__ __forceinline__ void prefetch(const HeadPages &pages, u32 page, u32 end) {
    if (page < end) {
        const u8 *keys = keys_of(pages, page);
        for (u32 i = threadIdx.x * 128; i < HEAD_BYTES<F, HD>; i += THREADS * 128) {
            prefetch_line(keys + i);
        }
    }
}

/// Shared memory of a narrow tile. One of each is enough: between two writes all threads pass the barrier of the other.
struct NarrowShared {
    uint4 weights[2][WARPS][32]; // A fragments of P; with Q8 also those times the scales
    Pair maxima[WARPS][8];       // of the warp's 16 tokens
    u32 arrived;
};

/// A lane's keys: the two tiles of 8 tokens of its warp.
template <class F, u32 HD>
__device__ __forceinline__ void load_keys(typename F::Raw (&k)[2][HD / 32], const u8 *keys, u32 warp, u32 g, u32 t) {
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
        const u32 token = 32 * (warp / 2) + 8 * (g / 2) + 2 * (2 * (warp % 2) + j) + g % 2;
#pragma unroll
        for (u32 b = 0; b < HD / 32; ++b) {
            k[j][b] = load_raw(F{}, keys + (token * HD + 32 * b + 8 * t) * F::BYTES);
        }
    }
}

/// A lane's values: all 64 tokens for the HD / 4 dims of its warp.
template <class F, u32 HD>
__device__ __forceinline__ void load_values(typename F::Raw (&v)[HD / 32][2], const u8 *keys, u32 warp, u32 g, u32 t) {
    const u8 *values = keys + KEY_BYTES<F, HD>;
#pragma unroll
    for (u32 i = 0; i < HD / 32; ++i) {
        const u32 dim = warp * (HD / 4) + 8 * i + g;
#pragma unroll
        for (u32 b = 0; b < 2; ++b) {
            v[i][b] = load_raw(F{}, values + (dim * PAGE_TOKENS + 32 * b + 8 * t) * F::BYTES);
        }
    }
}

/// The scales of a warp's 16 tokens, those of a lane's columns.
struct NarrowScales {
    float2 keys[2], values[2];
};

template <class F, u32 HD> __device__ __forceinline__ NarrowScales load_scales(const u8 *keys, u32 warp, u32 t) {
    NarrowScales scales = {};
    if constexpr (F::SCALES > 0) {
        const u8 *at = keys + 2 * KEY_BYTES<F, HD>;
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            const u32 token = token_of(warp / 2, 2 * (warp % 2) + j, t);
            scales.keys[j] = scales_at(at, token);
            scales.values[j] = scales_at(at + 4 * PAGE_TOKENS, token);
        }
    }
    return scales;
}

/// The largest scores of a page, of all warps.
__device__ __forceinline__ Pair narrow_maxima(const float (&c)[2][4], NarrowShared &shared) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
    const Pair own = {quad_max(fmaxf(fmaxf(c[0][0], c[0][1]), fmaxf(c[1][0], c[1][1]))),
                      quad_max(fmaxf(fmaxf(c[0][2], c[0][3]), fmaxf(c[1][2], c[1][3])))};
    if (lane % 4 == 0) {
        shared.maxima[warp][g] = own;
    }
    __syncthreads();
    Pair largest = shared.maxima[0][g];
#pragma unroll
    for (u32 w = 1; w < WARPS; ++w) {
        const Pair other = shared.maxima[w][g];
        largest = {fmaxf(largest.low, other.low), fmaxf(largest.high, other.high)};
    }
    return largest;
}

__device__ __forceinline__ void share_weights(uint4 (&to)[WARPS][32], const float (&c)[2][4]) {
    u32 p[4];
    fragment_of(p, c[0], c[1]);
    to[threadIdx.x / 32][threadIdx.x % 32] = make_uint4(p[0], p[1], p[2], p[3]);
}

__device__ __forceinline__ void take_weights(u32 (&p)[4], const uint4 (&from)[WARPS][32], u32 step) {
    const uint4 fragment = from[step][threadIdx.x % 32];
    p[0] = fragment.x;
    p[1] = fragment.y;
    p[2] = fragment.z;
    p[3] = fragment.w;
}

/// Scores of a page become the whole tile's P, and l takes them; returns the factors of what came before.
template <class F>
__device__ __forceinline__ Pair narrow_weights(u32 (&p)[4][4], float (&c)[2][4], const NarrowScales &scales, Softmax &s,
                                               NarrowShared &shared) {
    Pair base;
    const Pair factors = raise(s, narrow_maxima(c, shared), base);
    exponents(c[0], base);
    exponents(c[1], base);
    share_weights(shared.weights[0], c);
    if constexpr (F::SCALES > 0) {
        weigh(c[0], scales.values[0]);
        weigh(c[1], scales.values[1]);
        share_weights(shared.weights[1], c);
    }
    __syncthreads();
    scale_rows(s.l, factors);
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        take_weights(p[step], shared.weights[0], step);
        add_ones(s.l, p[step]);
        if constexpr (F::SCALES > 0) {
            take_weights(p[step], shared.weights[1], step);
        }
    }
    return factors;
}

template <class F, u32 HD>
__device__ __forceinline__ void attend_narrow_item(const AttendArgs &a, const AttendItem &item, u32 kv_head, NarrowShared &shared) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const Tile tile = tile_of(a, item, kv_head, g);
    const HeadPages pages = head_pages<F, HD>(a, item.sequence, kv_head);
    const bool is_split = item.num_parts > 1;
    const Range range = pages_of(item, tile);
    const u32 dim = warp * (HD / 4) + 2 * t;

    Queries q[HD / 32];
    typename F::Raw k[2][HD / 32], v[HD / 32][2];
    float o[HD / 32][4];
    float4 totals[HD / 32];
    Softmax chunk, total;
#pragma unroll
    for (u32 b = 0; b < HD / 32; ++b) {
        q[b] = load_queries<HD>(a, tile, b, t);
        totals[b] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
    clear(o);
    clear(chunk);
    clear(total);
    const u8 *next = keys_of(pages, range.begin);
    load_keys<F, HD>(k, next, warp, g, t);
    load_values<F, HD>(v, next, warp, g, t);
    NarrowScales scales = load_scales<F, HD>(next, warp, t);
    for (u32 i = 1; i < PREFETCH_PAGES; ++i) {
        prefetch<F, HD>(pages, range.begin + i, range.end);
    }
    for (u32 page = range.begin; page < range.end; ++page) {
        const u32 position = page * PAGE_TOKENS;
        const bool edge = is_edge(item, tile, position), has_next = page + 1 < range.end;
        next = keys_of(pages, has_next ? page + 1 : page);
        prefetch<F, HD>(pages, page + PREFETCH_PAGES, range.end);
        float c[2][4];
        clear(c);
#pragma unroll
        for (u32 b = 0; b < HD / 32; ++b) {
            add_scores(c[0], q[b], widen(k[0][b]));
            add_scores(c[1], q[b], widen(k[1][b]));
        }
        if (has_next) {
            load_keys<F, HD>(k, next, warp, g, t);
        }
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            if constexpr (F::SCALES > 0) {
                scale_scores(c[j], scales.keys[j]);
            }
            if (edge) {
                mask_scores(c[j], tile, position + token_of(warp / 2, 2 * (warp % 2) + j, t), a.window);
            }
        }
        u32 p[4][4];
        const Pair factors = narrow_weights<F>(p, c, scales, chunk, shared);
        if (has_next) {
            scales = load_scales<F, HD>(next, warp, t);
        }
#pragma unroll
        for (u32 i = 0; i < HD / 32; ++i) {
            uint4 wide[2] = {widen(v[i][0]), widen(v[i][1])};
            if (edge && F::SCALES == 0) {
                mask_values(wide[0], tile, position + 8 * t);
                mask_values(wide[1], tile, position + 32 + 8 * t);
            }
            scale_rows(o[i], factors);
            add_values(o[i], p, wide);
        }
        if (has_next) {
            load_values<F, HD>(v, next, warp, g, t);
        }
        if (!has_next || (page + 1) % CHUNK_PAGES == 0) {
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
            write_outputs<F>(a, tile, total, totals[i], dim + 8 * i);
        }
    } else if (is_last_part(a, item, kv_head, shared.arrived)) {
        merge_slots<F, HD>(a, item, tile, kv_head);
    }
}

template <class F, u32 HD> __device__ __forceinline__ void attend_narrow(const AttendArgs &a) {
    NarrowShared &shared = *reinterpret_cast<NarrowShared *>(tr_shared());
    for (u32 i = blockIdx.x; i < *a.num_items; i += gridDim.x) {
        attend_narrow_item<F, HD>(a, a.items[i], blockIdx.y, shared);
    }
}

// ---- kernels: grid (any, num_kv_heads), the blocks share the items; 128 threads, 4,368 bytes of shared memory ------------

extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_f16_32(AttendArgs a) { grid_begin(); attend_narrow<F16, 32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_f16_64(AttendArgs a) { grid_begin(); attend_narrow<F16, 64>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_f16_128(AttendArgs a) { grid_begin(); attend_narrow<F16, 128>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_q8_32(AttendArgs a) { grid_begin(); attend_narrow<Q8, 32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_q8_64(AttendArgs a) { grid_begin(); attend_narrow<Q8, 64>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_narrow_q8_128(AttendArgs a) { grid_begin(); attend_narrow<Q8, 128>(a); }
