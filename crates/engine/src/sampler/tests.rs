//! What the sampler promises, parameter by parameter.

use std::collections::HashMap;

use tramontane_compute::sampling::best;

use super::*;

fn greedy() -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        ..SamplingParams::default()
    }
}

fn sample_with(
    logits: &[f32],
    params: &SamplingParams,
    position: u32,
    seen: &SeenTokens,
) -> Result<TokenOutput, SampleError> {
    let draw = Draw {
        params,
        position,
        seen,
        eos_ids: &[0],
        output: &[],
        mask: None,
    };
    Sampler::default().sample(Row::Logits(&mut logits.to_vec()), draw)
}

fn sample(logits: &[f32], params: &SamplingParams) -> TokenId {
    sample_with(logits, params, 0, &SeenTokens::default())
        .unwrap()
        .id
}

/// How often each token comes in 4000 draws of different positions.
fn histogram(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
    let mut counts = vec![0; logits.len()];
    for position in 0..4000 {
        let output = sample_with(logits, params, position, &SeenTokens::default()).unwrap();
        counts[output.id as usize] += 1;
    }
    counts
}

fn probabilities(p: &[f32]) -> Vec<f32> {
    p.iter().map(|p| p.ln()).collect()
}

#[test]
fn temperature_zero_takes_the_best_and_the_lowest_id_of_a_tie() {
    assert_eq!(sample(&[1.0, 3.0, 2.0, 3.0], &greedy()), 1);
    assert_eq!(sample(&[f32::NEG_INFINITY, -5.0], &greedy()), 1);
}

#[test]
fn bias_and_penalties_come_before_the_choice() {
    let seen = SeenTokens {
        output: HashMap::from([(1, 3), (2, 1)]),
        prompt: [1, 3].into_iter().collect(),
    };
    let greedy_after = |logits: &[f32], change: &dyn Fn(&mut SamplingParams)| {
        let mut params = greedy();
        change(&mut params);
        sample_with(logits, &params, 5, &seen).unwrap().id
    };
    assert_eq!(
        greedy_after(&[1.0, 0.0], &|p| p.logit_bias = vec![(1, 1.5)]),
        1
    );
    // Presence: once, for output tokens only.
    assert_eq!(
        greedy_after(&[0.0, 1.5, 1.0, 0.9], &|p| p.presence_penalty = 1.0),
        3
    );
    // Frequency: 3 * 0.4 off token 1, 0.4 off token 2.
    assert_eq!(
        greedy_after(&[0.0, 1.5, 0.8, 0.3], &|p| p.frequency_penalty = 0.4),
        2
    );
    // Repetition: prompt and output, divides what is positive, multiplies what is negative.
    assert_eq!(
        greedy_after(&[0.9, 1.6, 1.7, 1.6], &|p| p.repetition_penalty = 2.0),
        0
    );
    assert_eq!(
        greedy_after(&[-1.9, -1.0, -1.0, -1.0], &|p| p.repetition_penalty = 2.0),
        0
    );
}

#[test]
fn stop_ids_and_eos_are_masked_before_min_tokens() {
    let params = SamplingParams {
        min_tokens: 2,
        stop_ids: vec![1],
        ..greedy()
    };
    let at = |position| {
        let seen = SeenTokens::default();
        sample_with(&[3.0, 2.0, 1.0], &params, position, &seen)
            .unwrap()
            .id
    };
    assert_eq!([at(0), at(1), at(2)], [2, 2, 0]);
}

#[test]
fn draws_follow_the_probabilities() {
    let params = SamplingParams {
        seed: 7,
        ..SamplingParams::default()
    };
    let counts = histogram(&probabilities(&[0.5, 0.2, 0.2, 0.1]), &params);
    // Four standard deviations are at most 126.
    for (got, expected) in counts.iter().zip([2000_u32, 800, 800, 400]) {
        assert!(got.abs_diff(expected) < 130, "{counts:?}");
    }
}

#[test]
fn temperature_sharpens_and_flattens() {
    let logits = probabilities(&[0.8, 0.2]);
    let share = |temperature| {
        let params = SamplingParams {
            temperature,
            seed: 3,
            ..SamplingParams::default()
        };
        f64::from(histogram(&logits, &params)[0]) / 4000.0
    };
    // p^(1/T), normalised: 0.941 at one half, 0.667 at two.
    assert!((share(0.5) - 0.941).abs() < 0.03);
    assert!((share(2.0) - 0.667).abs() < 0.03);
    assert!((share(1e-6) - 1.0).abs() < 1e-9);
}

#[test]
fn filters_keep_exactly_the_tokens_they_name() {
    let logits = probabilities(&[0.1, 0.3, 0.05, 0.3, 0.25]);
    let kept = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams {
            seed: 11,
            ..SamplingParams::default()
        };
        change(&mut params);
        let counts = histogram(&logits, &params);
        (0..counts.len())
            .filter(|&i| counts[i] > 0)
            .collect::<Vec<_>>()
    };
    assert_eq!(kept(&|_| ()), [0, 1, 2, 3, 4]);
    assert_eq!(kept(&|p| p.top_k = 1), [1], "the lowest id of a tie");
    assert_eq!(kept(&|p| p.top_k = 3), [1, 3, 4]);
    assert_eq!(kept(&|p| p.top_p = 0.25), [1]);
    assert_eq!(kept(&|p| p.top_p = 0.55), [1, 3], "reached by the second");
    assert_eq!(kept(&|p| p.top_p = 0.9), [0, 1, 3, 4]);
    assert_eq!(
        kept(&|p| p.min_p = 0.3),
        [0, 1, 3, 4],
        "0.1 is a third of 0.3"
    );
    assert_eq!(kept(&|p| p.min_p = 0.9), [1, 3]);
    // top-p works on what top-k left: 0.3 + 0.3 of 0.85 is 0.706.
    assert_eq!(kept(&|p| (p.top_k, p.top_p) = (3, 0.7)), [1, 3]);
    assert_eq!(kept(&|p| (p.top_k, p.top_p) = (3, 0.72)), [1, 3, 4]);
    assert_eq!(kept(&|p| (p.top_p, p.min_p) = (0.9, 0.5)), [1, 3, 4]);
}

#[test]
fn a_nucleus_larger_than_the_first_guess_is_found() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 1000) as f32 * 1e-4).collect();
    let mut sampler = Sampler::default();
    let scale = Scale::new(max(&logits), 1.0);
    for top_p in [0.01, 0.5, 0.9, 0.999_999] {
        sampler.fill_nucleus(&logits, scale, top_p);
        let mut sorted: Vec<f64> = logits.iter().map(|&l| scale.weight(l)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let total: f64 = logits.iter().map(|&l| scale.weight(l)).sum();
        keep_nucleus(&mut sorted, top_p * total);
        assert_eq!(sampler.weights, sorted, "top_p {top_p}");
    }
}

#[test]
fn the_last_token_of_a_bad_word_is_masked_behind_its_others() {
    let params = SamplingParams {
        bad_words: vec![vec![2], vec![0, 1, 3], vec![1, 1]],
        ..greedy()
    };
    let seen = SeenTokens::default();
    let after = |output: &[TokenId]| {
        let draw = Draw {
            params: &params,
            position: output.len() as u32,
            seen: &seen,
            eos_ids: &[],
            output,
            mask: None,
        };
        let mut logits = [0.0, 1.0, 9.0, 2.0];
        let row = Row::Logits(&mut logits);
        Sampler::default().sample(row, draw).unwrap().id
    };
    assert_eq!(after(&[]), 3);
    assert_eq!(after(&[0, 1]), 0, "3 and 1 would complete one");
    assert_eq!(after(&[1, 0]), 3);
    assert_eq!(after(&[0, 1, 1]), 3);
}

#[test]
fn log_probabilities_are_those_of_the_raw_logits() {
    let logits = probabilities(&[0.1, 0.3, 0.05, 0.3, 0.25]);
    let params = SamplingParams {
        logprobs: Some(3),
        logit_bias: vec![(2, 50.0)],
        temperature: 0.0,
        ..SamplingParams::default()
    };
    let output = sample_with(&logits, &params, 4, &SeenTokens::default()).unwrap();
    assert_eq!((output.index, output.id), (4, 2));
    assert!((output.logprob.unwrap() - 0.05_f32.ln()).abs() < 1e-6);
    let ids: Vec<_> = output.top_logprobs.iter().map(|t| t.id).collect();
    assert_eq!(ids, [1, 3, 4]);
    assert!((output.top_logprobs[2].logprob - 0.25_f32.ln()).abs() < 1e-6);
    let only_own = SamplingParams {
        logprobs: Some(0),
        ..params
    };
    let output = sample_with(&logits, &only_own, 4, &SeenTokens::default()).unwrap();
    assert!(output.logprob.is_some() && output.top_logprobs.is_empty());
}

#[test]
fn a_seed_and_a_position_decide_the_draw_alone() {
    let logits = vec![0.0; 500];
    let ids = |seed| {
        let params = SamplingParams {
            seed,
            ..SamplingParams::default()
        };
        let seen = SeenTokens::default();
        let at = |position| sample_with(&logits, &params, position, &seen).unwrap().id;
        (0..20).map(at).collect::<Vec<_>>()
    };
    assert_eq!(ids(1), ids(1));
    assert_ne!(ids(1), ids(2));
    assert_ne!(ids(1), ids(1 + (1 << 40)), "all 64 bits of a seed count");
}

#[test]
fn numbers_that_are_none_are_refused() {
    let refused = |logits: &[f32], params: &SamplingParams| {
        sample_with(logits, params, 0, &SeenTokens::default()).unwrap_err()
    };
    let drawn = SamplingParams::default();
    assert_eq!(
        refused(&[0.0, f32::NAN], &greedy()),
        SampleError::NotFinite { id: 1 }
    );
    assert_eq!(
        refused(&[f32::INFINITY, 0.0], &drawn),
        SampleError::NotFinite { id: 0 }
    );
    assert_eq!(
        refused(&[f32::NEG_INFINITY; 2], &drawn),
        SampleError::NoCandidate
    );
    let masked = SamplingParams {
        min_tokens: 1,
        ..drawn
    };
    assert_eq!(refused(&[1.0], &masked), SampleError::NoCandidate);
}

#[test]
fn a_token_alone_is_wanted_only_where_nothing_else_decides() {
    let at = |position, change: &dyn Fn(&mut SamplingParams)| {
        let mut params = greedy();
        change(&mut params);
        wanted(&params, position)
    };
    assert_eq!(at(0, &|_| ()), Wanted::Best);
    // What only chooses among several, or looks at the sampled token.
    assert_eq!(
        at(3, &|p| {
            (p.top_k, p.top_p, p.min_p, p.seed) = (3, 0.5, 0.1, 9);
            (p.min_tokens, p.max_tokens) = (3, 9);
            (p.stop_ids, p.ignore_eos) = (vec![1], true);
            p.prompt_logprobs = Some(2);
        }),
        Wanted::Best
    );
    assert_eq!(
        at(7, &|p| {
            (p.temperature, p.top_p, p.min_p, p.seed) = (0.7, 1.0, 0.1, 9);
        }),
        Wanted::Drawn(Multinomial {
            temperature: 0.7,
            min_p: 0.1,
            uniform: philox::uniform(9, 7),
        })
    );
    let need_logits: [&dyn Fn(&mut SamplingParams); 10] = [
        &|p| (p.temperature, p.top_k) = (1.0, 1),
        &|p| (p.temperature, p.top_p) = (1.0, 0.999),
        &|p| p.logprobs = Some(0),
        &|p| p.logit_bias = vec![(1, 0.0)],
        &|p| p.presence_penalty = 0.1,
        &|p| p.frequency_penalty = -0.1,
        &|p| p.repetition_penalty = 1.1,
        &|p| p.bad_words = vec![vec![1]],
        &|p| p.min_tokens = 3,
        &|p| {
            let regex = tramontane_types::Constraint::Regex("a".into());
            p.constraint = Some(std::sync::Arc::new(regex));
        },
    ];
    for (i, change) in need_logits.into_iter().enumerate() {
        assert_eq!(at(2, change), Wanted::Logits, "change {i}");
    }
}

#[test]
fn a_chosen_token_is_taken_over_and_a_refused_row_is_refused_alike() {
    let (seen, params) = (SeenTokens::default(), greedy());
    let taken = |choice| {
        let draw = Draw {
            params: &params,
            position: 4,
            seen: &seen,
            eos_ids: &[],
            output: &[],
            mask: None,
        };
        Sampler::default().sample(Row::Chosen(choice), draw)
    };
    let infinity = f32::INFINITY;
    let rows: [&[f32]; 5] = [
        &[0.0, 2.0, 2.0],
        &[-0.0, 0.0],
        &[-infinity, -infinity],
        &[1.0, f32::NAN, infinity],
        &[infinity, f32::NAN],
    ];
    for row in rows {
        let expected = sample_with(row, &params, 4, &seen);
        assert_eq!(taken(best(row)), expected, "{row:?}");
    }
}

#[test]
fn what_is_wanted_is_what_would_be_sampled() {
    let logits: Vec<f32> = (0..3000).map(|i| ((i * 37) % 1009) as f32 * 0.02).collect();
    let seen = SeenTokens::default();
    for (seed, temperature) in [0.0, 1e-30, 0.3, 1.0, 2.0].into_iter().enumerate() {
        for (position, min_p) in [0.0, 1e-9, 0.3, 1.0].into_iter().enumerate() {
            let params = SamplingParams {
                temperature,
                min_p,
                seed: seed as u64,
                ..SamplingParams::default()
            };
            let position = position as u32;
            let expected = sample_with(&logits, &params, position, &seen).unwrap();
            let chosen = wanted(&params, position).choose(&logits);
            assert_eq!(chosen, Some(Ok(expected.id)), "{temperature} {min_p}");
        }
    }
}
