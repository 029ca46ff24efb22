//! What a step gives of its logits rows: the logits of some, and of all others the tokens that the device has chosen. Rows that
//! want no logits are not copied.

use std::ops::Range;

use tramontane_compute::sampling::per_temperature;
use tramontane_compute::{Choice, Error, SampleError, StepOutputs, Wanted};

use super::abi::{Best, Draw};
use super::context::{Context, failed};
use super::core::{Core, Queue};
use super::kernels::Kernels;
use crate::device::{Args, Buffer, DeviceError, Pinned, Stream};

/// The places of one turn's outputs.
#[derive(Debug)]
pub(super) struct Outputs {
    /// `[rows, vocab]` f32.
    logits: Buffer,
    /// The best token of each row, or the one that was drawn, `[rows]`.
    best: Buffer,
    /// Weights of groups of tokens, `[rows, groups]` f64.
    sums: Buffer,
    /// Logits that were wanted, one row behind the other.
    logits_on_host: Pinned,
    best_on_host: Pinned,
}

impl Outputs {
    /// For so many rows at once.
    pub(super) fn new(context: &Context, rows: usize) -> Result<Self, Error> {
        let logits = context.buffer(rows * context.geometry.vocab * size_of::<f32>())?;
        let best = context.buffer(rows * size_of::<Best>())?;
        Ok(Self {
            logits_on_host: context.pinned(logits.bytes())?,
            best_on_host: context.pinned(best.bytes())?,
            sums: context
                .buffer(rows * Kernels::groups(context.geometry.vocab) * size_of::<f64>())?,
            logits,
            best,
        })
    }

    /// Where the LM head writes.
    pub(super) const fn logits(&self) -> u64 {
        self.logits.address()
    }

    /// Queues the copies of what is wanted: logits to consecutive rows on the host. Returns how many rows those are.
    ///
    /// # Safety
    /// As [`Stream::download`], and so below.
    unsafe fn fetch(
        &mut self,
        stream: &Stream,
        vocab: usize,
        wanted: &[Wanted],
    ) -> Result<usize, DeviceError> {
        let (mut first, mut num_logits) = (0, 0);
        for run in wanted.chunk_by(|a, b| a.wants_logits() == b.wants_logits()) {
            let rows = first..first + run.len();
            first = rows.end;
            if run[0].wants_logits() {
                // SAFETY: the caller's promise.
                unsafe { self.fetch_logits(stream, vocab, rows, num_logits)? };
                num_logits += run.len();
            }
        }
        if num_logits < wanted.len() {
            // All of them at once: one copy of few bytes.
            let bytes = wanted.len() * size_of::<Best>();
            // SAFETY: as above.
            unsafe { stream.download(&mut self.best_on_host, &self.best, 0, bytes)? };
        }
        Ok(num_logits)
    }

    unsafe fn fetch_logits(
        &mut self,
        stream: &Stream,
        vocab: usize,
        rows: Range<usize>,
        to_row: usize,
    ) -> Result<(), DeviceError> {
        let row_bytes = vocab * size_of::<f32>();
        let host = (&mut self.logits_on_host, to_row * row_bytes);
        let (begin, bytes) = (rows.start * row_bytes, rows.len() * row_bytes);
        // SAFETY: the caller's promise.
        unsafe { stream.download_to(host, &self.logits, begin, bytes) }
    }
}

impl Queue<'_> {
    /// The best token of each row of logits, or the one that is drawn, for the logits rows from the `first` on. A graph has
    /// it whatever its rows want: it takes a fraction of the LM head.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn choose_tokens(&self, first: usize) -> Result<(), DeviceError> {
        let (kernels, vocab) = (&self.context.kernels, self.context.geometry.vocab);
        let (outputs, draws) = (self.outputs, self.input.draws(first));
        let (best, logits) = (outputs.best.address(), outputs.logits.address());
        let sums = outputs.sums.address();
        // Where this counts more rows than a turn has, the grids have no blocks for them.
        let num_rows = self.input.num_logits();
        let groups = Kernels::groups(vocab);
        let argmax = Args::new().address(best).address(logits).address(num_rows);
        let group_sums = Args::new().address(sums).address(logits).address(best);
        let draw = Args::new().address(best).address(sums).address(logits);
        let how = |args: Args| {
            let args = args.address(draws).address(num_rows);
            args.size(groups).size(vocab)
        };
        // SAFETY: the caller's promise.
        unsafe {
            let shape = Kernels::argmax_shape(self.rows);
            self.launch(kernels.argmax, shape, argmax.size(vocab))?;
            let shape = Kernels::group_sums_shape(self.rows, vocab);
            self.launch(kernels.group_sums, shape, how(group_sums))?;
            let shape = Kernels::draw_shape(self.rows);
            self.launch(kernels.draw, shape, how(draw))
        }
    }
}

/// How the kernels draw what is wanted of a row, if that is drawn.
pub(super) fn draw_of(wanted: Wanted) -> Draw {
    match wanted {
        Wanted::Logits | Wanted::Best => Draw::default(),
        Wanted::Drawn(draw) => Draw {
            per_temperature: per_temperature(draw.temperature),
            min_weight: f64::from(draw.min_p),
            uniform: draw.uniform,
        },
    }
}

impl Core {
    /// Copies the logits of the first rows to the host, waits for them and appends them.
    pub(super) fn take_logits(&mut self, rows: usize, out: &mut Vec<f32>) -> Result<(), Error> {
        let vocab = self.context.geometry.vocab;
        // SAFETY: both places live in `self`, and the wait is below.
        let queued = unsafe { self.outputs.fetch_logits(&self.stream, vocab, 0..rows, 0) };
        queued.map_err(failed("fetching logits"))?;
        self.wait()?;
        out.extend_from_slice(&self.outputs.logits_on_host.as_slice()[..rows * vocab]);
        Ok(())
    }

    /// Copies what is wanted of the first rows to the host, waits for it and appends it.
    pub(super) fn take_outputs(
        &mut self,
        wanted: &[Wanted],
        out: &mut StepOutputs,
    ) -> Result<(), Error> {
        let vocab = self.context.geometry.vocab;
        // SAFETY: as above.
        let queued = unsafe { self.outputs.fetch(&self.stream, vocab, wanted) };
        let num_logits = queued.map_err(failed("fetching logits"))?;
        self.wait()?;
        let (logits, best) = (&self.outputs.logits_on_host, &self.outputs.best_on_host);
        out.logits
            .extend_from_slice(&logits.as_slice()[..num_logits * vocab]);
        let best = best.as_slice::<Best>().iter().zip(wanted);
        let chosen = best.filter(|(_, wanted)| !wanted.wants_logits());
        out.choices.extend(chosen.map(|(best, _)| choice(best)));
        Ok(())
    }
}

/// What the host's sampler would say of the row.
fn choice(best: &Best) -> Choice {
    if best.bad_id != Best::NO_TOKEN {
        let id = best.bad_id as usize;
        return Err(SampleError::NotFinite { id });
    }
    if best.id == Best::NO_TOKEN || best.logit == f32::NEG_INFINITY {
        return Err(SampleError::NoCandidate);
    }
    Ok(best.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_refused_as_on_the_host() {
        let told = |id, logit, bad_id| {
            choice(&Best {
                id,
                logit,
                bad_id,
                pad: 0,
            })
        };
        let none = Best::NO_TOKEN;
        assert_eq!(told(3, -1e30, none), Ok(3));
        assert_eq!(
            told(0, f32::NEG_INFINITY, none),
            Err(SampleError::NoCandidate)
        );
        let refused = Err(SampleError::NotFinite { id: 5 });
        assert_eq!(told(5, f32::INFINITY, 5), refused);
        assert_eq!(told(none, f32::NAN, 5), refused);
    }
}
