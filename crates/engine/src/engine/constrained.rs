//! What constraints do to the steps. A sequence whose mask was not there when it was to sample keeps its pages and gets no rows
//! until it has come: the others do not wait for it. Where the grammars of all have grown too large, the largest go.

use std::time::Instant;

use super::{Engine, Events, elapsed_us};
use crate::StepReport;
use crate::masks::{MASK_STEP_WAIT_MAX, MaskError, NoToken};
use crate::scheduler::Plan;
use crate::sequence::SequenceKey;

impl Engine {
    /// Leaves a sequence out of the steps until its mask has come.
    pub(super) fn await_mask(&mut self, key: SequenceKey) {
        if let Some(sequence) = self.sequences.get_mut(&key) {
            sequence.awaits_mask = true;
            self.late.insert(key);
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
