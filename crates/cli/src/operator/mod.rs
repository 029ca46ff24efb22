//! The operator's verbs: ask a router over gRPC and print what it says. This file is the door: how a router
//! is reached, and what its refusals mean. Nothing here decides anything about the cluster.

mod events;
mod placement;
mod plan;
mod status;
mod top;
mod wait;
mod weights;
mod workers;

use std::error::Error as _;
use std::future::Future;
use std::time::Duration;

use tonic::{Code, Status, TimeoutExpired};
use tramontane_proto::v1::admin_client::AdminClient;

pub(crate) use events::events;
pub(crate) use placement::placement;
pub(crate) use status::status;
pub(crate) use top::top;
pub(crate) use weights::{WeightsCommand, weights};
pub(crate) use workers::workers;

use crate::args::RouterAddress;
use crate::dial::{self, Proven};
use crate::exit::{Exit, refusal};
use crate::settings::chain;

/// Longest wait for an answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest answer: a placement may have 1 MiB, and a long list of workers more.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// What to try when nothing else is known.
pub(crate) const SEE_STATUS: &str = "tramontane status";
/// What to try, beside, when the connection broke: ports with TLS break one in the clear so.
const WITH_TLS: &str = "where the admin port speaks TLS: --tls-ca, --tls-cert and --tls-key (as `tramontane certs init` \
    prints), or --config with a [tls] section";
/// What to try when the router wants to know who asks.
const WITH_KEY: &str = "--api-key, or TRAMONTANE_API_KEY, with an operator's key";
/// What to try when a version was wrong or is not placed.
pub(crate) const SEE_WEIGHTS: &str = "tramontane weights list";
/// What to try when a worker's name was wrong or its state is not clear.
pub(crate) const SEE_WORKERS: &str = "tramontane workers list";

/// A connection to a router's admin service.
pub(crate) type Admin = AdminClient<Proven>;

/// Connects to the router that the operator names.
///
/// # Errors
/// With exit status 2 for an address that is none, and 5 when nobody answers there.
pub(crate) async fn connect(address: &RouterAddress) -> anyhow::Result<Admin> {
    let router = dial::admin(address, Some(REQUEST_TIMEOUT)).await?;
    Ok(AdminClient::new(router).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// The router's refusal in its own words, and `next`, the command to try.
pub(crate) fn refused(next: &str) -> impl Fn(Status) -> anyhow::Error {
    move |status| {
        let exit = exit_of(&status);
        let next = match exit {
            // The transport's own errors have a cause.
            Exit::Unavailable if status.source().is_some() => format!("{SEE_STATUS}; {WITH_TLS}"),
            Exit::Unavailable | Exit::Timeout => SEE_STATUS.to_owned(),
            _ if status.code() == Code::Unauthenticated => WITH_KEY.to_owned(),
            _ => next.to_owned(),
        };
        refusal(exit, words(&status), next)
    }
}

/// What the router says; what lies beneath it where the transport says it.
fn words(status: &Status) -> String {
    match status.source() {
        // The transport's words are often those of its first cause.
        Some(cause) if cause.to_string() == status.message() => chain(cause),
        Some(cause) => format!("{}: {}", status.message(), chain(cause)),
        // What a server says of services that it does not have, and nothing else.
        None if status.code() == Code::Unimplemented => {
            "there is no admin API at this port, or not this method; it has one of its own, 8002 unless `listen.admin` says otherwise"
                .to_owned()
        }
        None => status.message().to_owned(),
    }
}

/// What a refusal of the router is for a script.
fn exit_of(status: &Status) -> Exit {
    // The transport's own errors have a cause, and any code.
    if let Some(cause) = status.source() {
        let is_late = cause.is::<TimeoutExpired>();
        return if is_late {
            Exit::Timeout
        } else {
            Exit::Unavailable
        };
    }
    match status.code() {
        Code::NotFound => Exit::NotFound,
        Code::FailedPrecondition | Code::Aborted | Code::AlreadyExists => Exit::Conflict,
        Code::Unavailable => Exit::Unavailable,
        Code::DeadlineExceeded | Code::Cancelled => Exit::Timeout,
        Code::InvalidArgument | Code::OutOfRange => Exit::Misused,
        _ => Exit::Failed,
    }
}

/// Runs a verb until it ends or the operator presses Ctrl-C. What was begun in the cluster goes on.
///
/// # Errors
/// The verb's, or exit status 130.
pub(crate) async fn interruptible<T>(
    verb: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    tokio::select! {
        ended = verb => ended,
        Ok(()) = tokio::signal::ctrl_c() => {
            let message = "interrupted; what was begun goes on";
            Err(refusal(Exit::Interrupted, message, SEE_STATUS))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn a_refusal_of_the_router_becomes_a_status_and_advice() {
        let table = [
            (Status::not_found("no worker"), Exit::NotFound),
            (Status::failed_precondition("alive"), Exit::Conflict),
            (Status::unavailable("store away"), Exit::Unavailable),
            (Status::invalid_argument("65"), Exit::Misused),
            (Status::deadline_exceeded("late"), Exit::Timeout),
            (Status::internal("bug"), Exit::Failed),
        ];
        for (status, expected) in table {
            let message = status.message().to_owned();
            let error = refused(SEE_WORKERS)(status);
            assert_eq!(exit::of(&error), expected, "{message}");
            let text = error.to_string();
            assert!(
                text.starts_with(&message) && text.contains("\n  try: "),
                "{text}"
            );
        }
        let gone = Status::from_error(Box::new(std::io::Error::other("connection reset")));
        assert_eq!(exit_of(&gone), Exit::Unavailable);
        let gone = refused(SEE_WORKERS)(gone).to_string();
        assert!(gone.contains("--tls-cert"), "{gone}");
        let unknown = refused(SEE_WORKERS)(Status::unauthenticated("who asks?")).to_string();
        assert!(unknown.contains("TRAMONTANE_API_KEY"), "{unknown}");
    }
}
