//! How fast weights leave a worker: one rate for all transfers together. Holds nothing back while it is idle.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// Shares a rate.
#[derive(Debug)]
pub(crate) struct Pace {
    /// Bytes per second.
    rate: u64,
    /// When the next bytes may go.
    next: Mutex<Instant>,
}

impl Pace {
    pub(crate) fn new(rate: u64) -> Self {
        Self {
            rate: rate.max(1),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` may go.
    pub(crate) async fn wait(&self, bytes: usize) {
        let takes = Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        let begin = {
            let mut next = self.next.lock();
            let begin = (*next).max(Instant::now());
            *next = begin + takes;
            begin
        };
        sleep_until(begin).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn all_transfers_share_the_rate_and_rest_is_not_saved_up() {
        let pace = Pace::new(1000);
        let begin = Instant::now();
        for _ in 0..4 {
            pace.wait(500).await;
        }
        // The first bytes go at once.
        assert_eq!(begin.elapsed().as_millis() / 10, 150);
        tokio::time::sleep(Duration::from_secs(60)).await;
        let begin = Instant::now();
        tokio::join!(pace.wait(500), pace.wait(500), pace.wait(500));
        assert_eq!(begin.elapsed().as_millis() / 10, 100);
    }
}
