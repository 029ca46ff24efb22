//! Keeps a log short that strangers can fill: some lines each while, and how many were left out.

use std::time::Duration;

use tokio::time::Instant;

/// Lines that may be written in one period.
const LINES_MAX: u32 = 10;
/// How long it is.
const PERIOD: Duration = Duration::from_secs(10);

/// Counts what is said.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    began: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Quiet {
    /// Whether one more line may be written, and how many were left out since the last one.
    pub(super) fn may_speak(&mut self) -> Option<u64> {
        let now = Instant::now();
        if self.began.is_none_or(|began| now - began >= PERIOD) {
            (self.began, self.said) = (Some(now), 0);
        }
        if self.said >= LINES_MAX {
            self.unsaid += 1;
            return None;
        }
        self.said += 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_counted_and_not_written() {
        let mut quiet = Quiet::default();
        let said = (0..100).filter(|_| quiet.may_speak().is_some()).count();
        assert_eq!(said, 10);
        tokio::time::sleep(PERIOD).await;
        assert_eq!(quiet.may_speak(), Some(90));
        assert_eq!(quiet.may_speak(), Some(0));
    }
}
