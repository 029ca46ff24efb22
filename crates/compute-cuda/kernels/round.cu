// Rows of bf16 become e4m3 with a scale for each part of a row: what products with e4m3 weights read. sm_89 and later.
// Norms write such rows themselves (norm.cu), with the same bits; this is for rows of attention, of gate_up and of other workers.
//
// scale = amax / 448 in f32, q = e4m3(x / scale) to nearest, ties to even; the number is q scale. See e4m3_scale_of for zeros and for
// numbers that are not finite. A part is the whole row, or one of its segments (down products).
// The largest of a part does not depend on an order, so neither does anything else.
//
// tr_round_e4m3: grid (rows at most, parts), block 256. Shared bytes: 32.
// tr_round_panels_e4m3: grid (slots / 8, parts), block 256, a warp for each part of a slot. No shared memory.
// Bytes per row: 2 cols read twice (the second time from L1 or L2), cols written.

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

__device__ __forceinline__ u32 larger_of_eight(u32 amax, uint4 x) {
    return larger_of_two(larger_of_two(larger_of_two(larger_of_two(amax, x.x), x.y), x.z), x.w);
}

__device__ __forceinline__ uint2 e4m3x8_from(uint4 x, float inverse) {
    return make_uint2(e4m3x4_from(x.x, x.y, inverse), e4m3x4_from(x.z, x.w, inverse));
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
        amax = larger_of_eight(amax, load_eight(from, i, end));
    }
    const E4m3Scale scale = e4m3_scale_of(block_largest<ROUND_THREADS / 32>(amax, reinterpret_cast<u32 *>(tr_shared())));
    u8 *to = a.out + static_cast<size_t>(row) * a.out_stride;
    for (u32 i = begin + 8 * threadIdx.x; i < (is_last ? a.out_stride : end); i += 8 * ROUND_THREADS) {
        *reinterpret_cast<uint2 *>(to + i) = e4m3x8_from(load_eight(from, i, end), scale.inverse);
    }
    if (threadIdx.x == 0) {
        a.scales[static_cast<size_t>(row) * a.scale_stride + part] = scale.scale;
    }
}

/// The arguments of tr_round_panels_e4m3: see README.md.
struct RoundPanelsArgs {
    u8 *out;           // panels of e4m3
    float *scales;     // [parts, slots]
    const u8 *panels;  // of bf16
    u32 part_cols;     // a multiple of 256
    u32 slots;         // a multiple of 8
};
static_assert(sizeof(RoundPanelsArgs) == 32, "as the host has them");

/// The same of panels (panels.cu). What is in slots that no row has does not matter: nobody reads what comes of it.
extern "C" __global__ void __launch_bounds__(ROUND_THREADS) tr_round_panels_e4m3(RoundPanelsArgs a) {
    grid_begin();
    const int slots = static_cast<int>(a.slots), slot = blockIdx.x * (ROUND_THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    // Chunks of 8 columns.
    const int begin = blockIdx.y * a.part_cols / 8 + lane, end = (blockIdx.y + 1) * a.part_cols / 8;
    u32 amax = 0;
#pragma unroll 4
    for (int chunk = begin; chunk < end; chunk += 32) {
        amax = larger_of_eight(amax, load_16_in_place(a.panels + panel_at(chunk, slot, slots)));
    }
    const E4m3Scale scale = e4m3_scale_of(warp_largest(amax));
#pragma unroll 4
    for (int chunk = begin; chunk < end; chunk += 32) {
        u8 *to = a.out + panel_at(chunk / 2, slot, slots) + chunk % 2 * 8;
        *reinterpret_cast<uint2 *>(to) = e4m3x8_from(load_16_in_place(a.panels + panel_at(chunk, slot, slots)), scale.inverse);
    }
    if (lane == 0) {
        a.scales[static_cast<size_t>(blockIdx.y) * a.slots + slot] = scale.scale;
    }
}

#endif
