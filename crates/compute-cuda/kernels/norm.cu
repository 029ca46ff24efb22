// RMS norm of rows of the residual stream, with what stands before it (adding expert outputs) and behind it (the gate's
// scores). Chooses no expert.
//
// y = x / sqrt(mean(x^2) + eps) * weight, as the reference backend; NaN where the mean is not finite. One block per row (8 rows
// for the gate of a long batch). Thread t has elements 4 t to 4 t + 3 of every 1024, its squares are one chain of fmaf, then
// the warps' butterflies, then the warps ascending: the order does not depend on the batch or on the kernel.
// Scores are f32 products of the f32 row (not of its rounding) with the gate as loaded; see gate_scores for the order.
//
// grid (rows at most), block 256; gate8: grid (rows at most / 8, up). Shared bytes: NORM_SHARED_BYTES = 4 * 8 * 1024 + 256 with
// a gate of 8 rows, 4 * 1024 + 256 with one row, else 256.
// The _e4m3 kernels (sm_89 and later) write the row as e4m3 and its scale: what products with such weights read, with no rounding
// kernel in between; they read the row once more, from L1.
// Bytes per row: 4 hidden read (8 + 4 top_k and 4 written with the combine), 2 hidden written; once per block 4 hidden weights and
// 4 hidden num_experts of the gate, from the L2 cache: 128 KiB per block for Mixtral 8x7B, hence the 8 rows.

constexpr u32 NORM_THREADS = 256;
constexpr u32 NORM_WARPS = NORM_THREADS / 32;
constexpr u32 NORM_STRIP = 4 * NORM_THREADS; // elements of a row that a block takes at once

/// The rows and what is done to them.
struct NormArgs {
    u16 *out;             // [rows, out_stride] bf16; columns from hidden on become 0
    float *residual;      // [step rows, hidden]
    const float *weight;  // [hidden]
    const u32 *num_rows;
    const u32 *source;    // [rows]: row i is row source[i] of the residual stream; null: row i (always with a gate)
    float *scales;        // [rows], of the e4m3 kernels, whose out is bytes; otherwise null
    float eps;
    u32 hidden, out_stride; // out_stride is a multiple of 4
};

/// Expert outputs that are added before the norm, see combine.cu.
struct ExpertOutputs {
    const float *outputs;  // [slots, hidden]
    const u32 *slot_of;    // [step rows, top_k]: the slot of a row's k-th expert, ascending by expert
    const float *weights;  // [step rows, top_k]
    u32 top_k;
};

/// The gate behind the norm.
struct GateArgs {
    const float *gate;  // [num_experts, hidden]
    float *scores;      // [rows, num_experts]
    u32 num_experts;
};
static_assert(sizeof(NormArgs) == 64 && sizeof(ExpertOutputs) == 32 && sizeof(GateArgs) == 24, "as the host has them");

__device__ __forceinline__ float add_square(float sum, float4 x) {
    sum = __fmaf_rn(x.x, x.x, sum);
    sum = __fmaf_rn(x.y, x.y, sum);
    sum = __fmaf_rn(x.z, x.z, sum);
    return __fmaf_rn(x.w, x.w, sum);
}

/// 1 / sqrt(mean + eps) from the threads' sums of squares, in all threads. `sums` is shared, one per warp.
__device__ __forceinline__ float inverse_rms(float own, float *sums, const NormArgs &a) {
    const float sum = warp_sum(own);
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    float total = sums[0];
#pragma unroll
    for (u32 w = 1; w < NORM_WARPS; ++w) {
        total = __fadd_rn(total, sums[w]);
    }
    const float mean = __fdiv_rn(total, static_cast<float>(a.hidden));
    const bool is_finite = fabsf(mean) < __uint_as_float(0x7F800000U);
    // Squares beyond f32 would make zeros of the row: it is refused like one that is not finite.
    return is_finite ? reciprocal_sqrt(__fadd_rn(mean, a.eps)) : __uint_as_float(0x7FFFFFFFU);
}

__device__ __forceinline__ float4 normed(float4 x, float inverse, float4 w) {
    return make_float4(__fmul_rn(__fmul_rn(x.x, inverse), w.x), __fmul_rn(__fmul_rn(x.y, inverse), w.y),
                       __fmul_rn(__fmul_rn(x.z, inverse), w.z), __fmul_rn(__fmul_rn(x.w, inverse), w.w));
}

// How a row is written: as bf16, or as e4m3 with a scale, the rounding of its bf16 as tr_round_e4m3 has it: whoever gets the row as bf16
// and rounds it then (another worker) computes with the same bits.

struct AsBf16 {};

/// Elements i to i + 3 of row `row` of the output. Behind the end they are 0, also where the row is NaN.
__device__ __forceinline__ void write_normed(const AsBf16 &, const NormArgs &a, u32 row, u32 i, float4 y) {
    if (i < a.out_stride) {
        uint2 bits = make_uint2(bf16x2_from(y.x, y.y), bf16x2_from(y.z, y.w));
        if (i + 4 > a.hidden) {
            const u32 left = i < a.hidden ? a.hidden - i : 0; // 0 to 3
            bits.x &= left == 0 ? 0 : left == 1 ? 0xFFFFU : ~0U;
            bits.y &= left < 3 ? 0 : 0xFFFFU;
        }
        *reinterpret_cast<uint2 *>(a.out + static_cast<size_t>(row) * a.out_stride + i) = bits;
    }
}

/// Nothing to find out before, nor to keep.
__device__ __forceinline__ void prepare(AsBf16 &, const NormArgs &, u32, const float *, float, u32 *) {}
__device__ __forceinline__ void keep(const AsBf16 &, float *) {}
__device__ __forceinline__ void fetch(AsBf16 &, const float *) {}

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)
struct AsE4m3 {
    float inverse; // of the scale
};

/// Behind the end a row is 0, or it is not finite, and then all of it is 0 and the scale NaN.
__device__ __forceinline__ void write_normed(const AsE4m3 &form, const NormArgs &a, u32 row, u32 i, float4 y) {
    if (i < a.out_stride) {
        u8 *to = reinterpret_cast<u8 *>(a.out) + static_cast<size_t>(row) * a.out_stride + i;
        *reinterpret_cast<u32 *>(to) = e4m3x4_from(bf16x2_from(y.x, y.y), bf16x2_from(y.z, y.w), form.inverse);
    }
}

/// Finds the scale, for which the row is normed once more: x comes from L1. `shared`: NORM_WARPS that nobody else uses. All threads.
__device__ __forceinline__ void prepare(AsE4m3 &form, const NormArgs &a, u32 row, const float *x, float inverse, u32 *shared) {
    u32 amax = 0;
#pragma unroll 4
    for (u32 i = 4 * threadIdx.x; i < a.hidden; i += NORM_STRIP) {
        const float4 y = normed(load_four(x, i, a.hidden), inverse, load_four(a.weight, i, a.hidden));
        amax = larger_of_two(larger_of_two(amax, bf16x2_from(y.x, y.y)), bf16x2_from(y.z, y.w));
    }
    const E4m3Scale scale = e4m3_scale_of(block_largest<NORM_WARPS>(amax, shared));
    form.inverse = scale.inverse;
    if (threadIdx.x == 0) {
        a.scales[row] = scale.scale;
    }
}

/// In shared memory, where it costs no register of every thread.
__device__ __forceinline__ void keep(const AsE4m3 &form, float *shared) {
    if (threadIdx.x == 0) {
        *shared = form.inverse;
    }
}
__device__ __forceinline__ void fetch(AsE4m3 &form, const float *shared) { form.inverse = *shared; }
#endif

__device__ __forceinline__ u32 source_of(const NormArgs &a, u32 row) { return a.source == nullptr ? row : a.source[row]; }

/// `shared`: 2 NORM_WARPS, of which the first are in use.
template <class Form> __device__ __forceinline__ void norm_row(const NormArgs &a, u32 row, const float *x, float inverse, float *shared) {
    Form form;
    prepare(form, a, row, x, inverse, reinterpret_cast<u32 *>(shared) + NORM_WARPS);
    for (u32 i = 4 * threadIdx.x; i < a.out_stride; i += NORM_STRIP) {
        write_normed(form, a, row, i, normed(load_four(x, i, a.hidden), inverse, load_four(a.weight, i, a.hidden)));
    }
}

template <class Form> __device__ __forceinline__ void norm(const NormArgs &a) {
    grid_begin();
    auto *shared = reinterpret_cast<float *>(tr_shared());
    const u32 row = blockIdx.x;
    if (row >= *a.num_rows) {
        return;
    }
    const float *x = a.residual + static_cast<size_t>(source_of(a, row)) * a.hidden;
    float own = 0.0f;
#pragma unroll 4
    for (u32 i = 4 * threadIdx.x; i < a.hidden; i += NORM_STRIP) {
        own = add_square(own, load_four(x, i, a.hidden));
    }
    norm_row<Form>(a, row, x, inverse_rms(own, shared, a), shared);
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_bf16(NormArgs a) { norm<AsBf16>(a); }

/// Adds the expert outputs to the row, then norms it: what stands between two layers.
template <class Form> __device__ __forceinline__ void combine_norm(const NormArgs &a, const ExpertOutputs &experts) {
    grid_begin();
    auto *shared = reinterpret_cast<float *>(tr_shared());
    const u32 row = blockIdx.x;
    if (row >= *a.num_rows) {
        return;
    }
    const u32 source = source_of(a, row);
    float *x = a.residual + static_cast<size_t>(source) * a.hidden;
    const u32 *slot_of = experts.slot_of + static_cast<size_t>(source) * experts.top_k;
    const float *weights = experts.weights + static_cast<size_t>(source) * experts.top_k;
    float own = 0.0f;
#pragma unroll 4
    for (u32 i = 4 * threadIdx.x; i < a.hidden; i += NORM_STRIP) {
        float4 sum = load_four(x, i, a.hidden);
        for (u32 k = 0; k < experts.top_k; ++k) {
            const float *y = experts.outputs + static_cast<size_t>(slot_of[k]) * a.hidden;
            sum = plus(sum, times(weights[k], load_four(y, i, a.hidden))); // as combine.cu
        }
        store_four(x, i, a.hidden, sum);
        own = add_square(own, sum);
    }
    norm_row<Form>(a, row, x, inverse_rms(own, shared, a), shared); // a thread reads what it wrote itself
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_combine_norm_bf16(NormArgs a, ExpertOutputs experts) {
    combine_norm<AsBf16>(a, experts);
}

/// A lane's part of a strip of an expert's gate; 0 where there is none.
__device__ __forceinline__ void load_gate(float4 (&to)[NORM_STRIP / 128], const NormArgs &a, const GateArgs &g, u32 expert, u32 begin) {
    const float *gate = g.gate + static_cast<size_t>(expert) * a.hidden;
#pragma unroll
    for (u32 j = 0; j < NORM_STRIP / 128; ++j) {
        const u32 at = begin + 128 * j + 4 * (threadIdx.x % 32);
        to[j] = expert < g.num_experts ? load_four(gate, at, a.hidden) : make_float4(0.0F, 0.0F, 0.0F, 0.0F);
    }
}

__device__ __forceinline__ float add_products(float sum, float4 x, float4 w) {
    sum = __fmaf_rn(x.x, w.x, sum);
    sum = __fmaf_rn(x.y, w.y, sum);
    sum = __fmaf_rn(x.z, w.z, sum);
    return __fmaf_rn(x.w, w.w, sum);
}

/// Puts a strip of the normed rows into shared memory, and once also into the output.
template <class Form, u32 ROWS>
__device__ __forceinline__ void share_strip(float *strip, const NormArgs &a, const float (&inverse)[ROWS], const float *kept,
                                            u32 begin, bool is_written) {
    const u32 first = blockIdx.x * ROWS, num_rows = *a.num_rows, i = begin + 4 * threadIdx.x;
    const float4 w = load_four(a.weight, i, a.hidden);
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        if (first + r < num_rows) {
            const float *x = a.residual + static_cast<size_t>(first + r) * a.hidden;
            const float4 y = normed(load_four(x, i, a.hidden), inverse[r], w);
            *reinterpret_cast<float4 *>(strip + r * NORM_STRIP + 4 * threadIdx.x) = y;
            if (is_written) {
                Form form;
                fetch(form, kept + r * NORM_WARPS);
                write_normed(form, a, first + r, i, y);
            }
        }
    }
}

/// Norms `ROWS` rows, strip by strip, and takes the gate's scores of each strip from shared memory.
///
/// Warp w has experts w, w + 8, ... Lane l adds elements 4 l to 4 l + 3 of every 128 to one chain of fmaf per (row, expert);
/// then the butterfly. So a score's order depends on nothing but hidden. The gate is asked for one strip ahead: with one row it comes
/// from the L2 cache while the row is normed.
template <class Form, u32 ROWS> __device__ __forceinline__ void norm_gate(const NormArgs &a, const GateArgs &g) {
    auto *sums = reinterpret_cast<float *>(tr_shared()); // [ROWS][NORM_WARPS]; then the first of a row is what `keep` keeps
    float *strip = sums + 64;                            // [ROWS][NORM_STRIP]
    const u32 first = blockIdx.x * ROWS, num_rows = *a.num_rows;
    if (first >= num_rows) {
        return;
    }
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = max(a.hidden, a.out_stride);
    float4 gate[NORM_STRIP / 128];
    load_gate(gate, a, g, warp, 0);
    float inverse[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        float own = 0.0F;
        if (first + r < num_rows) {
            const float *x = a.residual + static_cast<size_t>(first + r) * a.hidden;
#pragma unroll 4
            for (u32 i = 4 * threadIdx.x; i < a.hidden; i += NORM_STRIP) {
                own = add_square(own, load_four(x, i, a.hidden));
            }
        }
        inverse[r] = inverse_rms(own, sums + r * NORM_WARPS, a);
    }
#pragma unroll
    for (u32 r = 0; r < ROWS; ++r) {
        if (first + r < num_rows) {
            // The strip is not in use yet; who writes it has passed a barrier. So have those who read the row's sums when it is prepared.
            const float *x = a.residual + static_cast<size_t>(first + r) * a.hidden;
            Form form;
            prepare(form, a, first + r, x, inverse[r], reinterpret_cast<u32 *>(strip) + r * NORM_WARPS);
            keep(form, sums + r * NORM_WARPS);
        }
    }
    // Experts beyond the first pass read the strips again.
    for (u32 expert = warp; expert - warp < g.num_experts; expert += NORM_WARPS) {
        float score[ROWS] = {};
        for (u32 begin = 0; begin < width; begin += NORM_STRIP) {
            __syncthreads(); // the strip before this one has been read
            share_strip<Form>(strip, a, inverse, sums, begin, expert == warp);
            __syncthreads();
#pragma unroll
            for (u32 j = 0; j < NORM_STRIP / 128; ++j) {
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) {
                    // Behind the end both are 0, or the row is NaN anyway.
                    score[r] = add_products(score[r], *reinterpret_cast<const float4 *>(strip + r * NORM_STRIP + 128 * j + 4 * lane), gate[j]);
                }
            }
            const bool has_more = begin + NORM_STRIP < width;
            load_gate(gate, a, g, has_more ? expert : expert + NORM_WARPS, has_more ? begin + NORM_STRIP : 0);
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r) {
            const float total = warp_sum(score[r]);
            if (lane == 0 && expert < g.num_experts && first + r < num_rows) {
                g.scores[static_cast<size_t>(first + r) * g.num_experts + expert] = total;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_gate_bf16(NormArgs a, GateArgs g) { grid_begin(); norm_gate<AsBf16, 1>(a, g); }

/// The same for 8 rows per block: less of the gate is read.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_gate8_bf16(NormArgs a, GateArgs g) { grid_begin(); norm_gate<AsBf16, 8>(a, g); }

#if __CUDA_ARCH__ >= 890 || defined(TR_EMULATOR)
// The same with rows as e4m3; scores are those of the f32 row.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_e4m3(NormArgs a) { norm<AsE4m3>(a); }
extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_combine_norm_e4m3(NormArgs a, ExpertOutputs experts) {
    combine_norm<AsE4m3>(a, experts);
}
extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_gate_e4m3(NormArgs a, GateArgs g) { grid_begin(); norm_gate<AsE4m3, 1>(a, g); }
extern "C" __global__ void __launch_bounds__(NORM_THREADS) tr_norm_gate8_e4m3(NormArgs a, GateArgs g) { grid_begin(); norm_gate<AsE4m3, 8>(a, g); }
#endif
