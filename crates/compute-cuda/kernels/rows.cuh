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

/// The largest of a warp in all its lanes.
__device__ __forceinline__ u32 warp_largest(u32 x) {
#pragma unroll
    for (u32 bits = 16; bits > 0; bits /= 2) {
        x = max(x, __shfl_xor_sync(~0U, x, bits));
    }
    return x;
}

// ---- Rows as e4m3: q and a scale for each part of a row, the number is q scale.

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)
constexpr float E4M3_LARGEST = 448.0F;

/// The larger of `amax` and the magnitudes of two bf16, all as bits of f32: their order is that of the numbers, with
/// infinity and NaN behind all others.
__device__ __forceinline__ u32 larger_of_two(u32 amax, u32 pair) {
    return max(amax, max(pair << 16 & 0x7FFF0000U, pair & 0x7FFF0000U));
}

/// The largest of a block of WARPS warps in all its threads. `shared`: one per warp.
template <u32 WARPS> __device__ __forceinline__ u32 block_largest(u32 x, u32 *shared) {
    x = warp_largest(x);
    if (threadIdx.x % 32 == 0) {
        shared[threadIdx.x / 32] = x;
    }
    __syncthreads();
    u32 largest = shared[0];
#pragma unroll
    for (u32 w = 1; w < WARPS; ++w) {
        largest = max(largest, shared[w]);
    }
    return largest;
}

/// The scale of a part, and what its numbers are multiplied by; 0 where all q are 0.
struct E4m3Scale {
    float scale, inverse;
};

/// scale = amax / 448. A part of zeros (or of numbers so small that the inverse is none) has scale 0, one with a number that is
/// not finite has scale NaN: q is 0 in both.
__device__ __forceinline__ E4m3Scale e4m3_scale_of(u32 amax) {
    if (amax >= 0x7F800000U) {
        return E4m3Scale{__uint_as_float(0x7FFFFFFFU), 0.0F};
    }
    const float scale = __fdiv_rn(__uint_as_float(amax), E4M3_LARGEST);
    const float inverse = __fdiv_rn(1.0F, scale);
    return inverse > 3.0e38F ? E4m3Scale{0.0F, 0.0F} : E4m3Scale{scale, inverse};
}

/// Four bf16 times `inverse`, to nearest, ties to even; zeros when that is 0, whatever they are.
__device__ __forceinline__ u32 e4m3x4_from(u32 first, u32 second, float inverse) {
    if (inverse == 0.0F) {
        return 0;
    }
    const u32 low = e4m3x2_from(__fmul_rn(bf16x2_low(first), inverse), __fmul_rn(bf16x2_high(first), inverse));
    const u32 high = e4m3x2_from(__fmul_rn(bf16x2_low(second), inverse), __fmul_rn(bf16x2_high(second), inverse));
    return low | high << 16;
}
#endif
