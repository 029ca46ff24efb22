//! Jobs that wait for a thread. Their owners take turns, and where there is no room whoever has most waiting gives way: who
//! asks for much waits for itself.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};
use std::time::{Duration, Instant};

use super::Job;

/// Of one owner, in their order, with when they came.
type Jobs = VecDeque<(Instant, Job)>;

/// All that wait.
#[derive(Default)]
pub(super) struct Queue {
    /// Never an empty one.
    owners: BTreeMap<u64, Jobs>,
    num_jobs: usize,
    /// Whose job was the last to be taken.
    last: u64,
}

impl Queue {
    /// Adds a job to at most `max`, and returns the one that gives way to it, if any has to: the last of the owner with
    /// most. An error when nobody has more than this owner would.
    pub(super) fn push(
        &mut self,
        owner: u64,
        (since, job): (Instant, Job),
        max: usize,
    ) -> Result<Option<Job>, ()> {
        let gone = if self.num_jobs < max {
            None
        } else {
            Some(self.give_way(owner).ok_or(())?)
        };
        self.owners
            .entry(owner)
            .or_default()
            .push_back((since, job));
        self.num_jobs += 1;
        Ok(gone)
    }

    fn give_way(&mut self, asking: u64) -> Option<Job> {
        let own = self.owners.get(&asking).map_or(0, VecDeque::len);
        let longest = self.owners.iter().max_by_key(|(_, jobs)| jobs.len());
        let (&owner, _) = longest.filter(|(_, jobs)| jobs.len() > own + 1)?;
        self.take(owner, VecDeque::pop_back)
    }

    /// The next job of whoever is next.
    pub(super) fn pop(&mut self) -> Option<Job> {
        let mut behind = self.owners.range((Excluded(self.last), Unbounded));
        let next = behind.next().or_else(|| self.owners.first_key_value());
        let (&owner, _) = next?;
        self.last = owner;
        self.take(owner, VecDeque::pop_front)
    }

    fn take(&mut self, owner: u64, end: fn(&mut Jobs) -> Option<(Instant, Job)>) -> Option<Job> {
        let jobs = self.owners.get_mut(&owner)?;
        let (_, job) = end(jobs)?;
        if jobs.is_empty() {
            self.owners.remove(&owner);
        }
        self.num_jobs -= 1;
        Some(job)
    }

    /// A job that waits since before `limit`, taken out.
    pub(super) fn pop_older(&mut self, limit: Instant) -> Option<Job> {
        let is_old = |jobs: &Jobs| jobs.front().is_some_and(|j| j.0 <= limit);
        let (&owner, _) = self.owners.iter().find(|(_, jobs)| is_old(jobs))?;
        self.take(owner, VecDeque::pop_front)
    }

    /// When the job that waits longest will have waited for `wait`.
    pub(super) fn next_time(&self, wait: Duration) -> Option<Instant> {
        let heads = self.owners.values().filter_map(VecDeque::front);
        heads.map(|(since, _)| *since + wait).min()
    }
}
