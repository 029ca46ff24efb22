//! Runs one step through the model: attention here, experts through the exchange. Holds no state of a
//! sequence; a step that fails leaves nothing behind but keys and values that a retry writes again.

use std::time::Instant;

use tramontane_compute::{Attention, RoutedRows, StepBatch};
use tramontane_exchange::Exchange;
use tramontane_types::{LayerId, ModelGeometry};

use crate::{Error, StepTimes};

#[derive(Debug)]
pub(crate) struct ModelRunner {
    num_layers: u16,
    vocab: usize,
    attention: Box<dyn Attention>,
    exchange: Box<dyn Exchange>,
    /// Kept between steps for its memory.
    routed: RoutedRows,
}

impl ModelRunner {
    pub(crate) fn new(
        geometry: &ModelGeometry,
        attention: Box<dyn Attention>,
        exchange: Box<dyn Exchange>,
    ) -> Result<Self, Error> {
        let num_layers =
            u16::try_from(geometry.num_layers).map_err(|_overflow| Error::InvalidConfig {
                key: "num_layers",
                rule: format!("at most {}", u16::MAX),
                got: geometry.num_layers,
            })?;
        let vocab = geometry.vocab;
        Ok(Self {
            num_layers,
            vocab,
            attention,
            exchange,
            routed: RoutedRows::default(),
        })
    }

    /// Computes the batch; `logits` receives `[batch.logits_rows.len(), vocab]`.
    pub(crate) fn run(
        &mut self,
        batch: &StepBatch,
        logits: &mut Vec<f32>,
        times: &mut StepTimes,
    ) -> Result<(), Error> {
        let mut lap = Lap(Instant::now());
        if !self.run_whole(batch, logits, times, &mut lap)? {
            self.run_layers(batch, logits, times, &mut lap)?;
        }
        let expected = batch.logits_rows.len() * self.vocab;
        if logits.len() != expected {
            return Err(Error::LogitsLen {
                expected,
                got: logits.len(),
            });
        }
        Ok(())
    }

    /// One call for everything, when all experts are this worker's and the backend can; otherwise `false`.
    fn run_whole(
        &mut self,
        batch: &StepBatch,
        logits: &mut Vec<f32>,
        times: &mut StepTimes,
        lap: &mut Lap,
    ) -> Result<bool, Error> {
        let Some(experts) = self.exchange.whole_model() else {
            return Ok(false);
        };
        let is_done = self
            .attention
            .step(batch, &*experts, logits)
            .map_err(refused("compute a step"))?;
        times.attend_us += lap.take_us();
        Ok(is_done)
    }

    fn run_layers(
        &mut self,
        batch: &StepBatch,
        logits: &mut Vec<f32>,
        times: &mut StepTimes,
        lap: &mut Lap,
    ) -> Result<(), Error> {
        self.attention
            .begin(batch)
            .map_err(refused("begin a step"))?;
        for layer in (0..self.num_layers).map(LayerId) {
            self.attention
                .attend(layer, batch, &mut self.routed)
                .map_err(refused("attend"))?;
            times.attend_us += lap.take_us();
            self.exchange_rows(layer)
                .map_err(|source| Error::Exchange { layer, source })?;
            times.exchange_us += lap.take_us();
        }
        if batch.logits_rows.is_empty() {
            logits.clear();
        } else {
            self.attention
                .logits(batch, logits)
                .map_err(refused("compute logits"))?;
        }
        times.logits_us += lap.take_us();
        Ok(())
    }

    /// No step follows until further notice.
    pub(crate) fn rest(&mut self) {
        self.exchange.rest();
    }

    /// Sends the rows of a layer to their experts and adds what comes back.
    fn exchange_rows(&mut self, layer: LayerId) -> Result<(), tramontane_exchange::Error> {
        let ticket = self.exchange.dispatch(layer, &self.routed)?;
        let attention = &mut self.attention;
        self.exchange.combine(ticket, &mut |contributions| {
            attention.combine(layer, contributions)
        })
    }
}

fn refused(stage: &'static str) -> impl Fn(tramontane_compute::Error) -> Error {
    move |source| Error::Backend { stage, source }
}

/// A stopwatch that starts again whenever it is read.
struct Lap(Instant);

impl Lap {
    fn take_us(&mut self) -> u64 {
        let now = Instant::now();
        let elapsed = now.duration_since(std::mem::replace(&mut self.0, now));
        elapsed.as_micros() as u64
    }
}
