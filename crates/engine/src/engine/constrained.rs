//! What constraints do to the steps. A sequence whose mask was not there when it was to sample keeps its pages and gets no rows
//! until it has come: the others do not wait for it. Where the grammars of all have grown too large, the largest go.

use std::time::Instant;

use tramontane_types::FinishReason;

use super::{Engine, Events, elapsed_us};
use crate::StepReport;
use crate::masks::{MASK_STEP_WAIT_MAX, MaskError, Matching, NoToken};
use crate::scheduler::Plan;
use crate::sequence::SequenceKey;

impl Engine {
    /// Leaves a sequence out of the steps until its mask has come.
    pub(super) fn await_mask(&mut self, key: SequenceKey) {
        if let Some(sequence) = self.sequences.get_mut(&key) {
            sequence.awaits_mask = true;
            self.stats.masks_late += 1;
            self.late.insert(key);
        }
    }

    /// Ends a sequence that has all the tokens it may have: by `stop` where its grammar lets nothing follow, which a thread
    /// finds out. False where that is not known by `until`; then it ends later.
    pub(super) fn close(&mut self, key: SequenceKey, until: Instant, events: &mut Events) -> bool {
        let Some(sequence) = self.sequences.get_mut(&key) else {
            return false;
        };
        let began = Instant::now();
        let has_come = sequence.matching.as_mut().is_none_or(|m| m.comes_by(until));
        self.stats.mask_wait_us += elapsed_us(began);
        if has_come {
            self.end_full(key, events);
            return true;
        }
        // Its pages and its place serve others meanwhile.
        sequence.clear_pages();
        self.scheduler.remove(key);
        sequence.is_full = true;
        self.await_mask(key);
        false
    }

    fn end_full(&mut self, key: SequenceKey, events: &mut Events) {
        let matching = self.sequences.get(&key).and_then(|s| s.matching.as_ref());
        match matching.map_or(Ok(false), Matching::has_ended) {
            Ok(true) => self.end(key, FinishReason::Stop, events),
            Ok(false) => self.end(key, FinishReason::Length, events),
            Err(error) => self.has_no_token(key, &error.into(), events),
        }
    }

    /// Sees which late masks have come, and gives up those that never seem to.
    pub(super) fn look_for_masks(&mut self, events: &mut Events, report: &mut StepReport) {
        if self.late.is_empty() {
            return;
        }
        self.masks.tend();
        for key in std::mem::take(&mut self.late) {
            let Some(sequence) = self.sequences.get_mut(&key) else {
                continue;
            };
            // One that was preempted meanwhile asks anew.
            let Some(matching) = sequence.matching.as_mut().filter(|_| sequence.awaits_mask) else {
                continue;
            };
            match matching.has_come(&self.masks.limits) {
                Ok(true) if sequence.is_full => {
                    self.end_full(key, events);
                    report.num_ended += 1;
                }
                Ok(true) => sequence.awaits_mask = false,
                Ok(false) => {
                    self.late.insert(key);
                }
                Err(error) => {
                    self.has_no_token(key, &NoToken::from(error), events);
                    report.num_ended += 1;
                }
            }
        }
    }

    /// Fails the sequences whose grammars have grown the most, until all together have room.
    pub(super) fn make_room(&mut self, events: &mut Events, report: &mut StepReport) {
        let limit = self.masks.room.limit();
        while self.masks.room.excess() > 0 {
            let sizes = self.sequences.iter().filter_map(|(key, sequence)| {
                let num_bytes = sequence.matching.as_ref()?.num_bytes();
                (num_bytes > 0).then_some((num_bytes, *key))
            });
            // What is left belongs to nobody who could go.
            let Some((got, key)) = sizes.max() else {
                return;
            };
            if let Some(matching) = self.sequences.get(&key).and_then(|s| s.matching.as_ref()) {
                matching.leave_room();
            }
            let error = MaskError::Full { limit, got };
            self.has_no_token(key, &error.into(), events);
            report.num_ended += 1;
        }
    }

    /// Where all there is to do is to wait for masks, waits for one: shortly, since other work may come.
    pub(super) fn wait_for_masks(&mut self, plan: &Plan, report: &StepReport) {
        if self.late.is_empty() || plan.num_preempted > 0 || report.num_ended > 0 {
            return;
        }
        let began = Instant::now();
        self.masks.wait(MASK_STEP_WAIT_MAX);
        self.stats.mask_wait_us += elapsed_us(began);
    }
}
