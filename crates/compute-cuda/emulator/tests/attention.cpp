// Paged attention against a plain softmax in f64, and against itself: a row's bits do not depend on what else is computed.
#include "check.h"

constexpr uint32_t PAGE = 64, CHUNK = 8 * PAGE, ALL = 0xFFFFFFFFU;

struct AttendItem {
    uint32_t row_begin, num_rows, sequence, chunk_begin, chunk_end, num_parts, slot_begin, counter;
};

struct AttendArgs {
    uint16_t *out;
    const uint16_t *q;
    const uint8_t *pages;
    const uint32_t *positions, *tables;
    const AttendItem *items;
    const uint32_t *num_items;
    float *slot_outputs, *slot_softmax;
    uint32_t *counters;
    uint32_t out_stride, table_stride, num_heads, num_kv_heads, head_dim, window;
};

struct Shape {
    uint32_t num_heads, num_kv_heads, head_dim, window;
    bool is_q8;

    uint32_t padded() const { return head_dim <= 32 ? 32 : head_dim <= 64 ? 64 : 128; }
    uint32_t group() const { return num_heads / num_kv_heads; }
    /// Bytes of a key head in a page.
    size_t head_bytes() const { return is_q8 ? 2 * PAGE * padded() + 2 * PAGE * 4 : 2 * PAGE * padded() * 2; }
};

/// Sequences with known keys, values and queries, in pages that lie anywhere.
struct Cache {
    Shape shape;
    std::vector<uint32_t> lengths;
    uint32_t table_stride;
    std::vector<float> keys, values; // as the cache has them: [sequence][position][head][head_dim], all as long as the longest
    std::vector<uint16_t> queries;
    Buffer<uint8_t> pages;
    Buffer<uint32_t> tables;

    static uint32_t longest(const std::vector<uint32_t> &lengths) { return *std::max_element(lengths.begin(), lengths.end()); }
    static uint32_t num_pages(const std::vector<uint32_t> &lengths) {
        return static_cast<uint32_t>(lengths.size()) * ((longest(lengths) + PAGE - 1) / PAGE + 1);
    }
    size_t at(uint32_t sequence, uint32_t position, uint32_t head, uint32_t heads) const {
        return ((static_cast<size_t>(sequence) * longest(lengths) + position) * heads + head) * shape.head_dim;
    }
    uint8_t *head_of(uint32_t sequence, uint32_t position, uint32_t head) {
        const size_t page = tables[sequence * table_stride + position / PAGE];
        return pages.data + (page * shape.num_kv_heads + head) * shape.head_bytes();
    }

    Cache(Shape shape, std::vector<uint32_t> lengths_, uint64_t seed)
        : shape(shape), lengths(std::move(lengths_)), table_stride((longest(lengths) + PAGE - 1) / PAGE + 1),
          keys(lengths.size() * longest(lengths) * shape.num_kv_heads * shape.head_dim), values(keys.size()),
          queries(lengths.size() * longest(lengths) * shape.num_heads * shape.head_dim),
          pages(num_pages(lengths) * shape.num_kv_heads * shape.head_bytes()), tables(lengths.size() * table_stride) {
        Random random{seed};
        for (auto &x : keys) x = random.normal() * 2;
        for (auto &x : values) x = random.normal();
        for (auto &x : queries) x = to_f16(random.normal() * 1.4427F / std::sqrt(static_cast<float>(shape.head_dim)));
        std::vector<uint32_t> ids(num_pages(lengths));
        for (uint32_t i = 0; i < ids.size(); ++i) ids[i] = i;
        for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[random.below(static_cast<uint32_t>(i))]);
        for (uint32_t s = 0, next = 0; s < lengths.size(); ++s) {
            for (uint32_t p = 0; p < table_stride; ++p) tables[s * table_stride + p] = p * PAGE < lengths[s] ? ids[next++] : ALL;
            for (uint32_t position = 0; position < lengths[s]; ++position) {
                for (uint32_t h = 0; h < shape.num_kv_heads; ++h) {
                    const size_t from = at(s, position, h, shape.num_kv_heads);
                    put(head_of(s, position, h), position % PAGE, keys.data() + from, false);
                    put(head_of(s, position, h), position % PAGE, values.data() + from, true);
                }
            }
        }
    }

    /// Writes a key or value into its page, and rounds `x` to what is there.
    void put(uint8_t *head, uint32_t token, float *x, bool is_value) const {
        const uint32_t hd = shape.padded();
        float amax = 0;
        for (uint32_t d = 0; d < shape.head_dim; ++d) amax = std::max(amax, std::fabs(x[d]));
        const float scale = amax / 127;
        for (uint32_t d = 0; d < hd; ++d) {
            const size_t place = (is_value ? PAGE * hd : 0) + (is_value ? d * PAGE + token : token * hd + d);
            const float value = d < shape.head_dim ? x[d] : 0;
            if (shape.is_q8) {
                const auto q = static_cast<int8_t>(std::nearbyint(value / scale));
                head[place] = static_cast<uint8_t>(q);
                if (d < shape.head_dim) x[d] = q * scale;
            } else {
                const uint16_t half = to_f16(value);
                memcpy(head + 2 * place, &half, 2);
                if (d < shape.head_dim) x[d] = from_f16(half);
            }
        }
        if (shape.is_q8) memcpy(head + 2 * PAGE * hd + 4 * ((is_value ? PAGE : 0) + token), &scale, 4);
    }

    /// What is behind the window is given back: entries that must not be read.
    void release(uint32_t sequence, uint32_t num_pages) {
        for (uint32_t p = 0; p < num_pages; ++p) tables[sequence * table_stride + p] = ALL;
    }
};

/// Rows of one sequence.
struct Span {
    uint32_t sequence, first, num_rows;
};

/// How a step is cut.
struct Cut {
    bool wide = false;       // wide tiles also where narrow ones would do
    uint32_t parts = 1;      // at most
    uint32_t blocks = 3;     // that share the items
    uint32_t tile_rows = 64; // at most
    uint32_t pairs = 128;    // (row, head) of a wide tile, at most
};

struct Plan {
    std::vector<AttendItem> narrow, wide;
    uint32_t num_slots = 0;
};

/// The host's plan of a step, as README.md asks for it.
static Plan plan(const Shape &shape, const std::vector<Span> &spans, Cut cut) {
    Plan plan;
    uint32_t row = 0;
    for (const Span &span : spans) {
        const bool is_narrow = span.num_rows * shape.group() <= 16 && !cut.wide;
        uint32_t done = 0;
        while (done < span.num_rows) {
            const uint32_t position = span.first + done;
            uint32_t rows = is_narrow ? span.num_rows : std::max(1U, cut.pairs / shape.group());
            rows = std::min({rows, span.num_rows - done, PAGE - position % PAGE, cut.tile_rows});
            const uint32_t begin = (position + 1 > shape.window ? position + 1 - shape.window : 0) / CHUNK;
            const uint32_t end = (position + rows + CHUNK - 1) / CHUNK, chunks = end - begin;
            const uint32_t parts = std::min(cut.parts, chunks);
            for (uint32_t part = 0; part < parts; ++part) {
                (is_narrow ? plan.narrow : plan.wide)
                    .push_back({row + done, rows, span.sequence, begin + chunks * part / parts, begin + chunks * (part + 1) / parts,
                                parts, plan.num_slots, row + done});
            }
            plan.num_slots += parts > 1 ? rows * chunks : 0;
            done += rows;
        }
        row += span.num_rows;
    }
    return plan;
}

/// Attention outputs of a step, [rows, num_heads * head_dim] bf16.
static std::vector<uint16_t> attend(Cache &cache, const std::vector<Span> &spans, Cut cut) {
    const Shape &shape = cache.shape;
    const uint32_t hd = shape.padded(), width = shape.num_heads * shape.head_dim, stride = width + 8;
    uint32_t num_rows = 0;
    for (const Span &span : spans) num_rows += span.num_rows;
    Buffer<uint16_t> q(static_cast<size_t>(num_rows) * shape.num_heads * hd), out(static_cast<size_t>(num_rows) * stride);
    Buffer<uint32_t> positions(num_rows), counts(2), counters(std::vector<uint32_t>(num_rows * shape.num_kv_heads, 0));
    uint32_t row = 0;
    for (const Span &span : spans) {
        for (uint32_t i = 0; i < span.num_rows; ++i, ++row) {
            positions[row] = span.first + i;
            for (uint32_t h = 0; h < shape.num_heads; ++h) {
                for (uint32_t d = 0; d < hd; ++d) {
                    const size_t from = cache.at(span.sequence, span.first + i, h, shape.num_heads) + d;
                    q[(static_cast<size_t>(row) * shape.num_heads + h) * hd + d] = d < shape.head_dim ? cache.queries[from] : 0;
                }
            }
        }
    }
    Plan planned = plan(shape, spans, cut);
    counts[0] = static_cast<uint32_t>(planned.narrow.size());
    counts[1] = static_cast<uint32_t>(planned.wide.size());
    planned.narrow.push_back({ALL, ALL, ALL, ALL, ALL, ALL, ALL, ALL}); // behind the last: never read
    planned.wide.push_back(planned.narrow.back());
    Buffer<AttendItem> narrow(planned.narrow), wide(planned.wide);
    Buffer<float> slot_outputs(static_cast<size_t>(planned.num_slots + 1) * shape.num_heads * hd);
    Buffer<float> slot_softmax(static_cast<size_t>(planned.num_slots + 1) * shape.num_heads * 2);
    AttendArgs args{out.data, q.data, cache.pages.data, positions.data, cache.tables.data, narrow.data, counts.data,
                    slot_outputs.data, slot_softmax.data, counters.data, stride, cache.table_stride, shape.num_heads,
                    shape.num_kv_heads, shape.head_dim, shape.window};
    const std::string tail = std::string(shape.is_q8 ? "_q8_" : "_f16_") + std::to_string(hd);
    launch(("tr_attend_narrow" + tail).c_str(), {cut.blocks, shape.num_kv_heads}, {128}, 4368, args);
    args.items = wide.data;
    args.num_items = counts.data + 1;
    launch(("tr_attend_wide" + tail).c_str(), {cut.blocks}, {128}, shape.is_q8 ? 448 * hd + 1600 : 640 * hd + 64, args);
    for (size_t i = 0; i < counters.count; ++i) {
        if (counters[i] != 0) fail("counter %zu was left at %u", i, counters[i]);
    }
    std::vector<uint16_t> result;
    for (row = 0; row < num_rows; ++row) {
        const uint16_t *from = out.data + static_cast<size_t>(row) * stride;
        result.insert(result.end(), from, from + width);
        for (uint32_t i = width; i < stride; ++i) {
            if (from[i] != 0xFFFF) fail("row %u: column %u behind the last was written", row, i);
        }
    }
    return result;
}

static void check_against_softmax(const Cache &cache, const std::vector<Span> &spans, const std::vector<uint16_t> &out) {
    const Shape &shape = cache.shape;
    uint32_t row = 0;
    for (const Span &span : spans) {
        for (uint32_t i = 0; i < span.num_rows; ++i, ++row) {
            const uint32_t position = span.first + i;
            const uint32_t first = position + 1 > shape.window ? position + 1 - shape.window : 0;
            for (uint32_t h = 0; h < shape.num_heads; ++h) {
                std::vector<double> expected(shape.head_dim, 0.0);
                double total = 0;
                for (uint32_t p = first; p <= position; ++p) {
                    const size_t q = cache.at(span.sequence, position, h, shape.num_heads);
                    const size_t k = cache.at(span.sequence, p, h / shape.group(), shape.num_kv_heads);
                    double score = 0;
                    for (uint32_t d = 0; d < shape.head_dim; ++d) {
                        score += static_cast<double>(from_f16(cache.queries[q + d])) * cache.keys[k + d];
                    }
                    const double weight = std::exp2(score);
                    total += weight;
                    for (uint32_t d = 0; d < shape.head_dim; ++d) expected[d] += weight * cache.values[k + d];
                }
                for (uint32_t d = 0; d < shape.head_dim; ++d) {
                    const size_t at = (static_cast<size_t>(row) * shape.num_heads + h) * shape.head_dim + d;
                    const double exact = expected[d] / total;
                    check_close("attention", at, from_bf16(out[at]), exact, std::fabs(exact) / 256 + 1e-3);
                }
            }
        }
    }
}

/// The rows of a span of a step, by place of the span.
static std::vector<uint16_t> rows_of(const Shape &shape, const std::vector<uint16_t> &out, uint32_t begin, uint32_t count) {
    const size_t width = shape.num_heads * shape.head_dim;
    return {out.begin() + static_cast<long>(begin * width), out.begin() + static_cast<long>((begin + count) * width)};
}

static void rows_are_a_softmax(Shape shape, const std::vector<Span> &spans) {
    std::vector<uint32_t> lengths;
    for (const Span &span : spans) {
        if (lengths.size() <= span.sequence) lengths.resize(span.sequence + 1, 1);
        lengths[span.sequence] = span.first + span.num_rows;
    }
    Cache cache(shape, lengths, shape.head_dim + shape.num_heads);
    for (const Span &span : spans) {
        const uint32_t first = span.first + 1 > shape.window ? span.first + 1 - shape.window : 0;
        cache.release(span.sequence, first / PAGE);
    }
    const std::vector<uint16_t> together = attend(cache, spans, {});
    check_against_softmax(cache, spans, together);
    // Alone, in every way in which a step may be cut, and in any order of warps and blocks.
    uint32_t begin = 0;
    for (const Span &span : spans) {
        const uint32_t last = span.first + span.num_rows - 1;
        for (uint32_t position : {span.first, span.first + span.num_rows / 2, last}) {
            const std::vector<uint16_t> expected = rows_of(shape, together, begin + position - span.first, 1);
            for (Cut cut : {Cut{}, Cut{false, 64, 5, 64}, Cut{true, 1, 1, 64}, Cut{true, 3, 2, 64}}) {
                tr_emulator_seed(position * 4 + cut.parts);
                if (attend(cache, {{span.sequence, position, 1}}, cut) != expected) {
                    fail("position %u of %u heads of %u differs alone (wide %d, %u parts)", position, shape.num_heads, shape.head_dim,
                         cut.wide, cut.parts);
                }
            }
        }
        begin += span.num_rows;
    }
    // All of it cut otherwise: into tiles of every number of strips.
    for (Cut cut : {Cut{true, 1, 2, 5}, Cut{false, 2, 7, 64}, Cut{true, 1, 3, 64, 64}, Cut{true, 2, 1, 64, 96}, Cut{true, 1, 1, 64, 128}}) {
        tr_emulator_seed(cut.pairs + cut.parts + cut.blocks);
        if (attend(cache, spans, cut) != together) {
            fail("%u heads of %u differ when the step is cut otherwise (%u parts, %u blocks, tiles of %u)", shape.num_heads, shape.head_dim,
                 cut.parts, cut.blocks, cut.pairs);
        }
    }
}

/// A token that is not a number spoils the rows that see it. Of the others: with q8 none, with f16 none of an earlier page.
static void what_is_not_a_number_stays_one(bool is_q8) {
    const Shape shape{4, 2, 32, ALL, is_q8};
    Cache cache(shape, {200}, 5);
    const uint32_t bad = 130, nan = 0x7FC00000; // in the third page
    for (uint32_t h = 0; h < 2; ++h) {
        uint8_t *head = cache.head_of(0, bad, h);
        for (uint32_t d = 0; d < 32 && !is_q8; ++d) head[2 * (PAGE * 32 + d * PAGE + bad % PAGE) + 1] = 0x7E;
        if (is_q8) memcpy(head + 2 * PAGE * 32 + 4 * (PAGE + bad % PAGE), &nan, 4);
    }
    for (bool is_wide : {true, false}) {
        const std::vector<uint16_t> out = is_wide ? attend(cache, {{0, 100, 100}}, {}) : attend(cache, {{0, 126, 8}}, {});
        const uint32_t first = is_wide ? 100 : 126;
        for (uint32_t row = 0; row < out.size() / 128; ++row) {
            const bool sees_it = first + row >= bad, shares_page = (first + row) / PAGE == bad / PAGE;
            for (uint32_t i = 0; i < 128; ++i) {
                const bool is_nan = std::isnan(from_bf16(out[row * 128 + i]));
                if (sees_it ? !is_nan : is_nan && (is_q8 || !shares_page)) fail("row at %u is %s", first + row, is_nan ? "NaN" : "finite");
            }
        }
    }
}

/// Values that are small or large keep their bits.
static void scales_of_any_size(float factor) {
    const Shape shape{4, 1, 32, ALL, true};
    Cache cache(shape, {90}, 6), scaled(shape, {90}, 6);
    for (uint32_t position = 0; position < 90; ++position) {
        float scale;
        uint8_t *at = scaled.head_of(0, position, 0) + 2 * PAGE * 32 + 4 * (PAGE + position % PAGE);
        memcpy(&scale, at, 4);
        scale *= factor;
        memcpy(at, &scale, 4);
    }
    const std::vector<uint16_t> plain = attend(cache, {{0, 89, 1}}, {}), other = attend(scaled, {{0, 89, 1}}, {});
    for (size_t i = 0; i < plain.size(); ++i) {
        const float expected = from_bf16(plain[i]) * factor;
        check_close("a scaled value", i, from_bf16(other[i]), expected, std::fabs(expected) / 100 + factor * (factor < 1e-3F ? 1e-3 : 2e-4));
    }
}

static void random_steps(uint64_t seed) {
    Random random{seed * 7919 + 1};
    const uint32_t kv_heads = 1 + random.below(8), group = 1 + random.below(9);
    const uint32_t windows[] = {ALL, ALL, 1 + random.below(64), 64 + random.below(600)};
    const Shape shape{kv_heads * group, kv_heads, 2 * (1 + random.below(64)), windows[random.below(4)], random.below(2) == 0};
    std::vector<Span> spans;
    for (uint32_t s = 0; s < 1 + random.below(3); ++s) {
        const uint32_t first = random.below(3) == 0 ? random.below(700) : random.below(130);
        spans.push_back({s, first, random.below(2) == 0 ? 1 : 1 + random.below(std::max(2U, 24 / kv_heads))});
    }
    rows_are_a_softmax(shape, spans);
}

int main() {
    for (uint64_t seed = 0; seed < 12; ++seed) random_steps(seed);
    for (bool is_q8 : {false, true}) {
        rows_are_a_softmax({1, 1, 32, ALL, is_q8}, {{0, 0, 1}});
        rows_are_a_softmax({4, 4, 32, ALL, is_q8}, {{0, 0, 70}, {1, 63, 1}, {2, 64, 1}, {3, 0, 3}, {4, 127, 2}});
        rows_are_a_softmax({8, 2, 64, ALL, is_q8}, {{0, 10, 40}, {1, 130, 1}, {2, 5, 4}});
        rows_are_a_softmax({4, 1, 128, ALL, is_q8}, {{0, 100, 33}, {1, 200, 1}, {2, 0, 1}});
        rows_are_a_softmax({32, 1, 24, ALL, is_q8}, {{0, 60, 9}, {1, 0, 1}});
        rows_are_a_softmax({3, 1, 32, 600, is_q8}, {{0, 1100, 70}, {1, 1023, 2}});
        // Wide tiles of 65 to 128 (row, head): a warp with two strips beside one with one or none, over several chunks.
        rows_are_a_softmax({5, 1, 128, ALL, is_q8}, {{0, 1040, 14}});
        rows_are_a_softmax({7, 1, 64, 700, is_q8}, {{0, 1030, 13}, {1, 40, 11}});
        rows_are_a_softmax({128, 1, 32, ALL, is_q8}, {{0, 62, 3}});
        what_is_not_a_number_stays_one(is_q8);
    }
    rows_are_a_softmax({8, 2, 64, 40, false}, {{0, 90, 50}, {1, 300, 1}});
    rows_are_a_softmax({8, 1, 128, 64, true}, {{0, 127, 3}, {1, 63, 1}});
    rows_are_a_softmax({6, 2, 12, 1, false}, {{0, 62, 6}});
    rows_are_a_softmax({8, 1, 6, ALL, false}, {{0, 0, 66}});
    rows_are_a_softmax({14, 2, 14, 16, true}, {{0, 0, 30}, {1, 64, 1}});
    rows_are_a_softmax({8, 8, 64, ALL, false}, {{0, 511, 1}, {1, 512, 1}, {2, 500, 20}});
    rows_are_a_softmax({4, 1, 32, ALL, true}, {{0, 1090, 10}, {1, 1600, 1}});
    for (float factor : {1e-4F, 1e-2F, 6e3F}) scales_of_any_size(factor);
    puts("attention: passed");
}
