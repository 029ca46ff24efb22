// Rows of bf16 or e4m3 in the order in which products for long batches read them: panels. Computes nothing.
//
// A panel is 128 bytes of all tokens (64 columns of bf16, 128 of e4m3): [panels][slots][128 bytes], a slot's 16-byte chunk c at place
// c ^ (slot % 8). So the tokens of a tile and step are one run of memory, which a bulk copy takes to several blocks at once. The rows of
// a job begin at a multiple of 8 slots; what lies between is not written, and only columns that nobody reads are computed from it.
// The scales of e4m3 rows move with them.
//
// grid (slots / 32, up, panels / 8, up), block 256: a block has 32 slots and 8 panels, a thread 16 bytes of each. No shared memory. Bytes: all read once
// and written once; 128 of a row at a time.

constexpr int PANEL_SLOTS = 32;
constexpr int PANELS_OF_BLOCK = 8;

/// The arguments of tr_panels: see README.md.
struct PanelsArgs {
    u8 *out;
    const u8 *x;
    const int *row_ids; // rows of the jobs, or null: slot i is row i
    const int *offsets; // [jobs + 1], or null
    const u32 *num_rows; // where there are no jobs
    const float *x_scales; // e4m3: one per row; else null
    float *scales; // [slots]
    int jobs, panels, x_stride /* bytes */, slots;
};

/// The row of a slot, or -1.
__device__ __forceinline__ int row_of_slot(const PanelsArgs &a, int slot) {
    if (a.offsets == nullptr) {
        return slot < static_cast<int>(*a.num_rows) ? slot : -1;
    }
    for (int job = 0, first = 0; job < a.jobs; ++job) {
        int begin = a.offsets[job], count = a.offsets[job + 1] - begin;
        if (slot - first < count) {
            return slot < first ? -1 : a.row_ids[begin + slot - first];
        }
        first += divide_up(count, 8) * 8;
    }
    return -1;
}

extern "C" __global__ void __launch_bounds__(256) tr_panels(PanelsArgs a) {
    grid_begin();
    int slot = blockIdx.x * PANEL_SLOTS + threadIdx.x / 8, chunk = threadIdx.x % 8;
    int row = slot < a.slots ? row_of_slot(a, slot) : -1;
    if (row < 0) {
        return;
    }
    if (a.x_scales != nullptr && blockIdx.y == 0 && chunk == 0) {
        a.scales[slot] = a.x_scales[row];
    }
    const u8 *from = a.x + static_cast<long long>(row) * a.x_stride + chunk * 16;
    int end = min(static_cast<int>(blockIdx.y + 1) * PANELS_OF_BLOCK, a.panels);
#pragma unroll 8
    for (int panel = blockIdx.y * PANELS_OF_BLOCK; panel < end; ++panel) {
        *reinterpret_cast<uint4 *>(a.out + panel_at(panel * 8 + chunk, slot, a.slots)) = load_16(from + panel * TOKEN_STEP_BYTES);
    }
}
