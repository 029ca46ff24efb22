//! Runs one step through the model: attention here, experts through the exchange. Holds no state of a
//! sequence; a step that fails leaves nothing behind but keys and values that a retry writes again.

use std::time::Instant;

use tramontane_compute::{Attention, RoutedRows, StepBatch, StepOutputs, Wanted};
use tramontane_exchange::Exchange;
use tramontane_types::{LayerId, ModelGeometry};

use crate::rows::num_logits;
use crate::{Error, StepTimes};

/// Whole steps between two looks at what they chose: a look is a short copy from the device.
const COUNT_EVERY: usize = 32;

#[derive(Debug)]
pub(crate) struct ModelRunner {
    num_layers: u16,
    vocab: usize,
    attention: Box<dyn Attention>,
    exchange: Box<dyn Exchange>,
    /// Kept between steps for its memory.
    routed: RoutedRows,
    /// Whole steps whose choices were not counted yet, and room for the counts.
    uncounted: usize,
    chosen: Vec<u64>,
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
            uncounted: 0,
            chosen: Vec::new(),
        })
    }

    /// Computes the batch; `out` receives what is wanted of each logits row. Where the backend chooses no tokens, all
    /// rows have logits, and `wanted` says so then.
    pub(crate) fn run(
        &mut self,
        batch: &StepBatch,
        (wanted, out): (&mut [Wanted], &mut StepOutputs),
        times: &mut StepTimes,
    ) -> Result<(), Error> {
        let mut lap = Lap(Instant::now());
        if !self.run_whole(batch, (wanted, out), times, &mut lap)? {
            wanted.fill(Wanted::Logits);
            out.clear();
            self.run_layers(batch, &mut out.logits, times, &mut lap)?;
        }
        let num_logits = num_logits(wanted);
        let lens = [
            ("logits", num_logits * self.vocab, out.logits.len()),
            ("tokens", wanted.len() - num_logits, out.choices.len()),
        ];
        match lens.into_iter().find(|(_, expected, got)| expected != got) {
            None => Ok(()),
            Some((what, expected, got)) => Err(Error::OutputsLen {
                what,
                expected,
                got,
            }),
        }
    }

    /// One call for everything, when all experts are this worker's and the backend can; otherwise `false`.
    fn run_whole(
        &mut self,
        batch: &StepBatch,
        (wanted, out): (&[Wanted], &mut StepOutputs),
        times: &mut StepTimes,
        lap: &mut Lap,
    ) -> Result<bool, Error> {
        let Some(experts) = self.exchange.whole_model() else {
            return Ok(false);
        };
        let is_done = self
            .attention
            .step(batch, wanted, &*experts, out)
            .map_err(refused("compute a step"))?;
        self.uncounted += usize::from(is_done);
        if self.uncounted >= COUNT_EVERY {
            self.count_chosen()?;
        }
        times.attend_us += lap.take_us();
        Ok(is_done)
    }

    /// Hands on what whole steps chose: placement goes by it.
    fn count_chosen(&mut self) -> Result<(), Error> {
        self.uncounted = 0;
        let taken = self.attention.take_chosen(&mut self.chosen);
        taken.map_err(refused("count chosen experts"))?;
        self.exchange.count_chosen(&self.chosen);
        Ok(())
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tramontane_compute::reference::ReferenceBackend;
    use tramontane_compute::{Backend as _, Contributions, Error as ComputeError, Experts};
    use tramontane_exchange::Ticket;

    use super::*;

    /// A step that is computed layer by layer.
    fn by_layers() -> ComputeError {
        ComputeError::Shape {
            what: "layers computed one by one".to_owned(),
            expected: 0,
            got: 1,
        }
    }

    /// Computes whole steps of one expert, and counts one choice in each.
    #[derive(Debug, Default)]
    struct Whole {
        steps: u64,
    }

    impl Attention for Whole {
        fn begin(&mut self, _: &StepBatch) -> Result<(), ComputeError> {
            Err(by_layers())
        }

        fn attend(
            &mut self,
            _: LayerId,
            _: &StepBatch,
            _: &mut RoutedRows,
        ) -> Result<(), ComputeError> {
            Err(by_layers())
        }

        fn combine(&mut self, _: LayerId, _: &Contributions<'_>) -> Result<(), ComputeError> {
            Err(by_layers())
        }

        fn logits(&mut self, _: &StepBatch, _: &mut Vec<f32>) -> Result<(), ComputeError> {
            Err(by_layers())
        }

        fn step(
            &mut self,
            _: &StepBatch,
            _: &[Wanted],
            _: &dyn Experts,
            out: &mut StepOutputs,
        ) -> Result<bool, ComputeError> {
            out.clear();
            self.steps += 1;
            Ok(true)
        }

        fn take_chosen(&mut self, chosen: &mut Vec<u64>) -> Result<(), ComputeError> {
            *chosen = vec![std::mem::take(&mut self.steps)];
            Ok(())
        }
    }

    /// Has the experts, and notes what is counted.
    #[derive(Debug)]
    struct All {
        experts: Arc<dyn Experts>,
        counted: Arc<Mutex<Vec<u64>>>,
    }

    impl Exchange for All {
        fn dispatch(
            &mut self,
            layer: LayerId,
            _: &RoutedRows,
        ) -> Result<Ticket, tramontane_exchange::Error> {
            Err(tramontane_exchange::Error::Routing {
                layer,
                what: "rows, though steps are whole",
                expected: 0,
                got: 1,
            })
        }

        fn combine(
            &mut self,
            _: Ticket,
            _: &mut dyn FnMut(&Contributions<'_>) -> Result<(), ComputeError>,
        ) -> Result<(), tramontane_exchange::Error> {
            Err(tramontane_exchange::Error::Routing {
                layer: LayerId(0),
                what: "rows, though steps are whole",
                expected: 0,
                got: 1,
            })
        }

        fn whole_model(&mut self) -> Option<Arc<dyn Experts>> {
            Some(Arc::clone(&self.experts))
        }

        fn count_chosen(&mut self, chosen: &[u64]) {
            self.counted.lock().unwrap().extend_from_slice(chosen);
        }
    }

    #[test]
    fn what_whole_steps_chose_is_counted_now_and_then_and_nothing_twice() {
        let geometry = ModelGeometry {
            hidden: 32,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 32,
            ff: 32,
            num_experts: 1,
            top_k: 1,
            vocab: 8,
            max_positions: 64,
            rope_theta: 1e4,
            rms_eps: 1e-5,
            sliding_window: None,
        };
        let counted = Arc::default();
        let exchange = All {
            experts: ReferenceBackend::new(&geometry).experts(),
            counted: Arc::clone(&counted),
        };
        let attention = Box::<Whole>::default();
        let mut runner = ModelRunner::new(&geometry, attention, Box::new(exchange)).unwrap();
        let (mut out, mut times) = (StepOutputs::default(), StepTimes::default());
        for _ in 0..2 * COUNT_EVERY + 1 {
            let batch = StepBatch::default();
            runner.run(&batch, (&mut [], &mut out), &mut times).unwrap();
        }
        assert_eq!(*counted.lock().unwrap(), [COUNT_EVERY as u64; 2]);
    }
}
