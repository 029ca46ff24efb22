//! What the planner does, in a few words for people. Decides nothing.

use tramontane_types::WorkerId;

use super::{PlannerAction, Shortage, WaitReason};

impl std::fmt::Display for PlannerAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list = |ids: &[WorkerId]| {
            let ids: Vec<&str> = ids.iter().map(WorkerId::as_str).collect();
            ids.join(" ")
        };
        match self {
            Self::Wait { reason, .. } => match reason {
                WaitReason::Idle => write!(f, "placement fits"),
                WaitReason::NotWorthIt { gain_percent } => write!(
                    f,
                    "placement fits, another would be {gain_percent} % faster"
                ),
                WaitReason::Rested { gain_percent } => write!(
                    f,
                    "placement is too young to be changed for one that would be {gain_percent} % faster"
                ),
                WaitReason::StoreAway => write!(f, "store away, membership is frozen"),
                WaitReason::TooFewWorkers { have, need } => {
                    write!(f, "{have} of {need} workers are there")
                }
                WaitReason::Settling => write!(f, "waiting for membership to settle"),
                WaitReason::Loading { epoch, workers } => {
                    write!(f, "epoch {epoch} loads on {}", list(workers))
                }
                WaitReason::NoPlacement(Shortage {
                    error,
                    needed_bytes,
                    offered_bytes,
                }) => write!(f, "{error} ({needed_bytes} bytes of {offered_bytes})"),
            },
            Self::Propose(placement) => write!(f, "proposing epoch {}", placement.epoch),
            Self::Publish => write!(f, "publishing"),
            Self::DropPending => write!(f, "removing a pending placement that is published"),
            Self::Restore => write!(f, "writing the lost placement again"),
            Self::Late(workers) => write!(f, "planning without {}", list(workers)),
        }
    }
}
