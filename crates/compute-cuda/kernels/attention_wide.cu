// Attention of wide tiles: up to 128 (row, head). attention.cu says what is computed and in which order, and how a page lies.
//
// A tile has up to 8 strips of 16 (row, head). Warp w has strip w and, with more than 64 (row, head), strip w + 4 too: what it loads
// of a page serves both, and in a smaller tile all warps have something to do.
//
// Counted for a page of f16, HD 128 and 128 (row, head), in cycles of an H200's multiprocessor: 1,650 for 1,056 products (mma.sync
// has 62 % of wgmma's speed); 1,536 for shared memory, at 128 bytes each: a warp reads K, V (32 KiB) and its Q (8 KiB), and 32 KiB are
// written; 512 for 8,192 exponentials; 1,020 instructions of each of the four warps, which have a scheduler each. With one strip per
// warp, shared memory would take 2,816. Two blocks per multiprocessor fill each other's gaps. That leaves 255 registers: 128 are outputs,
// 64 scores, and whatever can wait is in shared memory, in the thread's own memory, or computed again.
//
// Three halves of pages are in shared memory: one is read, the next is there or on its way, and a third is asked for where the one
// lay that was read last. So a copy has two steps of time, and a page two barriers. 80 KiB fit twice into the 164 of sm_80, once
// into the 100 of sm_89 and sm_120.

using namespace attention;

/// Strips of a warp, at most.
constexpr u32 STRIPS = 2;

/// Of a page: keys and all scales, or values.
template <class F, u32 HD> constexpr u32 HALF_BYTES = KEY_BYTES<F, HD> + 4 * F::SCALES;

/// What a block works on, and which of the pages all rows of it see whole.
struct WideWork {
    AttendItem item;
    u32 index, kv_head; // `index` counts items and key heads
    u32 table;          // where the sequence's pages begin in the tables
    Range pages, whole;
};

/// Registers are scarce: what is not needed all the time is here.
template <class F, u32 HD> struct WideShared {
    u8 halves[3][HALF_BYTES<F, HD>];          // keys [64][HD] or values [HD][64], pieces of 16 bytes swizzled
    uint4 queries[STRIPS * HD / 16][THREADS]; // A fragments, every thread's own
    WideWork work;
    u32 arrived;
};
static_assert(sizeof(WideShared<F16, 128>) == 640 * 128 + 64 && sizeof(WideShared<Q8, 128>) == 448 * 128 + 1600, "as the host has them");

/// This thread, of which the compiler knows nothing: what follows from it is not kept in registers from page to page.
__device__ __forceinline__ u32 thread_here() { return static_cast<u32>(computed_here(static_cast<int>(threadIdx.x))); }

/// What the place of 16 bytes in a row of `PER_ROW` such pieces is xored with. A quarter of a warp reads 16 bytes (Q8: half of it 8)
/// of rows r, r + 1, with Q8 also two rows further: r + 8, r + 9 of the keys, r + 2, r + 3 of the values. They lie in different banks.
/// For a sum of rows that have no bits in common it is the xor of theirs.
template <class F, u32 PER_ROW> __device__ __forceinline__ constexpr u32 swizzle_of(u32 row) {
    if constexpr (F::BYTES == 2) {
        return PER_ROW < 8 ? 0 : row % 2 * 4;
    } else if constexpr (PER_ROW == 8) {
        return row % 2 * 2 + row / 8 % 2 * 4;
    } else {
        return PER_ROW < 4 ? 0 : (row / 2 + row / 8) % 2 * 2;
    }
}

/// Where a thread copies to. Rows that are 16 or more apart (with 4 pieces 32) have one swizzle.
template <class F, u32 PER_ROW> __device__ __forceinline__ u8 *own_pieces(u8 *half) {
    const u32 thread = thread_here(), row = thread / PER_ROW, at = thread % PER_ROW;
    return half + 16 * (row * PER_ROW + (at ^ swizzle_of<F, PER_ROW>(row)));
}

/// Starts copying half of a page: rows of `PER_ROW` pieces.
template <class F, u32 HD, u32 PER_ROW> __device__ __forceinline__ void fetch(u8 *to, const u8 *from) {
    const u32 first = shared_address(own_pieces<F, PER_ROW>(to));
    const u8 *own = from + threadIdx.x * 16;
#pragma unroll
    for (u32 i = 0; i < KEY_BYTES<F, HD> / 16 / THREADS; ++i) {
        cp_async_16(first + i * THREADS * 16, own + i * THREADS * 16, 16);
    }
}

template <class F, u32 HD> __device__ __forceinline__ void fetch_keys(u8 *to, const u8 *keys) {
    fetch<F, HD, HD * F::BYTES / 16>(to, keys);
    if (F::SCALES > 0 && threadIdx.x < F::SCALES / 4) {
        const u32 at = threadIdx.x * 16;
        cp_async_16(shared_address(to + KEY_BYTES<F, HD> + at), keys + 2 * KEY_BYTES<F, HD> + at, 16);
    }
}

template <class F, u32 HD> __device__ __forceinline__ void fetch_values(u8 *to, const u8 *keys) {
    fetch<F, HD, PAGE_TOKENS * F::BYTES / 16>(to, keys + KEY_BYTES<F, HD>);
}

/// Zeroes what no row sees of the values that this thread has copied. Those of Q8 are numbers, whatever they are.
template <class F, u32 HD> __device__ __forceinline__ void mask_copied(u8 *values, const Tile &tile, u32 position) {
    if constexpr (F::SCALES == 0) {
        uint4 *own = reinterpret_cast<uint4 *>(own_pieces<F, 8>(values));
        for (u32 i = 0; i < KEY_BYTES<F, HD> / 16 / THREADS; ++i) {
            mask_values(own[i * THREADS], tile, position + 8 * (threadIdx.x % 8));
        }
    }
}

/// Where the first 8 elements of a lane lie whose first row is `row`.
template <class F, u32 PER_ROW> __device__ __forceinline__ u32 first_eight(u32 row, u32 t) {
    const u32 byte = 8 * t * F::BYTES;
    return 16 * (row * PER_ROW + (byte / 16 ^ swizzle_of<F, PER_ROW>(row))) + byte % 16;
}

/// Its 8 elements of block `b`, `row` rows further. Both are known when this is compiled, and the sum is part of the load.
template <class F, u32 PER_ROW> __device__ __forceinline__ uint4 eight_of(const u8 *half, u32 first, u32 row, u32 b) {
    constexpr u32 SWIZZLED = 16 * swizzle_of<F, PER_ROW>(PER_ROW == 4 ? 2 : 9);
    const u32 piece = 16 * (2 * b * F::BYTES ^ swizzle_of<F, PER_ROW>(row));
    const u8 *at = half + (first ^ (piece & SWIZZLED)) + (piece & ~SWIZZLED) + 16 * row * PER_ROW;
    return widen(*reinterpret_cast<const typename F::Raw *>(at));
}

/// Puts a strip's Q where its threads find it again.
template <class F, u32 HD>
__device__ __forceinline__ void keep_queries(WideShared<F, HD> &shared, const AttendArgs &a, const Tile &tile, u32 strip, u32 t) {
#pragma unroll
    for (u32 b = 0; b < HD / 32; ++b) {
        const Queries q = load_queries<HD>(a, tile, b, t);
        uint4 *to = &shared.queries[strip * (HD / 16) + 2 * b][threadIdx.x];
        to[0] = make_uint4(q.low.x, q.high.x, q.low.y, q.high.y);
        to[THREADS] = make_uint4(q.low.z, q.high.z, q.low.w, q.high.w);
    }
}

__device__ __forceinline__ void take_fragment(u32 (&to)[4], const uint4 &from) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
    to[3] = from.w;
}

/// The scores of a page for `N` strips, 8 tiles of 8 tokens each. Four sums in turn: a product need not wait for the one in front.
template <u32 N, class F, u32 HD>
__device__ __forceinline__ void wide_scores(float (&c)[N][8][4], const WideShared<F, HD> &shared, const u8 *keys, u32 g, u32 t) {
    constexpr u32 PER_ROW = HD * F::BYTES / 16, SPAN = 4 / N;
    constexpr u32 UNROLLED = N * HD > 128 ? 1 : HD / 32; // beside 128 outputs no register is left for loads ahead of a block
    const u32 own = first_eight<F, PER_ROW>(8 * (g / 2) + g % 2, t);
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        clear(c[n]);
    }
#pragma unroll UNROLLED
    for (u32 b = 0; b < HD / 32; ++b) {
        u32 q[N][2][4];
#pragma unroll
        for (u32 n = 0; n < 2 * N; ++n) {
            take_fragment(q[n / 2][n % 2], shared.queries[n / 2 * (HD / 16) + 2 * b + n % 2][threadIdx.x]);
        }
#pragma unroll
        for (u32 first = 0; first < 8; first += SPAN) {
            uint4 k[SPAN];
#pragma unroll
            for (u32 i = 0; i < SPAN; ++i) {
                const u32 j = first + i;
                k[i] = eight_of<F, PER_ROW>(keys, own, 32 * (j / 4) + 2 * (j % 4), b);
            }
#pragma unroll
            for (u32 i = 0; i < N * SPAN; ++i) {
                multiply(c[i % N][first + i / N], q[i % N][0], k[i / N].x, k[i / N].y);
            }
#pragma unroll
            for (u32 i = 0; i < N * SPAN; ++i) {
                multiply(c[i % N][first + i / N], q[i % N][1], k[i / N].z, k[i / N].w);
            }
        }
    }
}

__device__ __forceinline__ float2 shared_scales_at(const u8 *scales, u32 token) {
    return *reinterpret_cast<const float2 *>(scales + 4 * token);
}

/// Scores of a strip become P, and l takes them; returns the factors of what came before. `scales` are those of the page.
template <class F>
__device__ __forceinline__ Pair wide_weights(u32 (&p)[4][4], float (&c)[8][4], const u8 *scales, Softmax &s, u32 t) {
    Pair largest = {fmaxf(c[0][0], c[0][1]), fmaxf(c[0][2], c[0][3])};
#pragma unroll
    for (u32 j = 1; j < 8; ++j) {
        largest = {fmaxf(largest.low, fmaxf(c[j][0], c[j][1])), fmaxf(largest.high, fmaxf(c[j][2], c[j][3]))};
    }
    Pair base;
    const Pair factors = raise(s, {quad_max(largest.low), quad_max(largest.high)}, base);
    scale_rows(s.l, factors);
#pragma unroll
    for (u32 step = 0; step < 4; ++step) {
        float(&c0)[4] = c[2 * step], (&c1)[4] = c[2 * step + 1];
        exponents(c0, base);
        exponents(c1, base);
        fragment_of(p[step], c0, c1);
        add_ones(s.l, p[step]);
        if constexpr (F::SCALES > 0) {
            const u8 *of_values = scales + 4 * PAGE_TOKENS;
            weigh(c0, shared_scales_at(of_values, token_of(step / 2, 2 * (step % 2), t)));
            weigh(c1, shared_scales_at(of_values, token_of(step / 2, 2 * (step % 2) + 1, t)));
            fragment_of(p[step], c0, c1);
        }
    }
    return factors;
}

/// One lane's view of its warp's `N` strips.
template <u32 N, u32 HD> struct WideState {
    float o[N][HD / 8][4];
    u32 p[N][4][4];
    Softmax chunk[N];
    Pair factors[N];
};

/// Where a lane's rows of a strip are.
__device__ __forceinline__ Tile strip_tile(const AttendArgs &a, const WideWork &work, u32 strip) {
    return tile_of(a, work.item, work.kv_head, 64 * strip + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4);
}

/// P of a page for `N` strips.
template <u32 N, class F, u32 HD>
__device__ __forceinline__ void wide_keys(WideState<N, HD> &state, const AttendArgs &a, const WideShared<F, HD> &shared,
                                          const u8 *keys, u32 position, bool edge) {
    const u32 lane = thread_here() % 32, g = lane / 4, t = lane % 4;
    const u8 *scales = keys + KEY_BYTES<F, HD>;
    float c[N][8][4];
    wide_scores<N, F, HD>(c, shared, keys, g, t);
#pragma unroll
    for (u32 j = 0; j < 8 && F::SCALES > 0; ++j) {
        const float2 by = shared_scales_at(scales, token_of(j / 4, j % 4, t));
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            scale_scores(c[n][j], by);
        }
    }
    if (edge) {
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            const Tile tile = strip_tile(a, shared.work, n);
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                mask_scores(c[n][j], tile, position + token_of(j / 4, j % 4, t), a.window);
            }
        }
    }
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        state.factors[n] = wide_weights<F>(state.p[n], c[n], scales, state.chunk[n], t);
    }
}

/// Adds a page's values to the outputs of `N` strips, four sums in turn again.
template <u32 N, class F, u32 HD> __device__ __forceinline__ void wide_values(WideState<N, HD> &state, const u8 *values) {
    constexpr u32 PER_ROW = PAGE_TOKENS * F::BYTES / 16, SPAN = 4 / N;
    const u32 lane = thread_here() % 32, own = first_eight<F, PER_ROW>(lane / 4, lane % 4);
#pragma unroll
    for (u32 first = 0; first < HD / 8; first += SPAN) {
        uint4 v[SPAN][2];
#pragma unroll
        for (u32 i = 0; i < 2 * SPAN; ++i) {
            v[i / 2][i % 2] = eight_of<F, PER_ROW>(values, own, 8 * (first + i / 2), i % 2);
        }
#pragma unroll
        for (u32 i = 0; i < N * SPAN; ++i) {
            scale_rows(state.o[i % N][first + i / N], state.factors[i % N]);
        }
#pragma unroll
        for (u32 step = 0; step < 4; ++step) {
#pragma unroll
            for (u32 i = 0; i < N * SPAN; ++i) {
                const uint4 &eight = v[i / N][step / 2];
                multiply(state.o[i % N][first + i / N], state.p[i % N][step], step % 2 == 0 ? eight.x : eight.z,
                         step % 2 == 0 ? eight.y : eight.w);
            }
        }
    }
}

/// A strip's outputs and softmax of the chunks so far, in the thread's own memory: they are used once in 8 pages.
template <u32 HD> struct WideTotals {
    float4 o[HD / 8];
    float4 softmax; // m, l
};

/// Adds a chunk to those before it; the first one to nothing.
template <u32 HD>
__device__ __forceinline__ void add_chunk(WideTotals<HD> &totals, const Softmax &chunk, const float (&o)[HD / 8][4], bool is_first) {
    const float4 zeros = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    Softmax total;
    clear(total);
    if (!is_first) {
        total.m = {totals.softmax.x, totals.softmax.y};
        total.l[0] = totals.softmax.z;
        total.l[2] = totals.softmax.w;
    }
    const PairJoin by = join_chunk(total, chunk);
    totals.softmax = make_float4(total.m.low, total.m.high, total.l[0], total.l[2]);
#pragma unroll
    for (u32 i = 0; i < HD / 8; ++i) {
        totals.o[i] = joined(by, is_first ? zeros : totals.o[i], o[i]);
    }
}

/// Keeps a chunk of a shared tile as it is.
template <u32 HD> __device__ __forceinline__ void keep_alone(WideTotals<HD> &totals, const Softmax &chunk, const float (&o)[HD / 8][4]) {
    totals.softmax = make_float4(chunk.m.low, chunk.m.high, chunk.l[0], chunk.l[2]);
#pragma unroll
    for (u32 i = 0; i < HD / 8; ++i) {
        totals.o[i] = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
    }
}

/// Puts a strip's chunk where the last part to arrive will find it.
template <u32 HD>
__device__ __forceinline__ void keep_totals(const AttendArgs &a, const AttendItem &item, const Tile &tile, u32 chunk,
                                            const WideTotals<HD> &totals) {
    const float4 softmax = totals.softmax;
    const u32 t = threadIdx.x % 4;
    const Range chunks = chunks_of(tile);
    const size_t low = slot_of(a, item, chunks, tile.low, chunk), high = slot_of(a, item, chunks, tile.high, chunk);
#pragma unroll 1
    for (u32 i = 0; i < HD / 8; ++i) {
        const float o[1][4] = {{totals.o[i].x, totals.o[i].y, totals.o[i].z, totals.o[i].w}};
        if (tile.low != NOWHERE) {
            keep_chunk<HD>(a, low, make_float2(softmax.x, softmax.z), o, 0, 2 * t + 8 * i, t == 0 && i == 0);
        }
        if (tile.high != NOWHERE) {
            keep_chunk<HD>(a, high, make_float2(softmax.y, softmax.w), o, 2, 2 * t + 8 * i, t == 0 && i == 0);
        }
    }
}

/// Divides and writes a strip.
template <class F, u32 HD>
__device__ __forceinline__ void write_totals(const AttendArgs &a, const Tile &tile, const WideTotals<HD> &totals) {
    Softmax s;
    s.l[0] = totals.softmax.z;
    s.l[2] = totals.softmax.w;
#pragma unroll 1
    for (u32 i = 0; i < HD / 8; ++i) {
        write_outputs<F>(a, tile, s, totals.o[i], 2 * (threadIdx.x % 4) + 8 * i);
    }
}

/// Ends a chunk of all strips.
template <u32 N, u32 HD>
__device__ __forceinline__ void end_chunk(WideState<N, HD> &state, const AttendArgs &a, const WideWork &work, WideTotals<HD> *totals,
                                          u32 chunk) {
#pragma unroll
    for (u32 n = 0; n < N; ++n) {
        const Tile tile = strip_tile(a, work, n);
        if (work.item.num_parts > 1) {
            keep_alone(totals[n], state.chunk[n], state.o[n]);
            keep_totals(a, work.item, tile, chunk, totals[n]);
        } else {
            add_chunk(totals[n], state.chunk[n], state.o[n], chunk == chunks_of(tile).begin);
        }
        clear(state.o[n]);
        clear(state.chunk[n]);
    }
}

/// For all warps, which may be in functions for other numbers of strips: the hardware counts warps.
__device__ __forceinline__ void wide_barrier() { bar_sync(0, THREADS); }

/// Where half `i` of a sequence's pages is: keys and values in turn.
template <class F, u32 HD> __device__ __forceinline__ u8 *half_of(WideShared<F, HD> &shared, u32 i) {
    return shared.halves[static_cast<u32>(computed_here(static_cast<int>(i))) % 3];
}

/// The keys of a page in the cache.
template <class F, u32 HD> __device__ __forceinline__ const u8 *keys_at(const AttendArgs &a, const WideWork &work, u32 page) {
    const size_t id = load_4(a.tables + work.table + page);
    return a.pages + (id * a.num_kv_heads + work.kv_head) * HEAD_BYTES<F, HD>;
}

/// Starts copying keys, or with `IS_VALUES` values, of a page that is read; one group also where there are none.
template <bool IS_VALUES, class F, u32 HD>
__device__ __forceinline__ void fetch_half(WideShared<F, HD> &shared, const AttendArgs &a, u32 page) {
    if (page < shared.work.pages.end) {
        const u8 *keys = keys_at<F, HD>(a, shared.work, page);
        if constexpr (IS_VALUES) {
            fetch_values<F, HD>(half_of(shared, 2 * page + 1), keys);
        } else {
            fetch_keys<F, HD>(half_of(shared, 2 * page), keys);
        }
    }
    cp_async_commit();
}

/// An item's pages for a warp with `N` strips, or none: then it copies for the others.
template <u32 N, class F, u32 HD>
__device__ __forceinline__ void wide_strips(const AttendArgs &a, WideTotals<HD> (&memory)[STRIPS], WideShared<F, HD> &shared) {
    const WideWork &work = shared.work;
    WideState<N == 0 ? 1 : N, HD> state;
    if constexpr (N > 0) {
#pragma unroll
        for (u32 n = 0; n < N; ++n) {
            keep_queries<F, HD>(shared, a, strip_tile(a, work, n), n, threadIdx.x % 4);
            clear(state.o[n]);
            clear(state.chunk[n]);
        }
    }
    fetch_half<false>(shared, a, work.pages.begin);
    fetch_half<true>(shared, a, work.pages.begin);
    for (u32 page = work.pages.begin; page < work.pages.end; ++page) {
        cp_async_wait<1>();
        wide_barrier(); // the keys are there, the values of the page before are read
        fetch_half<false>(shared, a, page + 1);
        const bool is_edge = page < work.whole.begin || page >= work.whole.end;
        if constexpr (N > 0) {
            wide_keys<N, F, HD>(state, a, shared, half_of(shared, 2 * page), page * PAGE_TOKENS, is_edge);
        }
        cp_async_wait<1>();
        if (is_edge) {
            mask_copied<F, HD>(half_of(shared, 2 * page + 1), strip_tile(a, work, 0), page * PAGE_TOKENS);
        }
        wide_barrier(); // the values are there, the keys are read
        fetch_half<true>(shared, a, page + 1);
        if constexpr (N > 0) {
            wide_values<N, F, HD>(state, half_of(shared, 2 * page + 1));
            if (page + 1 == work.pages.end || (page + 1) % CHUNK_PAGES == 0) {
                // An index that the compiler does not know keeps them out of registers.
                end_chunk(state, a, work, memory + computed_here(0), page / CHUNK_PAGES);
            }
        }
    }
    if constexpr (N > 0) {
        for (u32 n = 0; n < N && work.item.num_parts == 1; ++n) {
            write_totals<F>(a, strip_tile(a, work, n), memory[n]);
        }
    }
}

template <class F, u32 HD> __device__ __forceinline__ void attend_wide_item(const AttendArgs &a, WideShared<F, HD> &shared) {
    const WideWork &work = shared.work;
    const u32 first = threadIdx.x / 32 * 16, num_pairs = work.item.num_rows * (a.num_heads / a.num_kv_heads);
    WideTotals<HD> memory[STRIPS];
    if (64 + first < num_pairs) {
        wide_strips<2, F, HD>(a, memory, shared);
    } else if (first < num_pairs) {
        wide_strips<1, F, HD>(a, memory, shared);
    } else {
        wide_strips<0, F, HD>(a, memory, shared);
    }
    if (work.item.num_parts > 1 && is_last_part(a, work.item, work.kv_head, shared.arrived)) {
        merge_slots<F, HD>(a, work.item, tile_of(a, work.item, work.kv_head, 0), work.kv_head);
    }
}

__device__ __forceinline__ WideWork wide_work(const AttendArgs &a, u32 index) {
    WideWork work;
    work.item = a.items[index / a.num_kv_heads];
    work.index = index;
    work.kv_head = index % a.num_kv_heads;
    work.table = work.item.sequence * a.table_stride;
    const Tile tile = tile_of(a, work.item, work.kv_head, 0);
    const u32 last_first = tile.first + work.item.num_rows - 1; // at least the first position that the last row sees
    work.pages = pages_of(work.item, tile);
    work.whole = {(last_first + PAGE_TOKENS - 1) / PAGE_TOKENS, (tile.end - work.item.num_rows + 1) / PAGE_TOKENS};
    return work;
}

/// All key heads of a tile, then the next tile: the host lists long ones first, so that the last ones to end are short.
template <class F, u32 HD> __device__ __forceinline__ void attend_wide(const AttendArgs &a) {
    WideShared<F, HD> &shared = *reinterpret_cast<WideShared<F, HD> *>(tr_shared());
    for (u32 i = blockIdx.x; i < *a.num_items * a.num_kv_heads; i = shared.work.index + gridDim.x) {
        __syncthreads(); // of the item before everything is read
        if (threadIdx.x == 0) {
            shared.work = wide_work(a, i);
        }
        __syncthreads();
        attend_wide_item(a, shared);
    }
}

// ---- kernels: grid (any), the blocks share items and key heads; 128 threads -------------------------------------------------
// Shared bytes: f16 640 HD + 64, q8 448 HD + 1,600. Own memory of a thread: 4 HD + 32 bytes.

extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_f16_32(AttendArgs a) { grid_begin(); attend_wide<F16, 32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_f16_64(AttendArgs a) { grid_begin(); attend_wide<F16, 64>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_f16_128(AttendArgs a) { grid_begin(); attend_wide<F16, 128>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_q8_32(AttendArgs a) { grid_begin(); attend_wide<Q8, 32>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_q8_64(AttendArgs a) { grid_begin(); attend_wide<Q8, 64>(a); }
extern "C" __global__ void __launch_bounds__(THREADS, 2) tr_attend_wide_q8_128(AttendArgs a) { grid_begin(); attend_wide<Q8, 128>(a); }
