// Rotates queries and keys, rounds them, and puts keys and values into their pages. Allots no page.
//
// Half-split RoPE, as the reference backend: element i of a head pairs with element i + head_dim / 2, the angle is position
// times theta^(-2 i / head_dim). cos and sin come from a table that the host computed once, in f64 from f32 angles as the CPU
// backend does: sinf of a large angle would need a stack. Queries leave as Q' = Q log2(e) / sqrt(head_dim) in f16, so that
// attention's scores are exponents of two. Heads are padded with zeros to HD = 32, 64 or 128. Layout of pages: attention.cu.
// f16: KvFormat::F16. q8: KvFormat::Q8, bytes and a scale per token and head as `tramontane_compute::kv::Q8Head` finds them, to the bit.
//
// grid (rows at most, 1 or more: blocks share the row's heads), block 128: a warp has a head. No shared memory. Bytes per row: 4
// (num_heads + 2 num_kv_heads) head_dim read, half of it written (q8: less); a value's 2 bytes each go to a sector of its own
// (attention reads them 16 tokens at a time), which costs 1/16 of the bytes that reading 1,000 tokens of context costs.

constexpr u32 ROPE_THREADS = 128;
constexpr u32 ROPE_WARPS = ROPE_THREADS / 32;

struct RopeArgs {
    u16 *q;                // [rows, num_heads, HD] f16
    u8 *pages;             // this layer's, see attention.cu
    const float *qkv;      // [rows, (num_heads + 2 num_kv_heads) * head_dim]
    const float2 *angles;  // [positions, head_dim / 2]: cos, sin
    const u32 *positions;  // [rows]
    const u32 *sequences;  // [rows]: which line of `tables`
    const u32 *tables;     // [sequences, table_stride]
    const u32 *num_rows;
    float q_scale;         // log2(e) / sqrt(head_dim)
    u32 table_stride, num_heads, num_kv_heads, head_dim;
};
static_assert(sizeof(RopeArgs) == 88, "as the host has them");

/// Finite numbers that f16 does not reach become its largest, as everywhere (KvFormat::F16).
__device__ __forceinline__ u16 kept_f16(float x) {
    constexpr float LARGEST = 65504.0F;
    const float magnitude = fabsf(x);
    const bool is_finite = magnitude < __uint_as_float(0x7F800000U);
    return static_cast<u16>(f16x2_from(is_finite && magnitude > LARGEST ? copysignf(LARGEST, x) : x, 0.0F));
}

/// Element `i` of a rotated head.
__device__ __forceinline__ float rotated(const float *head, u32 i, u32 half, const float2 *angles) {
    const bool is_first = i < half;
    const float2 angle = angles[is_first ? i : i - half];
    const float turned = __fmul_rn(head[is_first ? i + half : i - half], angle.y);
    const float own = __fmul_rn(head[i], angle.x);
    return is_first ? __fsub_rn(own, turned) : __fadd_rn(own, turned);
}

/// How Q8Head rounds the numbers of a warp.
struct Rounding {
    float scale, inverse;
};

template <u32 N> __device__ __forceinline__ Rounding rounding_of(const float (&x)[N]) {
    float amax = 0.0F, poison = 0.0F;
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
        amax = fabsf(x[j]) > amax ? fabsf(x[j]) : amax;
        poison = __fmaf_rn(x[j], 0.0F, poison); // NaN where x is not finite, and stays it
    }
    const float scale = __fadd_rn(__fdiv_rn(warp_max(amax), 127.0F), warp_sum(poison));
    const float inverse = scale > 0.0F ? __fdiv_rn(1.0F, scale) : 0.0F;
    if (scale > 0.0F && !(inverse < __uint_as_float(0x7F800000U))) {
        return {0.0F, 0.0F}; // too small to be told from zero
    }
    return {scale, inverse};
}

__device__ __forceinline__ u8 rounded(float x, Rounding by) {
    constexpr float TO_BITS = 12582912.0F; // 1.5 * 2^23: the sum with it has the rounded number in its low bits
    return by.inverse == 0.0F ? 0 : static_cast<u8>(__float_as_uint(__fadd_rn(__fmul_rn(x, by.inverse), TO_BITS)));
}

/// Puts a lane's elements of a key (rows of HD) or value (rows of 64 tokens) into its page: element lane + 32 j.
template <u32 HD> __device__ __forceinline__ void keep(attention::F16, u8 *head, const float (&x)[HD / 32], bool is_value, u32 token) {
    auto *half = reinterpret_cast<u16 *>(head + (is_value ? attention::KEY_BYTES<attention::F16, HD> : 0));
#pragma unroll
    for (u32 j = 0; j < HD / 32; ++j) {
        const u32 i = threadIdx.x % 32 + 32 * j;
        half[is_value ? i * attention::PAGE_TOKENS + token : token * HD + i] = kept_f16(x[j]);
    }
}

template <u32 HD> __device__ __forceinline__ void keep(attention::Q8, u8 *head, const float (&x)[HD / 32], bool is_value, u32 token) {
    constexpr u32 KEYS = attention::KEY_BYTES<attention::Q8, HD>;
    u8 *half = head + (is_value ? KEYS : 0);
    const Rounding by = rounding_of(x);
#pragma unroll
    for (u32 j = 0; j < HD / 32; ++j) {
        const u32 i = threadIdx.x % 32 + 32 * j;
        half[is_value ? i * attention::PAGE_TOKENS + token : token * HD + i] = rounded(x[j], by);
    }
    if (threadIdx.x % 32 == 0) {
        reinterpret_cast<float *>(head + 2 * KEYS)[(is_value ? attention::PAGE_TOKENS : 0) + token] = by.scale;
    }
}

template <class F, u32 HD> __device__ __forceinline__ void rope_kv(const RopeArgs &a) {
    const u32 row = blockIdx.x, lane = threadIdx.x % 32;
    if (row >= *a.num_rows) {
        return;
    }
    const u32 position = a.positions[row], half = a.head_dim / 2, heads = a.num_heads + 2 * a.num_kv_heads;
    const float *qkv = a.qkv + static_cast<size_t>(row) * heads * a.head_dim;
    const float2 *angles = a.angles + static_cast<size_t>(position) * half;
    const u32 *table = a.tables + static_cast<size_t>(a.sequences[row]) * a.table_stride;
    constexpr size_t HEAD = attention::HEAD_BYTES<F, HD>;
    u8 *page = a.pages + static_cast<size_t>(load_4(table + position / attention::PAGE_TOKENS)) * a.num_kv_heads * HEAD;
    for (u32 head = blockIdx.y * ROPE_WARPS + threadIdx.x / 32; head < heads; head += gridDim.y * ROPE_WARPS) {
        const float *from = qkv + head * a.head_dim;
        const bool is_value = head >= a.num_heads + a.num_kv_heads;
        float x[HD / 32];
#pragma unroll
        for (u32 j = 0; j < HD / 32; ++j) {
            const u32 i = lane + 32 * j;
            x[j] = i >= a.head_dim ? 0.0F : is_value ? from[i] : rotated(from, i, half, angles);
        }
        if (head >= a.num_heads) {
            const u32 kv_head = head - a.num_heads - (is_value ? a.num_kv_heads : 0);
            keep<HD>(F{}, page + kv_head * HEAD, x, is_value, position % attention::PAGE_TOKENS);
            continue;
        }
#pragma unroll
        for (u32 j = 0; j < HD / 32; ++j) {
            a.q[(static_cast<size_t>(row) * a.num_heads + head) * HD + lane + 32 * j] = kept_f16(__fmul_rn(x[j], a.q_scale));
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_32(RopeArgs a) { grid_begin(); rope_kv<attention::F16, 32>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_64(RopeArgs a) { grid_begin(); rope_kv<attention::F16, 64>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_128(RopeArgs a) { grid_begin(); rope_kv<attention::F16, 128>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_q8_32(RopeArgs a) { grid_begin(); rope_kv<attention::Q8, 32>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_q8_64(RopeArgs a) { grid_begin(); rope_kv<attention::Q8, 64>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_q8_128(RopeArgs a) { grid_begin(); rope_kv<attention::Q8, 128>(a); }
