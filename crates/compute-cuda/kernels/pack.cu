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
    const u32 *dm_a, *dm_b; // q4 only
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
    int lane = threadIdx.x, strip = blockIdx.y;
    const u16 *low = source_row(call, strip, lane / 4), *high = source_row(call, strip, lane / 4 + 8);
    u8 *step = call.out + (static_cast<long long>(strip) * gridDim.x + blockIdx.x) * Bf16Step::BYTES;
    for (int tile = 0; tile < 4; ++tile) {
        int col = blockIdx.x * Bf16Step::K + tile * 16 + lane % 4 * 2;
        auto two = [&](const u16 *row, int at) {
            return element(call, row, at) | static_cast<u32>(element(call, row, at + 1)) << 16;
        };
        uint4 out = make_uint4(two(low, col), two(high, col), two(low, col + 8), two(high, col + 8));
        *reinterpret_cast<uint4 *>(step + tile * 512 + lane * 16) = out;
    }
}
