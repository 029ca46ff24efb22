//! A client: knows the answer beforehand and compares every token. Never accepts a gap, a repetition, a
//! change, a second end, or an end that is none.

use std::sync::Arc;

use tokio::time::timeout;
use tramontane_router::simulation::{Failure, News};
use tramontane_types::{FinishReason, SamplingParams, TokenId};

use crate::check::Check;
use crate::model::{NUM_VERSIONS, Prefix};
use crate::rng::Rng;
use crate::router::SimRouter;
use crate::world::REQUEST_MAX;

/// Tokens that end an answer.
const STOP_IDS: [TokenId; 2] = [30, 31];

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Its name.
    pub id: String,
    prompt: Vec<TokenId>,
    sampling: SamplingParams,
    /// Tokens after which the client goes away.
    abandons_after: Option<usize>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With its whole answer.
    Finished,
    /// With a typed error.
    Failed,
    /// The client or its router went away.
    Abandoned,
}

impl Ask {
    /// A request by chance.
    #[must_use]
    pub fn by_chance(id: String, rng: &mut Rng, may_abandon: bool) -> Self {
        let prompt = (0..rng.range(1, 90))
            .map(|_| rng.range(20, 220) as TokenId)
            .collect();
        let sampling = SamplingParams {
            seed: rng.next(),
            max_tokens: rng.range(1, 120) as u32,
            stop_ids: STOP_IDS.to_vec(),
            ..SamplingParams::default()
        };
        let abandons = may_abandon && rng.chance(8);
        Self {
            id,
            prompt,
            sampling,
            abandons_after: abandons.then(|| rng.range(0, 20) as usize),
        }
    }

    /// Asks, reads the answer and checks all of it.
    pub async fn run(self, router: Arc<SimRouter>, check: Check) -> End {
        check.count(|counts| counts.requests += 1);
        let reading = timeout(REQUEST_MAX, self.read(&router, &check)).await;
        let end = match reading {
            Ok(Ok(end)) => end,
            Ok(Err(failure)) => self.failed(&failure, &router, &check),
            Err(_elapsed) => {
                check.violated(format_args!(
                    "{} did not end within {REQUEST_MAX:?}",
                    self.id
                ));
                End::Failed
            }
        };
        check.count(|counts| match end {
            End::Finished => counts.finished += 1,
            End::Failed => counts.failed += 1,
            End::Abandoned => counts.abandoned += 1,
        });
        check.note(format_args!("{} ends: {end:?}", self.id));
        end
    }

    fn failed(&self, failure: &Failure, router: &SimRouter, check: &Check) -> End {
        let Failure { kind, message, .. } = failure;
        check.note(format_args!("{} is told {kind}: {message}", self.id));
        if !router.is_alive() {
            return End::Abandoned;
        }
        if failure.is_internal {
            check.violated(format_args!(
                "{} ended with an internal error: {message}",
                self.id
            ));
        }
        End::Failed
    }

    async fn read(&self, router: &SimRouter, check: &Check) -> Result<End, Failure> {
        let sampling = self.sampling.clone();
        let mut answer = router
            .core
            .generate(&self.id, &self.prompt, sampling)
            .await?;
        // Every version that may have made it; in the end that is one.
        let begin = (0..NUM_VERSIONS).map(|version| Prefix::new(self.sampling.seed, version));
        let prompted = |begin| self.prompt.iter().fold(begin, |p: Prefix, &id| p.with(id));
        let mut prefixes: Vec<Prefix> = begin.map(prompted).collect();
        let (mut got, mut finish) = (Vec::new(), None);
        while let Some(News {
            tokens,
            finish: end,
        }) = answer.next().await?
        {
            for token in tokens {
                self.check_token((token.id, got.len()), &mut prefixes, finish, check);
                got.push(token.id);
                check.mix(u64::from(token.id));
            }
            if let Some(end) = end {
                if let Some(before) = finish {
                    check.violated(format_args!(
                        "{} ended as {before:?}, then as {end:?}",
                        self.id
                    ));
                }
                finish = Some(end);
            }
            if !router.is_alive() || self.abandons_after.is_some_and(|after| got.len() >= after) {
                return Ok(End::Abandoned);
            }
        }
        check.count(|counts| counts.tokens += got.len() as u64);
        if prefixes.iter().all(|prefix| prefix.version() > 0) {
            check.count(|counts| counts.updated += 1);
        }
        self.check_end(&got, finish, check);
        Ok(End::Finished)
    }

    fn check_token(
        &self,
        (id, index): (TokenId, usize),
        prefixes: &mut Vec<Prefix>,
        finish: Option<FinishReason>,
        check: &Check,
    ) {
        if finish.is_some() {
            check.violated(format_args!("{} got token {index} after its end", self.id));
        }
        let expected: Vec<(u8, TokenId)> = prefixes
            .iter()
            .map(|p| (p.version(), p.next_token()))
            .collect();
        prefixes.retain(|prefix| prefix.next_token() == id);
        if prefixes.is_empty() && !expected.is_empty() {
            let request = &self.id;
            check.violated(format_args!(
                "{request} token {index} is {id}, expected of all by version: {expected:?}"
            ));
        }
        prefixes
            .iter_mut()
            .for_each(|prefix| *prefix = prefix.with(id));
    }

    fn check_end(&self, got: &[TokenId], finish: Option<FinishReason>, check: &Check) {
        let stopped = got.last().is_some_and(|last| STOP_IDS.contains(last));
        let full = got.len() == self.sampling.max_tokens as usize;
        let is_right = match finish {
            Some(FinishReason::Stop) => stopped,
            Some(FinishReason::Length) => full && !stopped,
            Some(FinishReason::Aborted) | None => false,
        };
        if !is_right {
            let (request, count) = (&self.id, got.len());
            check.violated(format_args!(
                "{request} ended as {finish:?} after {count} tokens"
            ));
        }
    }
}
