//! How many log probabilities the answers to one request may report: a few hundred bytes of a request can ask for many
//! times the memory of its tokens. Never looks at what is reported.

use tramontane_types::SamplingParams;

use crate::error::ApiError;
use crate::request::PreparedPrompt;

/// Most log probabilities in all answers to one request: of every sampled token its own and those of the most likely
/// ones, and the same of the prompt in every answer. That is an answer of 32,768 tokens with three others each. One of
/// them takes 8 bytes while answers are made, beside some 50 of its token, and about 100 as JSON: 13 MB in all.
pub(crate) const REPORTED_MAX: u64 = 128 * 1024;

/// What the client calls the parameters that ask for them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReportNames {
    /// Those of sampled tokens.
    pub(crate) sampled: &'static str,
    /// Those of prompts.
    pub(crate) prompt: &'static str,
}

/// What is reported of the tokens of one prompt and its answers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reported {
    /// Answers per prompt.
    n: u64,
    /// Per sampled token.
    sampled: u64,
    /// Per token of the prompt.
    prompt: u64,
}

impl Reported {
    /// What `n` answers to each prompt report.
    pub(crate) fn of(sampling: &SamplingParams, n: u32) -> Self {
        let with_own = |top: Option<u32>| top.map_or(0, |top| u64::from(top) + 1);
        Self {
            n: n.into(),
            sampled: with_own(sampling.logprobs),
            prompt: with_own(sampling.prompt_logprobs),
        }
    }

    /// Most tokens of an answer to a prompt of so many, where the client has set no limit: one at least, for
    /// [`Self::check`] to refuse.
    pub(crate) fn tokens_max(self, prompt_tokens: usize) -> u32 {
        if self.sampled == 0 {
            return u32::MAX;
        }
        let left = REPORTED_MAX.saturating_sub(self.of_prompt(prompt_tokens));
        let max = left / (self.n * self.sampled).max(1);
        u32::try_from(max.max(1)).unwrap_or(u32::MAX)
    }

    /// Refuses what all prompts and their longest answers would report together.
    pub(crate) fn check(
        self,
        prompts: &[PreparedPrompt],
        names: ReportNames,
    ) -> Result<(), ApiError> {
        let (mut of_prompts, mut of_sampled) = (0_u64, 0_u64);
        for prompt in prompts {
            of_prompts = of_prompts.saturating_add(self.of_prompt(prompt.ids.len()));
            let sampled = self.n * self.sampled * u64::from(prompt.max_tokens);
            of_sampled = of_sampled.saturating_add(sampled);
        }
        let total = of_prompts.saturating_add(of_sampled);
        if total <= REPORTED_MAX {
            return Ok(());
        }
        let name = if of_prompts > of_sampled {
            names.prompt
        } else {
            names.sampled
        };
        let message = format!(
            "{name} must ask for at most {REPORTED_MAX} log probabilities in all answers together, got {total}: \
             {of_sampled} of tokens to sample and {of_prompts} of prompts"
        );
        Err(ApiError::invalid(name, message))
    }

    /// Of a prompt of so many tokens in all its answers; nothing is reported of the first one.
    fn of_prompt(self, prompt_tokens: usize) -> u64 {
        let told = prompt_tokens.saturating_sub(1) as u64;
        (self.n * self.prompt).saturating_mul(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: ReportNames = ReportNames {
        sampled: "top_logprobs",
        prompt: "prompt_logprobs",
    };

    fn reported(logprobs: Option<u32>, prompt_logprobs: Option<u32>, n: u32) -> Reported {
        let sampling = SamplingParams {
            logprobs,
            prompt_logprobs,
            ..SamplingParams::default()
        };
        Reported::of(&sampling, n)
    }

    fn prompt(num_tokens: usize, max_tokens: u32) -> PreparedPrompt {
        PreparedPrompt {
            ids: vec![5; num_tokens].into(),
            echo: None,
            is_chat: true,
            max_tokens,
        }
    }

    #[test]
    fn a_whole_context_with_three_others_per_token_passes_and_one_more_does_not() {
        let prompts = [prompt(1, 32_768)];
        reported(Some(3), None, 1).check(&prompts, NAMES).unwrap();
        let error = reported(Some(4), None, 1)
            .check(&prompts, NAMES)
            .unwrap_err();
        assert_eq!(error.param.as_deref(), Some("top_logprobs"));
        assert_eq!(
            error.message,
            "top_logprobs must ask for at most 131072 log probabilities in all answers together, got 163840: \
             163840 of tokens to sample and 0 of prompts"
        );
    }

    #[test]
    fn prompts_count_in_every_answer_and_are_named() {
        let prompts = [prompt(501, 1), prompt(501, 1)];
        let few = reported(Some(0), Some(20), 6);
        few.check(&prompts, NAMES).unwrap();
        let error = reported(None, Some(20), 7).check(&prompts, NAMES);
        let error = error.unwrap_err();
        assert_eq!(error.param.as_deref(), Some("prompt_logprobs"));
        assert!(error.message.contains("got 147000"), "{error}");
    }

    #[test]
    fn without_a_limit_of_the_client_an_answer_is_as_long_as_can_be_reported() {
        for (top, n, num_prompt) in [(0, 1, 10), (20, 1, 4000), (20, 128, 10), (5, 3, 2)] {
            let reported = reported(Some(top), Some(top), n);
            let max = reported.tokens_max(num_prompt);
            let fits = |max| reported.check(&[prompt(num_prompt, max)], NAMES).is_ok();
            assert!(fits(max) && !fits(max + 1), "{top} {n} {num_prompt}: {max}");
        }
        assert_eq!(reported(None, Some(20), 128).tokens_max(5), u32::MAX);
        // Nothing is left: it is refused.
        let none_left = reported(Some(0), Some(20), 128);
        assert_eq!(none_left.tokens_max(4000), 1);
        assert!(none_left.check(&[prompt(4000, 1)], NAMES).is_err());
    }
}
