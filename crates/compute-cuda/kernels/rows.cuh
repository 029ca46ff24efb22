// What the row-wise kernels share: rows of f32 four elements at a time, and sums over a warp in one order. No inline PTX.

/// Elements i to i + 3 of a row, each on its own: the row may begin anywhere. 0 behind its end.
__device__ __forceinline__ float4 load_four_singly(const float *row, u32 i, u32 hidden) {
    return make_float4(i < hidden ? row[i] : 0.0F, i + 1 < hidden ? row[i + 1] : 0.0F, i + 2 < hidden ? row[i + 2] : 0.0F,
                       i + 3 < hidden ? row[i + 3] : 0.0F);
}

/// The same of a row of a matrix `hidden` wide, whose rows lie on 16 bytes when `hidden` is a multiple of 4.
__device__ __forceinline__ float4 load_four(const float *row, u32 i, u32 hidden) {
    if (hidden % 4 == 0) {
        return i < hidden ? *reinterpret_cast<const float4 *>(row + i) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
    return load_four_singly(row, i, hidden);
}

__device__ __forceinline__ void store_four(float *row, u32 i, u32 hidden, float4 x) {
    if (hidden % 4 == 0) {
        if (i < hidden) {
            *reinterpret_cast<float4 *>(row + i) = x;
        }
        return;
    }
    const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
        if (i + j < hidden) {
            row[i + j] = values[j];
        }
    }
}

__device__ __forceinline__ float4 plus(float4 x, float4 y) {
    return make_float4(__fadd_rn(x.x, y.x), __fadd_rn(x.y, y.y), __fadd_rn(x.z, y.z), __fadd_rn(x.w, y.w));
}

__device__ __forceinline__ float4 times(float w, float4 y) {
    return make_float4(__fmul_rn(w, y.x), __fmul_rn(w, y.y), __fmul_rn(w, y.z), __fmul_rn(w, y.w));
}

/// The sum of a warp in all its lanes, by butterflies.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        x = __fadd_rn(x, __shfl_xor_sync(~0U, x, bits));
    }
    return x;
}

/// The largest of a warp in all its lanes; NaN is not looked at.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        x = fmaxf(x, __shfl_xor_sync(~0U, x, bits));
    }
    return x;
}
