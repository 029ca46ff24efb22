//! The masks of constrained sequences, found while the model computes the next step: a few threads go on in a sequence's
//! grammar by the token that was sampled. The engine never waits for one that is late: its sequence is left out of the steps
//! until it has come, and fails when that takes too long.
//!
//! What they find depends on a sequence's tokens alone, so who finds it, and when, changes no token.

mod crew;
mod room;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use tramontane_compute::SampleError;
use tramontane_grammar::{Canceller, MatchError, Next};
use tramontane_types::TokenId;

use crate::FailureKind;
use crate::sequence::OwnerId;

pub use crew::BeforeMask;
pub(crate) use crew::MaskThreads;
use crew::{Job, Ticket};
use room::Account;
pub use room::{HeldMatcher, MatcherRoom};

/// Threads that find masks, of each engine. Few: they take their time from those that compute.
pub const MASK_THREADS: usize = 2;
/// Masks that wait for a thread; a sequence that needs a further one is handed back.
pub const MASK_QUEUE_MAX: usize = 1024;
/// A thread that is at one mask for this long is replaced, so that others get theirs. A mask takes a tenth of a millisecond,
/// and with all its fuel some ten.
pub const MASK_RELIEF_AFTER: Duration = Duration::from_millis(250);
/// Replaced threads that are still at their masks: nothing but the mask itself ends them, and each takes a core. Where there
/// are this many and yet another one is slow, constrained sequences are refused.
pub const MASK_STRAYS_MAX: usize = 2;
/// How long a thread may be at one mask before its sequence fails. The fuel of a mask bounds what is counted, and ends most
/// work far earlier; but not all of it is counted, and then it may take minutes.
pub const MASK_FIND_MAX: Duration = Duration::from_secs(5);
/// How long a mask may wait for a thread before its sequence is handed back: it is not its own fault.
pub const MASK_QUEUE_WAIT_MAX: Duration = Duration::from_secs(10);
/// A step waits for all its masks together for as long as it has computed, within these two: a moment's wait is cheaper than
/// to compute a row once more.
pub const MASK_STEP_WAIT_MIN: Duration = Duration::from_millis(1);
/// See [`MASK_STEP_WAIT_MIN`]. Where there is nothing to compute, this long until the engine looks for other work.
pub const MASK_STEP_WAIT_MAX: Duration = Duration::from_millis(5);
/// Bytes of all sequences' states in their grammars.
pub const MATCHERS_BYTES_MAX: usize = 1 << 30;

/// What constraints may cost one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaskLimits {
    /// A thread that is at one mask for this long is replaced.
    pub relief_after: Duration,
    /// A sequence whose mask takes longer fails.
    pub find_max: Duration,
    /// A sequence whose mask waits longer for a thread is handed back.
    pub queue_wait_max: Duration,
    /// Bytes of all sequences' states in their grammars: beyond it no further sequences are taken, and the largest fail.
    pub bytes_max: usize,
}

impl Default for MaskLimits {
    fn default() -> Self {
        Self {
            relief_after: MASK_RELIEF_AFTER,
            find_max: MASK_FIND_MAX,
            queue_wait_max: MASK_QUEUE_WAIT_MAX,
            bytes_max: MATCHERS_BYTES_MAX,
        }
    }
}

/// Why there is no mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MaskError {
    #[error(transparent)]
    Match(#[from] MatchError),
    #[error("the grammar's next tokens were not found within {} ms", limit.as_millis())]
    Late { limit: Duration },
    #[error("no thread was free for the grammar's next tokens within {} ms", limit.as_millis())]
    NoThread { limit: Duration },
    #[error("{limit} masks wait for a thread already")]
    Queue { limit: usize },
    #[error("the thread that looks for the grammar's next tokens has ended")]
    Lost,
    #[error(
        "all grammars together have more than {limit} bytes, of which this one has {got}, the most"
    )]
    Full { limit: usize, got: usize },
}

impl MaskError {
    /// Another worker would find the same of the same tokens, and take as long.
    const fn kind(&self) -> FailureKind {
        match self {
            Self::Match(_) | Self::Late { .. } => FailureKind::Constraint,
            Self::NoThread { .. } | Self::Queue { .. } | Self::Full { .. } => FailureKind::Full,
            Self::Lost => FailureKind::Step,
        }
    }
}

/// Why a sequence has no next token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoToken {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// Beside the constraint there are `ignore_eos`, `min_tokens` and `bad_words`.
    #[error("no token is left that the grammar and the other parameters allow")]
    NothingLeft,
}

impl NoToken {
    /// Who may do something about it.
    pub(crate) const fn kind(&self) -> FailureKind {
        match self {
            Self::Sample(_) => FailureKind::Sequence,
            Self::Mask(error) => error.kind(),
            Self::NothingLeft => FailureKind::Constraint,
        }
    }
}

/// The place of one sequence in its grammar: here, or with a thread.
#[derive(Debug)]
pub(crate) struct Matching {
    place: Place,
    canceller: Canceller,
    account: Arc<Account>,
}

#[derive(Debug)]
enum Place {
    Here(HeldMatcher),
    Away(Away),
    Broken(MaskError),
}

/// A place that a thread has, or will have.
#[derive(Debug)]
struct Away {
    back: Receiver<HeldMatcher>,
    ticket: Arc<Ticket>,
    since: Instant,
}

impl Matching {
    /// A sequence's place, as it was when its grammar was compiled.
    pub(crate) fn new(held: HeldMatcher) -> Self {
        Self {
            canceller: held.matcher.canceller(),
            account: Arc::clone(&held.account),
            place: Place::Here(held),
        }
    }

    /// What it takes, wherever it is.
    pub(crate) fn num_bytes(&self) -> usize {
        self.account.num_bytes()
    }

    /// Counts it as gone, though a thread may have it for some time yet.
    pub(crate) fn leave_room(&self) {
        self.account.set(0);
    }

    /// Whether the place is here, or comes by `until`; also when it is known that it never will.
    pub(crate) fn comes_by(&mut self, until: Instant) -> bool {
        let Place::Away(away) = &self.place else {
            return true;
        };
        let left = until.saturating_duration_since(Instant::now());
        self.place = match away.back.recv_timeout(left) {
            Ok(held) => Place::Here(held),
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => Place::Broken(MaskError::Lost),
        };
        true
    }

    /// Whether the place is here, without a wait; an error once it has been awaited for too long.
    pub(crate) fn has_come(&mut self, limits: &MaskLimits) -> Result<bool, MaskError> {
        if self.comes_by(Instant::now()) {
            return Ok(true);
        }
        match &self.place {
            Place::Away(away) => away.check(limits).map(|()| false),
            Place::Here(_) | Place::Broken(_) => Ok(true),
        }
    }

    /// What may come next. The place is here.
    pub(crate) fn allowed(&mut self) -> Result<Next<'_>, MaskError> {
        match &mut self.place {
            Place::Here(held) => Ok(held.matcher.allowed()?),
            Place::Broken(error) => Err(error.clone()),
            Place::Away(_) => Err(MaskError::Lost),
        }
    }

    /// Whether the text is whole and nothing may follow. The place is here.
    pub(crate) fn has_ended(&self) -> Result<bool, MaskError> {
        match &self.place {
            Place::Here(held) => Ok(held.has_ended()),
            Place::Broken(error) => Err(error.clone()),
            Place::Away(_) => Err(MaskError::Lost),
        }
    }

    /// Goes on by a token that was sampled as [`allowed`](Self::allowed) says, and finds what may come then if
    /// `finds_mask`, while others compute.
    pub(crate) fn accept(
        &mut self,
        id: TokenId,
        finds_mask: bool,
        (owner, threads): (OwnerId, &MaskThreads),
    ) {
        let (done, back) = sync_channel(1);
        let ticket = Arc::new(Ticket::default());
        let away = Away {
            back,
            ticket: Arc::clone(&ticket),
            since: Instant::now(),
        };
        match std::mem::replace(&mut self.place, Place::Away(away)) {
            Place::Here(held) => {
                let job = Job {
                    held,
                    id,
                    finds_mask,
                    ticket,
                    done,
                };
                if let Err(error) = threads.send(owner, job) {
                    self.place = Place::Broken(error);
                }
            }
            broken => self.place = broken,
        }
    }
}

impl Drop for Matching {
    fn drop(&mut self) {
        self.canceller.cancel();
    }
}

impl Away {
    fn check(&self, limits: &MaskLimits) -> Result<(), MaskError> {
        let (find_max, wait_max) = (limits.find_max, limits.queue_wait_max);
        match self.ticket.began() {
            Some(began) if began.elapsed() > find_max => Err(MaskError::Late { limit: find_max }),
            None if self.since.elapsed() > wait_max => Err(MaskError::NoThread { limit: wait_max }),
            _ => Ok(()),
        }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        self.ticket.give_up();
    }
}
