//! Conversions between wire messages and shared types. What comes in is checked here, once.

use std::sync::Arc;

use tramontane_types::{
    Constraint, FinishReason, SamplingParams, TokenLogprob, TokenOutput, Usage,
    sampling::BAD_WORDS_MAX, sampling::LOGIT_BIAS_MAX, sampling::STOP_IDS_MAX,
};

use crate::v1;

/// A message that does not say what it must.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidWire {
    /// A field that every sender fills is absent.
    #[error("{message}.{field} is missing")]
    Missing {
        /// Message type.
        message: &'static str,
        /// Field.
        field: &'static str,
    },
    /// A list is longer than its limit.
    #[error("{message}.{field} has {got} entries, expected at most {limit}")]
    TooMany {
        /// Message type.
        message: &'static str,
        /// Field.
        field: &'static str,
        /// The limit.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// An enum number that this version does not know, or "unspecified".
    #[error("{message}.{field} is {got}, expected a known value")]
    Enum {
        /// Message type.
        message: &'static str,
        /// Field.
        field: &'static str,
        /// What came.
        got: i32,
    },
}

impl From<&SamplingParams> for v1::Sampling {
    fn from(params: &SamplingParams) -> Self {
        let bias = |&(id, bias): &(u32, f32)| v1::LogitBias { id, bias };
        Self {
            temperature: params.temperature,
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            logit_bias: params.logit_bias.iter().map(bias).collect(),
            seed: params.seed,
            max_tokens: params.max_tokens,
            min_tokens: params.min_tokens,
            stop_ids: params.stop_ids.clone(),
            ignore_eos: params.ignore_eos,
            logprobs: params.logprobs,
            prompt_logprobs: params.prompt_logprobs,
            bad_words: params
                .bad_words
                .iter()
                .map(|ids| v1::BadWord { ids: ids.clone() })
                .collect(),
            constraint: params.constraint.as_deref().map(v1::Constraint::from),
        }
    }
}

impl TryFrom<v1::Sampling> for SamplingParams {
    type Error = InvalidWire;

    /// Bounds the lists; the receiver still calls [`SamplingParams::validate`] with its vocabulary.
    fn try_from(wire: v1::Sampling) -> Result<Self, Self::Error> {
        at_most("logit_bias", wire.logit_bias.len(), LOGIT_BIAS_MAX)?;
        at_most("stop_ids", wire.stop_ids.len(), STOP_IDS_MAX)?;
        at_most("bad_words", wire.bad_words.len(), BAD_WORDS_MAX)?;
        let constraint = wire.constraint.map(Constraint::try_from).transpose()?;
        Ok(Self {
            temperature: wire.temperature,
            top_k: wire.top_k,
            top_p: wire.top_p,
            min_p: wire.min_p,
            presence_penalty: wire.presence_penalty,
            frequency_penalty: wire.frequency_penalty,
            repetition_penalty: wire.repetition_penalty,
            logit_bias: wire.logit_bias.iter().map(|b| (b.id, b.bias)).collect(),
            seed: wire.seed,
            max_tokens: wire.max_tokens,
            min_tokens: wire.min_tokens,
            stop_ids: wire.stop_ids,
            ignore_eos: wire.ignore_eos,
            logprobs: wire.logprobs,
            prompt_logprobs: wire.prompt_logprobs,
            bad_words: wire.bad_words.into_iter().map(|word| word.ids).collect(),
            constraint: constraint.map(Arc::new),
        })
    }
}

impl From<&Constraint> for v1::Constraint {
    fn from(constraint: &Constraint) -> Self {
        use v1::constraint::Kind;
        let kind = match constraint {
            Constraint::JsonObject => Kind::JsonObject(v1::JsonObject {}),
            Constraint::JsonSchema(schema) => Kind::JsonSchema(schema.to_string()),
            Constraint::Regex(expression) => Kind::Regex(expression.to_string()),
            Constraint::Lark(grammar) => Kind::Lark(grammar.to_string()),
        };
        Self { kind: Some(kind) }
    }
}

impl TryFrom<v1::Constraint> for Constraint {
    type Error = InvalidWire;

    fn try_from(wire: v1::Constraint) -> Result<Self, Self::Error> {
        use v1::constraint::Kind;
        match wire.kind {
            Some(Kind::JsonObject(_)) => Ok(Self::JsonObject),
            Some(Kind::JsonSchema(schema)) => Ok(Self::JsonSchema(schema.into())),
            Some(Kind::Regex(expression)) => Ok(Self::Regex(expression.into())),
            Some(Kind::Lark(grammar)) => Ok(Self::Lark(grammar.into())),
            None => Err(InvalidWire::Missing {
                message: "Constraint",
                field: "kind",
            }),
        }
    }
}

fn at_most(field: &'static str, got: usize, limit: usize) -> Result<(), InvalidWire> {
    if got <= limit {
        return Ok(());
    }
    Err(InvalidWire::TooMany {
        message: "Sampling",
        field,
        limit,
        got,
    })
}

impl From<&TokenOutput> for v1::SampledToken {
    fn from(token: &TokenOutput) -> Self {
        let top = |t: &TokenLogprob| v1::TopLogprob {
            id: t.id,
            logprob: t.logprob,
        };
        Self {
            index: token.index,
            id: token.id,
            logprob: token.logprob,
            top_logprobs: token.top_logprobs.iter().map(top).collect(),
        }
    }
}

impl From<v1::SampledToken> for TokenOutput {
    fn from(wire: v1::SampledToken) -> Self {
        let top = |t: &v1::TopLogprob| TokenLogprob {
            id: t.id,
            logprob: t.logprob,
        };
        Self {
            index: wire.index,
            id: wire.id,
            logprob: wire.logprob,
            top_logprobs: wire.top_logprobs.iter().map(top).collect(),
        }
    }
}

impl From<Usage> for v1::Usage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            cached_tokens: usage.cached_tokens,
            completion_tokens: usage.completion_tokens,
        }
    }
}

impl From<v1::Usage> for Usage {
    fn from(wire: v1::Usage) -> Self {
        Self {
            prompt_tokens: wire.prompt_tokens,
            cached_tokens: wire.cached_tokens,
            completion_tokens: wire.completion_tokens,
        }
    }
}

/// The wire form of a finish reason.
#[must_use]
pub const fn finish_reason_to_wire(reason: FinishReason) -> v1::FinishReason {
    match reason {
        FinishReason::Stop => v1::FinishReason::Stop,
        FinishReason::Length => v1::FinishReason::Length,
        FinishReason::Aborted => v1::FinishReason::Aborted,
    }
}

/// The finish reason of `SequenceFinished.reason`.
///
/// # Errors
/// When the number is unknown or "unspecified".
pub fn finish_reason_from_wire(got: i32) -> Result<FinishReason, InvalidWire> {
    match v1::FinishReason::try_from(got) {
        Ok(v1::FinishReason::Stop) => Ok(FinishReason::Stop),
        Ok(v1::FinishReason::Length) => Ok(FinishReason::Length),
        Ok(v1::FinishReason::Aborted) => Ok(FinishReason::Aborted),
        Ok(v1::FinishReason::Unspecified) | Err(_) => Err(InvalidWire::Enum {
            message: "SequenceFinished",
            field: "reason",
            got,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_crosses_the_wire_unchanged() {
        let params = SamplingParams {
            temperature: 0.7,
            logit_bias: vec![(5, -1.5)],
            seed: u64::MAX,
            stop_ids: vec![2, 9],
            logprobs: Some(0),
            prompt_logprobs: Some(3),
            bad_words: vec![vec![4, 5]],
            constraint: Some(Arc::new(Constraint::Regex("[ab]+".into()))),
            ..SamplingParams::default()
        };
        assert_eq!(
            SamplingParams::try_from(v1::Sampling::from(&params)),
            Ok(params)
        );
    }

    #[test]
    fn too_many_stop_ids_are_refused_by_name() {
        let wire = v1::Sampling {
            stop_ids: vec![1; 65],
            ..v1::Sampling::default()
        };
        let text = SamplingParams::try_from(wire).unwrap_err().to_string();
        assert_eq!(
            text,
            "Sampling.stop_ids has 65 entries, expected at most 64"
        );
    }

    #[test]
    fn an_unknown_finish_reason_is_refused() {
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Aborted,
        ] {
            assert_eq!(
                finish_reason_from_wire(finish_reason_to_wire(reason) as i32),
                Ok(reason)
            );
        }
        assert!(finish_reason_from_wire(0).is_err());
        assert!(finish_reason_from_wire(77).is_err());
    }
}
