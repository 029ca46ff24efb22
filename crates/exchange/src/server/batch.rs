//! One batch of the expert server: computed as one call of the backend, answered call by call.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use tramontane_compute::ExpertJob;
use tramontane_types::LayerId;

use super::{ExpertServerHandle, Queue, Shared, WAIT_ROWS_MAX, Waiting};
use crate::call::outputs_of;
use crate::exchange::borrow;
use crate::failure::{Failure, panic_text};
use crate::merge::{len_of, merge, split};
use crate::rhythm::Caller;
use crate::stats::add;
use crate::{ExpertCall, Refusal, Reply};

/// Most rows per segment of a batch whose time is that of reading the weights.
const SPEED_ROWS_MAX: usize = 8;

/// Takes the calls of `layer` in order of arrival, up to `rows_max` rows but at least one call.
pub(super) fn take_layer(
    calls: &mut VecDeque<Waiting>,
    layer: LayerId,
    rows_max: usize,
) -> Vec<Waiting> {
    let mut batch: Vec<Waiting> = Vec::new();
    let mut num_rows = 0;
    let mut at = 0;
    while let Some(waiting) = calls.get(at) {
        if waiting.call.layer != layer {
            at += 1;
            continue;
        }
        num_rows += waiting.call.num_rows;
        if num_rows > rows_max && !batch.is_empty() {
            break;
        }
        batch.extend(calls.remove(at));
    }
    batch
}

/// Memory of the thread, reused from batch to batch.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    rows: Vec<u8>,
    out: Vec<f32>,
    /// Segments of each expert that a batch reads.
    masks: Vec<u8>,
}

impl Queue {
    /// Whether others are about to call for `layer`, and computing with them saves more than waiting costs.
    pub(super) fn is_worth_waiting(&self, layer: LayerId, now: Instant) -> bool {
        let of_layer = || self.calls.iter().filter(|w| w.call.layer == layer);
        let rows: usize = of_layer().map(|waiting| waiting.call.num_rows).sum();
        let Some(first) = of_layer().next().filter(|_| rows <= WAIT_ROWS_MAX) else {
            return false;
        };
        let is_here = |caller| of_layer().any(|waiting| waiting.caller == Some(caller));
        let until = self.rhythm.wait_until(layer, first.arrived, is_here);
        until.is_some_and(|until| now < until)
    }
}

impl ExpertServerHandle {
    /// Nanoseconds that one segment takes in a batch of few rows, where reading the weights is most of the
    /// work; `None` before the first such batch.
    #[must_use]
    pub fn segment_ns(&self) -> Option<u64> {
        self.shared.counters.segment_ns.get()
    }
}

impl Shared {
    /// Computes a batch and answers its calls. Calls that fail together are tried one by one, so that
    /// one of them cannot take the others with it. A panic is a failure like any other.
    pub(super) fn serve(&self, mut batch: Vec<Waiting>, scratch: &mut Scratch) {
        while let Some(at) = batch.iter().position(|waiting| !self.holds(&waiting.call)) {
            let waiting = batch.swap_remove(at);
            self.refuse(
                waiting,
                Refusal::Stale {
                    epoch: self.epoch(),
                },
            );
        }
        let calls: Vec<&ExpertCall> = batch.iter().map(|waiting| &waiting.call).collect();
        if calls.is_empty() {
            return;
        }
        let begin = self.now();
        match self.compute_caught(&calls, scratch) {
            Ok(outputs) => {
                self.note_batch(&batch, begin, scratch);
                for (waiting, outputs) in batch.into_iter().zip(outputs) {
                    self.answer(waiting, outputs);
                }
            }
            Err(_) if batch.len() > 1 => {
                for waiting in batch {
                    self.serve(vec![waiting], scratch);
                }
            }
            Err(failure) => {
                let why = failure.refusal(self.epoch());
                for waiting in batch {
                    self.refuse(waiting, why.clone());
                }
            }
        }
    }

    fn note_batch(&self, batch: &[Waiting], begin: Instant, scratch: &mut Scratch) {
        if batch
            .iter()
            .any(|waiting| waiting.caller != Some(Caller::OWN))
        {
            add(&self.counters.batches, 1);
        }
        let now = self.now();
        self.note_speed(batch, now - begin, &mut scratch.masks);
        let mut queue = self.queue.lock();
        let rows: usize = batch.iter().map(|waiting| waiting.call.num_rows).sum();
        if rows <= WAIT_ROWS_MAX {
            queue.rhythm.computed(now - begin);
        }
        for caller in batch.iter().filter_map(|waiting| waiting.caller) {
            queue.rhythm.answered(caller, now);
        }
    }

    /// Counts what a batch of few rows took for each segment that it read. Long batches say how fast
    /// products are, which is another figure.
    fn note_speed(&self, batch: &[Waiting], took: Duration, masks: &mut Vec<u8>) {
        let real = (1_u16 << self.config.geometry.num_segments()) - 1;
        masks.clear();
        masks.resize(self.config.geometry.num_experts, 0);
        let mut num_products = 0;
        for job in batch.iter().flat_map(|waiting| &waiting.call.jobs) {
            let mask = u16::from(job.range.mask()) & real;
            num_products += job.row_ids.len() * mask.count_ones() as usize;
            if let Some(read) = masks.get_mut(usize::from(job.expert.0)) {
                *read |= mask as u8;
            }
        }
        // What several calls ask for is read once.
        let num_read: usize = masks.iter().map(|m| m.count_ones() as usize).sum();
        if num_read > 0 && num_products <= num_read * SPEED_ROWS_MAX {
            let ns = took.as_nanos() as f64 / num_read as f64;
            self.counters.segment_ns.note(ns.max(1.0));
        }
    }

    fn answer(&self, waiting: Waiting, outputs: Vec<f32>) {
        if waiting.caller != Some(Caller::OWN) {
            add(&self.counters.calls, 1);
            add(&self.counters.rows, waiting.call.num_rows);
        }
        let service_us = self
            .now()
            .saturating_duration_since(waiting.arrived)
            .as_micros() as u64;
        waiting.reply.send(Ok(Reply {
            outputs: outputs_of(outputs),
            service_us,
        }));
    }

    pub(super) fn refuse(&self, waiting: Waiting, why: Refusal) {
        add(&self.counters.refused, 1);
        waiting.reply.send(Err(why));
    }

    /// The outputs of each call. A panic of the backend ends here, or it would end the thread and with
    /// it every later call.
    fn compute_caught(
        &self,
        calls: &[&ExpertCall],
        scratch: &mut Scratch,
    ) -> Result<Vec<Vec<f32>>, Failure> {
        // The scratch is all that a panic could leave half-written here; it is thrown away then.
        let computed = catch_unwind(AssertUnwindSafe(|| self.compute(calls, scratch)));
        let panic = match computed {
            Ok(result) => return result.map_err(Failure::Refused),
            Err(panic) => panic,
        };
        *scratch = Scratch::default();
        let (num_calls, text) = (calls.len(), panic_text(panic.as_ref()));
        let layer = calls.first().map(|call| call.layer.0);
        tracing::error!(num_calls, layer, panic = text, "the experts panicked");
        Err(Failure::Panicked)
    }

    /// The outputs of each call.
    fn compute(
        &self,
        calls: &[&ExpertCall],
        scratch: &mut Scratch,
    ) -> Result<Vec<Vec<f32>>, tramontane_compute::Error> {
        if let [call] = calls {
            let jobs: Vec<ExpertJob<'_>> = call.jobs.iter().map(borrow).collect();
            let mut out = Vec::new();
            self.experts
                .compute(call.layer, &call.rows, call.num_rows, &jobs, &mut out)?;
            return Ok(vec![out]);
        }
        let merged = merge(calls, &mut scratch.rows);
        let jobs: Vec<ExpertJob<'_>> = merged.jobs.iter().map(borrow).collect();
        let layer = calls.first().map_or(LayerId(0), |call| call.layer);
        let out = &mut scratch.out;
        self.experts
            .compute(layer, &scratch.rows, merged.num_rows, &jobs, out)?;
        let geometry = &self.config.geometry;
        let lens = merged.jobs.iter().map(|job| len_of(geometry, job));
        let (expected, got) = (lens.sum(), out.len());
        if expected != got {
            let what = "outputs of a merged batch".to_owned();
            return Err(tramontane_compute::Error::Shape {
                what,
                expected,
                got,
            });
        }
        Ok(split(calls, &merged.parts, out, geometry))
    }
}
