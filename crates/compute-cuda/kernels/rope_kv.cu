// Rotates queries and keys, rounds them, and puts keys and values into their pages. Allots no page.
//
// Half-split RoPE, as the reference backend: element i of a head pairs with element i + head_dim / 2, the angle is position
// times theta^(-2 i / head_dim). cos and sin come from a table that the host computed once, in f64 from f32 angles as the CPU
// backend does: sinf of a large angle would need a stack. Queries leave as Q' = Q log2(e) / sqrt(head_dim), so that
// attention's scores are exponents of two. Heads are padded with zeros to HD = 32, 64 or 128. Layout of pages: attention.cu.
//
// grid (rows at most, 1 or more: blocks share the row's heads), block 128, no shared memory. Bytes per row: 4 (num_heads +
// 2 num_kv_heads) head_dim read, half of it written; a value's 2 bytes each go to a sector of its own (attention reads
// them 16 tokens at a time), which costs 1/16 of the bytes that reading 1,000 tokens of context costs.

constexpr u32 ROPE_THREADS = 128;
constexpr u32 KV_PAGE_TOKENS = 64;

struct RopeArgs {
    u16 *q;                // [rows, num_heads, HD]
    u16 *pages;            // this layer: [page][kv_head] K [64][HD], V [HD][64]
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

struct RopeBf16 {};
struct RopeF16 {};

__device__ __forceinline__ u16 round_to(RopeBf16, float x) { return bf16_from(x); }

/// Finite numbers that f16 does not reach become its largest, as everywhere (KvFormat::F16).
__device__ __forceinline__ u16 round_to(RopeF16, float x) {
    constexpr float LARGEST = 65504.0f;
    const float magnitude = fabsf(x);
    const bool is_finite = magnitude < __uint_as_float(0x7F800000U);
    const float kept = is_finite && magnitude > LARGEST ? copysignf(LARGEST, x) : x;
    return static_cast<u16>(f16x2_from(kept, 0.0f));
}

/// Element `i` of a rotated head.
__device__ __forceinline__ float rotated(const float *head, u32 i, u32 half, float2 angle) {
    const u32 pair = i < half ? i + half : i - half;
    const float turned = __fmul_rn(head[pair], angle.y);
    const float own = __fmul_rn(head[i], angle.x);
    return i < half ? __fsub_rn(own, turned) : __fadd_rn(own, turned);
}

template <class E, u32 HD> __device__ __forceinline__ void rope_kv(const RopeArgs &a) {
    const u32 row = blockIdx.x;
    if (row >= *a.num_rows) {
        return;
    }
    const u32 position = a.positions[row], half = a.head_dim / 2;
    const u32 heads = a.num_heads + 2 * a.num_kv_heads;
    const float *qkv = a.qkv + static_cast<size_t>(row) * heads * a.head_dim;
    const float2 *angles = a.angles + static_cast<size_t>(position) * half;
    const u32 page = load_4(a.tables + static_cast<size_t>(a.sequences[row]) * a.table_stride + position / KV_PAGE_TOKENS);
    u16 *pages = a.pages + static_cast<size_t>(page) * a.num_kv_heads * 2 * KV_PAGE_TOKENS * HD;
    const u32 token = position % KV_PAGE_TOKENS;
    for (u32 at = blockIdx.y * ROPE_THREADS + threadIdx.x; at < heads * HD; at += gridDim.y * ROPE_THREADS) {
        const u32 head = at / HD, i = at % HD;
        const float *x = qkv + head * a.head_dim;
        const bool is_pad = i >= a.head_dim;
        if (head >= a.num_heads + a.num_kv_heads) {
            const u32 kv_head = head - a.num_heads - a.num_kv_heads;
            pages[((2 * kv_head + 1) * HD + i) * KV_PAGE_TOKENS + token] = round_to(E{}, is_pad ? 0.0f : x[i]);
            continue;
        }
        const float turned = is_pad ? 0.0f : rotated(x, i, half, angles[i < half ? i : i - half]);
        if (head < a.num_heads) {
            a.q[(static_cast<size_t>(row) * a.num_heads + head) * HD + i] = round_to(E{}, __fmul_rn(turned, a.q_scale));
        } else {
            pages[(2 * (head - a.num_heads) * KV_PAGE_TOKENS + token) * HD + i] = round_to(E{}, turned);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_bf16_32(RopeArgs a) { rope_kv<RopeBf16, 32>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_bf16_64(RopeArgs a) { rope_kv<RopeBf16, 64>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_bf16_128(RopeArgs a) { rope_kv<RopeBf16, 128>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_32(RopeArgs a) { rope_kv<RopeF16, 32>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_64(RopeArgs a) { rope_kv<RopeF16, 64>(a); }
extern "C" __global__ void __launch_bounds__(ROPE_THREADS) tr_rope_kv_f16_128(RopeArgs a) { rope_kv<RopeF16, 128>(a); }
