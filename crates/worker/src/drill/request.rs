//! What may be asked of a drill, checked once, and why it is refused. Does nothing.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tramontane_exchange::Cut;
use tramontane_proto::v1::{self, DrillKind};
use tramontane_types::WorkerId;

use crate::config::NAME_BYTES_MAX;
use crate::status::{ERROR_DOMAIN, reason};

/// Longest fault: longer than every lease and deadline that it is to test, short enough to wait for.
pub const DRILL_MAX: Duration = Duration::from_secs(60);
/// Longest delay of an answer or a step: far above the time after which others are asked.
pub const DRILL_DELAY_MAX: Duration = Duration::from_secs(5);
/// Most peers that a partition names.
pub const DRILL_PEERS_MAX: usize = 64;

/// A checked drill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Drill {
    Kill,
    Pause(Duration),
    Slow { duration: Duration, delay: Duration },
    Partition { duration: Duration, cut: Cut },
}

/// Why there is no drill.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DrillError {
    /// The configuration does not allow drills.
    #[error(
        "drills are off on worker {worker}: start it with --drills, `worker.drills = true` or \
         TRAMONTANE_WORKER__DRILLS=true"
    )]
    Off {
        /// Which worker.
        worker: String,
    },
    /// One at a time.
    #[error("worker {worker} has a {} drill under way, expected none", name(*.kind))]
    Running {
        /// Which worker.
        worker: String,
        /// What runs.
        kind: DrillKind,
    },
    /// A pause stops a whole process.
    #[error(
        "worker {worker} shares its process with other workers, which a pause would stop as well: \
         try a slow or a kill drill"
    )]
    SharedProcess {
        /// Which worker.
        worker: String,
    },
    /// Nothing travels that could be dropped.
    #[error(
        "worker {worker} hands its calls over in memory, where nothing can be cut: serve with \
         --exchange grpc, or try a slow or a kill drill"
    )]
    InMemory {
        /// Which worker.
        worker: String,
    },
    /// The request makes no sense.
    #[error("{field} must be {rule}, got {got}")]
    Invalid {
        /// Which part of it.
        field: &'static str,
        /// What is allowed.
        rule: String,
        /// What came.
        got: String,
    },
    /// Nobody would end the pause.
    #[error("worker {worker} has no process to end its pause: {source}")]
    Helper {
        /// Which worker.
        worker: String,
        /// What the system says.
        source: std::io::Error,
    },
}

impl From<DrillError> for Status {
    fn from(error: DrillError) -> Self {
        let (code, reason) = match &error {
            DrillError::Invalid { .. } => (Code::InvalidArgument, reason::INVALID),
            DrillError::Off { .. } => (Code::FailedPrecondition, reason::DRILLS_OFF),
            DrillError::Running { .. } => (Code::FailedPrecondition, reason::DRILL_RUNNING),
            DrillError::SharedProcess { .. }
            | DrillError::InMemory { .. }
            | DrillError::Helper { .. } => (Code::FailedPrecondition, reason::DRILL_IMPOSSIBLE),
        };
        let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
        Self::with_error_details(code, error.to_string(), details)
    }
}

impl Drill {
    /// Checks a request to worker `me`.
    pub(super) fn check(request: &v1::DrillRequest, me: &WorkerId) -> Result<Self, DrillError> {
        let kind = request.kind();
        let times = (
            Duration::from_millis(request.duration_ms.into()),
            Duration::from_millis(request.delay_ms.into()),
        );
        let duration = || within("duration_ms", times.0, DRILL_MAX);
        if kind != DrillKind::Slow && !times.1.is_zero() {
            return Err(not_of("delay_ms", kind, &request.delay_ms));
        }
        if kind != DrillKind::Partition && !request.peers.is_empty() {
            return Err(not_of("peers", kind, &request.peers.len()));
        }
        match kind {
            DrillKind::Unspecified => Err(DrillError::Invalid {
                field: "kind",
                rule: "kill, pause, slow or partition".to_owned(),
                got: request.kind.to_string(),
            }),
            DrillKind::Kill if request.duration_ms > 0 => {
                Err(not_of("duration_ms", kind, &request.duration_ms))
            }
            DrillKind::Kill => Ok(Self::Kill),
            DrillKind::Pause => Ok(Self::Pause(duration()?)),
            DrillKind::Slow => Ok(Self::Slow {
                duration: duration()?,
                delay: within("delay_ms", times.1, DRILL_DELAY_MAX)?,
            }),
            DrillKind::Partition => Ok(Self::Partition {
                duration: duration()?,
                cut: cut(&request.peers, me)?,
            }),
        }
    }

    pub(super) const fn kind(&self) -> DrillKind {
        match self {
            Self::Kill => DrillKind::Kill,
            Self::Pause(_) => DrillKind::Pause,
            Self::Slow { .. } => DrillKind::Slow,
            Self::Partition { .. } => DrillKind::Partition,
        }
    }
}

fn within(field: &'static str, got: Duration, max: Duration) -> Result<Duration, DrillError> {
    if !got.is_zero() && got <= max {
        return Ok(got);
    }
    Err(DrillError::Invalid {
        field,
        rule: format!("between 1 and {}", max.as_millis()),
        got: got.as_millis().to_string(),
    })
}

fn not_of(field: &'static str, kind: DrillKind, got: &dyn ToString) -> DrillError {
    DrillError::Invalid {
        field,
        rule: format!("absent from a {} drill", name(kind)),
        got: got.to_string(),
    }
}

fn cut(peers: &[String], me: &WorkerId) -> Result<Cut, DrillError> {
    let wrong = |rule: String, got: String| DrillError::Invalid {
        field: "peers",
        rule,
        got,
    };
    if peers.is_empty() {
        return Ok(Cut::All);
    }
    if peers.len() > DRILL_PEERS_MAX {
        let rule = format!("at most {DRILL_PEERS_MAX} workers");
        return Err(wrong(rule, peers.len().to_string()));
    }
    let is_bad = |id: &&String| id.is_empty() || id.len() > NAME_BYTES_MAX || *id == me.as_str();
    if let Some(bad) = peers.iter().find(is_bad) {
        let rule = format!("ids of other workers, 1 to {NAME_BYTES_MAX} bytes each");
        let got = bad.chars().take(NAME_BYTES_MAX).collect::<String>();
        return Err(wrong(rule, format!("{got:?}")));
    }
    let peers: BTreeSet<_> = peers.iter().map(|id| WorkerId::new(id)).collect();
    Ok(Cut::From(peers))
}

/// A kind as people write it.
const fn name(kind: DrillKind) -> &'static str {
    match kind {
        DrillKind::Unspecified => "nameless",
        DrillKind::Kill => "kill",
        DrillKind::Pause => "pause",
        DrillKind::Slow => "slow",
        DrillKind::Partition => "partition",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: DrillKind, duration_ms: u32) -> v1::DrillRequest {
        v1::DrillRequest {
            kind: kind.into(),
            duration_ms,
            ..v1::DrillRequest::default()
        }
    }

    fn refused(request: &v1::DrillRequest) -> String {
        let error = Drill::check(request, &WorkerId::new("w-0")).unwrap_err();
        let text = error.to_string();
        assert_eq!(Status::from(error).code(), Code::InvalidArgument);
        text
    }

    #[test]
    fn every_limit_of_a_drill_is_named() {
        let slow = request(DrillKind::Slow, 100);
        let partition = request(DrillKind::Partition, 100);
        let peers = |peers: Vec<String>| v1::DrillRequest {
            peers,
            ..partition.clone()
        };
        for (got, text) in [
            (
                request(DrillKind::Unspecified, 1),
                "kind must be kill, pause, slow or partition, got 0",
            ),
            (
                request(DrillKind::Pause, 60_001),
                "duration_ms must be between 1 and 60000, got 60001",
            ),
            (
                request(DrillKind::Partition, 0),
                "duration_ms must be between 1 and 60000, got 0",
            ),
            (
                request(DrillKind::Kill, 5),
                "duration_ms must be absent from a kill drill, got 5",
            ),
            (slow.clone(), "delay_ms must be between 1 and 5000, got 0"),
            (
                v1::DrillRequest {
                    delay_ms: 7,
                    ..partition.clone()
                },
                "delay_ms must be absent from a partition drill, got 7",
            ),
            (
                v1::DrillRequest {
                    peers: vec!["w-1".to_owned()],
                    ..slow
                },
                "peers must be absent from a slow drill, got 1",
            ),
            (
                peers(vec!["w-1".to_owned(); 65]),
                "peers must be at most 64 workers, got 65",
            ),
            (
                peers(vec!["w-0".to_owned()]),
                "peers must be ids of other workers, 1 to 128 bytes each, got \"w-0\"",
            ),
        ] {
            assert_eq!(refused(&got), text);
        }
    }

    #[test]
    fn a_partition_without_names_is_from_everybody() {
        let check =
            |request: v1::DrillRequest| Drill::check(&request, &WorkerId::new("w-0")).unwrap();
        let duration = Duration::from_secs(60);
        let mut asked = request(DrillKind::Partition, 60_000);
        let cut = Cut::All;
        assert_eq!(check(asked.clone()), Drill::Partition { duration, cut });
        asked.peers = vec!["w-1".to_owned()];
        let cut = Cut::From([WorkerId::new("w-1")].into());
        assert_eq!(check(asked), Drill::Partition { duration, cut });
    }
}
