//! What the router keeps of a running sequence so that it can go on elsewhere: prompt, sampled tokens,
//! parameters. Never written to disk, never logged; bounded by admission and the model's context.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tramontane_coordination::Version;
use tramontane_coordination::mutation::{Mutation, is_on};
use tramontane_proto::v1;
use tramontane_types::{SamplingParams, TokenId, WorkerId};

use crate::admission::Counted;

/// Counts what the entries of all running sequences hold.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    entries: Arc<AtomicUsize>,
    tokens: Arc<AtomicUsize>,
}

/// One running sequence. Dropping it closes the entry.
#[derive(Debug)]
pub(crate) struct Entry {
    request_id: String,
    prompt: Arc<[TokenId]>,
    sampled: Vec<TokenId>,
    params: SamplingParams,
    /// Of its tenant.
    cache_salt: u64,
    /// What it began with, and goes on with wherever it runs.
    version: Arc<Version>,
    /// Where it runs.
    worker: Option<WorkerId>,
    /// Times that it was sent to a worker.
    sent: u32,
    tokens: Arc<AtomicUsize>,
    _open: Counted,
}

impl Journal {
    /// Opens the entry of a sequence that starts.
    pub(crate) fn open(
        &self,
        request_id: String,
        (prompt, cache_salt): (Arc<[TokenId]>, u64),
        params: SamplingParams,
        version: Arc<Version>,
    ) -> Entry {
        Entry {
            request_id,
            prompt,
            sampled: Vec::new(),
            params,
            cache_salt,
            version,
            worker: None,
            sent: 0,
            tokens: Arc::clone(&self.tokens),
            _open: Counted::new(&self.entries),
        }
    }

    /// Sequences that run.
    pub(crate) fn num_entries(&self) -> usize {
        self.entries.load(Ordering::Relaxed)
    }

    /// Sampled tokens that are kept for them.
    pub(crate) fn num_tokens(&self) -> usize {
        self.tokens.load(Ordering::Relaxed)
    }
}

impl Entry {
    /// Writes down one sampled token.
    pub(crate) fn record(&mut self, id: TokenId) {
        self.sampled.push(id);
        self.tokens.fetch_add(1, Ordering::Relaxed);
    }

    /// Writes down where the sequence runs now.
    pub(crate) fn move_to(&mut self, worker: WorkerId) {
        self.worker = Some(worker);
    }

    pub(crate) const fn worker(&self) -> Option<&WorkerId> {
        self.worker.as_ref()
    }

    pub(crate) const fn version(&self) -> &Arc<Version> {
        &self.version
    }

    /// Only to prove that nobody may do so.
    pub(crate) fn mix_weights(&mut self, version: Arc<Version>) {
        self.version = version;
    }

    pub(crate) fn request_id(&self) -> &str {
        &self.request_id
    }

    pub(crate) fn num_prompt(&self) -> usize {
        self.prompt.len()
    }

    pub(crate) fn sampled(&self) -> &[TokenId] {
        &self.sampled
    }

    pub(crate) const fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The request that starts the sequence, or goes on with it after the last recorded token: sampled
    /// tokens follow the prompt, and limits, penalties and the generator still count them as output.
    /// Each time under another id: a worker that seemed lost may still run the last one.
    pub(crate) fn next_request(&mut self) -> v1::GenerateSequenceRequest {
        self.sent += 1;
        let mut prompt_ids = Vec::with_capacity(self.prompt.len() + self.sampled.len());
        prompt_ids.extend_from_slice(&self.prompt);
        let left_out = usize::from(is_on(Mutation::JournalOffByOne)).min(self.sampled.len());
        prompt_ids.extend_from_slice(&self.sampled[left_out..]);
        v1::GenerateSequenceRequest {
            request_id: format!("{}.{}", self.request_id, self.sent),
            prompt_ids,
            sampling: Some(v1::Sampling::from(&self.params)),
            num_resumed: u32::try_from(self.sampled.len()).unwrap_or(u32::MAX),
            cache_salt: self.cache_salt,
            model: self.version.model.to_string(),
            numeric_class: self.version.numeric_class.to_string(),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.tokens.fetch_sub(self.sampled.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_is_the_prompt_and_what_was_sampled() {
        let journal = Journal::default();
        let params = SamplingParams {
            seed: 9,
            ..SamplingParams::default()
        };
        let version = Arc::new(Version {
            model: "f1".into(),
            numeric_class: "cpu-q8".into(),
        });
        let prompt = Arc::from([1, 2, 3]);
        let mut entry = journal.open("r-0".to_owned(), (prompt, 7), params.clone(), version);
        let first = entry.next_request();
        assert_eq!((first.num_resumed, first.request_id.as_str()), (0, "r-0.1"));
        entry.record(7);
        entry.record(8);
        let wire = entry.next_request();
        assert_eq!(wire.request_id, "r-0.2");
        assert_eq!(wire.prompt_ids, [1, 2, 3, 7, 8]);
        assert_eq!((wire.num_resumed, wire.cache_salt), (2, 7));
        let weights = (wire.model.as_str(), wire.numeric_class.as_str());
        assert_eq!(weights, ("f1", "cpu-q8"));
        assert_eq!(wire.sampling, Some(v1::Sampling::from(&params)));
        assert_eq!((journal.num_entries(), journal.num_tokens()), (1, 2));
        drop(entry);
        assert_eq!((journal.num_entries(), journal.num_tokens()), (0, 0));
    }
}
