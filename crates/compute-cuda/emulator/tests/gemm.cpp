// The products against plain sums in double, and every variant of a class against every other, bit by bit.
#include <algorithm>
#include <memory>
#include <string>

#include "check.h"

// What kernels/README.md says of the arguments.
struct Expert {
    const uint8_t *gate_up[8], *down[8];
    const float *gate_up_scales[8], *down_scales[8];
};
struct Job {
    int expert, begin, end, out;
};
struct Pack {
    uint8_t *out;
    float *scales;
    const void *a, *b;
    int rows, cols, stride;
    const uint32_t *dm_a, *dm_b;
};
struct RoundArgs {
    uint8_t *out;
    float *scales;
    const uint16_t *rows;
    const int *num_rows;
    uint32_t cols, part_cols, row_stride, out_stride, scale_stride;
};
struct Linear {
    const uint8_t *weights;
    const void *x;
    const int *row_ids;
    float *out;
    const float *weight_scales, *x_scales;
    int num_tokens, rows, cols, x_stride, out_stride, is_added;
};
struct GateUp {
    uint16_t *out;
    const Expert *experts;
    const Job *jobs;
    const int *offsets, *row_ids;
    const void *x;
    const float *x_scales;
    int hidden, ff, x_stride, out_stride;
};
struct Down {
    float *out;
    const Expert *experts;
    const Job *jobs;
    const int *offsets;
    const void *x;
    const float *x_scales;
    int hidden, ff, x_stride;
};

static int divide_up(int a, int b) { return (a + b - 1) / b; }
static int segment_cols(int cols) { return divide_up(divide_up(cols, 8), 32) * 32; }
static int part_len(int cols, int part) { return std::min(segment_cols(cols), cols - part * segment_cols(cols)); }

// ---- Formats and variants.

struct Format {
    const char *name;
    int step_k;
    size_t step_bytes;
};
static const Format BF16 = {"bf16", 64, 2048}, E4M3 = {"e4m3", 128, 2048}, Q4 = {"q4", 64, 640};

static size_t packed_bytes(const Format &f, int rows, int cols) {
    return static_cast<size_t>(divide_up(rows, 64) * 4 * divide_up(cols, 2 * f.step_k) * 2) * f.step_bytes;
}

/// A variant of a kernel: tokens per block, rows (gate_up: columns of ff) per block, threads, shared bytes.
struct Variant {
    std::string suffix;
    int n, rows, threads;
    size_t shared;
};

/// A numeric class: its variants give the same bits.
struct Class {
    Format format;
    std::vector<Variant> linear, gate_up, down;
};

static Class mma_class(const Format &f) {
    auto by_parts = [](int n, int rows) { return size_t(24 * n * 128 + 8 * n * (rows + 4) * 4); };
    auto in_turn = [](int n) { return size_t(3 * n * 128 + 3 * 64 * n * 4); };
    std::vector<Variant> tree = {{"n8", 8, 16, 256, by_parts(8, 16)},
                                 {"n16", 16, 32, 256, by_parts(16, 32)},
                                 {"n32", 32, 64, 128, in_turn(32)},
                                 {"n64", 64, 64, 128, in_turn(64)}};
    return {f,
            tree,
            {{"n8", 8, 32, 128, 4 * 8 * 128},
             {"n16", 16, 32, 128, 4 * 16 * 128},
             {"n32", 32, 32, 128, 4 * 32 * 128},
             {"n64", 64, 32, 128, 4 * 64 * 128},
             {"n128", 128, 32, 128, 3 * 128 * 128}},
            tree};
}

static Class wgmma_class(const Format &f) {
    auto stage = [&](int n, int groups) { return (4 * groups * f.step_bytes + 1023) / 1024 * 1024 + n * 128; };
    auto by_parts = [&](int n, int stages) { return 4 * stages * (stage(n, 1) + 16) + 4 * n * 68 * 4; };
    auto in_turn = [&](int n, int stages, int levels) { return stages * stage(n, 2) + levels * 128 * n * 4 + stages * 16; };
    auto gate_up = [&](int n, int groups, int stages) { return stages * (stage(n, groups) + 16); };
    std::vector<Variant> few = {{"wg_n8", 8, 64, 640, by_parts(8, 5)},
                                {"wg_n16", 16, 64, 640, by_parts(16, 5)},
                                {"wg_n32", 32, 64, 640, by_parts(32, 4)}};
    Variant most = {"wg_n128", 128, 128, 384, in_turn(128, 5, 1)};
    std::vector<Variant> linear = few, down = few;
    linear.insert(linear.end(), {{"wg_n64", 64, 64, 640, by_parts(64, 2)}, most});
    down.insert(down.end(), {{"wg_n64", 64, 128, 384, in_turn(64, 6, 2)}, most});
    return {f,
            linear,
            {{"wg_n8", 8, 32, 160, gate_up(8, 1, 6)},
             {"wg_n16", 16, 32, 160, gate_up(16, 1, 5)},
             {"wg_n32", 32, 64, 320, gate_up(32, 2, 4)},
             {"wg_n64", 64, 128, 640, gate_up(64, 4, 4)},
             {"wg_n128", 128, 64, 384, gate_up(128, 2, 6)},
             {"wg_n256", 256, 64, 384, gate_up(256, 2, 4)}},
            down};
}

static std::string kernel(const char *what, const Class &c, const Variant &v) {
    return std::string("tr_") + what + "_" + c.format.name + "_" + v.suffix;
}

static unsigned gate_up_blocks(int ff, const Variant &v) {
    return static_cast<unsigned>(8 * divide_up(segment_cols(ff), v.rows));
}

// ---- Numbers.

static float e4m3_value(int code) {
    static const std::vector<float> table = [] {
        std::vector<float> values;
        for (int c = 0; c < 128; ++c) {
            int exponent = c >> 3, mantissa = c & 7;
            values.push_back(exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10));
        }
        return values;
    }();
    return code & 128 ? -table[size_t(code & 127)] : table[size_t(code)];
}

/// The nearest of all numbers, the even one of two that are equally near.
static int e4m3_nearest(float x) {
    int best = 0;
    for (int code = 0; code < 127; ++code) {
        float d = std::fabs(std::fabs(x) - e4m3_value(code)), b = std::fabs(std::fabs(x) - e4m3_value(best));
        if (d < b || (d == b && code % 2 == 0)) best = code;
    }
    return best | (std::signbit(x) ? 128 : 0);
}

/// A matrix as the host has it, and what its packed elements are worth when it is cut into parts of `part_cols`.
struct Matrix {
    Format format;
    int rows, cols, blocks;
    std::vector<uint16_t> bf16;
    std::vector<uint8_t> nibbles;
    std::vector<uint32_t> dm;
    std::vector<double> value;

    Matrix(Random &random, const Format &format, int rows, int cols, int part_cols)
        : format(format), rows(rows), cols(cols), blocks(divide_up(cols, 32)), value(static_cast<size_t>(rows) * cols) {
        if (format.name == Q4.name) {
            make_q4(random);
            return;
        }
        bf16.resize(value.size());
        for (auto &x : bf16) x = to_bf16(random.normal() * 0.1F);
        for (int r = 0; r < rows; ++r) {
            for (int begin = 0; begin < cols; begin += part_cols) {
                round(r, begin, std::min(cols, begin + part_cols));
            }
        }
    }

    void round(int row, int begin, int end) {
        float amax = 0;
        auto at = [&](int col) { return static_cast<size_t>(row) * cols + col; };
        for (int c = begin; c < end; ++c) amax = std::max(amax, std::fabs(from_bf16(bf16[at(c)])));
        float scale = amax / 448, inverse = 1 / scale;
        for (int c = begin; c < end; ++c) {
            float x = from_bf16(bf16[at(c)]);
            bool is_e4m3 = format.name == E4M3.name;
            value[at(c)] = is_e4m3 ? static_cast<double>(e4m3_value(e4m3_nearest(x * inverse))) * scale : x;
        }
    }

    void make_q4(Random &random) {
        nibbles.resize(static_cast<size_t>(rows) * blocks * 16);
        for (auto &x : nibbles) x = static_cast<uint8_t>(random.next());
        for (int i = 0; i < rows * blocks; ++i) {
            dm.push_back(to_f16(random.normal() * 0.02F) | static_cast<uint32_t>(to_f16(random.normal() * 0.1F)) << 16);
        }
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < cols; ++c) {
                size_t block = static_cast<size_t>(r) * blocks + c / 32;
                int q = nibbles[block * 16 + c % 32 / 2] >> (c % 2 * 4) & 15;
                float scale = from_bf16(to_bf16(from_f16(static_cast<uint16_t>(dm[block]))));
                float min = from_bf16(to_bf16(from_f16(static_cast<uint16_t>(dm[block] >> 16))));
                value[static_cast<size_t>(r) * cols + c] = from_bf16(to_bf16(std::fma(float(q), scale, min)));
            }
        }
    }
};

/// A packed part and its scales.
struct Packed {
    Buffer<uint8_t> bytes;
    Buffer<float> scales;

    /// Rows [row, row + rows) and columns [col, col + cols) of `a`, interleaved with those of `b` if there is one.
    Packed(const Matrix &a, const Matrix *b, int row, int rows, int col, int cols)
        : bytes(packed_bytes(a.format, b == nullptr ? rows : divide_up(rows, 32) * 64, cols)),
          scales(static_cast<size_t>(divide_up(rows, b == nullptr ? 64 : 32)) * 64) {
        bool is_q4 = a.format.name == Q4.name;
        Buffer<uint16_t> source_a(a.bf16), source_b(b == nullptr ? a.bf16 : b->bf16);
        Buffer<uint8_t> nibbles_a(a.nibbles), nibbles_b(b == nullptr ? a.nibbles : b->nibbles);
        Buffer<uint32_t> dm_a(a.dm), dm_b(b == nullptr ? a.dm : b->dm);
        size_t at = static_cast<size_t>(row) * a.cols + col, block = static_cast<size_t>(row) * a.blocks + col / 32;
        Pack call = {bytes.data, scales.data, source_a.data + at, source_b.data + at, rows, cols, a.cols, nullptr, nullptr};
        if (is_q4) {
            call = {bytes.data, nullptr, nibbles_a.data + block * 16, nibbles_b.data + block * 16, rows, cols, a.blocks * 16,
                    dm_a.data + block, dm_b.data + block};
        }
        if (b == nullptr) {
            call.b = nullptr;
        }
        auto strips = static_cast<unsigned>(divide_up(rows, b == nullptr ? 64 : 32) * 4);
        auto steps = static_cast<unsigned>(divide_up(cols, 2 * a.format.step_k) * 2);
        std::string name = std::string("tr_pack_") + a.format.name;
        if (a.format.name == E4M3.name) {
            launch(name.c_str(), {1, strips}, {256}, 64, call);
        } else {
            launch(name.c_str(), {steps, strips}, {32}, 0, call);
        }
    }
};

/// Rows of activations as a product reads them, and what their elements are worth.
struct Rows {
    int rows, cols, stride; // stride in bytes
    Buffer<uint16_t> bf16;
    Buffer<uint8_t> e4m3;
    Buffer<float> scales;
    bool is_e4m3;
    int part_cols, parts;

    Rows(const Format &f, const std::vector<uint16_t> &values, int rows, int cols, int value_stride, int part_cols, int parts)
        : rows(rows), cols(cols), stride(value_stride * 2), bf16(values), e4m3(static_cast<size_t>(rows) * divide_up(cols, 16) * 16),
          scales(static_cast<size_t>(rows) * parts), is_e4m3(f.name == E4M3.name), part_cols(part_cols), parts(parts) {
        if (!is_e4m3) return;
        stride = divide_up(cols, 16) * 16;
        Buffer<int> num_rows(std::vector<int>{rows});
        auto u = [](int x) { return static_cast<uint32_t>(x); };
        RoundArgs call = {e4m3.data, scales.data, bf16.data, num_rows.data, u(cols), u(part_cols), u(value_stride), u(stride), u(parts)};
        launch("tr_round_e4m3", {u(rows) + 1, u(parts)}, {256}, 32, call);
    }
    const void *data() const { return is_e4m3 ? static_cast<const void *>(e4m3.data) : bf16.data; }
    double value(int row, int col) const {
        if (!is_e4m3) return from_bf16(bf16.data[static_cast<size_t>(row) * (stride / 2) + col]);
        double scale = scales.data[static_cast<size_t>(row) * parts + col / part_cols];
        return e4m3_value(e4m3.data[static_cast<size_t>(row) * stride + col]) * scale;
    }
};

/// Rows with NaN behind their last column: nobody may read there.
static std::vector<uint16_t> random_rows(Random &random, int rows, int cols, int stride) {
    std::vector<uint16_t> values(static_cast<size_t>(rows) * stride, 0x7FC0);
    for (size_t i = 0; i < values.size(); ++i) {
        if (static_cast<int>(i % stride) < cols) values[i] = to_bf16(random.normal());
    }
    return values;
}

// ---- Tests.

static void linear_is_a_product(const Class &c, int rows, int cols, int num_tokens, bool is_added, bool is_gathered) {
    Random random{static_cast<uint64_t>(rows * 31 + cols * 7 + num_tokens)};
    int part_cols = segment_cols(cols), parts = divide_up(cols, part_cols), x_rows = num_tokens + 5, stride = divide_up(cols, 8) * 8;
    Matrix w(random, c.format, rows, cols, part_cols);
    Rows x(c.format, random_rows(random, x_rows, cols, stride), x_rows, cols, stride, cols, 1);
    size_t part_bytes = packed_bytes(c.format, rows, part_cols), part_rows = static_cast<size_t>(divide_up(rows, 64)) * 64;
    Buffer<uint8_t> packed(part_bytes * parts);
    Buffer<float> scales(part_rows * parts);
    for (int p = 0; p < parts; ++p) {
        Packed part(w, nullptr, 0, rows, p * part_cols, part_len(cols, p));
        memcpy(packed.data + p * part_bytes, part.bytes.data, part.bytes.count);
        memcpy(scales.data + p * part_rows, part.scales.data, part_rows * 4);
    }
    std::vector<int> ids;
    for (int i = 0; i < num_tokens; ++i) ids.push_back(is_gathered ? static_cast<int>(random.below(static_cast<uint32_t>(x_rows))) : i);
    Buffer<int> d_ids(ids);
    std::vector<float> before(static_cast<size_t>(num_tokens) * rows), first;
    for (auto &v : before) v = random.normal();
    for (const Variant &v : c.linear) {
        Buffer<float> out(before.size());
        if (is_added) memcpy(out.data, before.data(), before.size() * 4);
        Linear call = {packed.data, x.data(), is_gathered ? d_ids.data : nullptr, out.data, scales.data, x.scales.data,
                       num_tokens, rows, cols, x.stride, rows, is_added};
        Dim grid = {static_cast<unsigned>(divide_up(num_tokens, v.n)), static_cast<unsigned>(divide_up(rows, v.rows))};
        launch(kernel("linear", c, v).c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<float> got(out.data, out.data + out.count);
        if (first.empty()) first = got;
        if (memcmp(got.data(), first.data(), got.size() * 4) != 0) {
            fail("%s differs with %d rows, %d columns, %d tokens", kernel("linear", c, v).c_str(), rows, cols, num_tokens);
        }
    }
    for (size_t at = 0; at < first.size(); ++at) {
        double sum = is_added ? before[at] : 0;
        for (int k = 0; k < cols; ++k) sum += w.value[at % rows * cols + k] * x.value(ids[at / rows], k);
        check_close(kernel("linear", c, c.linear[0]).c_str(), at, first[at], sum, 1e-4);
    }
}

static double silu(double x) { return x / (1 + std::exp(-x)); }

struct Node {
    int begin, len;
};
/// The nodes of a range: tramontane_types::SegmentRange::nodes.
static std::vector<Node> nodes(int begin, int end, int num_segments) {
    if (end >= num_segments) end = 8;
    std::vector<Node> out;
    while (begin < end && begin < num_segments) {
        int len = 1;
        while (begin % (len * 2) == 0 && begin + len * 2 <= end) len *= 2;
        out.push_back({begin, len});
        begin += len;
    }
    return out;
}

/// Some experts, packed whole.
struct Experts {
    int hidden, ff, part_cols, num_segments;
    std::vector<Matrix> w1, w2, w3;
    std::vector<std::unique_ptr<Packed>> packed;
    std::vector<Expert> table;

    Experts(Random &random, const Format &f, int count, int hidden, int ff)
        : hidden(hidden), ff(ff), part_cols(segment_cols(ff)), num_segments(divide_up(ff, part_cols)) {
        for (int e = 0; e < count; ++e) {
            w1.emplace_back(random, f, ff, hidden, hidden);
            w3.emplace_back(random, f, ff, hidden, hidden);
            w2.emplace_back(random, f, hidden, ff, part_cols);
            Expert expert = {};
            for (int s = 0; s < num_segments; ++s) {
                packed.push_back(std::make_unique<Packed>(w1[e], &w3[e], s * part_cols, part_len(ff, s), 0, hidden));
                expert.gate_up[s] = packed.back()->bytes.data;
                expert.gate_up_scales[s] = packed.back()->scales.data;
                packed.push_back(std::make_unique<Packed>(w2[e], nullptr, 0, hidden, s * part_cols, part_len(ff, s)));
                expert.down[s] = packed.back()->bytes.data;
                expert.down_scales[s] = packed.back()->scales.data;
            }
            table.push_back(expert);
        }
    }
};

/// Jobs on the device.
struct Jobs {
    std::vector<Job> list;
    std::vector<int> offsets = {0}, ids;
    int most = 0, vectors = 0;

    Jobs(Random &random, const Experts &experts, std::vector<Job> jobs, const std::vector<int> &counts, bool is_routed)
        : list(jobs) {
        for (size_t j = 0; j < list.size(); ++j) {
            for (int i = 0; i < counts[j]; ++i) ids.push_back(static_cast<int>(random.below(40)));
            offsets.push_back(static_cast<int>(ids.size()));
            list[j].out = is_routed ? -1 : vectors;
            vectors += counts[j] * static_cast<int>(nodes(list[j].begin, list[j].end, experts.num_segments).size());
            most = std::max(most, counts[j]);
        }
    }
};

/// Activations of all jobs by every variant, checked; [assignments, 8 * part_cols].
static std::vector<uint16_t> run_gate_up(const Class &c, const Experts &experts, const Jobs &jobs, const Rows &x) {
    Buffer<Expert> table(experts.table);
    Buffer<Job> list(jobs.list);
    Buffer<int> offsets(jobs.offsets), ids(jobs.ids);
    int stride = 8 * experts.part_cols;
    std::vector<uint16_t> h;
    for (const Variant &v : c.gate_up) {
        Buffer<uint16_t> out(jobs.ids.size() * stride);
        GateUp call = {out.data, table.data, list.data, offsets.data, ids.data, x.data(), x.scales.data, experts.hidden, experts.ff, x.stride, stride};
        // One tile more than there are tokens: a graph's grid is for the worst case.
        Dim grid = {static_cast<unsigned>(divide_up(jobs.most, v.n) + 1), gate_up_blocks(experts.ff, v), static_cast<unsigned>(list.count)};
        launch(kernel("gate_up", c, v).c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<uint16_t> got(out.data, out.data + out.count);
        if (h.empty()) h = got;
        if (got != h) fail("%s differs, hidden %d, ff %d", kernel("gate_up", c, v).c_str(), experts.hidden, experts.ff);
    }
    for (size_t j = 0; j < jobs.list.size(); ++j) {
        const Job &job = jobs.list[j];
        const auto &w1 = experts.w1[job.expert].value, &w3 = experts.w3[job.expert].value;
        for (int i = jobs.offsets[j]; i < jobs.offsets[j + 1]; ++i) {
            for (int col = job.begin * experts.part_cols; col < std::min(experts.ff, job.end * experts.part_cols); ++col) {
                double gate = 0, up = 0;
                for (int k = 0; k < experts.hidden; ++k) {
                    gate += w1[static_cast<size_t>(col) * experts.hidden + k] * x.value(jobs.ids[i], k);
                    up += w3[static_cast<size_t>(col) * experts.hidden + k] * x.value(jobs.ids[i], k);
                }
                double expected = silu(gate) * up;
                check_close(kernel("gate_up", c, c.gate_up[0]).c_str(), col, from_bf16(h[static_cast<size_t>(i) * stride + col]), expected, std::fabs(expected) / 200 + 1e-5);
            }
        }
    }
    return h;
}

/// Output vectors of all jobs by every variant, which must agree.
static std::vector<float> run_down(const Class &c, const Experts &experts, const Jobs &jobs, const Rows &h) {
    Buffer<Expert> table(experts.table);
    Buffer<Job> list(jobs.list);
    Buffer<int> offsets(jobs.offsets);
    std::vector<float> first;
    auto is_part = [&](const Job &job) { return job.begin > 0 || job.end < experts.num_segments; };
    bool has_parts = std::any_of(jobs.list.begin(), jobs.list.end(), is_part);
    for (const Variant &v : c.down) {
        if (has_parts && v.suffix.rfind("wg_", 0) == 0 && v.n > 32) continue; // these know whole experts only
        Buffer<float> out(static_cast<size_t>(jobs.vectors) * experts.hidden);
        Down call = {out.data, table.data, list.data, offsets.data, h.data(), h.scales.data, experts.hidden, experts.ff, h.stride};
        Dim grid = {static_cast<unsigned>(divide_up(jobs.most, v.n) + 1), static_cast<unsigned>(divide_up(experts.hidden, v.rows)), static_cast<unsigned>(list.count)};
        launch(kernel("down", c, v).c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<float> got(out.data, out.data + out.count);
        if (first.empty()) first = got;
        if (memcmp(got.data(), first.data(), got.size() * 4) != 0) {
            fail("%s differs, hidden %d, ff %d", kernel("down", c, v).c_str(), experts.hidden, experts.ff);
        }
    }
    return first;
}

// ---- Panels: the products of long batches.

struct Panels {
    uint8_t *out;
    const void *x;
    const int *row_ids, *offsets;
    const uint32_t *num_rows;
    const float *x_scales;
    float *scales;
    int jobs, panels, x_stride, slots;
};
struct RoundPanels {
    uint8_t *out;
    float *scales;
    const uint8_t *panels;
    uint32_t part_cols, slots;
};

/// Slots behind the last that a tile may read.
constexpr int TILE_MAX = 256;

static void pack_panels(const Panels &call) {
    launch("tr_panels", {static_cast<unsigned>(divide_up(call.slots, 32)), static_cast<unsigned>(divide_up(call.panels, 8))}, {256}, 0, call);
}

/// Long batches of whole experts, by rows and by panels: the same bits.
static void panels_give_the_bits_of_rows(const Format &format, std::vector<int> counts) {
    Class c = wgmma_class(format);
    bool is_e4m3 = format.name == E4M3.name;
    int hidden = 256, ff = 16 * format.step_k, num_jobs = static_cast<int>(counts.size());
    Random random{77};
    Experts experts(random, format, num_jobs, hidden, ff);
    std::vector<Job> list;
    for (int j = 0; j < num_jobs; ++j) list.push_back({num_jobs - 1 - j, 0, 8, -1});
    Jobs jobs(random, experts, list, counts, true);
    Rows x(format, random_rows(random, 40, hidden, hidden), 40, hidden, hidden, hidden, 1);
    std::vector<uint16_t> rows = run_gate_up(c, experts, jobs, x);
    Rows h(format, rows, static_cast<int>(jobs.ids.size()), ff, ff, ff / 8, 8);
    std::vector<float> expected = run_down(c, experts, jobs, h);
    int slots = TILE_MAX;
    for (int count : counts) slots += divide_up(count, 8) * 8;
    Buffer<Expert> table(experts.table);
    Buffer<Job> d_jobs(jobs.list);
    Buffer<int> offsets(jobs.offsets), ids(jobs.ids);
    // Of rows, then of rounded hidden rows; and of hidden rows.
    Buffer<uint8_t> x_panels(static_cast<size_t>(slots) * (is_e4m3 ? ff : hidden * 2)), h_panels(static_cast<size_t>(slots) * ff * 2);
    Buffer<float> x_scales(static_cast<size_t>(slots) * 8), out(expected.size());
    const float *row_scales = is_e4m3 ? x.scales.data : nullptr;
    pack_panels({x_panels.data, x.data(), ids.data, offsets.data, nullptr, row_scales, x_scales.data, num_jobs, hidden / format.step_k, x.stride, slots});
    auto stage = [&](int n) { return 8 * format.step_bytes + n * 128; };
    unsigned experts_of = static_cast<unsigned>(num_jobs);
    GateUp gate_up = {reinterpret_cast<uint16_t *>(h_panels.data), table.data, d_jobs.data, offsets.data, ids.data, x_panels.data, x_scales.data, hidden, ff, slots * 128, slots};
    Dim grid = {static_cast<unsigned>(divide_up(jobs.most, 256) + 1), static_cast<unsigned>(ff / 64), experts_of};
    launch((std::string("tr_gate_up_") + format.name + "_cl_n256").c_str(), grid, {384}, 4 * (stage(256) + 16), gate_up);
    if (is_e4m3) {
        RoundPanels round = {x_panels.data, x_scales.data, h_panels.data, static_cast<uint32_t>(ff / 8), static_cast<uint32_t>(slots)};
        launch("tr_round_panels_e4m3", {static_cast<unsigned>(slots / 8), 8}, {256}, 0, round);
    }
    const uint8_t *read = is_e4m3 ? x_panels.data : h_panels.data;
    Down down = {out.data, table.data, d_jobs.data, offsets.data, read, x_scales.data, hidden, ff, slots * 128};
    grid = {static_cast<unsigned>(divide_up(jobs.most, 128) + 1), static_cast<unsigned>(hidden / 128), experts_of};
    launch((std::string("tr_down_") + format.name + "_cl_n128").c_str(), grid, {384}, 5 * stage(128) + 128 * 128 * 4 + 80, down);
    if (memcmp(out.data, expected.data(), expected.size() * 4) != 0) fail("experts by panels differ, %s", format.name);
}

/// Hidden rows rounded and then packed, and packed and then rounded: the same panels and scales.
static void panels_are_rounded_as_rows_are(int part_cols, int num_rows) {
    int cols = 8 * part_cols, slots = divide_up(num_rows, 8) * 8;
    Random random{79};
    std::vector<uint16_t> values = random_rows(random, num_rows, cols, cols);
    std::fill_n(values.begin() + cols, part_cols, static_cast<uint16_t>(0)); // a part of zeros
    values[static_cast<size_t>(3 * cols - 1)] = 0x7F80;                      // infinity, in the last part of row 2
    Rows rows(E4M3, values, num_rows, cols, cols, part_cols, 8);
    size_t bytes = static_cast<size_t>(slots) * cols, scales = static_cast<size_t>(slots) * 8;
    Buffer<uint8_t> expected(bytes), panels(2 * bytes), got(bytes);
    Buffer<float> unused(scales), got_scales(scales);
    Buffer<uint32_t> d_rows(std::vector<uint32_t>{static_cast<uint32_t>(num_rows)});
    pack_panels({expected.data, rows.data(), nullptr, nullptr, d_rows.data, nullptr, unused.data, 0, cols / 128, rows.stride, slots});
    pack_panels({panels.data, rows.bf16.data, nullptr, nullptr, d_rows.data, nullptr, unused.data, 0, cols / 64, cols * 2, slots});
    RoundPanels round = {got.data, got_scales.data, panels.data, static_cast<uint32_t>(part_cols), static_cast<uint32_t>(slots)};
    launch("tr_round_panels_e4m3", {static_cast<unsigned>(slots / 8), 8}, {256}, 0, round);
    for (int row = 0; row < num_rows; ++row) {
        for (int panel = 0; panel < cols / 128; ++panel) {
            size_t at = (static_cast<size_t>(panel) * slots + row) * 128;
            if (memcmp(got.data + at, expected.data + at, 128) != 0) fail("row %d differs in panel %d of e4m3", row, panel);
        }
        for (int part = 0; part < 8; ++part) {
            const float *scale = &got_scales[static_cast<size_t>(part) * slots + row], *of_row = &rows.scales[static_cast<size_t>(row) * 8 + part];
            if (memcmp(scale, of_row, 4) != 0) fail("scale of row %d, part %d: %g in panels, %g in rows", row, part, *scale, *of_row);
        }
    }
}

static void linear_by_panels_gives_the_bits_of_rows(const Format &format, int num_tokens, bool is_added) {
    int rows = 512, cols = 16 * format.step_k, slots = divide_up(num_tokens, 8) * 8 + TILE_MAX;
    Random random{78};
    Matrix w(random, format, rows, cols, cols / 8);
    Rows x(format, random_rows(random, num_tokens, cols, cols), num_tokens, cols, cols, cols, 1);
    size_t part_bytes = packed_bytes(format, rows, cols / 8);
    Buffer<uint8_t> packed(part_bytes * 8), panels(static_cast<size_t>(slots) * 16 * 128);
    Buffer<float> weight_scales(static_cast<size_t>(rows) * 8), scales(static_cast<size_t>(slots));
    for (int p = 0; p < 8; ++p) {
        Packed part(w, nullptr, 0, rows, p * cols / 8, cols / 8);
        memcpy(packed.data + p * part_bytes, part.bytes.data, part.bytes.count);
        memcpy(weight_scales.data + p * rows, part.scales.data, static_cast<size_t>(rows) * 4);
    }
    Buffer<uint32_t> d_rows(std::vector<uint32_t>{static_cast<uint32_t>(num_tokens)});
    const float *row_scales = format.name == E4M3.name ? x.scales.data : nullptr;
    pack_panels({panels.data, x.data(), nullptr, nullptr, d_rows.data, row_scales, scales.data, 0, 16, x.stride, slots});
    std::vector<float> before(static_cast<size_t>(num_tokens) * rows), results[2];
    for (auto &b : before) b = random.normal();
    for (bool is_panel : {false, true}) {
        Buffer<float> out(before);
        Linear call = {packed.data, is_panel ? panels.data : x.data(), nullptr, out.data, weight_scales.data, is_panel ? scales.data : x.scales.data,
                       num_tokens, rows, cols, is_panel ? slots * 128 : x.stride, rows, is_added};
        Dim grid = {static_cast<unsigned>(divide_up(num_tokens, 128)), static_cast<unsigned>(rows / 128)};
        std::string name = std::string("tr_linear_") + format.name + (is_panel ? "_cl_n128" : "_wg_n128");
        launch(name.c_str(), grid, {384}, 5 * (8 * format.step_bytes + 128 * 128) + 128 * 128 * 4 + 80, call);
        results[is_panel].assign(out.data, out.data + out.count);
    }
    if (memcmp(results[0].data(), results[1].data(), before.size() * 4) != 0) fail("a dense product by panels differs, %s", format.name);
}

static void experts_are_products(const Class &c, int hidden, int ff, std::vector<Job> list, std::vector<int> counts, bool is_routed) {
    Random random{static_cast<uint64_t>(hidden * 131 + ff)};
    Experts experts(random, c.format, 3, hidden, ff);
    Jobs jobs(random, experts, list, counts, is_routed);
    int stride = divide_up(hidden, 8) * 8, rows = static_cast<int>(jobs.ids.size());
    Rows x(c.format, random_rows(random, 40, hidden, stride), 40, hidden, stride, hidden, 1);
    Rows h(c.format, run_gate_up(c, experts, jobs, x), rows, ff, 8 * experts.part_cols, experts.part_cols, 8);
    std::vector<float> out = run_down(c, experts, jobs, h);
    size_t at = 0;
    for (size_t j = 0; j < jobs.list.size(); ++j) {
        const Job &job = jobs.list[j];
        for (int i = jobs.offsets[j]; i < jobs.offsets[j + 1]; ++i) {
            for (Node node : nodes(job.begin, job.end, experts.num_segments)) {
                int end = std::min(ff, (node.begin + node.len) * experts.part_cols);
                for (int r = 0; r < hidden; ++r, ++at) {
                    double sum = 0;
                    for (int k = node.begin * experts.part_cols; k < end; ++k) {
                        sum += experts.w2[job.expert].value[static_cast<size_t>(r) * ff + k] * h.value(i, k);
                    }
                    check_close(kernel("down", c, c.down[0]).c_str(), at, out[at], sum, 1e-4);
                }
            }
        }
    }
    if (at != out.size()) fail("%zu elements checked of %zu", at, out.size());
}

/// The vector of a node has the same bits whoever holds what else: those of its segments, summed along the tree.
static void a_part_has_the_bits_of_the_whole(const Class &c) {
    Random random{5};
    const int hidden = 48, ff = 8 * 64, tokens = 3;
    Experts experts(random, c.format, 1, hidden, ff);
    Rows h(c.format, random_rows(random, tokens, ff, ff), tokens, ff, ff, 64, 8);
    auto run = [&](int begin, int end) {
        Jobs jobs(random, experts, {{0, begin, end, 0}}, {tokens}, false);
        return run_down(c, experts, jobs, h);
    };
    std::vector<float> segments[8];
    for (int s = 0; s < 8; ++s) segments[s] = run(s, s + 1);
    for (int begin = 0; begin < 8; ++begin) {
        for (int end = begin + 2; end <= 8; ++end) {
            auto got = run(begin, end);
            auto list = nodes(begin, end, 8);
            for (size_t at = 0; at < got.size(); ++at) {
                size_t vector = at / hidden, r = at % hidden, t = vector / list.size();
                Node node = list[vector % list.size()];
                float sums[8];
                for (int s = 0; s < node.len; ++s) sums[s] = segments[node.begin + s][t * hidden + r];
                for (int len = node.len; len > 1; len /= 2) {
                    for (int s = 0; s < len / 2; ++s) sums[s] = sums[2 * s] + sums[2 * s + 1];
                }
                if (got[at] != sums[0]) fail("%s segments %d..%d: element %zu is %g, of its segments %g", c.format.name, begin, end, at, got[at], sums[0]);
            }
        }
    }
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 1;
    tr_emulator_seed(seed);
    for (const Format &f : {BF16, E4M3}) {
        panels_give_the_bits_of_rows(f, {300, 0, 70, 3});
        linear_by_panels_gives_the_bits_of_rows(f, 200, false);
        linear_by_panels_gives_the_bits_of_rows(f, 77, true);
    }
    panels_are_rounded_as_rows_are(512, 77);
    for (const Format &f : {BF16, E4M3, Q4}) {
        for (const Class &c : {mma_class(f), wgmma_class(f)}) {
            if (f.name != Q4.name) {
                linear_is_a_product(c, 40, 64, 1, false, false);
                linear_is_a_product(c, 100, 200, 13, true, false);
                linear_is_a_product(c, 64, 520, 70, false, true);
                linear_is_a_product(c, 16, 32, 33, true, true);
                linear_is_a_product(c, 130, 1000, 9, false, false);
                linear_is_a_product(c, 33, 77, 5, false, false);
            }
            experts_are_products(c, 64, 256, {{0, 0, 8, 0}, {1, 0, 8, 0}, {2, 0, 8, 0}}, {3, 0, 21}, true);
            experts_are_products(c, 72, 100, {{0, 0, 8, 0}, {2, 1, 8, 0}, {0, 3, 5, 0}, {1, 0, 3, 0}}, {9, 1, 2, 70}, false);
            experts_are_products(c, 200, 300, {{1, 0, 8, 0}, {0, 2, 3, 0}}, {17, 5}, false);
            a_part_has_the_bits_of_the_whole(c);
        }
    }
    printf("gemm: passed, seed %llu\n", static_cast<unsigned long long>(seed));
}
