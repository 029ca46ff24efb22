// The choice of experts, their lists, and the best tokens of logits against plain loops with the host's rules.
#include "check.h"

constexpr uint32_t NONE = 0xFFFFFFFFU;
constexpr size_t ROUTE_SHARED = 4 * 257, SAMPLE_SHARED = 512;

struct RouteArgs {
    uint32_t *topk_ids;
    float *topk_weights;
    uint32_t *offsets, *row_of, *slot_of;
    const float *scores;
    const uint32_t *num_rows;
    uint32_t *chosen;
    uint32_t num_experts, top_k;
};

/// What a row's experts must be: of equal probabilities the lowest ids, ascending; NaN counts as least.
static std::vector<uint32_t> best_experts(const std::vector<float> &p, uint32_t top_k) {
    std::vector<uint32_t> order(p.size());
    for (uint32_t e = 0; e < order.size(); ++e) order[e] = e;
    auto rank = [&](uint32_t e) { return std::isnan(p[e]) ? -1.0F : p[e]; };
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return rank(a) > rank(b); });
    order.resize(top_k);
    std::sort(order.begin(), order.end());
    return order;
}

struct Routed {
    std::vector<uint32_t> ids, offsets, row_of, slot_of;
    std::vector<float> weights;

    bool operator==(const Routed &other) const {
        return ids == other.ids && offsets == other.offsets && row_of == other.row_of && slot_of == other.slot_of &&
               memcmp(weights.data(), other.weights.data(), weights.size() * 4) == 0;
    }
};

/// `scores` is empty for a dense model.
static Routed route(const std::vector<float> &scores, uint32_t rows, uint32_t num_experts, uint32_t top_k, bool is_one_kernel) {
    const uint32_t slots = rows * top_k;
    Buffer<uint32_t> ids(slots), offsets(num_experts + 1), row_of(slots), slot_of(slots), num_rows(std::vector<uint32_t>{rows});
    Buffer<float> weights(slots), device_scores(scores.empty() ? std::vector<float>{0} : scores);
    // One more at each place, so that what was there before must be kept.
    Buffer<uint32_t> chosen(std::vector<uint32_t>(num_experts, 0xFFFFFFFFU));
    const RouteArgs args{ids.data, weights.data, offsets.data, row_of.data, slot_of.data,
                         scores.empty() ? nullptr : device_scores.data, num_rows.data, chosen.data, num_experts, top_k};
    if (is_one_kernel) {
        launch("tr_route", {1}, {1024}, ROUTE_SHARED, args);
    } else {
        launch("tr_choose_experts", {(rows + 7) / 8 + 1}, {256}, 0, args);
        const uint32_t threads = rows % 2 == 0 ? 1024 : 32 * std::min(32U, num_experts);
        launch("tr_expert_lists", {1}, {threads}, ROUTE_SHARED, args);
    }
    for (uint32_t e = 0; e < num_experts; ++e) {
        uint32_t count = offsets.data[e + 1] - offsets.data[e];
        if (chosen.data[e] + 1 != count) fail("expert %u was chosen %u times, counted %u", e, count, chosen.data[e] + 1);
    }
    auto all = [](auto &buffer) { return std::vector(buffer.data, buffer.data + buffer.count); };
    return {all(ids), all(offsets), all(row_of), all(slot_of), all(weights)};
}

static void check_lists(const Routed &routed, uint32_t rows, uint32_t num_experts, uint32_t top_k) {
    uint32_t slot = 0;
    for (uint32_t e = 0; e < num_experts; ++e) {
        if (routed.offsets[e] != slot) fail("expert %u begins at %u, expected %u", e, routed.offsets[e], slot);
        for (uint32_t row = 0; row < rows; ++row) {
            for (uint32_t k = 0; k < top_k; ++k) {
                if (routed.ids[row * top_k + k] != e) continue;
                if (routed.row_of[slot] != row || routed.slot_of[row * top_k + k] != slot) fail("slot %u of expert %u is wrong", slot, e);
                ++slot;
            }
        }
    }
    if (routed.offsets[num_experts] != slot || slot != rows * top_k) fail("the lists have %u slots", slot);
}

static void experts_are_chosen(uint32_t rows, uint32_t num_experts, uint32_t top_k) {
    Random random{rows * 1000 + num_experts * 10 + top_k};
    std::vector<float> scores(rows * num_experts);
    // Few different scores: many are equal.
    for (float &x : scores) x = random.below(4) == 0 ? static_cast<float>(random.below(3)) : random.normal() * 3;
    const Routed routed = route(scores, rows, num_experts, top_k, false);
    if (!(route(scores, rows, num_experts, top_k, true) == routed)) fail("one kernel and two differ for %u rows", rows);
    check_lists(routed, rows, num_experts, top_k);
    for (uint32_t row = 0; row < rows; ++row) {
        const std::vector<float> own(scores.begin() + row * num_experts, scores.begin() + (row + 1) * num_experts);
        const std::vector<uint32_t> expected = best_experts(own, top_k);
        double sum = 0;
        for (uint32_t e : expected) sum += std::exp(static_cast<double>(own[e]));
        for (uint32_t k = 0; k < top_k; ++k) {
            if (routed.ids[row * top_k + k] != expected[k]) fail("row %u has expert %u, expected %u", row, routed.ids[row * top_k + k], expected[k]);
            check_close("weight", row * top_k + k, routed.weights[row * top_k + k], std::exp(static_cast<double>(own[expected[k]])) / sum, 1e-6);
        }
        if (row % 7 == 0) { // alone
            const Routed alone = route(own, 1, num_experts, top_k, row % 2 == 0);
            if (memcmp(alone.weights.data(), routed.weights.data() + row * top_k, top_k * 4) != 0) fail("row %u differs alone", row);
        }
    }
}

static void odd_scores_give_distinct_experts() {
    const std::vector<float> scores{NAN, NAN, NAN, NAN, 1, NAN, 3, 2, -INFINITY, -INFINITY, 0, -INFINITY, 5, 5, 5, 5};
    const Routed routed = route(scores, 4, 4, 2, true);
    const std::vector<uint32_t> expected{0, 1, 0, 1, 0, 2, 0, 1}; // a softmax with a NaN is NaN
    if (routed.ids != expected) fail("experts of odd scores");
    if (!std::isnan(routed.weights[0]) || !std::isnan(routed.weights[2])) fail("NaN vanished");
    if (routed.weights[4] != 0 || routed.weights[5] != 1) fail("weights beside minus infinity are %g, %g", routed.weights[4], routed.weights[5]);
    if (routed.weights[6] != 0.5F) fail("equal weights");
    check_lists(routed, 4, 4, 2);
}

static void a_dense_model_has_one_expert() {
    const Routed routed = route({}, 37, 1, 1, false);
    for (float weight : routed.weights) {
        if (weight != 1) fail("weight %g of a dense model", weight);
    }
    check_lists(routed, 37, 1, 1);
}

struct Best {
    uint32_t id;
    float logit;
    uint32_t bad_id, zero;
};

struct TopSum {
    double sum;
    float max;
    uint32_t zero;
};

static std::vector<Best> argmax(const std::vector<float> &logits, uint32_t rows) {
    Buffer<float> device(logits);
    Buffer<Best> out(rows);
    Buffer<uint32_t> num_rows(std::vector<uint32_t>{rows});
    launch("tr_argmax", {rows + 1}, {1024}, SAMPLE_SHARED, out.data, device.data, num_rows.data, static_cast<uint32_t>(logits.size() / rows));
    return {out.data, out.data + rows};
}

static void the_best_token_is_found(uint32_t vocab) {
    Random random{vocab};
    const uint32_t rows = 4, n = std::min(20U, vocab);
    std::vector<float> logits(rows * vocab);
    for (float &x : logits) x = static_cast<float>(random.below(2000)) * 0.01F - 10;
    if (vocab > 3) logits[vocab + 3] = -INFINITY;
    const std::vector<Best> best = argmax(logits, rows);
    Buffer<float> device(logits), values(rows * n);
    Buffer<uint32_t> ids(rows * n), num_rows(std::vector<uint32_t>{rows});
    Buffer<TopSum> sums(rows);
    launch("tr_top_logits", {rows + 1}, {1024}, SAMPLE_SHARED, ids.data, values.data, sums.data, device.data, num_rows.data, n, vocab);
    for (uint32_t row = 0; row < rows; ++row) {
        const float *own = logits.data() + row * vocab;
        std::vector<uint32_t> order(vocab);
        for (uint32_t id = 0; id < vocab; ++id) order[id] = id;
        std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return own[a] > own[b]; });
        if (best[row].id != order[0] || best[row].logit != own[order[0]] || best[row].bad_id != NONE) fail("row %u has argmax %u, expected %u", row, best[row].id, order[0]);
        double sum = 0;
        for (uint32_t id = 0; id < vocab; ++id) sum += std::exp(static_cast<double>(own[id]) - own[order[0]]);
        check_close("sum", row, sums[row].sum, sum, sum * 1e-14);
        if (sums[row].max != own[order[0]]) fail("maximum of row %u", row);
        for (uint32_t k = 0; k < n; ++k) {
            if (ids[row * n + k] != order[k] || values[row * n + k] != own[order[k]]) fail("token %u of the best of row %u", k, row);
        }
    }
}

static void ties_and_odd_logits() {
    const float infinity = INFINITY;
    const std::vector<float> logits{1, 2, 2, 0,                       // of equal ones the lower id
                                    -0.0F, 0, -1, -2,                 // equal for the argmax
                                    -infinity, -infinity, -infinity, -infinity, // none left: the first, as the host
                                    0, NAN, 9, infinity};             // refused, by the first that is bad
    const std::vector<Best> best = argmax(logits, 4);
    if (best[0].id != 1 || best[1].id != 0) fail("ties: %u, %u", best[0].id, best[1].id);
    if (best[2].id != 0 || best[2].logit != -infinity || best[2].bad_id != NONE) fail("all masked");
    if (best[3].bad_id != 1) fail("bad logit at %u", best[3].bad_id);
    const std::vector<Best> bad = argmax({NAN, NAN, NAN, infinity, 1, 0}, 2);
    if (bad[0].id != NONE || bad[0].bad_id != 0 || bad[1].bad_id != 0) fail("rows that are not numbers");
    // The order of the best tokens is total: 0 before -0.
    Buffer<float> device(std::vector<float>{-0.0F, 0, -1}), values(3);
    Buffer<uint32_t> ids(3), num_rows(std::vector<uint32_t>{1});
    Buffer<TopSum> sums(1);
    launch("tr_top_logits", {1}, {1024}, SAMPLE_SHARED, ids.data, values.data, sums.data, device.data, num_rows.data, 3U, 3U);
    if (ids[0] != 1 || ids[1] != 0 || ids[2] != 2) fail("order of zeros");
}

int main() {
    for (uint32_t num_experts : {2U, 3U, 8U}) {
        for (uint32_t top_k = 1; top_k <= num_experts; ++top_k) experts_are_chosen(9, num_experts, top_k);
    }
    experts_are_chosen(1, 8, 2);
    experts_are_chosen(300, 8, 2);
    experts_are_chosen(1001, 8, 2);
    experts_are_chosen(130, 3, 3);
    experts_are_chosen(40, 33, 5);
    experts_are_chosen(10, 256, 7);
    odd_scores_give_distinct_experts();
    a_dense_model_has_one_expert();
    for (uint32_t vocab : {1U, 5U, 37U, 1024U, 3001U}) the_best_token_is_found(vocab);
    ties_and_odd_logits();
    puts("route: passed");
}
