//! One answer as its reader sees it: what comes next, and in the end how much it was. Dropping an
//! [`Answer`] without an idempotency key aborts all that still runs for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tramontane_coordination::Version;
use tramontane_tokenizer::ToolCall;
use tramontane_types::{FinishReason, TokenId, TokenLogprob, TokenOutput, Usage};

use crate::admission::Counted;
use crate::answer_id::AnswerId;
use crate::asked::{Position, beyond_the_end, unit_of_finish};
use crate::error::ApiError;
use crate::kept::Reader;
use crate::request::{PreparedPrompt, PreparedRequest};
use crate::sequence::Delta;
use crate::text::CallDelta;

/// What one request's task tells the reader of its answer.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) delta: Result<Delta, ApiError>,
    /// With this delta.
    pub(crate) spent: Spent,
}

/// What a request took so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    pub(crate) usage: Usage,
    /// Waiting for admission.
    pub(crate) queued: Duration,
    /// From its arrival to the first token of any answer.
    pub(crate) first_token: Option<Duration>,
    /// Mean time from a token of an answer to its next one.
    pub(crate) next_token: Option<Duration>,
    /// Since its arrival.
    pub(crate) total: Duration,
}

impl Told {
    /// Bytes of memory that it takes.
    pub(crate) fn size(&self) -> usize {
        let mut size = size_of::<Self>();
        if let Ok(delta) = &self.delta {
            size += delta.text.len();
            for call in &delta.calls {
                size += size_of::<CallDelta>() + call.size();
            }
            for token in delta.tokens.iter().chain(&delta.prompt_tokens) {
                size +=
                    size_of::<TokenOutput>() + token.top_logprobs.len() * size_of::<TokenLogprob>();
            }
        }
        size
    }
}

/// One whole answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    /// The first token of the prompt, where the others are reported.
    pub(crate) prompt_begin: Option<TokenId>,
    /// Whether `text` begins with the prompt.
    pub(crate) is_echoed: bool,
    /// What was asked for about the prompt, from its second token on.
    pub(crate) prompt_tokens: Arc<[TokenOutput]>,
    /// Calls of tools.
    pub(crate) calls: Vec<ToolCall>,
    pub(crate) tokens: Vec<TokenOutput>,
    /// Whether the last of `tokens` ended the answer and has no text.
    pub(crate) has_end_token: bool,
    pub(crate) finish: Option<FinishReason>,
}

/// What is known of an answer before it begins.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    /// Per prompt, what its answers begin with.
    echoes: Vec<Option<Arc<str>>>,
    /// Per prompt, its first token where the others are reported.
    begins: Vec<Option<TokenId>>,
    /// Answers per prompt.
    n: usize,
    /// The best of them, which a whole answer has.
    kept: usize,
    num_choices: usize,
}

impl Shape {
    pub(crate) fn of(request: &PreparedRequest) -> Self {
        let echoes = request.prompts.iter().map(|prompt| prompt.echo.clone());
        let reported = |prompt: &PreparedPrompt| {
            let first = prompt.ids.first().copied();
            first.filter(|_| request.sampling.prompt_logprobs.is_some())
        };
        Self {
            echoes: echoes.collect(),
            begins: request.prompts.iter().map(reported).collect(),
            n: request.n as usize,
            kept: request.kept as usize,
            num_choices: request.num_sequences(),
        }
    }
}

impl Shape {
    fn begin(&self, choice: usize) -> Option<TokenId> {
        *self.begins.get(choice / self.n.max(1))?
    }
}

/// Where an answer is read from.
#[derive(Debug)]
pub(crate) enum Source {
    /// From the task that makes it, which waits for its reader.
    Made(mpsc::Receiver<Told>),
    /// From what is kept of it for all requests with its idempotency key.
    Kept(Reader),
}

impl Source {
    async fn next(&mut self) -> Option<Told> {
        match self {
            Self::Made(told) => told.recv().await,
            Self::Kept(reader) => reader.next().await,
        }
    }
}

/// The answers to one request, as they come.
#[derive(Debug)]
pub(crate) struct Answer {
    id: AnswerId,
    version: Arc<Version>,
    source: Source,
    shape: Shape,
    num_finished: usize,
    spent: Spent,
    failed: bool,
    abort: CancellationToken,
    _running: Counted,
}

impl Answer {
    /// The answer that `source` tells, with its name and what it began with; `running` counts it until it
    /// is out.
    pub(crate) fn new(
        (id, version): (AnswerId, Arc<Version>),
        source: Source,
        shape: Shape,
        abort: CancellationToken,
        running: Counted,
    ) -> Self {
        Self {
            id,
            version,
            source,
            shape,
            num_finished: 0,
            spent: Spent::default(),
            failed: false,
            abort,
            _running: running,
        }
    }

    /// What comes next in any of the answers; `None` when all have ended. Nothing follows an error.
    /// Dropping the future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        if self.failed {
            return None;
        }
        let next = match self.source.next().await {
            Some(told) => {
                self.spent = told.spent;
                told.delta
            }
            None if self.has_ended() => return None,
            None if self.abort.is_cancelled() => Err(stopping()),
            None => Err(ApiError::unavailable(
                "the answer was not read for too long",
            )),
        };
        match &next {
            Ok(delta) => self.num_finished += usize::from(delta.finish.is_some()),
            Err(_) => self.failed = true,
        }
        Some(next)
    }

    /// Refuses a client that says it has seen more than there is of an answer that has ended. How long one will be that
    /// is still made shows later.
    pub(crate) fn check_seen(&self, seen: Option<&Position>) -> Result<(), ApiError> {
        let (Source::Kept(reader), Some(Position::Units(units))) = (&self.source, seen) else {
            return Ok(());
        };
        let num_tokens = reader.num_tokens(self.num_choices()).unwrap_or_default();
        for (choice, (&seen, num_tokens)) in units.iter().zip(num_tokens).enumerate() {
            let end = unit_of_finish(num_tokens);
            if seen > end {
                return Err(beyond_the_end(choice, end, seen));
            }
        }
        Ok(())
    }

    /// All answers that are given, whole: of each prompt's the best, best first, where more are made.
    pub(crate) async fn collect(&mut self) -> Result<Vec<Choice>, ApiError> {
        self.collect_with(|_| ()).await
    }

    /// The same; `see` is shown what they are put together from.
    pub(crate) async fn collect_with(
        &mut self,
        mut see: impl FnMut(&Delta) + Send,
    ) -> Result<Vec<Choice>, ApiError> {
        let n = self.shape.n.max(1);
        let mut choices = vec![Choice::default(); self.shape.num_choices];
        // Kept once for all answers to a prompt.
        let mut prompts = vec![Vec::new(); self.shape.num_choices.div_ceil(n)];
        for (index, choice) in choices.iter_mut().enumerate() {
            let echo = self.echo(index);
            choice.is_echoed = echo.is_some();
            choice.text.push_str(echo.unwrap_or_default());
            choice.prompt_begin = self.shape.begin(index);
        }
        while let Some(delta) = self.next().await {
            let delta = delta?;
            see(&delta);
            if delta.choice.is_multiple_of(n)
                && let Some(prompt) = prompts.get_mut(delta.choice / n)
            {
                prompt.extend(delta.prompt_tokens);
            }
            let Some(choice) = choices.get_mut(delta.choice) else {
                continue;
            };
            choice.text.push_str(&delta.text);
            for call in &delta.calls {
                call.add_to(&mut choice.calls);
            }
            choice.tokens.extend(delta.tokens);
            choice.has_end_token |= delta.has_end_token;
            choice.finish = delta.finish.or(choice.finish);
        }
        for (choices, prompt) in choices.chunks_mut(n).zip(prompts) {
            let prompt: Arc<[TokenOutput]> = prompt.into();
            for choice in choices {
                choice.prompt_tokens = Arc::clone(&prompt);
            }
        }
        Ok(best(choices, n, self.shape.kept))
    }

    /// Its name.
    pub(crate) const fn id(&self) -> AnswerId {
        self.id
    }

    /// The weights that it began with, and all of it comes from.
    pub(crate) const fn version(&self) -> &Arc<Version> {
        &self.version
    }

    /// Answers of this request.
    pub(crate) const fn num_choices(&self) -> usize {
        self.shape.num_choices
    }

    /// What the answer begins with before anything was sampled.
    pub(crate) fn echo(&self, choice: usize) -> Option<&str> {
        self.shape
            .echoes
            .get(choice / self.shape.n.max(1))?
            .as_deref()
    }

    /// Whether every answer has ended.
    pub(crate) const fn has_ended(&self) -> bool {
        self.num_finished >= self.shape.num_choices
    }

    /// What it took up to the last delta that was read; final after the last of all.
    pub(crate) const fn spent(&self) -> Spent {
        self.spent
    }

    /// Tokens up to the last delta that was read; final after the last of all.
    pub(crate) const fn usage(&self) -> Usage {
        self.spent.usage
    }
}

/// Of each prompt's `made` answers the `kept` best ones, best first: by the mean log probability of their tokens.
fn best(choices: Vec<Choice>, made: usize, kept: usize) -> Vec<Choice> {
    if made <= kept {
        return choices;
    }
    let mut choices = choices.into_iter();
    let mut given = Vec::new();
    while choices.len() > 0 {
        let mut answers: Vec<Choice> = choices.by_ref().take(made).collect();
        // Of equals the first.
        answers.sort_by(|a, b| mean_logprob(b).total_cmp(&mean_logprob(a)));
        answers.truncate(kept);
        given.extend(answers);
    }
    given
}

fn mean_logprob(choice: &Choice) -> f64 {
    let logprobs = choice.tokens.iter().filter_map(|token| token.logprob);
    let sum: f64 = logprobs.map(f64::from).sum();
    sum / choice.tokens.len().max(1) as f64
}

/// Why a request ends that this router has no more time for.
pub(crate) fn stopping() -> ApiError {
    ApiError::unavailable("this router is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, logprobs: &[f32]) -> Choice {
        let token = |&logprob: &f32| TokenOutput {
            index: 0,
            id: 5,
            logprob: Some(logprob),
            top_logprobs: Vec::new(),
        };
        Choice {
            text: text.to_owned(),
            tokens: logprobs.iter().map(token).collect(),
            ..Choice::default()
        }
    }

    fn texts(choices: &[Choice]) -> String {
        choices.iter().map(|choice| choice.text.as_str()).collect()
    }

    #[test]
    fn the_best_answers_are_given_best_first() {
        let made = vec![
            answer("a", &[-1.0, -1.0]),
            answer("b", &[-0.5, -0.75, -0.5]),
            answer("c", &[-0.5, -2.0]),
            answer("d", &[f32::NEG_INFINITY]),
            answer("e", &[-3.0]),
            answer("f", &[-2.0]),
        ];
        assert_eq!(texts(&best(made.clone(), 3, 2)), "bafe");
        assert_eq!(texts(&best(made.clone(), 6, 1)), "b");
        assert_eq!(texts(&best(made, 2, 2)), "abcdef");
    }
}
