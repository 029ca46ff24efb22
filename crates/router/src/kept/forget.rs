//! Whose answer is forgotten where there is no room for all.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::time::Instant;

use super::{KeptAnswers, KeyDigest, Tape};
use crate::tenants::TenantName;

/// Memory of an answer beside its deltas, roughly.
const TAPE_BYTES: usize = 1 << 10;

/// What is kept of one tenant's answers.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    bytes: usize,
    /// The answer that may be forgotten first, and since when it is whole.
    oldest: Option<(Instant, KeyDigest)>,
}

impl KeptAnswers {
    /// Forgets the answer that has been whole for the longest time and is not read, if there is one: of whoever's take
    /// most memory, among those who have one.
    pub(super) fn forget_oldest(&self, tapes: &mut HashMap<KeyDigest, Arc<Tape>>) -> bool {
        let mut tenants: HashMap<&TenantName, Kept> = HashMap::new();
        for (key, tape) in tapes.iter() {
            let state = tape.state.lock();
            let kept = tenants.entry(&tape.tenant).or_default();
            kept.bytes += TAPE_BYTES + state.bytes;
            let is_read = state.is_read(self.limits.stall);
            if let Some(since) = state.whole_since.filter(|_| !is_read)
                && kept.oldest.is_none_or(|(other, _)| since < other)
            {
                kept.oldest = Some((since, *key));
            }
        }
        let can_forget = tenants.values().filter(|kept| kept.oldest.is_some());
        let most = can_forget.max_by_key(|kept| kept.bytes);
        let oldest = most.and_then(|kept| kept.oldest);
        let Some(tape) = oldest.and_then(|(_, key)| tapes.remove(&key)) else {
            return false;
        };
        tape.forget();
        true
    }
}
