//! The load of a drill: the same requests over and over, each answer compared with the one of the
//! fault-free run, token by token and byte by byte.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::Status;
use tramontane_proto::v1::inference_client::InferenceClient;
use tramontane_proto::v1::{self, generate_request::Input};

use super::{EXIT_REFUSED, EXIT_TIMEOUT, NoVerdict};
use crate::dial::Proven;

/// Tokens of one answer.
const ANSWER_TOKENS: u32 = 256;
/// Room for the prompt in a model of short context.
const PROMPT_TOKENS: u32 = 32;
/// The fault comes when every stream has had this many tokens.
const TOKENS_BEFORE_FAULT: usize = 8;
/// Longest answer: far above a fault and the deadlines behind it.
const ANSWER_MAX: Duration = Duration::from_secs(180);

/// One request: either greedy or seeded.
#[derive(Debug)]
pub(super) struct Probe {
    client: InferenceClient<Proven>,
    requests: Vec<v1::GenerateRequest>,
}

/// What one request was answered.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    tokens: Vec<Token>,
    text: String,
    finish: Option<i32>,
    /// Longest time without a new token, the first one included.
    pub(super) longest_stall: Duration,
    /// Why it has no end.
    pub(super) failure: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Token {
    index: u32,
    id: u32,
}

/// How an answer differs from its reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) lost: usize,
    pub(super) duplicated: usize,
    pub(super) changed: usize,
}

impl Probe {
    /// `num_streams` requests that the served model has room for.
    pub(super) async fn new(router: Proven, num_streams: u32) -> Result<Self, NoVerdict> {
        let mut client = InferenceClient::new(router);
        let models = client.list_models(v1::ListModelsRequest {}).await?;
        let models = models.into_inner().models;
        let context = models.first().map_or(0, |model| model.context_length);
        let max_tokens = ANSWER_TOKENS
            .min(context.saturating_sub(PROMPT_TOKENS))
            .max(1);
        let requests = (0..num_streams).map(|index| request(index, max_tokens));
        Ok(Self {
            client,
            requests: requests.collect(),
        })
    }

    /// Every request once, at the same time. Not one may fail.
    pub(super) async fn reference(&self) -> Result<Vec<Said>, NoVerdict> {
        let mut running = JoinSet::new();
        for (index, request) in self.requests.iter().cloned().enumerate() {
            let client = self.client.clone();
            running.spawn(async move { (index, ask(client, request, None).await) });
        }
        let mut said = running.join_all().await;
        said.sort_by_key(|(index, _)| *index);
        let said: Vec<Said> = said.into_iter().map(|(_, said)| said).collect();
        match said.iter().find_map(|said| said.failure.as_ref()) {
            Some(why) => {
                let text = format!("a request failed before there was a fault: {why}");
                Err(NoVerdict::new(EXIT_REFUSED, text))
            }
            None => Ok(said),
        }
    }

    /// Every request once more, with the difference from `reference`.
    pub(super) async fn once(&self, reference: &[Said]) -> Vec<Vec<Answered>> {
        let (stop, stopped) = watch::channel(true);
        let load = Load::begin(self, reference, stop, &stopped);
        load.stop().await
    }
}

/// Half are greedy, half seeded; no two alike.
fn request(index: u32, max_tokens: u32) -> v1::GenerateRequest {
    let is_greedy = index.is_multiple_of(2);
    v1::GenerateRequest {
        input: Some(Input::Prompt(format!("Tell me story number {index}."))),
        options: Some(v1::GenerateOptions {
            temperature: Some(if is_greedy { 0.0 } else { 1.0 }),
            seed: (!is_greedy).then(|| i64::from(index)),
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..v1::GenerateOptions::default()
        }),
        ..v1::GenerateRequest::default()
    }
}

/// An answer during or after the fault.
#[derive(Clone, Debug)]
pub(super) struct Answered {
    pub(super) said: Said,
    pub(super) difference: Difference,
}

/// Streams that ask again and again until they are told to stop.
#[derive(Debug)]
pub(super) struct Load {
    stop: watch::Sender<bool>,
    running: JoinSet<(usize, Vec<Answered>)>,
    /// Every stream says once that it has tokens.
    with_tokens: mpsc::Receiver<()>,
    num_streams: usize,
}

impl Load {
    pub(super) fn start(probe: &Probe, reference: &[Said]) -> Self {
        let (stop, stopped) = watch::channel(false);
        Self::begin(probe, reference, stop, &stopped)
    }

    fn begin(
        probe: &Probe,
        reference: &[Said],
        stop: watch::Sender<bool>,
        stopped: &watch::Receiver<bool>,
    ) -> Self {
        let num_streams = probe.requests.len();
        let (tell, with_tokens) = mpsc::channel(num_streams.max(1));
        let mut running = JoinSet::new();
        for (index, request) in probe.requests.iter().cloned().enumerate() {
            let stream = Stream {
                client: probe.client.clone(),
                request,
                reference: reference.get(index).cloned().unwrap_or_default(),
                stopped: stopped.clone(),
            };
            let tell = tell.clone();
            running.spawn(async move { (index, stream.run(tell).await) });
        }
        Self {
            stop,
            running,
            with_tokens,
            num_streams,
        }
    }

    /// Waits until every stream has had some tokens.
    pub(super) async fn all_have_tokens(&mut self) -> Result<(), NoVerdict> {
        let all = async {
            for _ in 0..self.num_streams {
                self.with_tokens.recv().await;
            }
        };
        timeout(ANSWER_MAX, all).await.map_err(|_elapsed| {
            let text = format!("not every stream had tokens within {ANSWER_MAX:?}");
            NoVerdict::new(EXIT_TIMEOUT, text)
        })
    }

    /// Lets the running requests end; all answers by stream.
    pub(super) async fn stop(mut self) -> Vec<Vec<Answered>> {
        self.stop.send_replace(true);
        let mut streams = vec![Vec::new(); self.num_streams];
        while let Some(ended) = self.running.join_next().await {
            // A stream that panicked has no answers, which the verdict sees.
            if let Ok((index, answers)) = ended
                && let Some(stream) = streams.get_mut(index)
            {
                *stream = answers;
            }
        }
        streams
    }
}

/// One request, over and over.
struct Stream {
    client: InferenceClient<Proven>,
    request: v1::GenerateRequest,
    reference: Said,
    stopped: watch::Receiver<bool>,
}

impl Stream {
    async fn run(self, tell: mpsc::Sender<()>) -> Vec<Answered> {
        let mut tell = Some(tell);
        let mut answers = Vec::new();
        loop {
            let said = ask(self.client.clone(), self.request.clone(), tell.take()).await;
            let difference = said.difference(&self.reference);
            let failed = said.failure.is_some();
            answers.push(Answered { said, difference });
            // One failure is a verdict; asking on would only repeat it as fast as it can fail.
            if failed || *self.stopped.borrow() {
                return answers;
            }
        }
    }
}

/// Asks and reads to the end; tells when there are some tokens.
async fn ask(
    mut client: InferenceClient<Proven>,
    request: v1::GenerateRequest,
    tell: Option<mpsc::Sender<()>>,
) -> Said {
    let mut said = Said::default();
    let read = said.read(&mut client, request, tell);
    let failure = match timeout(ANSWER_MAX, read).await {
        Ok(Ok(())) => None,
        Ok(Err(status)) => Some(format!("{:?}: {}", status.code(), status.message())),
        Err(_elapsed) => Some(format!("no end within {ANSWER_MAX:?}")),
    };
    said.failure = failure;
    said
}

impl Said {
    async fn read(
        &mut self,
        client: &mut InferenceClient<Proven>,
        request: v1::GenerateRequest,
        mut tell: Option<mpsc::Sender<()>>,
    ) -> Result<(), Status> {
        let mut last = Instant::now();
        let mut stream = client.generate(request).await?.into_inner();
        loop {
            let message = stream.message().await;
            // Also before a failure: silence that ends in one is a stall.
            let silence = last.elapsed();
            let is_news = !matches!(&message, Ok(Some(new)) if new.tokens.is_empty());
            if is_news {
                self.longest_stall = self.longest_stall.max(silence);
                last = Instant::now();
            }
            let Some(new) = message? else {
                return self
                    .finish
                    .map(|_| ())
                    .ok_or_else(|| Status::data_loss("the stream ended without a finish reason"));
            };
            self.note(&new);
            if self.tokens.len() >= TOKENS_BEFORE_FAULT
                && let Some(tell) = tell.take()
            {
                // The receiver is gone when nobody waits for it.
                let _unheard = tell.try_send(());
            }
        }
    }

    fn note(&mut self, new: &v1::GenerateResponse) {
        self.text.push_str(&new.text);
        self.finish = new.finish_reason.or(self.finish);
        let tokens = new.tokens.iter();
        self.tokens.extend(tokens.map(|token| Token {
            index: token.index,
            id: token.id,
        }));
    }

    /// What is missing, comes twice or is another one. Of a failed request only what it did say counts.
    fn difference(&self, reference: &Self) -> Difference {
        let mut difference = Difference::default();
        let mut next = 0;
        for token in &self.tokens {
            let index = token.index as usize;
            if index < next {
                difference.duplicated += 1;
                continue;
            }
            difference.lost += index - next;
            next = index + 1;
            let expected = reference.tokens.get(index).map(|token| token.id);
            difference.changed += usize::from(expected != Some(token.id));
        }
        if self.failure.is_some() {
            return difference;
        }
        difference.lost += reference.tokens.len().saturating_sub(next);
        let same_tokens = difference == Difference::default();
        let same = self.text == reference.text && self.finish == reference.finish;
        if same_tokens && !same {
            difference.changed = 1;
        }
        difference
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(tokens: &[(u32, u32)], text: &str) -> Said {
        let tokens = tokens.iter().map(|&(index, id)| Token { index, id });
        Said {
            tokens: tokens.collect(),
            text: text.to_owned(),
            finish: Some(2),
            ..Said::default()
        }
    }

    #[test]
    fn every_way_to_differ_is_counted() {
        let reference = said(&[(0, 7), (1, 8), (2, 9)], "abc");
        for (got, expected) in [
            (said(&[(0, 7), (1, 8), (2, 9)], "abc"), (0, 0, 0)),
            (said(&[(0, 7), (2, 9)], "ac"), (1, 0, 0)),
            (said(&[(0, 7), (1, 8)], "ab"), (1, 0, 0)),
            (said(&[(0, 7), (1, 8), (1, 8), (2, 9)], "abbc"), (0, 1, 0)),
            (said(&[(0, 7), (1, 5), (2, 9)], "axc"), (0, 0, 1)),
            (said(&[(0, 7), (1, 8), (2, 9), (3, 1)], "abcd"), (0, 0, 1)),
            (said(&[(0, 7), (1, 8), (2, 9)], "abd"), (0, 0, 1)),
        ] {
            let difference = got.difference(&reference);
            let (lost, duplicated, changed) = expected;
            let expected = Difference {
                lost,
                duplicated,
                changed,
            };
            assert_eq!(difference, expected, "{got:?}");
        }
    }

    #[test]
    fn of_a_failed_request_only_what_it_said_counts() {
        let reference = said(&[(0, 7), (1, 8)], "ab");
        let mut failed = said(&[(0, 6)], "x");
        failed.failure = Some("Unavailable".to_owned());
        let difference = failed.difference(&reference);
        assert_eq!((difference.lost, difference.changed), (0, 1));
    }
}
