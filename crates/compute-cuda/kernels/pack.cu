// Weights from row-major rows to the packed order of tile.cuh, once at load. Computes nothing but roundings.
//
// Strip s of a plain matrix has rows 16 s to 16 s + 15. Strip s of a gate-up pair has rows 8 s to 8 s + 7 of the gate
// and then the same of up: a thread that holds rows r and r + 8 has both halves of an element. What lies outside
// the matrix is zero. Bound by memory: 2 bytes read and at most 2 written per weight.

/// The arguments of tr_pack_*: see README.md.
struct Pack {
    u8 *out;
    float *scales;       // e4m3 only: [packed rows]
    const u16 *a, *b;    // bf16 [rows, stride]; b: up, or null
    int rows, cols, stride;
    const u32 *dm_a, *dm_b; // q4 only: [rows, stride / 16]
};

/// Packed rows: whole strips, their number a multiple of 4.
__device__ __forceinline__ int packed_rows(const Pack &call) {
    return divide_up(call.rows, call.b == nullptr ? 64 : 32) * 64;
}

/// The row of the source that is row `row` of a strip; null outside.
__device__ __forceinline__ const u16 *source_row(const Pack &call, int strip, int row) {
    const u16 *matrix = call.b != nullptr && row >= 8 ? call.b : call.a;
    long long at = call.b == nullptr ? strip * 16 + row : strip * 8 + row % 8;
    return at < call.rows ? matrix + at * call.stride : nullptr;
}

__device__ __forceinline__ u16 element(const Pack &call, const u16 *row, int col) {
    return row != nullptr && col < call.cols ? row[col] : static_cast<u16>(0);
}

/// bf16: one warp writes one step of one strip. Grid (steps of the part, packed strips), block 32.
extern "C" __global__ void __launch_bounds__(32) tr_pack_bf16(const Pack call) {
    grid_begin();
    int lane = threadIdx.x, strip = blockIdx.y;
    const u16 *low = source_row(call, strip, lane / 4), *high = source_row(call, strip, lane / 4 + 8);
    u8 *step = call.out + strip_offset<Bf16Step>(strip, gridDim.x) + static_cast<long long>(blockIdx.x) * GROUP_STEP<Bf16Step>;
    for (int tile = 0; tile < 4; ++tile) {
        int col = blockIdx.x * Bf16Step::K + tile * 16 + lane % 4 * 2;
        auto two = [&](const u16 *row, int at) {
            return element(call, row, at) | static_cast<u32>(element(call, row, at + 1)) << 16;
        };
        uint4 out = make_uint4(two(low, col), two(high, col), two(low, col + 8), two(high, col + 8));
        *reinterpret_cast<uint4 *>(step + tile * 512 + lane * 16) = out;
    }
}

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)
/// e4m3: a block of 8 warps writes one strip and its scales, amax / 448 of each row of the part. Grid (1, packed
/// strips), block 256, shared 64.
extern "C" __global__ void __launch_bounds__(256) tr_pack_e4m3(const Pack call) {
    grid_begin();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, strip = blockIdx.y;
    auto *inverse = reinterpret_cast<float *>(tr_shared());
    for (int r = warp; r < 16; r += 8) {
        const u16 *row = source_row(call, strip, r);
        u32 bits = 0;
        for (int col = lane; col < call.cols; col += 32) {
            bits = max(bits, static_cast<u32>(element(call, row, col) & 0x7FFF) << 16);
        }
        const E4m3Scale scale = e4m3_scale_of(warp_largest(bits));
        if (lane == 0) {
            call.scales[strip * 16 + r] = scale.scale;
            inverse[r] = scale.inverse;
        }
    }
    __syncthreads();
    const u16 *low = source_row(call, strip, lane / 4), *high = source_row(call, strip, lane / 4 + 8);
    float low_inverse = inverse[lane / 4], high_inverse = inverse[lane / 4 + 8];
    int steps = steps_of<Fp8Step>(call.cols);
    u8 *out = call.out + strip_offset<Fp8Step>(strip, steps);
    for (int tile = warp; tile < steps * 4; tile += 8) {
        int col = tile * 32 + lane % 4 * 4;
        auto four = [&](const u16 *row, float scale, int at) {
            auto two = [&](int c) {
                return static_cast<u32>(e4m3x2_from(__fmul_rn(bf16_to(element(call, row, c)), scale),
                                                    __fmul_rn(bf16_to(element(call, row, c + 1)), scale)));
            };
            return two(at) | two(at + 2) << 16;
        };
        uint4 word = make_uint4(four(low, low_inverse, col), four(high, high_inverse, col), four(low, low_inverse, col + 16),
                                four(high, high_inverse, col + 16));
        *reinterpret_cast<uint4 *>(out + static_cast<long long>(tile / 4) * GROUP_STEP<Fp8Step> + tile % 4 * 512 + lane * 16) = word;
    }
}
#endif

/// q4: one warp writes one step of one strip. `a`, `b`: nibbles, 16 bytes per block of 32 columns, byte i of a block
/// has columns 2 i (low) and 2 i + 1; `stride` in bytes. `dm`: f16 scale (low) and minimum per block. Grid as bf16.
extern "C" __global__ void __launch_bounds__(32) tr_pack_q4(const Pack call) {
    grid_begin();
    int lane = threadIdx.x, strip = blockIdx.y, blocks = divide_up(call.cols, 32);
    u8 *step = call.out + strip_offset<Q4Step>(strip, gridDim.x) + static_cast<long long>(blockIdx.x) * GROUP_STEP<Q4Step>;
    auto row_at = [&](int r) { return call.b == nullptr ? strip * 16 + r : strip * 8 + r % 8; };
    auto is_up = [&](int r) { return call.b != nullptr && r >= 8; };
    // Two columns from `col` on (even) of row `r` of the strip.
    auto two = [&](int r, int col) {
        long long row = row_at(r);
        if (row >= call.rows || col >= call.cols) {
            return 0U;
        }
        const u8 *nibbles = reinterpret_cast<const u8 *>(is_up(r) ? call.b : call.a) + row * call.stride;
        u32 byte = nibbles[col / 2];
        return (byte & 15) | (byte >> 4) << 16;
    };
    u32 words[4];
    for (int tile = 0; tile < 4; ++tile) {
        int col = blockIdx.x * Q4Step::K + tile * 16 + lane % 4 * 2, low = lane / 4;
        words[tile] = two(low, col) | two(low + 8, col) << 4 | two(low, col + 8) << 8 | two(low + 8, col + 8) << 12;
    }
    *reinterpret_cast<uint4 *>(step + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);
    // Lane 4 g + i: row g (i even) or g + 8, block i / 2.
    int r = lane / 4 + lane % 2 * 8, block = blockIdx.x * 2 + lane % 4 / 2;
    long long row = row_at(r);
    u32 line = 0;
    if (row < call.rows && block < blocks) {
        u32 dm = (is_up(r) ? call.dm_b : call.dm_a)[row * (call.stride / 16) + block];
        line = bf16x2_from(f16_to(static_cast<u16>(dm)), f16_to(static_cast<u16>(dm >> 16)));
    }
    *reinterpret_cast<u32 *>(step + 512 + lane * 4) = line;
}
