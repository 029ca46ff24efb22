// The row-wise kernels against plain loops: embedding, norms and the gate, RoPE and the cache, combining, gathering.
#include "check.h"

struct NormArgs {
    uint16_t *out;
    float *residual;
    const float *weight;
    const uint32_t *num_rows, *source;
    float *scales;
    float eps;
    uint32_t hidden, out_stride;
};

struct ExpertOutputs {
    const float *outputs;
    const uint32_t *slot_of;
    const float *weights;
    uint32_t top_k;
};

struct GateArgs {
    const float *gate;
    float *scores;
    uint32_t num_experts;
};

struct RopeArgs {
    uint16_t *q;
    uint8_t *pages;
    const float *qkv, *angles;
    const uint32_t *positions, *sequences, *tables, *num_rows;
    float q_scale;
    uint32_t table_stride, num_heads, num_kv_heads, head_dim;
};

static std::vector<float> noise(uint64_t seed, size_t count) {
    Random random{seed};
    std::vector<float> values(count);
    for (float &x : values) x = random.normal();
    return values;
}

static bool same_bits(const float *a, const float *b, size_t count) { return memcmp(a, b, count * sizeof(float)) == 0; }

template <class T> static std::vector<T> copy_of(const Buffer<T> &buffer) { return {buffer.data, buffer.data + buffer.count}; }

static void embeddings_are_looked_up(uint32_t hidden) {
    const uint32_t vocab = 37, rows = 5;
    Random random{hidden};
    std::vector<uint16_t> table(vocab * hidden);
    for (auto &x : table) x = to_bf16(random.normal());
    const std::vector<uint32_t> tokens{36, 0, 7, 7, 1, 99};
    Buffer<uint16_t> device_table(table);
    Buffer<uint32_t> device_tokens(tokens), num_rows(std::vector<uint32_t>{rows});
    Buffer<float> residual(rows * hidden);
    launch("tr_embed_bf16", {rows + 1}, {256}, 0, residual.data, device_table.data, device_tokens.data, num_rows.data, hidden);
    for (size_t i = 0; i < residual.count; ++i) {
        check_close("embedding", i, residual[i], from_bf16(table[tokens[i / hidden] * hidden + i % hidden]), 0);
    }
}

/// `got` is a row as the norm leaves it.
static void check_normed(const uint16_t *got, const float *x, const std::vector<float> &weight, uint32_t stride, float eps) {
    const auto hidden = static_cast<uint32_t>(weight.size());
    double squares = 0;
    for (uint32_t i = 0; i < hidden; ++i) squares += static_cast<double>(x[i]) * x[i];
    const double scale = 1 / std::sqrt(squares / hidden + eps);
    for (uint32_t i = 0; i < stride; ++i) {
        const double expected = i < hidden ? x[i] * scale * weight[i] : 0;
        check_close("norm", i, from_bf16(got[i]), expected, std::fabs(expected) / 250);
    }
}

struct RoundArgs {
    uint8_t *out;
    float *scales;
    const uint16_t *rows;
    const uint32_t *num_rows;
    uint32_t cols, part_cols, row_stride, out_stride, scale_stride;
};

/// Rows as e4m3 that a norm has written.
struct Rounded {
    Buffer<uint8_t> rows;
    Buffer<float> scales;

    Rounded(uint32_t rows, uint32_t stride) : rows(rows * stride), scales(rows) {}

    /// The arguments of the same norm with these rows as its output.
    NormArgs of(const NormArgs &args, uint32_t stride) {
        NormArgs other = args;
        other.out = reinterpret_cast<uint16_t *>(rows.data);
        other.scales = scales.data;
        other.out_stride = stride;
        return other;
    }

    /// Whether they are those of tr_round_e4m3 of what the bf16 kernel has written, to the bit.
    void check(const char *kernel, const NormArgs &args, uint32_t num_rows, uint32_t stride) {
        Rounded expected(num_rows, stride);
        Buffer<uint32_t> count(std::vector<uint32_t>{num_rows});
        launch("tr_round_e4m3", {num_rows, 1}, {256}, 32,
               RoundArgs{expected.rows.data, expected.scales.data, args.out, count.data, args.hidden, args.hidden, args.out_stride, stride, 1});
        if (copy_of(rows) != copy_of(expected.rows)) fail("%s of %u columns is not the rounding of its bf16", kernel, args.hidden);
        if (!same_bits(scales.data, expected.scales.data, num_rows)) fail("scales of %s of %u columns", kernel, args.hidden);
    }
};

constexpr size_t NORM_SHARED = 256, GATE_SHARED = 256 + 4096, GATE8_SHARED = 256 + 8 * 4096;

static void norms_and_scores(uint32_t hidden, uint32_t num_experts, uint32_t top_k) {
    const uint32_t rows = 11, stride = (hidden + 15) / 8 * 8;
    const float eps = 1e-5F;
    const std::vector<float> x = noise(hidden, rows * hidden), weight = noise(2, hidden), gate = noise(3, num_experts * hidden);
    Buffer<float> residual(x), device_weight(weight), device_gate(gate), scores(rows * num_experts), scores8(rows * num_experts);
    Buffer<uint16_t> out(rows * stride), out1(rows * stride), out8(rows * stride);
    Buffer<uint32_t> num_rows(std::vector<uint32_t>{rows});
    NormArgs args{out.data, residual.data, device_weight.data, num_rows.data, nullptr, nullptr, eps, hidden, stride};
    launch("tr_norm_bf16", {rows + 2}, {256}, NORM_SHARED, args);
    for (uint32_t row = 0; row < rows; ++row) check_normed(out.data + row * stride, x.data() + row * hidden, weight, stride, eps);
    const uint32_t stride8 = (hidden + 15) / 16 * 16 + 16;
    Rounded rounded(rows, stride8), rounded1(rows, stride8), rounded8(rows, stride8);
    launch("tr_norm_e4m3", {rows + 2}, {256}, NORM_SHARED, rounded.of(args, stride8));
    rounded.check("tr_norm_e4m3", args, rows, stride8);
    // With the gate: one row at a time, and eight.
    GateArgs gate_args{device_gate.data, scores.data, num_experts};
    args.out = out1.data;
    launch("tr_norm_gate_bf16", {rows + 1}, {256}, GATE_SHARED, args, gate_args);
    gate_args.scores = scores8.data;
    args.out = out8.data;
    launch("tr_norm_gate8_bf16", {(rows + 7) / 8 + 1}, {256}, GATE8_SHARED, args, gate_args);
    if (copy_of(out1) != copy_of(out) || copy_of(out8) != copy_of(out)) fail("the norms of %u columns differ", hidden);
    if (!same_bits(scores.data, scores8.data, scores.count)) fail("the scores of %u columns differ", hidden);
    Buffer<float> scores_of_rounded(rows * num_experts);
    gate_args.scores = scores_of_rounded.data;
    launch("tr_norm_gate_e4m3", {rows + 1}, {256}, GATE_SHARED, rounded1.of(args, stride8), gate_args);
    rounded1.check("tr_norm_gate_e4m3", args, rows, stride8);
    if (!same_bits(scores.data, scores_of_rounded.data, scores.count)) fail("the scores of %u rounded columns differ", hidden);
    launch("tr_norm_gate8_e4m3", {(rows + 7) / 8 + 1}, {256}, GATE8_SHARED, rounded8.of(args, stride8), gate_args);
    rounded8.check("tr_norm_gate8_e4m3", args, rows, stride8);
    if (!same_bits(scores.data, scores_of_rounded.data, scores.count)) fail("the scores of %u rounded columns differ", hidden);
    for (uint32_t row = 0; row < rows; ++row) {
        double squares = 0;
        for (uint32_t i = 0; i < hidden; ++i) squares += static_cast<double>(x[row * hidden + i]) * x[row * hidden + i];
        const double scale = 1 / std::sqrt(squares / hidden + eps);
        for (uint32_t e = 0; e < num_experts; ++e) {
            double sum = 0, size = 0;
            for (uint32_t i = 0; i < hidden; ++i) {
                const double term = x[row * hidden + i] * scale * weight[i] * gate[e * hidden + i];
                sum += term;
                size += std::fabs(term);
            }
            check_close("score", row * num_experts + e, scores[row * num_experts + e], sum, size * 1e-6);
        }
    }
    // A row's bits alone, by way of `source`, with expert outputs added before.
    const std::vector<float> outputs = noise(4, rows * top_k * hidden), weights = noise(5, rows * top_k);
    std::vector<uint32_t> slot_of(rows * top_k);
    for (uint32_t i = 0; i < slot_of.size(); ++i) slot_of[i] = (i * 7 + 3) % (rows * top_k); // rows * top_k has no factor 7
    Buffer<float> device_outputs(outputs), device_weights(weights), plain(x);
    Buffer<uint32_t> device_slots(slot_of);
    const ExpertOutputs experts{device_outputs.data, device_slots.data, device_weights.data, top_k};
    args = {out.data, residual.data, device_weight.data, num_rows.data, nullptr, nullptr, eps, hidden, stride};
    launch("tr_combine_norm_bf16", {rows}, {256}, NORM_SHARED, args, experts);
    Buffer<float> again(x);
    NormArgs late_args = rounded.of(args, stride8);
    late_args.residual = again.data;
    launch("tr_combine_norm_e4m3", {rows}, {256}, NORM_SHARED, late_args, experts);
    rounded.check("tr_combine_norm_e4m3", args, rows, stride8);
    if (!same_bits(again.data, residual.data, again.count)) fail("the combine before a norm of %u rounded columns differs", hidden);
    launch("tr_combine", {rows + 1, (hidden + 1023) / 1024}, {256}, 0, plain.data, device_outputs.data, device_slots.data,
           device_weights.data, num_rows.data, top_k, hidden);
    std::vector<float> expected = x;
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t k = 0; k < top_k; ++k) {
            for (uint32_t i = 0; i < hidden; ++i) {
                volatile float product = weights[row * top_k + k] * outputs[slot_of[row * top_k + k] * hidden + i];
                expected[row * hidden + i] = expected[row * hidden + i] + product;
            }
        }
        check_normed(out.data + row * stride, expected.data() + row * hidden, weight, stride, eps);
    }
    if (!same_bits(residual.data, expected.data(), expected.size())) fail("the combine before a norm is not that of the host");
    if (!same_bits(plain.data, expected.data(), expected.size())) fail("the combine is not that of the host");
    const std::vector<uint32_t> wanted{10, 3};
    Buffer<uint32_t> source(wanted), num_wanted(std::vector<uint32_t>{2});
    Buffer<uint16_t> picked(2 * stride);
    args.out = picked.data;
    args.source = source.data;
    args.num_rows = num_wanted.data;
    launch("tr_norm_bf16", {2}, {256}, NORM_SHARED, args);
    Buffer<float> late(x);
    Buffer<uint16_t> late_picked(2 * stride);
    args.out = late_picked.data;
    args.residual = late.data;
    launch("tr_combine_norm_bf16", {2}, {256}, NORM_SHARED, args, experts);
    for (uint32_t i = 0; i < 2; ++i) {
        const uint16_t *all = out.data + wanted[i] * stride;
        if (memcmp(picked.data + i * stride, all, stride * 2) != 0) fail("a picked row differs");
        if (memcmp(late_picked.data + i * stride, all, stride * 2) != 0) fail("a picked row differs when experts are added to it");
    }
    if (late[0] != x[0]) fail("experts were added to a row that was not picked");
}

static void a_row_that_is_not_finite_is_nan() {
    const uint32_t hidden = 10, stride = 16;
    std::vector<float> x = noise(1, 3 * hidden);
    x[3] = 1e30F; // its square is no f32
    x[hidden + 4] = NAN;
    Buffer<float> residual(x), weight(noise(2, hidden));
    Buffer<uint16_t> out(3 * stride);
    Buffer<uint32_t> num_rows(std::vector<uint32_t>{3});
    launch("tr_norm_bf16", {3}, {256}, NORM_SHARED,
           NormArgs{out.data, residual.data, weight.data, num_rows.data, nullptr, nullptr, 1e-5F, hidden, stride});
    for (uint32_t i = 0; i < 3 * stride; ++i) {
        const bool is_nan = std::isnan(from_bf16(out[i]));
        if (is_nan != (i / stride < 2 && i % stride < hidden)) fail("element %u of a spoilt batch", i);
    }
    Rounded rounded(3, stride);
    const NormArgs args{out.data, residual.data, weight.data, num_rows.data, nullptr, nullptr, 1e-5F, hidden, stride};
    launch("tr_norm_e4m3", {3}, {256}, NORM_SHARED, rounded.of(args, stride));
    for (uint32_t row = 0; row < 3; ++row) {
        const float scale = rounded.scales[row];
        if (std::isnan(scale) != (row < 2)) fail("scale of row %u of a spoilt batch is %g", row, scale);
        for (uint32_t i = 0; row < 2 && i < stride; ++i) {
            if (rounded.rows[row * stride + i] != 0) fail("element %u of row %u of a spoilt batch is not 0", i, row);
        }
    }
}

static void check_f16(const char *what, uint16_t got, float expected) {
    const float value = from_f16(got), kept = std::isfinite(expected) ? std::copysign(std::min(std::fabs(expected), 65504.0F), expected) : expected;
    if (!std::isfinite(kept)) {
        if (std::isnan(value) != std::isnan(kept) || (!std::isnan(kept) && value != kept)) fail("%s is %g, expected %g", what, value, kept);
        return;
    }
    check_close(what, 0, value, kept, std::fabs(kept) / 2000 + 1e-6);
}

/// A head as the host's Q8Head rounds it, to the bit.
static void check_q8(const uint8_t *head, const std::vector<float> &x, bool is_value, uint32_t token, uint32_t hd, std::vector<bool> &written, size_t base) {
    float amax = 0;
    bool is_finite = true;
    for (float v : x) {
        amax = std::max(amax, std::fabs(v));
        is_finite = is_finite && std::isfinite(v);
    }
    float scale = is_finite ? amax / 127 : NAN, inverse = scale > 0 ? 1 / scale : 0;
    if (scale > 0 && std::isinf(inverse)) scale = inverse = 0;
    const size_t scale_at = 128 * hd + 4 * ((is_value ? 64 : 0) + token);
    float got;
    memcpy(&got, head + scale_at, 4);
    if (std::isnan(scale) ? !std::isnan(got) : got != scale) fail("scale is %g, expected %g", got, scale);
    for (uint32_t i = 0; i < 4; ++i) written[base + scale_at + i] = true;
    for (uint32_t i = 0; i < hd; ++i) {
        const size_t at = is_value ? 64 * hd + i * 64 + token : token * hd + i;
        const float product = inverse == 0 ? 0 : x[i] * inverse;
        if (static_cast<int8_t>(head[at]) != static_cast<int8_t>(std::nearbyint(product))) fail("byte %u of a head of %u", i, hd);
        written[base + at] = true;
    }
}

static void heads_are_rotated_and_kept(uint32_t heads, uint32_t kv_heads, uint32_t head_dim, bool is_q8) {
    const uint32_t hd = head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128, half = head_dim / 2, width = (heads + 2 * kv_heads) * head_dim;
    const std::vector<uint32_t> positions{0, 63, 64, 130, 5, 6, 7}, sequences{0, 0, 0, 0, 1, 1, 1};
    const std::vector<uint32_t> tables{6, 2, 4, 0xFFFFFFFF, 1, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF};
    const auto rows = static_cast<uint32_t>(positions.size());
    std::vector<float> qkv = noise(head_dim, rows * width), angles(200 * half * 2);
    for (uint32_t p = 0; p < 200; ++p) {
        for (uint32_t i = 0; i < half; ++i) {
            const double angle = p * std::pow(1e4, -2.0 * i / head_dim);
            angles[(p * half + i) * 2] = static_cast<float>(std::cos(angle));
            angles[(p * half + i) * 2 + 1] = static_cast<float>(std::sin(angle));
        }
    }
    qkv[width - 1] = 1e6F; // the last value of row 0: f16 keeps its largest
    qkv[2 * width - 2] = -INFINITY;
    qkv[3 * width - 3] = NAN;
    for (uint32_t i = 0; i < head_dim; ++i) qkv[5 * width - 1 - i] = 0, qkv[6 * width - 1 - i] = 1e-43F;
    Buffer<float> device_qkv(qkv), device_angles(angles);
    Buffer<uint32_t> device_positions(positions), device_sequences(sequences), device_tables(tables), num_rows(std::vector<uint32_t>{rows});
    const uint32_t head_bytes = is_q8 ? 128 * hd + 512 : 256 * hd;
    Buffer<uint16_t> q(rows * heads * hd);
    Buffer<uint8_t> pages(7 * kv_heads * head_bytes);
    const float q_scale = 1.44269504F / std::sqrt(static_cast<float>(head_dim));
    launch((std::string("tr_rope_kv") + (is_q8 ? "_q8_" : "_f16_") + std::to_string(hd)).c_str(), {rows + 1, 3}, {128}, 0,
           RopeArgs{q.data, pages.data, device_qkv.data, device_angles.data, device_positions.data, device_sequences.data,
                    device_tables.data, num_rows.data, q_scale, 4, heads, kv_heads, head_dim});
    std::vector<bool> written(pages.count, false);
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t h = 0; h < heads + 2 * kv_heads; ++h) {
            const float *x = qkv.data() + row * width + h * head_dim;
            std::vector<float> expected(hd, 0.0F);
            for (uint32_t i = 0; i < head_dim; ++i) {
                const float *angle = angles.data() + (positions[row] * half + i % half) * 2;
                volatile float own = x[i] * angle[0], turned = x[i < half ? i + half : i - half] * angle[1];
                expected[i] = h >= heads + kv_heads ? x[i] : i < half ? own - turned : own + turned;
            }
            if (h < heads) {
                for (uint32_t i = 0; i < hd; ++i) check_f16("query", q[(row * heads + h) * hd + i], expected[i] * q_scale);
                continue;
            }
            const bool is_value = h >= heads + kv_heads;
            const uint32_t kv_head = h - heads - (is_value ? kv_heads : 0), token = positions[row] % 64;
            const size_t base = (tables[sequences[row] * 4 + positions[row] / 64] * kv_heads + kv_head) * head_bytes;
            if (is_q8) {
                check_q8(pages.data + base, expected, is_value, token, hd, written, base);
                continue;
            }
            for (uint32_t i = 0; i < hd; ++i) {
                const size_t at = base + 2 * (is_value ? 64 * hd + i * 64 + token : token * hd + i);
                uint16_t got;
                memcpy(&got, pages.data + at, 2);
                check_f16(is_value ? "value" : "key", got, expected[i]);
                written[at] = written[at + 1] = true;
            }
        }
    }
    for (size_t i = 0; i < pages.count; ++i) {
        if (!written[i] && pages[i] != 0xFF) fail("byte %zu of the cache was written", i);
    }
}

/// The pieces of a row's experts, cut in every way that a placement may cut them, are summed as the tree says.
static void pieces_are_summed_along_the_tree(uint32_t hidden) {
    const uint32_t rows = 9, top_k = 2, segments = 8;
    const std::vector<std::vector<uint32_t>> cuts{{8}, {4, 4}, {1, 1, 2, 4}, {4, 2, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1},
                                                 {2, 2, 4}, {4, 2}, {4, 1}, {2, 1}};
    const std::vector<float> leaves = noise(hidden, rows * top_k * segments * hidden), weights = noise(6, rows * top_k), x = noise(7, rows * hidden);
    std::vector<float> pieces{0.0F}, expected = x; // the first f32 is none: offsets are not multiples of anything
    std::vector<uint32_t> begins{0}, lens;
    std::vector<unsigned long long> offsets;
    // A node's sum is the sum of its halves; behind `last` nothing is added.
    struct Tree {
        const float *leaves;
        uint32_t hidden, last;
        float sum(uint32_t begin, uint32_t len, uint32_t i) const {
            if (len == 1) return leaves[begin * hidden + i];
            volatile float left = sum(begin, len / 2, i);
            return begin + len / 2 >= last ? left : left + sum(begin + len / 2, len / 2, i);
        }
    };
    for (uint32_t s = 0; s < rows * top_k; ++s) {
        const std::vector<uint32_t> &cut = cuts[s % cuts.size()];
        uint32_t last = 0;
        for (uint32_t len : cut) last += len;
        const Tree tree{leaves.data() + s * segments * hidden, hidden, last};
        uint32_t begin = 0;
        for (uint32_t len : cut) {
            offsets.push_back(pieces.size());
            lens.push_back(len);
            for (uint32_t i = 0; i < hidden; ++i) pieces.push_back(tree.sum(begin, len, i));
            begin += len;
        }
        begins.push_back(static_cast<uint32_t>(lens.size()));
        for (uint32_t i = 0; i < hidden; ++i) {
            volatile float product = weights[s] * tree.sum(0, 8, i);
            expected[s / top_k * hidden + i] = expected[s / top_k * hidden + i] + product;
        }
    }
    Buffer<float> residual(x), device_pieces(pieces), device_weights(weights);
    Buffer<uint32_t> device_begins(begins), device_lens(lens), num_rows(std::vector<uint32_t>{rows});
    Buffer<unsigned long long> device_offsets(offsets);
    launch("tr_combine_pieces", {rows + 1, (hidden + 1023) / 1024}, {256}, 0, residual.data, device_pieces.data, device_begins.data,
           device_offsets.data, device_lens.data, device_weights.data, num_rows.data, top_k, hidden);
    if (!same_bits(residual.data, expected.data(), expected.size())) fail("pieces of %u columns are not summed along the tree", hidden);
}

static void rows_are_gathered(uint32_t words) {
    const std::vector<uint32_t> ids{4, 0, 4, 2};
    std::vector<uint32_t> rows(5 * words);
    for (uint32_t i = 0; i < rows.size(); ++i) rows[i] = i * 2654435761U;
    Buffer<uint32_t> from(rows), to(ids.size() * words), device_ids(ids), num_ids(std::vector<uint32_t>{4});
    launch("tr_gather_rows", {5, 2}, {256}, 0, to.data, from.data, device_ids.data, num_ids.data, words);
    for (uint32_t i = 0; i < to.count; ++i) {
        if (to[i] != rows[ids[i / words] * words + i % words]) fail("word %u of gathered rows of %u", i, words);
    }
}

static float from_e4m3(uint8_t x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    if (exponent == 15 && mantissa == 7) return NAN;
    const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    return x & 0x80 ? -value : value;
}

static void rows_are_rounded_to_e4m3(uint32_t cols, uint32_t part_cols) {
    const uint32_t rows = 5, stride = (cols + 7) / 8 * 8 + 8, parts = (cols + part_cols - 1) / part_cols;
    Random random{cols};
    std::vector<uint16_t> values(rows * stride, 0x7FC0); // NaN behind the columns
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t i = 0; i < cols; ++i) values[row * stride + i] = row == 1 ? 0 : to_bf16(random.normal() * (row == 2 ? 1e-39F : 100));
    }
    values[3 * stride + cols - 1] = 0x7F80; // infinity
    Buffer<uint16_t> from(values);
    Buffer<uint8_t> to(rows * stride);
    Buffer<float> scales(rows * parts);
    Buffer<uint32_t> num_rows(std::vector<uint32_t>{rows});
    launch("tr_round_e4m3", {rows + 1, parts + 1}, {256}, 32,
           RoundArgs{to.data, scales.data, from.data, num_rows.data, cols, part_cols, stride, stride, parts});
    for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t part = 0; part < parts; ++part) {
            const uint32_t begin = part * part_cols, end = std::min(cols, begin + part_cols);
            float amax = 0;
            for (uint32_t i = begin; i < end; ++i) amax = std::max(amax, std::fabs(from_bf16(values[row * stride + i])));
            const float scale = scales[row * parts + part];
            if (row == 3 && end == cols ? !std::isnan(scale) : row == 1 || row == 2 ? scale != 0 : std::fabs(scale * 448 - amax) > amax * 1e-6F) {
                fail("scale of row %u is %g, its largest %g", row, scale, amax);
            }
            for (uint32_t i = begin; i < (end == cols ? stride : end); ++i) {
                const float got = from_e4m3(to[row * stride + i]);
                const bool is_zero = i >= end || scale == 0 || std::isnan(scale);
                const double x = is_zero ? 0 : from_bf16(values[row * stride + i]) / static_cast<double>(scale);
                // Half a step of three bits, or of the least exponent.
                check_close("e4m3", row * stride + i, got, x, std::max(std::fabs(x) / 16, 1.0 / 1024) * 1.0001);
            }
        }
    }
}

int main() {
    for (uint32_t hidden : {1U, 7U, 32U, 40U, 2050U}) embeddings_are_looked_up(hidden);
    norms_and_scores(32, 8, 2);
    norms_and_scores(40, 4, 1);
    norms_and_scores(71, 3, 3);
    norms_and_scores(1024, 17, 2);
    norms_and_scores(2330, 6, 3);
    a_row_that_is_not_finite_is_nan();
    for (bool is_q8 : {false, true}) {
        heads_are_rotated_and_kept(4, 2, 32, is_q8);
        heads_are_rotated_and_kept(8, 1, 6, is_q8);
        heads_are_rotated_and_kept(3, 3, 64, is_q8);
        heads_are_rotated_and_kept(2, 1, 40, is_q8);
        heads_are_rotated_and_kept(4, 4, 128, is_q8);
    }
    for (uint32_t hidden : {4U, 33U, 1500U}) pieces_are_summed_along_the_tree(hidden);
    for (uint32_t words : {1U, 16U, 37U, 2048U}) rows_are_gathered(words);
    rows_are_rounded_to_e4m3(1, 1);
    rows_are_rounded_to_e4m3(40, 40);
    rows_are_rounded_to_e4m3(4100, 4100);
    rows_are_rounded_to_e4m3(300, 64);
    puts("rows: passed");
}
