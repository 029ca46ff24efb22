//! Chooses the next token from a row of logits. Holds no state of a sequence: the same row, parameters
//! and position give the same token, whatever else is in the batch.
//!
//! In this order: log probabilities of the raw logits; logit bias; repetition, then presence and
//! frequency penalties; bad words and, before `min_tokens`, stop ids masked; what the grammar does not allow masked;
//! temperature; top-k; top-p; min-p; draw.

pub(crate) mod philox;
pub(crate) mod softmax;

use std::cmp::Ordering;

use tramontane_compute::sampling::{
    Multinomial, SampleError, Scale, Sums, Wanted, argmax, at_least, check_numbers, max,
};
use tramontane_grammar::TokenMask;
use tramontane_types::{SamplingParams, TokenId, TokenLogprob, TokenOutput};

use crate::rows::Row;
use crate::sequence::SeenTokens;
use softmax::log_sum_exp;

/// The first guess of how many tokens reach `top_p`.
const NUCLEUS_FIRST_GUESS: usize = 64;
/// Factor of the next guess, when they do not.
const NUCLEUS_GROWTH: usize = 4;

/// What sampling depends on besides the logits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Draw<'a> {
    pub(crate) params: &'a SamplingParams,
    /// Position of the new token in the output.
    pub(crate) position: u32,
    pub(crate) seen: &'a SeenTokens,
    pub(crate) eos_ids: &'a [TokenId],
    /// The tokens sampled so far.
    pub(crate) output: &'a [TokenId],
    /// What the grammar of the output allows here, if it has one.
    pub(crate) mask: Option<&'a TokenMask>,
}

/// Scratch memory of the sampler.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    candidates: Vec<Candidate>,
    weights: Vec<f64>,
    sums: Sums,
}

/// A token that may be chosen. The best one comes first: highest logit, lowest id.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    id: TokenId,
}

impl Candidate {
    fn order(self, other: Self) -> Ordering {
        other
            .logit
            .total_cmp(&self.logit)
            .then(self.id.cmp(&other.id))
    }
}

/// What a step is to give of the row behind which output token `position` is sampled. A token alone only where
/// [`Sampler::sample`] would take the same one from the row's logits.
pub(crate) fn wanted(params: &SamplingParams, position: u32) -> Wanted {
    // Whoever adds a parameter says here whether it changes the choice.
    let SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
        logit_bias,
        min_tokens,
        logprobs,
        bad_words,
        constraint,
        // Look at the token that was sampled, or at the prompt.
        max_tokens: _,
        stop_ids: _,
        ignore_eos: _,
        prompt_logprobs: _,
    } = params;
    let has_penalty =
        *presence_penalty != 0.0 || *frequency_penalty != 0.0 || *repetition_penalty != 1.0;
    let changes_logits = has_penalty
        || !logit_bias.is_empty()
        || !bad_words.is_empty()
        || constraint.is_some()
        || position < *min_tokens;
    if changes_logits || logprobs.is_some() {
        return Wanted::Logits;
    }
    // The best of several candidates is the best of all.
    if *temperature == 0.0 {
        return Wanted::Best;
    }
    if *top_k != 0 || *top_p < 1.0 {
        return Wanted::Logits;
    }
    Wanted::Drawn(Multinomial {
        temperature: *temperature,
        min_p: *min_p,
        uniform: philox::uniform(*seed, position),
    })
}

impl Sampler {
    /// Chooses a token from logits, or takes over the one that was chosen as [`wanted`].
    pub(crate) fn sample(
        &mut self,
        row: Row<'_>,
        draw: Draw<'_>,
    ) -> Result<TokenOutput, SampleError> {
        match row {
            Row::Logits(logits) => self.sample_logits(logits, draw),
            Row::Chosen(choice) => Ok(TokenOutput {
                index: draw.position,
                id: choice?,
                logprob: None,
                top_logprobs: Vec::new(),
            }),
        }
    }

    /// `logits`, `[vocab]`, are changed on the way.
    fn sample_logits(
        &mut self,
        logits: &mut [f32],
        draw: Draw<'_>,
    ) -> Result<TokenOutput, SampleError> {
        check_numbers(logits)?;
        let lse = draw
            .params
            .logprobs
            .map(|_| log_sum_exp(logits, max(logits)));
        let top_logprobs = match (draw.params.logprobs, lse) {
            (Some(n), Some(lse)) if n > 0 => self.top_logprobs(logits, n as usize, lse),
            _ => Vec::new(),
        };
        // Only what changes the raw logits needs a copy of them: the chosen token's own value.
        let raw = lse.map(|lse| (lse, logits.to_vec()));
        adjust(logits, draw);
        let id = self.choose(logits, draw)?;
        let logprob = raw.map(|(lse, raw)| log_prob(raw[id as usize], lse));
        Ok(TokenOutput {
            index: draw.position,
            id,
            logprob,
            top_logprobs,
        })
    }

    /// How likely token `id` was, and the `n` best. `logits`, `[vocab]`, are those of the position before it.
    pub(crate) fn report(
        &mut self,
        logits: &[f32],
        (index, id): (usize, TokenId),
        n: u32,
    ) -> Result<TokenOutput, SampleError> {
        check_numbers(logits)?;
        let lse = log_sum_exp(logits, max(logits));
        let logit = logits.get(id as usize).copied();
        Ok(TokenOutput {
            index: index as u32,
            id,
            logprob: logit.map(|logit| log_prob(logit, lse)),
            top_logprobs: match n {
                0 => Vec::new(),
                n => self.top_logprobs(logits, n as usize, lse),
            },
        })
    }

    fn top_logprobs(&mut self, logits: &[f32], n: usize, lse: f64) -> Vec<TokenLogprob> {
        self.fill_candidates(logits);
        keep_best(&mut self.candidates, n);
        let mut top: Vec<_> = self
            .candidates
            .iter()
            .map(|c| TokenLogprob {
                id: c.id,
                logprob: log_prob(c.logit, lse),
            })
            .collect();
        // Different logits may round to the same log probability.
        top.sort_by(|a, b| b.logprob.total_cmp(&a.logprob).then(a.id.cmp(&b.id)));
        top
    }

    fn choose(&mut self, logits: &[f32], draw: Draw<'_>) -> Result<TokenId, SampleError> {
        let (best, logit) = argmax(logits).ok_or(SampleError::NoCandidate)?;
        if !logit.is_finite() {
            let id = best as usize;
            let all_masked = logit == f32::NEG_INFINITY;
            return Err(if all_masked {
                SampleError::NoCandidate
            } else {
                SampleError::NotFinite { id }
            });
        }
        let params = draw.params;
        if params.temperature == 0.0 {
            return Ok(best);
        }
        let scale = Scale::new(logit, params.temperature);
        let unit = philox::uniform(params.seed, draw.position);
        let top_k = params.top_k as usize;
        let min_weight = f64::from(params.min_p);
        if top_k > 0 && top_k < logits.len() {
            self.fill_candidates(logits);
            keep_best(&mut self.candidates, top_k);
            self.weights.clear();
            self.weights
                .extend(self.candidates.iter().map(|c| scale.weight(c.logit)));
            let total: f64 = self.weights.iter().sum();
            keep_nucleus(&mut self.weights, f64::from(params.top_p) * total);
        } else if params.top_p < 1.0 {
            self.fill_nucleus(logits, scale, f64::from(params.top_p));
        } else {
            self.weights.clear();
            self.weights.extend(
                logits
                    .iter()
                    .map(|&l| at_least(scale.weight(l), min_weight)),
            );
            return self
                .sums
                .pick(&self.weights, unit)
                .map(|i| i as TokenId)
                .ok_or(SampleError::NoCandidate);
        }
        for weight in &mut self.weights {
            *weight = at_least(*weight, min_weight);
        }
        let picked = self.sums.pick(&self.weights, unit);
        let picked = picked.and_then(|i| self.candidates.get(i));
        picked.map(|c| c.id).ok_or(SampleError::NoCandidate)
    }

    /// The fewest best tokens whose share of all weights reaches `top_p`, best first. Sorts no more
    /// tokens than it must.
    fn fill_nucleus(&mut self, logits: &[f32], scale: Scale, top_p: f64) {
        let total: f64 = logits.iter().map(|&l| scale.weight(l)).sum();
        let mut guess = NUCLEUS_FIRST_GUESS;
        loop {
            self.fill_candidates(logits);
            keep_best(&mut self.candidates, guess);
            self.weights.clear();
            self.weights
                .extend(self.candidates.iter().map(|c| scale.weight(c.logit)));
            if keep_nucleus(&mut self.weights, top_p * total) || guess >= logits.len() {
                return;
            }
            guess *= NUCLEUS_GROWTH;
        }
    }

    fn fill_candidates(&mut self, logits: &[f32]) {
        self.candidates.clear();
        let all = logits
            .iter()
            .zip(0..)
            .map(|(&logit, id)| Candidate { logit, id });
        self.candidates.extend(all);
    }
}

/// Logit bias, penalties and masks: of early stops, and of the grammar.
fn adjust(logits: &mut [f32], draw: Draw<'_>) {
    let params = draw.params;
    let mut change = |id: TokenId, to: &dyn Fn(f32) -> f32| {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = to(*logit);
        }
    };
    for &(id, bias) in &params.logit_bias {
        change(id, &|logit| logit + bias);
    }
    // Keskar et al., CTRL, section 4.1, with the sign rule that everybody uses since.
    let repetition = params.repetition_penalty;
    if repetition != 1.0 {
        let penalise = |l: f32| {
            if l > 0.0 {
                l / repetition
            } else {
                l * repetition
            }
        };
        for &id in &draw.seen.prompt {
            change(id, &penalise);
        }
        for &id in draw
            .seen
            .output
            .keys()
            .filter(|id| !draw.seen.prompt.contains(*id))
        {
            change(id, &penalise);
        }
    }
    let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
    if presence != 0.0 || frequency != 0.0 {
        for (&id, &count) in &draw.seen.output {
            change(id, &|logit| logit - frequency * count as f32 - presence);
        }
    }
    for word in &params.bad_words {
        if let Some((&last, begin)) = word.split_last()
            && draw.output.ends_with(begin)
        {
            change(last, &|_| f32::NEG_INFINITY);
        }
    }
    if draw.position < params.min_tokens {
        for &id in params.stop_ids.iter().chain(draw.eos_ids) {
            change(id, &|_| f32::NEG_INFINITY);
        }
    }
    let Some(mask) = draw.mask else {
        return;
    };
    // Where the grammar lets a text end, it may also go on.
    if params.ignore_eos {
        for &id in draw.eos_ids {
            change(id, &|_| f32::NEG_INFINITY);
        }
    }
    mask.apply(logits);
}

fn log_prob(logit: f32, lse: f64) -> f32 {
    (f64::from(logit) - lse) as f32
}

/// Keeps the `n` best candidates, best first.
fn keep_best(candidates: &mut Vec<Candidate>, n: usize) {
    if n < candidates.len() {
        candidates.select_nth_unstable_by(n, |a, b| a.order(*b));
        candidates.truncate(n);
    }
    candidates.sort_unstable_by(|a, b| a.order(*b));
}

/// Keeps the first weights whose sum reaches `wanted`; false when all together do not.
fn keep_nucleus(weights: &mut Vec<f64>, wanted: f64) -> bool {
    let mut sum = 0.0;
    for (i, weight) in weights.iter().enumerate() {
        sum += weight;
        if sum >= wanted {
            weights.truncate(i + 1);
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests;
