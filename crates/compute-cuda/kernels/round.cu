// Rows of bf16 become e4m3 with a scale for each part of a row: what products with e4m3 weights read. sm_89 and later.
//
// scale = amax / 448 in f32, q = e4m3(x / scale) to nearest, ties to even; the number is q scale. A part of zeros has scale 0, one with a
// number that is not finite has scale NaN; q is 0 in both. A part is the whole row, or one of its segments (down products).
// The largest of a part does not depend on an order, so neither does anything else.
//
// grid (rows at most, parts), block 256. Shared bytes: 64. Bytes per row: 2 cols read twice (the second time from L1), cols written.

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)

constexpr u32 ROUND_THREADS = 256;
constexpr u32 ROUND_WARPS = ROUND_THREADS / 32;
constexpr float E4M3_LARGEST = 448.0F;

struct RoundArgs {
    u8 *out;              // [rows, out_stride]; columns from cols on become 0
    float *scales;        // [rows, scale_stride]
    const u16 *rows;      // [rows, row_stride] bf16
    const u32 *num_rows;
    u32 cols, part_cols;  // part p has columns p * part_cols to the next part or cols; a multiple of 8 when there are several
    u32 row_stride, out_stride, scale_stride; // elements; the first two multiples of 8
};
static_assert(sizeof(RoundArgs) == 56, "as the host has them");

/// Largest magnitude of a block's threads, NaN when `poison` is in any of them. `shared`: two per warp.
__device__ __forceinline__ float block_amax(float amax, float poison, float *shared) {
    amax = warp_max(amax);
    poison = warp_sum(poison);
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = amax;
        shared[ROUND_WARPS + threadIdx.x / 32] = poison;
    }
    __syncthreads();
    float largest = 0.0F, sum = 0.0F;
#pragma unroll
    for (u32 w = 0; w < ROUND_WARPS; ++w) {
        largest = fmaxf(largest, shared[w]);
        sum = __fadd_rn(sum, shared[ROUND_WARPS + w]);
    }
    return __fadd_rn(largest, sum);
}

__device__ __forceinline__ u32 e4m3x4_from(float a, float b, float c, float d) {
    return e4m3x2_from(a, b) | static_cast<u32>(e4m3x2_from(c, d)) << 16;
}

/// Columns i to i + 7 as f32; those from `end` on are 0.
__device__ __forceinline__ void load_eight(float (&x)[8], const u16 *row, u32 i, u32 end) {
    const uint4 bits = load_16(row + i);
    const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        x[2 * j] = i + 2 * j < end ? bf16x2_low(pairs[j]) : 0.0F;
        x[2 * j + 1] = i + 2 * j + 1 < end ? bf16x2_high(pairs[j]) : 0.0F;
    }
}

extern "C" __global__ void __launch_bounds__(ROUND_THREADS) tr_round_e4m3(RoundArgs a) {
    grid_begin();
    auto *shared = reinterpret_cast<float *>(tr_shared());
    const u32 row = blockIdx.x, part = blockIdx.y, begin = part * a.part_cols;
    if (row >= *a.num_rows || begin >= a.cols) {
        return;
    }
    const bool is_last = begin + a.part_cols >= a.cols;
    const u32 end = is_last ? a.cols : begin + a.part_cols;
    const u16 *from = a.rows + static_cast<size_t>(row) * a.row_stride;
    float amax = 0.0F, poison = 0.0F;
    for (u32 i = begin + 8 * threadIdx.x; i < end; i += 8 * ROUND_THREADS) {
        float x[8];
        load_eight(x, from, i, end);
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            amax = fmaxf(amax, fabsf(x[j]));
            poison = __fmaf_rn(x[j], 0.0F, poison); // NaN where x is not finite, and stays it
        }
    }
    const float scale = __fdiv_rn(block_amax(amax, poison, shared), E4M3_LARGEST);
    // Too small to be told from zero when the inverse is no number.
    const float inverse = __fdiv_rn(1.0F, scale);
    const bool is_zero = !(scale > 0.0F) || inverse > 3.0e38F;
    u8 *to = a.out + static_cast<size_t>(row) * a.out_stride;
    for (u32 i = begin + 8 * threadIdx.x; i < (is_last ? a.out_stride : end); i += 8 * ROUND_THREADS) {
        float x[8] = {};
        if (i < end) {
            load_eight(x, from, i, end);
        }
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            x[j] = is_zero ? 0.0F : __fmul_rn(x[j], inverse);
        }
        *reinterpret_cast<uint2 *>(to + i) = make_uint2(e4m3x4_from(x[0], x[1], x[2], x[3]), e4m3x4_from(x[4], x[5], x[6], x[7]));
    }
    if (threadIdx.x == 0) {
        a.scales[static_cast<size_t>(row) * a.scale_stride + part] = is_zero && scale == scale ? 0.0F : scale;
    }
}

#endif
