// The rows of the embedding that a step's tokens name become its residual stream. Checks no token: the host did.
//
// grid (rows at most), block 256, no shared memory. Bytes per row: 2 hidden read, 4 hidden written.

constexpr u32 EMBED_THREADS = 256;

extern "C" __global__ void __launch_bounds__(EMBED_THREADS)
    tr_embed_bf16(float *residual, const u16 *table, const u32 *tokens, const u32 *num_rows, u32 hidden) {
    grid_begin();
    const u32 row = blockIdx.x;
    if (row >= *num_rows) {
        return;
    }
    const u16 *from = table + static_cast<size_t>(tokens[row]) * hidden;
    float *to = residual + static_cast<size_t>(row) * hidden;
    if (hidden % 4 == 0) {
        for (u32 i = 4 * threadIdx.x; i < hidden; i += 4 * EMBED_THREADS) {
            const uint2 x = load_8(from + i);
            *reinterpret_cast<float4 *>(to + i) =
                make_float4(bf16x2_low(x.x), bf16x2_high(x.x), bf16x2_low(x.y), bf16x2_high(x.y));
        }
        return;
    }
    for (u32 i = threadIdx.x; i < hidden; i += EMBED_THREADS) {
        to[i] = bf16_to(from[i]);
    }
}
