//! How much the states of all sequences in their grammars may take together. Each counts from when it is made, wherever it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tramontane_grammar::Matcher;

use crate::SubmitError;

/// The room for the matchers of one engine's sequences. Cheap to clone.
#[derive(Clone, Debug)]
pub struct MatcherRoom {
    bytes: Arc<AtomicUsize>,
    limit: usize,
}

/// A matcher that counts.
#[derive(Debug)]
pub struct HeldMatcher {
    pub(super) matcher: Box<Matcher>,
    pub(super) account: Arc<Account>,
}

/// What one matcher has of the room.
#[derive(Debug)]
pub(super) struct Account {
    own: AtomicUsize,
    room: MatcherRoom,
}

impl MatcherRoom {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            bytes: Arc::default(),
            limit,
        }
    }

    /// Takes room for a matcher.
    ///
    /// # Errors
    /// When there is none.
    pub fn hold(&self, matcher: Matcher) -> Result<HeldMatcher, SubmitError> {
        let (limit, num_bytes) = (self.limit, matcher.num_bytes());
        let taken = |bytes: usize| Some(bytes.saturating_add(num_bytes)).filter(|&b| b <= limit);
        // In one go: who finds no room has never counted.
        let fits = self
            .bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        if fits.is_err() {
            return Err(SubmitError::GrammarsFull { limit });
        }
        Ok(HeldMatcher {
            account: Arc::new(Account {
                own: AtomicUsize::new(num_bytes),
                room: self.clone(),
            }),
            matcher: Box::new(matcher),
        })
    }

    /// Bytes beyond the limit.
    pub(crate) fn excess(&self) -> usize {
        self.bytes
            .load(Ordering::Relaxed)
            .saturating_sub(self.limit)
    }

    pub(crate) const fn limit(&self) -> usize {
        self.limit
    }
}

impl HeldMatcher {
    /// Whether the text is whole, and nothing may follow.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        self.matcher.has_ended()
    }

    /// Notes the size that it has now.
    pub(super) fn count(&self) {
        self.account.set(self.matcher.num_bytes());
    }
}

impl Drop for HeldMatcher {
    fn drop(&mut self) {
        self.account.set(0);
    }
}

impl Account {
    pub(super) fn num_bytes(&self) -> usize {
        self.own.load(Ordering::Relaxed)
    }

    /// Whoever sets it, and in whichever order: the room has the sum of what is set.
    pub(super) fn set(&self, now: usize) {
        let before = self.own.swap(now, Ordering::Relaxed);
        let bytes = &self.room.bytes;
        if now >= before {
            bytes.fetch_add(now - before, Ordering::Relaxed);
        } else {
            bytes.fetch_sub(before - now, Ordering::Relaxed);
        }
    }
}
