//! Sequences whose masks were not there when they were to sample: they keep their pages and get no rows until their masks have
//! come. The others do not wait for them.

use std::time::Instant;

use super::{Engine, Events, elapsed_us};
use crate::StepReport;
use crate::masks::{MASK_STEP_WAIT_MAX, NoToken};
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
