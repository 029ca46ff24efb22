//! What becomes of a computed step: rows count, tokens are sampled, full pages are found by others.

use std::ops::Range;
use std::time::Instant;

use tramontane_compute::SampleError;
use tramontane_grammar::{Next, TokenMask};
use tramontane_types::FinishReason;

use super::{Engine, Events, elapsed_us};
use crate::masks::{MaskError, Matching, NoToken};
use crate::rows::Rows;
use crate::sampler::Draw;
use crate::scheduler::{Chunk, Plan};
use crate::sequence::{SequenceKey, WantedLogits};
use crate::{EngineStats, FailureKind, SequenceEvent, StepReport};

const STOP: Option<FinishReason> = Some(FinishReason::Stop);

/// How a sequence came out of a step.
#[derive(Clone, Copy, Debug)]
enum Sampled {
    /// Its last token says whether it ends.
    Open,
    /// It ends: its grammar lets nothing follow.
    Whole,
    /// It ends: it has all the tokens it may have. Whether its text is whole is not known yet.
    Full,
    /// It could not sample: its mask is not there yet.
    Late,
}

/// What may come next.
#[derive(Debug)]
enum NextMask<'a> {
    /// Everything: there is no grammar.
    Any,
    OneOf(&'a TokenMask),
    /// Nothing: the text is whole.
    Whole,
    /// It is not known yet.
    Late,
}

impl Engine {
    /// Takes over what the step computed: rows, tokens, full pages. Waits for masks until `until` at most.
    pub(super) fn commit(
        &mut self,
        plan: &Plan,
        until: Instant,
        events: &mut Events,
        report: &mut StepReport,
    ) {
        let mut outputs = std::mem::take(&mut self.outputs);
        let given = std::mem::take(&mut self.wanted);
        let mut rest = Rows::new(&given, &mut outputs, self.geometry.vocab);
        for chunk in &plan.chunks {
            let Some(sequence) = self.sequences.get(&chunk.key) else {
                continue;
            };
            let wanted = sequence.wanted_logits(chunk.num_rows);
            let rows = rest.take_rows(wanted.num_rows());
            report.num_rows += chunk.num_rows;
            report.num_sequences += 1;
            self.commit_chunk(*chunk, (wanted, rows), until, events, report);
        }
        (self.outputs, self.wanted) = (outputs, given);
    }

    /// One sequence's part of [`Self::commit`]; `rows` are those that it wanted.
    fn commit_chunk(
        &mut self,
        chunk: Chunk,
        (wanted, mut rows): (WantedLogits, Rows<'_>),
        until: Instant,
        events: &mut Events,
        report: &mut StepReport,
    ) {
        let Some(begin) = self.advance(chunk, events) else {
            return;
        };
        let prompt = rows.take_rows(wanted.prompt.len()).into_logits();
        let done = self
            .report_prompt(chunk.key, wanted.prompt, prompt, events)
            .map_err(NoToken::from)
            .and_then(|()| self.sample_all(chunk.key, rows, until, events, report));
        match done {
            Ok(sampled) => {
                self.register(chunk.key, begin);
                let has_ended = match sampled {
                    Sampled::Open => self.finish(chunk.key, events),
                    Sampled::Whole => {
                        self.end(chunk.key, FinishReason::Stop, events);
                        true
                    }
                    Sampled::Full => self.close(chunk.key, until, events),
                    Sampled::Late => {
                        self.await_mask(chunk.key);
                        false
                    }
                };
                report.num_ended += usize::from(has_ended);
            }
            Err(error) => {
                self.has_no_token(chunk.key, &error, events);
                report.num_ended += 1;
            }
        }
    }

    /// Ends a sequence that cannot go on.
    pub(super) fn has_no_token(&mut self, key: SequenceKey, error: &NoToken, events: &mut Events) {
        let kind = error.kind();
        if let Some(sequence) = self.sequences.get(&key) {
            // A constraint is the client's to mend.
            if kind == FailureKind::Constraint {
                tracing::debug!(request_id = %sequence.id, %error, "constraint has no next token");
            } else {
                tracing::warn!(request_id = %sequence.id, %error, "sequence has no next token");
            }
            // What gave such logits must not be found by others.
            if matches!(error, NoToken::Sample(SampleError::NotFinite { .. })) {
                sequence.table.forget();
            }
        }
        self.fail(key, error.to_string(), kind, events);
    }

    /// Counts the rows of a chunk as computed. Returns how many there were before.
    fn advance(&mut self, chunk: Chunk, events: &mut Events) -> Option<usize> {
        let sequence = self.sequences.get_mut(&chunk.key)?;
        let begin = sequence.num_computed;
        // Guessed tokens count when they have come true.
        sequence.num_computed = (begin + chunk.num_rows).min(sequence.tokens.len());
        if !sequence.is_started {
            sequence.is_started = true;
            let found = sequence.cached_tokens.unwrap_or(0);
            let cached_tokens = sequence.usage().cached_tokens;
            events.push((
                sequence.id.clone(),
                SequenceEvent::Started { cached_tokens },
            ));
            self.stats.prompt_tokens += sequence.num_prompt() as u64;
            if self.config.prefix_cache {
                let looked_up = sequence.num_prompt().max(found as usize);
                self.stats.prefix_query_tokens += looked_up as u64;
                self.stats.prefix_hit_tokens += u64::from(found);
            }
        }
        Some(begin)
    }

    /// Tells how likely the tokens behind `positions` of the prompt were.
    fn report_prompt(
        &mut self,
        key: SequenceKey,
        positions: Range<usize>,
        logits: &[f32],
        events: &mut Events,
    ) -> Result<(), SampleError> {
        let Some(sequence) = self
            .sequences
            .get_mut(&key)
            .filter(|_| !positions.is_empty())
        else {
            return Ok(());
        };
        let n = sequence.params.prompt_logprobs.unwrap_or(0);
        let mut reported = Vec::with_capacity(positions.len());
        for (position, row) in positions.zip(logits.chunks_exact(self.geometry.vocab)) {
            let next = position + 1;
            let token = (next, sequence.tokens[next]);
            reported.push(self.sampler.report(row, token, n)?);
            sequence.next_prompt_logprob = next + 1;
        }
        events.push((sequence.id.clone(), SequenceEvent::PromptTokens(reported)));
        Ok(())
    }

    /// Samples the token behind the last one, and goes on for as long as guessed tokens come true and masks are there.
    fn sample_all(
        &mut self,
        key: SequenceKey,
        rows: Rows<'_>,
        until: Instant,
        events: &mut Events,
        report: &mut StepReport,
    ) -> Result<Sampled, NoToken> {
        let Some(sequence) = self.sequences.get_mut(&key) else {
            return Ok(Sampled::Open);
        };
        let mut num_true = 0;
        let mut sampled = Sampled::Open;
        for row in rows {
            let (position, first_output) = (sequence.num_output() as u32, sequence.num_prompt());
            let mask = match next_mask(&mut sequence.matching, until, &mut self.stats)? {
                NextMask::Any => None,
                NextMask::OneOf(mask) => Some(mask),
                NextMask::Whole => {
                    sampled = Sampled::Whole;
                    break;
                }
                NextMask::Late => {
                    // Its row is computed once more, with the same result; nothing is said of the guess.
                    sequence.num_computed = sequence.tokens.len() - 1;
                    sequence.draft.truncate(num_true);
                    sampled = Sampled::Late;
                    break;
                }
            };
            let draw = Draw {
                params: &sequence.params,
                position,
                seen: &sequence.seen,
                eos_ids: &self.config.eos_ids,
                output: &sequence.tokens[first_output..],
                mask,
            };
            let output = self
                .sampler
                .sample(row, draw)
                .map_err(|error| match error {
                    SampleError::NoCandidate if mask.is_some() => NoToken::NothingLeft,
                    _ => error.into(),
                })?;
            let id = output.id;
            sequence.push(id);
            report.num_sampled += 1;
            events.push((sequence.id.clone(), SequenceEvent::Token(output)));
            let reason = sequence.finish_reason(&self.config.eos_ids, self.length_max);
            // Whoever finds the next mask does so while others compute.
            if let Some(matching) = sequence.matching.as_mut().filter(|_| reason != STOP) {
                let threads = (sequence.owner, &self.masks);
                matching.accept(id, reason.is_none(), threads);
                sampled = reason.map_or(Sampled::Open, |_length| Sampled::Full);
            }
            if reason.is_some() {
                break;
            }
            if sequence.draft.get(num_true) != Some(&id) {
                break;
            }
            // The row of this token is already computed.
            sequence.num_computed += 1;
            num_true += 1;
        }
        self.stats.tokens_guessed += sequence.draft.len() as u64;
        self.stats.guesses_true += num_true as u64;
        sequence.learn(num_true);
        Ok(sampled)
    }
}

/// The mask of a sequence's next token, if it comes by `until`.
fn next_mask<'a>(
    matching: &'a mut Option<Matching>,
    until: Instant,
    stats: &mut EngineStats,
) -> Result<NextMask<'a>, MaskError> {
    let Some(matching) = matching else {
        return Ok(NextMask::Any);
    };
    let began = Instant::now();
    let has_come = matching.comes_by(until);
    stats.mask_wait_us += elapsed_us(began);
    if !has_come {
        return Ok(NextMask::Late);
    }
    Ok(match matching.allowed()? {
        Next::OneOf(mask) => NextMask::OneOf(mask),
        Next::Ended => NextMask::Whole,
    })
}
