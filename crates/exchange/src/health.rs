//! Whom to ask: remembers who failed, and for how long not to ask again. Reads no clock.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tramontane_types::WorkerId;

/// First pause after a refusal or a lost call; doubles with every further one.
pub(crate) const REFUSED_PAUSE: Duration = Duration::from_millis(5);
/// Longest pause after a refusal: asking costs a round trip, not asking costs a stalled layer.
pub(crate) const REFUSED_PAUSE_MAX: Duration = Duration::from_millis(100);
/// First pause after a call that takes longer than usual: others are asked until it answers after all.
pub(crate) const LATE_PAUSE: Duration = Duration::from_millis(50);
/// First pause after a call that got no answer in time; asking such a worker again costs a whole timeout.
pub(crate) const SILENT_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after silence.
pub(crate) const SILENT_PAUSE_MAX: Duration = Duration::from_secs(8);
/// Workers remembered before those whose pause is over are forgotten.
const REMEMBERED_MAX: usize = 1024;

#[derive(Debug)]
struct Down {
    until: Instant,
    pause: Duration,
}

/// Workers that failed lately.
#[derive(Debug, Default)]
pub(crate) struct Health {
    down: HashMap<WorkerId, Down>,
}

impl Health {
    pub(crate) fn usable(&self, worker: &WorkerId, now: Instant) -> bool {
        self.down.get(worker).is_none_or(|down| down.until <= now)
    }

    pub(crate) fn refused(&mut self, worker: &WorkerId, now: Instant) {
        self.pause(worker, now, REFUSED_PAUSE, REFUSED_PAUSE_MAX);
    }

    /// Only a call that is answered ends the doubling: a worker that hangs is soon asked seldom.
    pub(crate) fn late(&mut self, worker: &WorkerId, now: Instant) {
        self.pause(worker, now, LATE_PAUSE, SILENT_PAUSE_MAX);
    }

    pub(crate) fn silent(&mut self, worker: &WorkerId, now: Instant) {
        self.pause(worker, now, SILENT_PAUSE, SILENT_PAUSE_MAX);
    }

    pub(crate) fn answered(&mut self, worker: &WorkerId) {
        self.down.remove(worker);
    }

    fn pause(&mut self, worker: &WorkerId, now: Instant, first: Duration, max: Duration) {
        match self.down.get_mut(worker) {
            // Several calls of one failure count once.
            Some(down) if down.until > now && down.pause >= first => {}
            Some(down) => {
                down.pause = (down.pause * 2).clamp(first, max);
                down.until = now + down.pause;
            }
            None => {
                if self.down.len() >= REMEMBERED_MAX {
                    self.down.retain(|_, down| down.until > now);
                }
                let down = Down {
                    until: now + first,
                    pause: first,
                };
                self.down.insert(worker.clone(), down);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_limit_and_end_with_an_answer() {
        let worker = WorkerId::new("a");
        let mut health = Health::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..6 {
            health.refused(&worker, now);
            health.refused(&worker, now);
            let begin = now;
            while !health.usable(&worker, now) {
                now += Duration::from_millis(1);
            }
            pauses.push((now - begin).as_millis());
        }
        assert_eq!(pauses, [5, 10, 20, 40, 80, 100]);
        health.refused(&worker, now);
        health.answered(&worker);
        assert!(health.usable(&worker, now));
    }

    #[test]
    fn a_worker_that_is_late_again_and_again_is_soon_asked_seldom() {
        let worker = WorkerId::new("a");
        let mut health = Health::default();
        let (begin, mut now) = (Instant::now(), Instant::now());
        let mut num_asked = 0;
        while now < begin + Duration::from_secs(30) {
            if health.usable(&worker, now) {
                health.late(&worker, now);
                num_asked += 1;
            }
            now += Duration::from_millis(1);
        }
        assert_eq!(num_asked, 11);
        health.answered(&worker);
        assert!(health.usable(&worker, now));
    }

    #[test]
    fn silence_counts_more_than_a_refusal() {
        let worker = WorkerId::new("a");
        let mut health = Health::default();
        let now = Instant::now();
        health.refused(&worker, now);
        health.silent(&worker, now);
        assert!(!health.usable(&worker, now + Duration::from_millis(999)));
        assert!(health.usable(&worker, now + Duration::from_secs(1)));
    }
}
