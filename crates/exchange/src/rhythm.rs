//! When callers are likely to call again, and how long it pays to wait for them. Reads no clock.
//!
//! Workers that step through the same layers ask each other for the same experts. Computed together,
//! their rows read each weight once; apart, once for each of them. So a call waits a little when
//! somebody who was answered for the layer before is about to call, but never longer than reading
//! the weights again is worth.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tramontane_types::LayerId;

/// Whose calls they are: a number per stream of calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Caller(pub(crate) u64);

impl Caller {
    /// The engine of the same worker.
    pub(crate) const OWN: Self = Self(0);
}

/// A caller is expected until twice its usual pause has passed, and this.
const MARGIN: Duration = Duration::from_micros(50);
/// Callers remembered before those that were last heard longest ago are forgotten.
const REMEMBERED_MAX: usize = 256;

/// What is known of the callers of one server.
#[derive(Debug)]
pub(crate) struct Rhythm {
    num_layers: usize,
    callers: HashMap<Caller, Beat>,
    /// Time that a batch of few rows takes: mostly the reading of weights.
    batch_cost: Duration,
}

#[derive(Debug)]
struct Beat {
    /// Of its last call.
    layer: LayerId,
    /// When that was answered; `None` while it waits.
    answered: Option<Instant>,
    /// Usual time from an answer to the next call: inside a step, and between two steps.
    pauses: [Option<Duration>; 2],
}

impl Rhythm {
    pub(crate) fn new(num_layers: usize) -> Self {
        Self {
            num_layers,
            callers: HashMap::new(),
            batch_cost: Duration::ZERO,
        }
    }

    /// A caller's call for `layer` has come.
    pub(crate) fn called(&mut self, caller: Caller, layer: LayerId, now: Instant) {
        if self.callers.len() >= REMEMBERED_MAX && !self.callers.contains_key(&caller) {
            self.forget_oldest();
        }
        let next = self.next(layer);
        let beat = self.callers.entry(caller).or_insert(Beat {
            layer,
            answered: None,
            pauses: [None; 2],
        });
        let follows = usize::from(layer.0) == usize::from(beat.layer.0) + 1
            || (layer == LayerId(0) && next != layer && beat.layer != layer);
        if let Some(answered) = beat.answered.take().filter(|_| follows) {
            let pause = now.saturating_duration_since(answered);
            let usual = &mut beat.pauses[usize::from(layer == LayerId(0))];
            *usual = Some(usual.map_or(pause, |usual| (usual * 3 + pause) / 4));
        }
        beat.layer = layer;
    }

    /// A caller's call was answered.
    pub(crate) fn answered(&mut self, caller: Caller, now: Instant) {
        if let Some(beat) = self.callers.get_mut(&caller) {
            beat.answered = Some(now);
        }
    }

    /// A batch of few rows took `cost`.
    pub(crate) fn computed(&mut self, cost: Duration) {
        self.batch_cost = (self.batch_cost * 3 + cost) / 4;
    }

    /// A caller is gone.
    pub(crate) fn forget(&mut self, caller: Caller) {
        self.callers.remove(&caller);
    }

    /// Until when a batch of `layer` whose first call came at `first` should wait for callers that are
    /// not in it yet; `None` when nobody is expected.
    pub(crate) fn wait_until(
        &self,
        layer: LayerId,
        first: Instant,
        is_here: impl Fn(Caller) -> bool,
    ) -> Option<Instant> {
        let expected = |(caller, beat): (&Caller, &Beat)| {
            let answered = beat.answered?;
            if is_here(*caller) || self.next(beat.layer) != layer {
                return None;
            }
            let pause = beat.pauses[usize::from(layer == LayerId(0))].unwrap_or_default();
            Some(answered + pause * 2 + MARGIN)
        };
        let last = self.callers.iter().filter_map(expected).max()?;
        // Waiting costs every call of the batch; not waiting costs one more reading of the weights.
        Some(last.min(first + self.batch_cost / 2))
    }

    fn next(&self, layer: LayerId) -> LayerId {
        if usize::from(layer.0) + 1 >= self.num_layers {
            return LayerId(0);
        }
        LayerId(layer.0 + 1)
    }

    fn forget_oldest(&mut self) {
        let oldest = self.callers.iter().min_by_key(|(_, beat)| beat.answered);
        if let Some(caller) = oldest.map(|(&caller, _)| caller) {
            self.callers.remove(&caller);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A caller that is answered at 0 and calls again after 100 us, layer after layer.
    fn steady(layers: u16) -> (Rhythm, Instant) {
        let mut rhythm = Rhythm::new(4);
        for _ in 0..40 {
            rhythm.computed(US * 1000);
        }
        let mut now = Instant::now();
        for layer in 0..layers {
            rhythm.called(Caller(1), LayerId(layer % 4), now);
            rhythm.answered(Caller(1), now);
            now += US * 100;
        }
        (rhythm, now - US * 100)
    }

    #[test]
    fn a_steady_caller_is_awaited_for_its_next_layer_only() {
        let (rhythm, answered) = steady(3);
        let wait = |layer| rhythm.wait_until(LayerId(layer), answered + US * 80, |_| false);
        assert_eq!(wait(3), Some(answered + US * 250));
        assert_eq!([wait(0), wait(1), wait(2)], [None; 3]);
        let here = rhythm.wait_until(LayerId(3), answered, |caller| caller == Caller(1));
        assert_eq!(here, None);
    }

    #[test]
    fn behind_the_last_layer_comes_the_first_and_a_wait_is_never_longer_than_half_a_batch() {
        let (mut rhythm, answered) = steady(4);
        rhythm.called(Caller(1), LayerId(0), answered + US * 5000);
        rhythm.answered(Caller(1), answered + US * 5000);
        let (rhythm, answered) = {
            for layer in 1..4 {
                rhythm.called(Caller(1), LayerId(layer), answered + US * 5000);
                rhythm.answered(Caller(1), answered + US * 5000);
            }
            (rhythm, answered + US * 5000)
        };
        let first = answered + US * 10;
        let until = rhythm.wait_until(LayerId(0), first, |_| false).unwrap();
        assert!(until <= first + US * 500 && until > first + US * 400);
    }

    #[test]
    fn a_caller_that_waits_itself_or_is_gone_is_not_awaited() {
        let (mut rhythm, now) = steady(2);
        rhythm.called(Caller(1), LayerId(1), now);
        assert_eq!(rhythm.wait_until(LayerId(2), now, |_| false), None);
        rhythm.answered(Caller(1), now);
        assert!(rhythm.wait_until(LayerId(2), now, |_| false).is_some());
        rhythm.forget(Caller(1));
        assert_eq!(rhythm.wait_until(LayerId(2), now, |_| false), None);
    }
}
