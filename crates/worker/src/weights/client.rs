//! Bytes of weight files from other workers: one peer after the other until one gives them whole. Never takes
//! what its digest does not fit, never asks for ever.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tramontane_coordination::{Members, WorkerState};
use tramontane_exchange::LinkSettings;
use tramontane_grammar::{InvalidVocabulary, Vocabulary};
use tramontane_model::{Description, Error, Part, Source};
use tramontane_proto::v1::{self, weights_chunk::Kind, weights_client::WeightsClient};
use tramontane_runtime::tls::Link;
use tramontane_types::WorkerId;

use super::{FETCHES_MAX, RANGE_BYTES_MAX, RANGE_PIECES_MAX, WeightStats, from_wire};

/// A peer that says nothing for this long is left: longer than it may have a request wait for its turn.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Longest time for one range, waiting for busy peers included.
const RANGE_TIME_MAX: Duration = Duration::from_secs(300);
/// Answers to one range that come to nothing before it is given up.
pub(super) const ATTEMPTS_MAX: usize = 6;
/// Pause before all peers are asked again.
const ROUND_PAUSE: Duration = Duration::from_millis(250);
/// A peer that failed is asked after the others for this long.
const REST: Duration = Duration::from_secs(10);
/// Bytes of a digest; whatever else a peer sends for one is not repeated.
const DIGEST_BYTES: usize = 32;
/// Largest description: `config.json`, 4096 files, a vocabulary.
const DESCRIPTION_BYTES_MAX: usize = 16 << 20;

/// The other workers that have a model.
#[derive(Debug)]
pub(crate) struct PeerWeights {
    asker: v1::WeightsAsker,
    link: Link,
    members: watch::Receiver<Arc<Members>>,
    runtime: Handle,
    stop: CancellationToken,
    known: Mutex<HashMap<String, Known>>,
    at_once: Semaphore,
    stats: Arc<WeightStats>,
    /// Ranges go to another peer each, so that all give their share.
    turn: AtomicUsize,
}

/// What is known of the peer at an address.
#[derive(Debug)]
struct Known {
    client: WeightsClient<Channel>,
    rests_until: Option<Instant>,
}

#[derive(Clone, Debug)]
struct Peer {
    id: WorkerId,
    address: String,
}

/// A range that is filled with what one peer sends. Takes no more than it has room for.
#[derive(Debug)]
pub(super) struct Filling<'a> {
    out: &'a mut [u8],
    got: usize,
    hash: Sha256,
}

impl<'a> Filling<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self {
            out,
            got: 0,
            hash: Sha256::new(),
        }
    }

    /// Takes the next message; there is none at the end. Whether the range is whole.
    pub(super) fn take(&mut self, chunk: Option<v1::WeightsChunk>) -> Result<bool, Failure> {
        let (expected, got) = (self.out.len(), self.got);
        match chunk.and_then(|chunk| chunk.kind) {
            Some(Kind::Data(data)) => {
                let place = self.out.get_mut(got..got + data.len());
                place
                    .ok_or(Failure::Long { expected })?
                    .copy_from_slice(&data);
                self.hash.update(&data);
                self.got += data.len();
                Ok(false)
            }
            Some(Kind::Sha256(theirs)) if got == expected => {
                let ours = self.hash.finalize_reset();
                if ours[..] == theirs[..] {
                    return Ok(true);
                }
                let (expected, got) = (hex(&theirs), hex(&ours));
                Err(Failure::Digest { expected, got })
            }
            Some(Kind::Sha256(_)) | None => Err(Failure::Short { expected, got }),
        }
    }
}

/// Why one peer did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{address:?} is no address")]
    Address { address: String },
    #[error("{code:?}: {message}")]
    Refused { code: Code, message: String },
    #[error("silent for {SILENCE_MAX:?}")]
    Silent,
    #[error("not done within the {RANGE_TIME_MAX:?} that all peers have together")]
    Slow,
    #[error("ended after {got} bytes, expected {expected}")]
    Short { expected: usize, got: usize },
    #[error("more than the {expected} bytes that were asked for")]
    Long { expected: usize },
    #[error("sha-256 is {got}, expected {expected}")]
    Digest { expected: String, got: String },
    #[error("describes tokens that cannot be: {0}")]
    Vocabulary(InvalidVocabulary),
    #[error("describes a form of checkpoint that is not known here")]
    Form,
}

impl Failure {
    /// Whether it is a peer that has too much to do, and nothing else.
    const fn is_busy(&self) -> bool {
        matches!(
            self,
            Self::Refused {
                code: Code::ResourceExhausted,
                ..
            }
        )
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Refused {
            code: status.code(),
            message: status.message().chars().take(256).collect(),
        }
    }
}

/// Nobody gave it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotGiven {
    #[error("no other worker with model {model} is listed")]
    Nobody { model: String },
    #[error("no worker gave it; {}", shown(failures))]
    Failed {
        /// What peers said, and how often.
        failures: BTreeMap<String, usize>,
    },
    #[error("every worker that has it was busy for {RANGE_TIME_MAX:?}")]
    Busy,
    #[error("this worker is stopping")]
    Stopping,
}

impl PeerWeights {
    /// Asks on behalf of `asker` those `members` that have its model. `stop` ends all waits.
    pub(crate) fn new(
        asker: v1::WeightsAsker,
        link: Link,
        members: watch::Receiver<Arc<Members>>,
        stats: Arc<WeightStats>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            asker,
            link,
            members,
            runtime: Handle::current(),
            stop,
            known: Mutex::default(),
            at_once: Semaphore::new(FETCHES_MAX),
            stats,
            turn: AtomicUsize::new(0),
        }
    }

    #[cfg(test)]
    pub(super) fn asker(&self) -> v1::WeightsAsker {
        self.asker.clone()
    }

    /// What somebody who has the model says of it, and of its tokens.
    pub(crate) async fn describe(&self) -> Result<(Description, Option<Vocabulary>), NotGiven> {
        let ask = async |peer: &Peer| {
            let request = v1::DescribeCheckpointRequest {
                asker: Some(self.asker.clone()),
            };
            let mut client = self.client(peer)?;
            let answer = timeout(SILENCE_MAX, client.describe_checkpoint(request)).await;
            let mut answer = answer.map_err(|_elapsed| Failure::Silent)??.into_inner();
            let vocabulary = answer.vocabulary.take();
            let vocabulary = vocabulary.map(|it| Vocabulary::from_words(it.words, &it.eos_ids));
            let vocabulary = vocabulary.transpose().map_err(Failure::Vocabulary)?;
            let description = from_wire(answer).ok_or(Failure::Form)?;
            Ok((description, vocabulary))
        };
        self.ask_in_turn(ask).await
    }

    /// Asks one peer after the other until one gives an answer.
    async fn ask_in_turn<T>(
        &self,
        mut ask: impl AsyncFnMut(&Peer) -> Result<T, Failure>,
    ) -> Result<T, NotGiven> {
        let (deadline, mut failures) = (Instant::now() + RANGE_TIME_MAX, BTreeMap::new());
        let (mut attempts, mut rounds_without_peers) = (0, 0);
        loop {
            let peers = self.peers();
            if peers.is_empty() {
                rounds_without_peers += 1;
            }
            let num_peers = peers.len() as u32;
            for (peer, behind) in peers.into_iter().zip((0..num_peers).rev()) {
                // A peer that says something again and again is not silent, and may still never end: those behind it
                // have their share of the time.
                let left = deadline.saturating_duration_since(Instant::now());
                let until = Instant::now() + left / (behind + 1);
                let failure = match timeout_at(until, ask(&peer)).await {
                    Ok(Ok(answer)) => return Ok(answer),
                    Ok(Err(failure)) => failure,
                    Err(_elapsed) => Failure::Slow,
                };
                self.let_rest(&peer);
                if failure.is_busy() {
                    continue;
                }
                self.stats.failed.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(peer = %peer.id, error = %failure, "weights not given, asking the next");
                let said = format!("{} at {}: {failure}", peer.id, peer.address);
                *failures.entry(said).or_default() += 1;
                attempts += 1;
                if attempts >= ATTEMPTS_MAX || Instant::now() >= deadline {
                    return Err(NotGiven::Failed { failures });
                }
            }
            if rounds_without_peers >= ATTEMPTS_MAX {
                let model = self.asker.model.clone();
                return Err(NotGiven::Nobody { model });
            }
            if Instant::now() >= deadline {
                return Err(match failures.is_empty() {
                    true => NotGiven::Busy,
                    false => NotGiven::Failed { failures },
                });
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    /// Who has the model: those that rest behind the others, and another one first each time.
    fn peers(&self) -> Vec<Peer> {
        let members = Arc::clone(&self.members.borrow());
        let others = members.workers.values().filter(|record| {
            record.model.fingerprint == self.asker.model
                && record.id.as_str() != self.asker.worker_id
                && record.state != WorkerState::Leaving
        });
        let mut peers: Vec<Peer> = others
            .map(|record| Peer {
                id: record.id.clone(),
                address: record.address.clone(),
            })
            .collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let num_peers = peers.len().max(1);
        peers.rotate_left(turn % num_peers);
        let (known, now) = (self.known.lock(), Instant::now());
        let rests = |peer: &Peer| {
            let known = known.get(&peer.address);
            known.is_some_and(|known| known.rests_until.is_some_and(|until| until > now))
        };
        // Keeps the order among equals.
        peers.sort_by_key(rests);
        peers
    }

    fn let_rest(&self, peer: &Peer) {
        if let Some(known) = self.known.lock().get_mut(&peer.address) {
            known.rests_until = Some(Instant::now() + REST);
        }
    }

    fn client(&self, peer: &Peer) -> Result<WeightsClient<Channel>, Failure> {
        let mut known = self.known.lock();
        if let Some(known) = known.get(&peer.address) {
            return Ok(known.client.clone());
        }
        let link = LinkSettings::default();
        let endpoint = Endpoint::from_shared(format!("http://{}", peer.address));
        let endpoint = endpoint.map_err(|_invalid| Failure::Address {
            address: peer.address.clone(),
        })?;
        // A connection of its own: the windows of expert calls are not theirs.
        let endpoint = endpoint
            .connect_timeout(link.connect_timeout)
            .http2_keep_alive_interval(link.keepalive_interval)
            .keep_alive_timeout(link.keepalive_timeout)
            .keep_alive_while_idle(false);
        let channel = self.link.connect_lazy(&endpoint);
        let client = WeightsClient::new(channel).max_decoding_message_size(DESCRIPTION_BYTES_MAX);
        // Addresses of members that left are not asked again.
        let members = Arc::clone(&self.members.borrow());
        known.retain(|address, _| members.workers.values().any(|w| w.address == *address));
        known.insert(
            peer.address.clone(),
            Known {
                client: client.clone(),
                rests_until: None,
            },
        );
        Ok(client)
    }

    /// Fills `out` with a range that one peer gives.
    async fn fetch_from(
        &self,
        peer: &Peer,
        range: &Part<'_>,
        out: &mut [u8],
    ) -> Result<(), Failure> {
        let request = v1::ReadWeightsRequest {
            asker: Some(self.asker.clone()),
            file: range.file.to_owned(),
            tensor: range.tensor.to_owned(),
            begin: range.begin,
            piece_bytes: range.piece as u64,
            stride: range.stride,
            // In range: at most `RANGE_PIECES_MAX`.
            pieces: range.count as u32,
        };
        let mut client = self.client(peer)?;
        let answer = timeout(SILENCE_MAX, client.read_weights(request)).await;
        let mut stream = answer.map_err(|_elapsed| Failure::Silent)??.into_inner();
        let mut filling = Filling::new(out);
        loop {
            let message = timeout(SILENCE_MAX, stream.message()).await;
            let chunk = message.map_err(|_elapsed| Failure::Silent)??;
            if filling.take(chunk)? {
                return Ok(());
            }
        }
    }

    async fn fetch(&self, range: &Part<'_>, out: &mut [u8]) -> Result<(), NotGiven> {
        // Never closed.
        let _place = self.at_once.acquire().await;
        let fetched = self.ask_in_turn(async |peer: &Peer| self.fetch_from(peer, range, out).await);
        fetched.await?;
        let received = &self.stats.received;
        received.fetch_add(out.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl Source for PeerWeights {
    /// Called by threads that pack, never by one of the runtime.
    fn read(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error> {
        if let Some(error) = part.instead_of {
            self.stats.unreadable.fetch_add(1, Ordering::Relaxed);
            let error = error as &dyn std::error::Error;
            let (file, tensor) = (part.file, part.tensor);
            tracing::error!(
                file,
                tensor,
                error,
                "a weight file cannot be read, asking other workers"
            );
        }
        let mut rest = out;
        for range in part.cut(RANGE_BYTES_MAX, RANGE_PIECES_MAX) {
            let (now, later) = rest.split_at_mut(range.piece * range.count);
            let fetched = self.runtime.block_on(async {
                let fetched = self.stop.run_until_cancelled(self.fetch(&range, now));
                fetched.await.unwrap_or(Err(NotGiven::Stopping))
            });
            fetched.map_err(|source| Error::Elsewhere {
                file: part.file.to_owned(),
                tensor: part.tensor.to_owned(),
                source: Box::new(source),
            })?;
            rest = later;
        }
        Ok(())
    }
}

fn shown(failures: &BTreeMap<String, usize>) -> String {
    let times = |(said, count): (&String, &usize)| match count {
        1 => said.clone(),
        count => format!("{said} ({count} times)"),
    };
    failures.iter().map(times).collect::<Vec<_>>().join("; ")
}

/// A digest as it is shown.
fn hex(digest: &[u8]) -> String {
    let shown = &digest[..digest.len().min(DIGEST_BYTES)];
    shown.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::tests::record;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_never_ends_is_not_waited_for_longer_than_one_range_may_take() {
        let mut members = Members::default();
        let peer = record("slow", "127.0.0.1:1", "f");
        members.workers.insert(peer.id.clone(), Arc::new(peer));
        let asker = v1::WeightsAsker {
            worker_id: "me".to_owned(),
            cluster: "c".to_owned(),
            model: "f".to_owned(),
        };
        let (_sender, members) = watch::channel(Arc::new(members));
        let stop = CancellationToken::new();
        let peers = PeerWeights::new(asker, Link::default(), members, Arc::default(), stop);
        let begin = Instant::now();
        let drips = async |_: &Peer| -> Result<(), Failure> {
            loop {
                sleep(SILENCE_MAX / 2).await;
            }
        };
        let asked = timeout(2 * RANGE_TIME_MAX, peers.ask_in_turn(drips)).await;
        let error = asked.expect("no end").unwrap_err().to_string();
        assert!(error.contains("slow at 127.0.0.1:1: not done"), "{error}");
        assert_eq!(begin.elapsed(), RANGE_TIME_MAX);
    }
}
