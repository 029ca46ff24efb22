// The products against plain sums in double, and every variant against every other, bit by bit.
#include <algorithm>
#include <string>

#include "check.h"

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
    const uint16_t *a, *b;
    int rows, cols, stride;
    const uint32_t *dm_a, *dm_b;
};
struct Linear {
    const uint8_t *weights, *x;
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
    const uint8_t *x;
    const float *x_scales;
    int hidden, ff, x_stride, out_stride;
};
struct Down {
    float *out;
    const Expert *experts;
    const Job *jobs;
    const int *offsets;
    const uint8_t *x;
    const float *x_scales;
    int hidden, ff, x_stride;
};

static int divide_up(int a, int b) { return (a + b - 1) / b; }
static int segment_cols(int cols) { return divide_up(divide_up(cols, 8), 32) * 32; }

/// A variant of a kernel: tokens per block, rows per block, threads, shared bytes.
struct Variant {
    const char *suffix;
    int n, rows, threads;
    size_t shared;
};
static size_t by_parts(int n, int rows) { return 8 * 3 * n * 128 + 8 * n * (rows + 4) * 4; }
static size_t in_turn(int n) { return 3 * n * 128 + 3 * 64 * n * 4; }
static size_t stage(int n, int groups) { return groups * 8192 + n * 128; }
static size_t group_by_parts(int n) { return 4 * 4 * stage(n, 1) + 8 * n * 68 * 4 + 4 * 4 * 16; }
static size_t group_in_turn(int n, int stages, int levels) { return stages * stage(n, 2) + levels * 128 * n * 4 + stages * 16; }
static size_t group_gate_up(int n, int groups, int stages) { return stages * (stage(n, groups) + 16); }

/// A numeric class: its variants give the same bits.
struct Class {
    const char *name;
    std::vector<Variant> tree, gate_up;
};
static const Class CLASSES[] = {
    {"bf16",
     {{"n8", 8, 16, 256, by_parts(8, 16)},
      {"n16", 16, 32, 256, by_parts(16, 32)},
      {"n32", 32, 64, 128, in_turn(32)},
      {"n64", 64, 64, 128, in_turn(64)}},
     {{"n8", 8, 32, 128, 4 * 8 * 128},
      {"n16", 16, 32, 128, 4 * 16 * 128},
      {"n32", 32, 32, 128, 4 * 32 * 128},
      {"n64", 64, 32, 128, 4 * 64 * 128},
      {"n128", 128, 32, 128, 3 * 128 * 128}}},
    {"bf16_wg",
     {{"n8", 8, 64, 640, group_by_parts(8)},
      {"n16", 16, 64, 640, group_by_parts(16)},
      {"n32", 32, 128, 288, group_in_turn(32, 5, 3)},
      {"n64", 64, 128, 288, group_in_turn(64, 5, 3)},
      {"n128", 128, 128, 384, group_in_turn(128, 3, 2)}},
     {{"n8", 8, 32, 160, group_gate_up(8, 1, 6)},
      {"n16", 16, 32, 160, group_gate_up(16, 1, 5)},
      {"n32", 32, 64, 288, group_gate_up(32, 2, 4)},
      {"n64", 64, 128, 544, group_gate_up(64, 4, 4)},
      {"n128", 128, 64, 384, group_gate_up(128, 2, 6)},
      {"n256", 256, 64, 384, group_gate_up(256, 2, 4)}}},
};

static std::string kernel(const char *what, const Class &c, const Variant &v) {
    return std::string("tr_") + what + "_" + c.name + "_" + v.suffix;
}

/// Blocks along the intermediate row: every segment begins a new one.
static unsigned gate_up_blocks(int ff, const Variant &v) {
    return static_cast<unsigned>(8 * divide_up(segment_cols(ff), v.rows));
}

static std::vector<uint16_t> random_bf16(Random &random, size_t count, float scale) {
    std::vector<uint16_t> values(count);
    for (auto &x : values) x = to_bf16(random.normal() * scale);
    return values;
}

/// Packs columns [begin, begin + cols) of a matrix of `stride` columns.
static void pack(uint8_t *out, const uint16_t *a, const uint16_t *b, int rows, int cols, int stride) {
    Pack call = {out, nullptr, a, b, rows, cols, stride, nullptr, nullptr};
    unsigned strips = static_cast<unsigned>(divide_up(rows, b == nullptr ? 64 : 32) * 4);
    launch("tr_pack_bf16", {static_cast<unsigned>(divide_up(cols, 128) * 2), strips}, {32}, 0, call);
}

static size_t packed_bytes(int rows, int cols) {
    return static_cast<size_t>(divide_up(rows, 64)) * 4 * static_cast<size_t>(divide_up(cols, 128) * 2) * 2048;
}

static void linear_is_a_product(const Class &c, int rows, int cols, int num_tokens, bool is_added, bool is_gathered) {
    Random random{static_cast<uint64_t>(rows * 31 + cols * 7 + num_tokens)};
    auto w = random_bf16(random, static_cast<size_t>(rows) * cols, 0.1F);
    int x_rows = num_tokens + 5, stride = divide_up(cols, 8) * 8;
    auto x = random_bf16(random, static_cast<size_t>(x_rows) * stride, 1);
    int part_cols = segment_cols(cols), parts = divide_up(cols, part_cols);
    size_t part_bytes = packed_bytes(rows, part_cols);
    Buffer<uint16_t> dw(w), dx(x);
    Buffer<uint8_t> packed(part_bytes * static_cast<size_t>(parts));
    for (int p = 0; p < parts; ++p) {
        int begin = p * part_cols, len = part_cols < cols - begin ? part_cols : cols - begin;
        pack(packed.data + p * part_bytes, dw.data + begin, nullptr, rows, len, cols);
    }
    std::vector<int> ids(static_cast<size_t>(num_tokens));
    for (auto &id : ids) id = static_cast<int>(random.below(static_cast<uint32_t>(x_rows)));
    if (!is_gathered) {
        for (int i = 0; i < num_tokens; ++i) ids[static_cast<size_t>(i)] = i;
    }
    Buffer<int> d_ids(ids);
    std::vector<float> before(static_cast<size_t>(num_tokens) * rows), first;
    for (auto &v : before) v = random.normal();
    for (const Variant &v : c.tree) {
        Buffer<float> out(before.size());
        if (is_added) memcpy(out.data, before.data(), before.size() * 4);
        Linear call = {packed.data, reinterpret_cast<uint8_t *>(dx.data), is_gathered ? d_ids.data : nullptr, out.data,
                       nullptr, nullptr, num_tokens, rows, cols, stride * 2, rows, is_added};
        Dim grid = {static_cast<unsigned>(divide_up(num_tokens, v.n)), static_cast<unsigned>(divide_up(rows, v.rows))};
        std::string name = kernel("linear", c, v);
        launch(name.c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<float> got(out.data, out.data + out.count);
        if (first.empty()) {
            first = got;
            for (int t = 0; t < num_tokens; ++t) {
                for (int r = 0; r < rows; ++r) {
                    size_t at = static_cast<size_t>(t) * rows + r;
                    double sum = is_added ? before[at] : 0;
                    for (int k = 0; k < cols; ++k) {
                        sum += static_cast<double>(from_bf16(w[static_cast<size_t>(r) * cols + k]))
                               * from_bf16(x[static_cast<size_t>(ids[static_cast<size_t>(t)]) * stride + k]);
                    }
                    check_close(name.c_str(), at, got[at], sum, 1e-4);
                }
            }
        } else if (memcmp(got.data(), first.data(), got.size() * 4) != 0) {
            fail("%s differs from n8 with %d rows, %d columns, %d tokens", name.c_str(), rows, cols, num_tokens);
        }
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
    std::vector<std::vector<uint16_t>> w1, w2, w3;
    std::vector<Buffer<uint8_t> *> packed;
    std::vector<Expert> table;

    Experts(Random &random, int count, int hidden, int ff)
        : hidden(hidden), ff(ff), part_cols(segment_cols(ff)), num_segments(divide_up(ff, part_cols)) {
        for (int e = 0; e < count; ++e) {
            w1.push_back(random_bf16(random, static_cast<size_t>(ff) * hidden, 0.1F));
            w3.push_back(random_bf16(random, static_cast<size_t>(ff) * hidden, 0.1F));
            w2.push_back(random_bf16(random, static_cast<size_t>(hidden) * ff, 0.1F));
            Buffer<uint16_t> d1(w1.back()), d2(w2.back()), d3(w3.back());
            Expert expert = {};
            for (int s = 0; s < num_segments; ++s) {
                int begin = s * part_cols, len = part_cols < ff - begin ? part_cols : ff - begin;
                size_t up_bytes = packed_bytes(divide_up(len, 32) * 64, hidden), down_bytes = packed_bytes(hidden, len);
                packed.push_back(new Buffer<uint8_t>(up_bytes));
                pack(packed.back()->data, d1.data + begin * hidden, d3.data + begin * hidden, len, hidden, hidden);
                expert.gate_up[s] = packed.back()->data;
                packed.push_back(new Buffer<uint8_t>(down_bytes));
                pack(packed.back()->data, d2.data + begin, nullptr, hidden, len, ff);
                expert.down[s] = packed.back()->data;
            }
            table.push_back(expert);
        }
    }
    ~Experts() {
        for (auto *p : packed) delete p;
    }
};

/// Gate-up and down of several jobs: values against sums in double, bits of every pair of variants.
static void experts_are_products(const Class &c, int hidden, int ff, std::vector<Job> jobs, std::vector<int> counts, bool is_routed) {
    Random random{static_cast<uint64_t>(hidden * 131 + ff)};
    Experts experts(random, 3, hidden, ff);
    int x_rows = 40, x_stride = divide_up(hidden, 8) * 8, h_stride = 8 * experts.part_cols;
    auto x = random_bf16(random, static_cast<size_t>(x_rows) * x_stride, 1);
    std::vector<int> offsets = {0}, ids;
    int most = 0, vectors = 0;
    for (size_t j = 0; j < jobs.size(); ++j) {
        for (int i = 0; i < counts[j]; ++i) ids.push_back(static_cast<int>(random.below(40)));
        offsets.push_back(static_cast<int>(ids.size()));
        jobs[j].out = is_routed ? -1 : vectors;
        vectors += counts[j] * static_cast<int>(nodes(jobs[j].begin, jobs[j].end, experts.num_segments).size());
        most = counts[j] > most ? counts[j] : most;
    }
    Buffer<uint16_t> dx(x);
    Buffer<Expert> table(experts.table);
    Buffer<Job> d_jobs(jobs);
    Buffer<int> d_offsets(offsets), d_ids(ids);
    auto z = static_cast<unsigned>(jobs.size());
    std::vector<uint16_t> h;
    for (const Variant &v : c.gate_up) {
        Buffer<uint16_t> out(ids.size() * h_stride);
        GateUp call = {out.data, table.data, d_jobs.data, d_offsets.data, d_ids.data, reinterpret_cast<uint8_t *>(dx.data),
                       nullptr, hidden, ff, x_stride * 2, h_stride};
        // One tile more than there are tokens: a graph's grid is for the worst case.
        Dim grid = {static_cast<unsigned>(divide_up(most, v.n) + 1), gate_up_blocks(ff, v), z};
        launch(kernel("gate_up", c, v).c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<uint16_t> got(out.data, out.data + out.count);
        if (h.empty()) h = got;
        if (got != h) fail("%s differs from n8, hidden %d, ff %d", kernel("gate_up", c, v).c_str(), hidden, ff);
    }
    for (size_t j = 0; j < jobs.size(); ++j) {
        const auto &w1 = experts.w1[jobs[j].expert], &w3 = experts.w3[jobs[j].expert];
        for (int i = offsets[j]; i < offsets[j + 1]; ++i) {
            const uint16_t *row = x.data() + static_cast<size_t>(ids[i]) * x_stride;
            for (int col = jobs[j].begin * experts.part_cols; col < std::min(ff, jobs[j].end * experts.part_cols); ++col) {
                double gate = 0, up = 0;
                for (int k = 0; k < hidden; ++k) {
                    gate += from_bf16(w1[static_cast<size_t>(col) * hidden + k]) * from_bf16(row[k]);
                    up += from_bf16(w3[static_cast<size_t>(col) * hidden + k]) * from_bf16(row[k]);
                }
                double expected = silu(gate) * up;
                check_close("gate_up", col, from_bf16(h[static_cast<size_t>(i) * h_stride + col]), expected,
                            std::fabs(expected) / 200 + 1e-5);
            }
        }
    }
    Buffer<uint16_t> dh(h);
    std::vector<float> first;
    for (const Variant &v : c.tree) {
        Buffer<float> out(static_cast<size_t>(vectors) * hidden);
        Down call = {out.data, table.data, d_jobs.data, d_offsets.data, reinterpret_cast<uint8_t *>(dh.data), nullptr,
                     hidden, ff, h_stride * 2};
        Dim grid = {static_cast<unsigned>(divide_up(most, v.n) + 1), static_cast<unsigned>(divide_up(hidden, v.rows)), z};
        launch(kernel("down", c, v).c_str(), grid, {static_cast<unsigned>(v.threads)}, v.shared, call);
        std::vector<float> got(out.data, out.data + out.count);
        if (first.empty()) first = got;
        if (memcmp(got.data(), first.data(), got.size() * 4) != 0) {
            fail("%s differs from n8, hidden %d, ff %d", kernel("down", c, v).c_str(), hidden, ff);
        }
    }
    size_t at = 0;
    for (size_t j = 0; j < jobs.size(); ++j) {
        const auto &w2 = experts.w2[jobs[j].expert];
        for (int i = offsets[j]; i < offsets[j + 1]; ++i) {
            for (Node node : nodes(jobs[j].begin, jobs[j].end, experts.num_segments)) {
                for (int r = 0; r < hidden; ++r, ++at) {
                    double sum = 0;
                    for (int k = node.begin * experts.part_cols; k < std::min(ff, (node.begin + node.len) * experts.part_cols); ++k) {
                        sum += from_bf16(w2[static_cast<size_t>(r) * ff + k]) * from_bf16(h[static_cast<size_t>(i) * h_stride + k]);
                    }
                    check_close("down", at, first[at], sum, 1e-4);
                }
            }
        }
    }
    if (at != first.size()) fail("%zu elements checked of %zu", at, first.size());
}

/// The vector of a node has the same bits whoever holds what else.
static void a_part_has_the_bits_of_the_whole(const Class &c) {
    Random random{5};
    const int hidden = 48, ff = 8 * 64, h_stride = ff;
    Experts experts(random, 1, hidden, ff);
    auto h = random_bf16(random, 4 * ff, 1);
    Buffer<uint16_t> dh(h);
    Buffer<Expert> table(experts.table);
    auto run = [&](int begin, int end) {
        int count = static_cast<int>(nodes(begin, end, 8).size());
        Buffer<Job> job(std::vector<Job>{{0, begin, end, 0}});
        Buffer<int> offsets(std::vector<int>{0, 4});
        std::vector<float> first;
        for (const Variant &v : c.tree) {
            Buffer<float> out(static_cast<size_t>(4 * count) * hidden);
            Down call = {out.data, table.data, job.data, offsets.data, reinterpret_cast<uint8_t *>(dh.data), nullptr, hidden, ff, h_stride * 2};
            launch(kernel("down", c, v).c_str(), {1, static_cast<unsigned>(divide_up(hidden, v.rows))},
                   {static_cast<unsigned>(v.threads)}, v.shared, call);
            std::vector<float> got(out.data, out.data + out.count);
            if (first.empty()) first = got;
            if (memcmp(got.data(), first.data(), got.size() * 4) != 0) fail("range %d..%d: variants differ", begin, end);
        }
        return first;
    };
    std::vector<float> segments[8];
    for (int s = 0; s < 8; ++s) segments[s] = run(s, s + 1);
    for (int begin = 0; begin < 8; ++begin) {
        for (int end = begin + 1; end <= 8; ++end) {
            auto got = run(begin, end);
            auto list = nodes(begin, end, 8);
            for (size_t n = 0; n < list.size(); ++n) {
                for (int t = 0; t < 4; ++t) {
                    for (int r = 0; r < hidden; ++r) {
                        float sums[8];
                        for (int s = 0; s < list[n].len; ++s) sums[s] = segments[list[n].begin + s][static_cast<size_t>(t * hidden + r)];
                        for (int len = list[n].len; len > 1; len /= 2) {
                            for (int s = 0; s < len / 2; ++s) sums[s] = sums[2 * s] + sums[2 * s + 1];
                        }
                        float value = got[(static_cast<size_t>(t) * list.size() + n) * hidden + r];
                        if (value != sums[0]) fail("range %d..%d node %zu: %g, of its segments %g", begin, end, n, value, sums[0]);
                    }
                }
            }
        }
    }
}

int main() {
    for (const Class &c : CLASSES) {
        linear_is_a_product(c, 40, 64, 1, false, false);
        linear_is_a_product(c, 100, 200, 13, true, false);
        linear_is_a_product(c, 64, 520, 70, false, true);
        linear_is_a_product(c, 16, 32, 33, true, true);
        linear_is_a_product(c, 130, 1000, 9, false, false);
        experts_are_products(c, 64, 256, {{0, 0, 8, 0}, {1, 0, 8, 0}, {2, 0, 8, 0}}, {3, 0, 21}, true);
        experts_are_products(c, 72, 100, {{0, 0, 8, 0}, {2, 1, 8, 0}, {0, 3, 5, 0}, {1, 0, 3, 0}}, {9, 1, 2, 70}, false);
        experts_are_products(c, 200, 300, {{1, 0, 8, 0}, {0, 2, 3, 0}}, {17, 5}, false);
        a_part_has_the_bits_of_the_whole(c);
    }
    puts("gemm: passed");
}
