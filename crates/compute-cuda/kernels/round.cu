// Rows of bf16 become e4m3 with a scale for each part of a row: what products with e4m3 weights read. sm_89 and later.
// Norms write such rows themselves (norm.cu), with the same bits; this is for rows of attention, of gate_up and of other workers.
//
// scale = amax / 448 in f32, q = e4m3(x / scale) to nearest, ties to even; the number is q scale. See e4m3_scale_of for zeros and for
// numbers that are not finite. A part is the whole row, or one of its segments (down products).
// The largest of a part does not depend on an order, so neither does anything else.
//
// grid (rows at most, parts), block 256. Shared bytes: 32. Bytes per row: 2 cols read twice (the second time from L1), cols written.

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)

constexpr u32 ROUND_THREADS = 256;

struct RoundArgs {
    u8 *out;              // [rows, out_stride]; columns from cols on become 0
    float *scales;        // [rows, scale_stride]
    const u16 *rows;      // [rows, row_stride] bf16
    const u32 *num_rows;
    u32 cols, part_cols;  // part p has columns p * part_cols to the next part or cols; a multiple of 8 when there are several
    u32 row_stride, out_stride, scale_stride; // elements; the first two multiples of 8
};
static_assert(sizeof(RoundArgs) == 56, "as the host has them");

/// Columns i to i + 7; those from `end` on are 0.
__device__ __forceinline__ uint4 load_eight(const u16 *row, u32 i, u32 end) {
    uint4 bits = i < end ? load_16(row + i) : make_uint4(0, 0, 0, 0);
    auto until = [&](u32 pair, u32 at) { return at + 1 < end ? pair : at < end ? pair & 0xFFFFU : 0; };
    return make_uint4(until(bits.x, i), until(bits.y, i + 2), until(bits.z, i + 4), until(bits.w, i + 6));
}

extern "C" __global__ void __launch_bounds__(ROUND_THREADS) tr_round_e4m3(RoundArgs a) {
    grid_begin();
    const u32 row = blockIdx.x, part = blockIdx.y, begin = part * a.part_cols;
    if (row >= *a.num_rows || begin >= a.cols) {
        return;
    }
    const bool is_last = begin + a.part_cols >= a.cols;
    const u32 end = is_last ? a.cols : begin + a.part_cols;
    const u16 *from = a.rows + static_cast<size_t>(row) * a.row_stride;
    u32 amax = 0;
    for (u32 i = begin + 8 * threadIdx.x; i < end; i += 8 * ROUND_THREADS) {
        const uint4 x = load_eight(from, i, end);
        amax = larger_of_two(larger_of_two(larger_of_two(larger_of_two(amax, x.x), x.y), x.z), x.w);
    }
    const E4m3Scale scale = e4m3_scale_of(block_largest<ROUND_THREADS / 32>(amax, reinterpret_cast<u32 *>(tr_shared())));
    u8 *to = a.out + static_cast<size_t>(row) * a.out_stride;
    for (u32 i = begin + 8 * threadIdx.x; i < (is_last ? a.out_stride : end); i += 8 * ROUND_THREADS) {
        const uint4 x = load_eight(from, i, end);
        *reinterpret_cast<uint2 *>(to + i) = make_uint2(e4m3x4_from(x.x, x.y, scale.inverse), e4m3x4_from(x.z, x.w, scale.inverse));
    }
    if (threadIdx.x == 0) {
        a.scales[static_cast<size_t>(row) * a.scale_stride + part] = scale.scale;
    }
}

#endif
