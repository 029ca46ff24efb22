//! The gRPC service `Weights`: gives bytes of this worker's files to workers of its cluster and model. Never
//! faster than its rate, never more at once than its places, never on a runtime thread.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::Stream;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};
use tramontane_grammar::Vocabulary;
use tramontane_model::{Checkpoint, Error, Part};
use tramontane_proto::v1::{
    self, weights_chunk::Kind, weights_server::Weights, weights_server::WeightsServer,
};
use tramontane_types::WorkerId;

use super::pace::Pace;
use super::{
    CHUNK_BYTES_MAX, RANGE_BYTES_MAX, RANGE_PIECES_MAX, TRANSFERS_MAX, TRANSFERS_WAITING_MAX,
    WeightStats, to_wire,
};
use crate::config::NAME_BYTES_MAX;

/// Longest wait for a place.
const PLACE_WAIT_MAX: Duration = Duration::from_secs(2);
/// Longest wait for the asker to take a message.
const SEND_MAX: Duration = Duration::from_secs(10);
/// Messages that are read and not yet sent, per transfer.
const CHUNKS_WAITING_MAX: usize = 2;
/// Longest name of a file: what file systems have.
const FILE_NAME_BYTES_MAX: usize = 255;
/// Largest request.
const REQUEST_BYTES_MAX: usize = 64 << 10;

/// What the service gives, and to whom.
#[derive(Debug)]
pub(crate) struct WeightsServing {
    pub(crate) me: WorkerId,
    pub(crate) cluster: String,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) vocabulary: Option<Vocabulary>,
    /// Bytes per second.
    pub(crate) rate: u64,
    pub(crate) stats: Arc<WeightStats>,
    /// Ends all transfers.
    pub(crate) ended: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// The service in front of one worker's files.
#[derive(Clone, Debug)]
pub(crate) struct WeightsService {
    serving: Arc<WeightsServing>,
    pace: Arc<Pace>,
    places: Arc<Semaphore>,
    /// Places and the queue before them.
    queue: Arc<Semaphore>,
}

type ChunkStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;
type Chunks = mpsc::Sender<Result<v1::WeightsChunk, Status>>;

/// The places of a transfer, and of a request that waits for one.
#[derive(Debug)]
pub(super) struct Place {
    _transfer: OwnedSemaphorePermit,
    _queue: OwnedSemaphorePermit,
}

impl WeightsService {
    pub(crate) fn new(serving: WeightsServing) -> Self {
        Self {
            pace: Arc::new(Pace::new(serving.rate)),
            serving: Arc::new(serving),
            places: Arc::new(Semaphore::new(TRANSFERS_MAX)),
            queue: Arc::new(Semaphore::new(TRANSFERS_MAX + TRANSFERS_WAITING_MAX)),
        }
    }

    /// The service with its message limits set, to be added to a server.
    pub(crate) fn into_service(self) -> WeightsServer<Self> {
        WeightsServer::new(self).max_decoding_message_size(REQUEST_BYTES_MAX)
    }

    /// Whether the asker is of our cluster and model.
    fn check(&self, asker: Option<&v1::WeightsAsker>) -> Result<(), Status> {
        let Some(asker) = asker else {
            return Err(Status::invalid_argument(
                "the request does not say who asks",
            ));
        };
        let serving = &self.serving;
        for (what, ours, theirs) in [
            ("cluster", serving.cluster.as_str(), &asker.cluster),
            ("model", serving.checkpoint.fingerprint(), &asker.model),
        ] {
            if ours != theirs {
                let theirs = clip(theirs);
                return Err(Status::failed_precondition(format!(
                    "{what} is {theirs:?}, expected {ours:?}"
                )));
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn has_room(&self) -> bool {
        self.queue.available_permits() > 0
    }

    pub(super) async fn take_place(&self) -> Result<Place, Status> {
        let busy = || Status::resource_exhausted(format!("{TRANSFERS_MAX} transfers run already"));
        let queue = Arc::clone(&self.queue).try_acquire_owned();
        let queue = queue.map_err(|_full| busy())?;
        let transfer = timeout(PLACE_WAIT_MAX, Arc::clone(&self.places).acquire_owned());
        match transfer.await {
            Ok(Ok(transfer)) => Ok(Place {
                _transfer: transfer,
                _queue: queue,
            }),
            Ok(Err(_)) | Err(_) => Err(busy()),
        }
    }

    /// Sends a range and its digest.
    async fn transfer(self, range: Range, chunks: Chunks, _place: Place) {
        let mut hash = Sha256::new();
        let parts: Vec<Piece> = range
            .part()
            .cut(CHUNK_BYTES_MAX, RANGE_PIECES_MAX)
            .map(Piece::from)
            .collect();
        for piece in parts {
            self.pace.wait(piece.len * piece.count).await;
            let (range, checkpoint) = (range.clone(), Arc::clone(&self.serving.checkpoint));
            let read = move || {
                let data = range.read(piece, &checkpoint);
                hash.update(data.as_deref().unwrap_or_default());
                (data, hash)
            };
            let Ok((chunk, so_far)) = tokio::task::spawn_blocking(read).await else {
                send(&chunks, Err(Status::internal("reading weights panicked"))).await;
                return;
            };
            hash = so_far;
            let (bytes, is_last) = (chunk.as_ref().map_or(0, Vec::len), chunk.is_err());
            let kind = chunk.map(|data| Kind::Data(data.into()));
            if !send(&chunks, kind).await || is_last {
                return;
            }
            let sent = &self.serving.stats.sent;
            sent.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        send(&chunks, Ok(Kind::Sha256(hash.finalize().to_vec()))).await;
    }
}

/// Whether the asker is still there.
async fn send(chunks: &Chunks, kind: Result<Kind, Status>) -> bool {
    let chunk = kind.map(|kind| v1::WeightsChunk { kind: Some(kind) });
    matches!(timeout(SEND_MAX, chunks.send(chunk)).await, Ok(Ok(())))
}

#[tonic::async_trait]
impl Weights for WeightsService {
    type ReadWeightsStream = ChunkStream;

    async fn describe_checkpoint(
        &self,
        request: Request<v1::DescribeCheckpointRequest>,
    ) -> Result<Response<v1::CheckpointDescription>, Status> {
        self.check(request.get_ref().asker.as_ref())?;
        let mut description = to_wire(self.serving.checkpoint.describe());
        let vocabulary = self.serving.vocabulary.as_ref();
        description.vocabulary = vocabulary.map(|vocabulary| v1::Vocabulary {
            words: vocabulary.words().to_vec(),
            eos_ids: vocabulary.eos_ids().to_vec(),
        });
        Ok(Response::new(description))
    }

    async fn read_weights(
        &self,
        request: Request<v1::ReadWeightsRequest>,
    ) -> Result<Response<ChunkStream>, Status> {
        let request = request.into_inner();
        self.check(request.asker.as_ref())?;
        let asker = request.asker.as_ref().map(|asker| clip(&asker.worker_id));
        let range = Range::new(request)?;
        let place = self.take_place().await?;
        tracing::debug!(worker = %self.serving.me, asker, file = &*range.file, "giving weights");
        let (sender, chunks) = mpsc::channel(CHUNKS_WAITING_MAX);
        let (ended, transfer) = (
            self.serving.ended.clone(),
            self.clone().transfer(range, sender, place),
        );
        self.serving
            .tasks
            .spawn(async move { ended.run_until_cancelled(transfer).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }
}

/// What is asked for, within the limits of one request.
#[derive(Clone, Debug)]
pub(super) struct Range {
    file: Arc<str>,
    tensor: Arc<str>,
    whole: Piece,
}

/// Some pieces of a file.
#[derive(Clone, Copy, Debug)]
struct Piece {
    begin: u64,
    len: usize,
    stride: u64,
    count: usize,
}

impl From<Part<'_>> for Piece {
    fn from(part: Part<'_>) -> Self {
        Self {
            begin: part.begin,
            len: part.piece,
            stride: part.stride,
            count: part.count,
        }
    }
}

impl Range {
    pub(super) fn new(request: v1::ReadWeightsRequest) -> Result<Self, Status> {
        let bytes = request.piece_bytes.checked_mul(u64::from(request.pieces));
        let in_range = bytes.filter(|n| (1..=RANGE_BYTES_MAX as u64).contains(n));
        let is_cut_up = request.pieces as usize > RANGE_PIECES_MAX;
        if in_range.is_none() || is_cut_up || request.stride < request.piece_bytes {
            let (pieces, len, stride) = (request.pieces, request.piece_bytes, request.stride);
            return Err(Status::invalid_argument(format!(
                "{pieces} pieces of {len} bytes, {stride} apart: expected 1 to {RANGE_BYTES_MAX} bytes in at \
                 most {RANGE_PIECES_MAX} pieces that do not overlap"
            )));
        }
        let name_len = request.file.len();
        if name_len > FILE_NAME_BYTES_MAX {
            return Err(Status::invalid_argument(format!(
                "file has a name of {name_len} bytes, expected at most {FILE_NAME_BYTES_MAX}"
            )));
        }
        let range = Self {
            whole: Piece {
                begin: request.begin,
                // In range: at most `RANGE_BYTES_MAX`.
                len: request.piece_bytes as usize,
                stride: request.stride,
                count: request.pieces as usize,
            },
            file: request.file.into(),
            tensor: clip(&request.tensor).into(),
        };
        if range.part().end().is_none() {
            let (begin, stride) = (request.begin, request.stride);
            return Err(Status::out_of_range(format!(
                "pieces from byte {begin} on, {stride} apart: expected an end that can be counted in 64 bits"
            )));
        }
        Ok(range)
    }

    pub(super) fn part(&self) -> Part<'_> {
        self.part_of(self.whole)
    }

    fn part_of(&self, piece: Piece) -> Part<'_> {
        Part {
            piece: piece.len,
            stride: piece.stride,
            count: piece.count,
            ..Part::whole(&self.file, &self.tensor, piece.begin, 0)
        }
    }

    fn read(&self, piece: Piece, checkpoint: &Checkpoint) -> Result<Vec<u8>, Status> {
        let mut data = vec![0; piece.len * piece.count];
        match checkpoint.read_here(&self.part_of(piece), &mut data) {
            Ok(()) => Ok(data),
            Err(error @ Error::NotHere { .. }) => Err(Status::not_found(error.to_string())),
            Err(error @ Error::Tensor { .. }) => Err(Status::out_of_range(error.to_string())),
            Err(error) => {
                let cause = &error as &dyn std::error::Error;
                tracing::error!(error = cause, "a weight file cannot be read");
                Err(Status::data_loss(format!("{} cannot be read", self.file)))
            }
        }
    }
}

/// So much of a text of somebody else as may stand in a log.
fn clip(text: &str) -> String {
    text.chars().take(NAME_BYTES_MAX).collect()
}
