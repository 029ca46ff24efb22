//! The leader's end of the ranks' streams: greets, forwards, and says when one has ended. Decides nothing.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use tramontane_proto::v1::{
    self,
    island_server::{Island, IslandServer},
    rank_message::Kind,
};

use super::hub::Hub;
use super::{QUEUE_MAX, SILENCE_MAX, message_bytes_max};

/// The tonic service `Island` in front of a [`Hub`].
#[derive(Debug)]
pub(crate) struct IslandService {
    pub(crate) hub: Arc<Hub>,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl IslandService {
    pub(crate) fn into_service(self) -> IslandServer<Self> {
        let most = message_bytes_max(&self.hub.config.geometry);
        IslandServer::new(self)
            .max_decoding_message_size(most)
            .max_encoding_message_size(most)
    }
}

/// Reads what a rank says until it ends.
async fn read(
    hub: Arc<Hub>,
    id: u64,
    mut said: Streaming<v1::RankMessage>,
    stop: CancellationToken,
) {
    let why = loop {
        let message = tokio::select! {
            message = said.next() => message,
            () = stop.cancelled() => break "the worker ends".to_owned(),
        };
        match message {
            Some(Ok(v1::RankMessage { kind: Some(kind) })) => hub.hear(id, kind),
            Some(Ok(_)) => break "a message that says nothing".to_owned(),
            Some(Err(status)) => break status.message().to_owned(),
            None => break "it has left".to_owned(),
        }
    };
    hub.depart(id, &why);
}

#[tonic::async_trait]
impl Island for IslandService {
    type FollowStream = Pin<Box<dyn Stream<Item = Result<v1::LeadMessage, Status>> + Send>>;

    async fn follow(
        &self,
        request: Request<Streaming<v1::RankMessage>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut said = request.into_inner();
        let first = timeout(SILENCE_MAX, said.next()).await;
        let Ok(Some(Ok(v1::RankMessage {
            kind: Some(Kind::Hello(hello)),
        }))) = first
        else {
            return Err(Status::invalid_argument("a rank greets first"));
        };
        let (queue, messages) = mpsc::channel(QUEUE_MAX);
        let arrived = self.hub.arrive(&hello, queue);
        let id = arrived.map_err(Status::failed_precondition)?;
        let (hub, stop) = (Arc::clone(&self.hub), self.stop.clone());
        self.tasks.spawn(read(hub, id, said, stop));
        Ok(Response::new(Box::pin(
            ReceiverStream::new(messages).map(Ok),
        )))
    }
}
