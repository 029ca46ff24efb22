//! Exit statuses, and errors that know theirs and the next command to try.

use std::fmt;
use std::process::ExitCode;

use crate::settings::Misuse;

/// How a command ended, other than well. Scripts go by these numbers: they do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Refused or failed.
    Failed = 1,
    /// Written wrongly (clap's own).
    Misused = 2,
    /// No such worker or placement.
    NotFound = 3,
    /// The cluster is not in a state in which it can be done.
    Conflict = 4,
    /// Nobody answers, or the cluster does not serve.
    Unavailable = 5,
    /// The wait was too short.
    Timeout = 124,
    /// Ctrl-C.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Why a command did not do what it was asked to, and what to try next.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) exit: Exit,
    message: String,
    next: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  try: {}", self.message, self.next)
    }
}

impl std::error::Error for Refusal {}

/// An error with its exit status and the next command to try.
pub(crate) fn refusal(
    exit: Exit,
    message: impl Into<String>,
    next: impl Into<String>,
) -> anyhow::Error {
    anyhow::Error::new(Refusal {
        exit,
        message: message.into(),
        next: next.into(),
    })
}

/// The exit status of an error.
pub(crate) fn of(error: &anyhow::Error) -> Exit {
    if let Some(refusal) = error.downcast_ref::<Refusal>() {
        return refusal.exit;
    }
    let is_setting = error
        .downcast_ref::<tramontane_router::Error>()
        .is_some_and(tramontane_router::Error::is_setting);
    let is_of_worker = matches!(
        error.downcast_ref::<tramontane_worker::Error>(),
        Some(tramontane_worker::Error::Config(_))
    );
    if is_setting || is_of_worker || error.is::<Misuse>() {
        return Exit::Misused;
    }
    Exit::Failed
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;
    use crate::settings::misuse;

    #[test]
    fn an_error_keeps_its_status_and_its_advice_under_a_context() {
        let missing = refusal(Exit::NotFound, "no worker w-9", "tramontane workers list");
        let missing = Err::<(), _>(missing).context("draining").unwrap_err();
        assert_eq!(of(&missing), Exit::NotFound);
        assert_eq!(
            format!("{missing:#}"),
            "draining: no worker w-9\n  try: tramontane workers list"
        );
        assert_eq!(of(&misuse("x")), Exit::Misused);
        assert_eq!(of(&anyhow::anyhow!("x")), Exit::Failed);
    }
}
