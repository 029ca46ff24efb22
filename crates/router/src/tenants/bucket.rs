//! A token bucket: so much per minute, a minute's worth at once. Pure: time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// The time in which an empty bucket fills.
const MINUTE: Duration = Duration::from_secs(60);

/// One quota of one tenant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bucket {
    capacity: f64,
    /// Below zero after more was used than was known when it was allowed.
    level: f64,
    at: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(per_minute: u64, now: Instant) -> Self {
        let capacity = per_minute as f64;
        Self {
            capacity,
            level: capacity,
            at: now,
        }
    }

    /// Takes `amount`, or says when it will be there. More than a full bucket holds waits for a full one and
    /// leaves a debt: whoever asks for it is late, not lost.
    pub(crate) fn take(&mut self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.fill(now);
        let needed = (amount as f64).min(self.capacity);
        if self.level < needed {
            return Err(self.time_for(needed - self.level));
        }
        self.level -= amount as f64;
        Ok(())
    }

    /// Takes what was used already, if need be as a debt.
    pub(crate) fn charge(&mut self, amount: u64, now: Instant) {
        self.fill(now);
        self.level -= amount as f64;
    }

    /// Gives back what was taken for nothing.
    pub(crate) fn give_back(&mut self, amount: u64, now: Instant) {
        self.fill(now);
        self.level = (self.level + amount as f64).min(self.capacity);
    }

    /// When anything is left again; zero when something is.
    pub(crate) fn empty_for(&mut self, now: Instant) -> Duration {
        self.fill(now);
        // Less than a whole unit is nothing yet.
        self.time_for((1.0_f64.min(self.capacity) - self.level).max(0.0))
    }

    /// What is left, in whole units.
    pub(crate) fn left(&mut self, now: Instant) -> u64 {
        self.fill(now);
        self.level.max(0.0) as u64
    }

    /// When it will be full.
    pub(crate) fn full_in(&mut self, now: Instant) -> Duration {
        self.fill(now);
        self.time_for(self.capacity - self.level)
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        let more = self.capacity * passed.as_secs_f64() / MINUTE.as_secs_f64();
        self.level = (self.level + more).min(self.capacity);
        self.at = self.at.max(now);
    }

    fn time_for(&self, amount: f64) -> Duration {
        let seconds = MINUTE.as_secs_f64() * amount / self.capacity.max(1.0);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_worth_comes_at_once_and_then_as_it_fills() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(60, begin);
        bucket.take(60, begin).unwrap();
        assert_eq!(bucket.take(1, begin), Err(Duration::from_secs(1)));
        assert_eq!(bucket.take(5, begin), Err(Duration::from_secs(5)));
        let later = begin + Duration::from_secs(5);
        bucket.take(5, later).unwrap();
        assert_eq!(bucket.left(later), 0);
        assert_eq!(bucket.full_in(later), MINUTE);
        assert_eq!(bucket.left(later + 10 * MINUTE), 60);
    }

    #[test]
    fn what_was_used_without_asking_is_a_debt() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(60, begin);
        bucket.charge(90, begin);
        assert_eq!(bucket.left(begin), 0);
        assert_eq!(bucket.empty_for(begin), Duration::from_secs(31));
        assert_eq!(
            bucket.empty_for(begin + Duration::from_secs(31)),
            Duration::ZERO
        );
    }

    #[test]
    fn more_than_a_full_bucket_is_late_and_not_lost() {
        let begin = Instant::now();
        let mut bucket = Bucket::new(60, begin);
        bucket.take(30, begin).unwrap();
        assert_eq!(bucket.take(600, begin), Err(Duration::from_secs(30)));
        let full = begin + Duration::from_secs(30);
        bucket.take(600, full).unwrap();
        assert_eq!(bucket.empty_for(full), Duration::from_secs(541));
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing() {
        let begin = Instant::now() + MINUTE;
        let mut bucket = Bucket::new(60, begin);
        bucket.take(60, begin).unwrap();
        assert_eq!(bucket.left(begin - Duration::from_secs(30)), 0);
        assert_eq!(bucket.left(begin + Duration::from_secs(30)), 30);
    }
}
