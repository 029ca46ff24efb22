//! What etcd's answers mean to us. Never retries anything: it only says what may be retried.

use tonic::Code;

use crate::Error;
use crate::store::{LeaseId, Revision};

/// The lease of a status that says that some lease does not exist.
const SOME_LEASE: LeaseId = LeaseId(0);

/// Texts and codes as in etcd's `api/v3rpc/rpctypes/error.go`.
pub(super) fn error_of(operation: &'static str, error: &etcd_client::Error) -> Error {
    let detail = error.to_string();
    let etcd_client::Error::GRpcStatus(status) = error else {
        return match error {
            etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => {
                Error::invalid(operation, detail)
            }
            _ => Error::Unavailable { operation, detail },
        };
    };
    let text = status.message();
    let detail = text.to_owned();
    match status.code() {
        Code::NotFound if text.contains("lease not found") => {
            Error::LeaseNotFound { lease: SOME_LEASE }
        }
        Code::OutOfRange if text.contains("compacted") => Error::Compacted {
            from: Revision::default(),
            oldest: Revision::default(),
        },
        Code::ResourceExhausted if text.contains("space exceeded") => {
            Error::OutOfSpace { operation }
        }
        Code::PermissionDenied | Code::Unauthenticated => Error::Denied { operation, detail },
        Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
            Error::invalid(operation, detail)
        }
        // No leader, too many requests, a connection that broke in any of its ways.
        _ => Error::Unavailable { operation, detail },
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    fn of(status: Status) -> Error {
        error_of("put", &etcd_client::Error::GRpcStatus(status))
    }

    #[test]
    fn statuses_are_told_apart() {
        let full = of(Status::resource_exhausted(
            "etcdserver: mvcc: database space exceeded",
        ));
        assert_eq!(full, Error::OutOfSpace { operation: "put" });
        assert!(of(Status::resource_exhausted("etcdserver: too many requests")).is_retryable());
        assert!(of(Status::unavailable("etcdserver: no leader")).is_retryable());
        assert!(of(Status::unknown("transport error")).is_retryable());
        let compacted = "etcdserver: mvcc: required revision has been compacted";
        assert!(matches!(
            of(Status::out_of_range(compacted)),
            Error::Compacted { .. }
        ));
        let large = of(Status::out_of_range("decoded message length too large"));
        assert!(matches!(large, Error::Invalid { .. }), "{large}");
        let denied = of(Status::permission_denied("etcdserver: permission denied"));
        assert!(matches!(denied, Error::Denied { .. }) && !denied.is_retryable());
    }
}
