//! Experts of plain f32 arithmetic that honour segments, rows and the summation tree, and can be held up.

use std::collections::HashMap;

use parking_lot::{Condvar, Mutex};
use tramontane_compute::{Error, ExpertJob, ExpertWeights, Experts, RoutedRows};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, Node, SegmentRange};

#[derive(Debug)]
pub(crate) struct FakeExperts {
    geometry: ModelGeometry,
    held: Mutex<HashMap<(u16, u16), u8>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    entered: usize,
    short: bool,
    panics: usize,
}

impl FakeExperts {
    pub(crate) fn new(geometry: ModelGeometry) -> Self {
        let (held, state, changed) = Default::default();
        Self {
            geometry,
            held,
            state,
            changed,
        }
    }

    pub(crate) fn hold(&self, layer: LayerId, expert: ExpertId, range: SegmentRange) {
        *self.held.lock().entry((layer.0, expert.0)).or_default() |= range.mask();
    }

    pub(crate) fn hold_nothing(&self) {
        self.held.lock().clear();
    }

    /// From now on every `compute` waits for [`FakeExperts::open`].
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
    }

    pub(crate) fn open(&self) {
        self.state.lock().closed = false;
        self.changed.notify_all();
    }

    /// Waits until `compute` was entered `times` in all.
    pub(crate) fn wait_entered(&self, times: usize) {
        let mut state = self.state.lock();
        while state.entered < times {
            assert!(
                !self
                    .changed
                    .wait_for(&mut state, super::PATIENCE)
                    .timed_out()
            );
        }
    }

    /// How often `compute` was entered.
    pub(crate) fn num_entered(&self) -> usize {
        self.state.lock().entered
    }

    pub(crate) fn return_too_little(&self) {
        self.state.lock().short = true;
    }

    /// The next `times` computations panic.
    pub(crate) fn panic_next(&self, times: usize) {
        self.state.lock().panics = times;
    }

    fn leaf(layer: LayerId, expert: ExpertId, segment: u8, x: &[f32]) -> Vec<f32> {
        let seed = (u32::from(layer.0) * 97 + u32::from(expert.0)) * 31 + u32::from(segment);
        let gain = |h: usize| {
            let mixed = (seed * 65_537 + h as u32 * 40_503 + 1).wrapping_mul(2_246_822_519);
            let mixed = (mixed ^ mixed >> 15).wrapping_mul(3_266_489_917);
            (mixed >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let at = |h: usize| x[h % x.len()];
        (0..x.len())
            .map(|h| (at(h) * gain(h) + at(h + 1)).max(-0.4) * gain(h + 7))
            .collect()
    }

    /// The sum below a node along the tree.
    pub(crate) fn node(&self, layer: LayerId, expert: ExpertId, node: Node, x: &[f32]) -> Vec<f32> {
        let Some((left, right)) = node.halves() else {
            return Self::leaf(layer, expert, node.begin, x);
        };
        let mut sum = self.node(layer, expert, left, x);
        if right.begin < self.geometry.num_segments() {
            for (a, b) in sum.iter_mut().zip(self.node(layer, expert, right, x)) {
                *a += b;
            }
        }
        sum
    }

    /// What the layer adds to a residual stream of zeros when one worker holds everything.
    pub(crate) fn direct(&self, layer: LayerId, routed: &RoutedRows) -> Vec<f32> {
        let rows = floats(&routed.rows);
        let mut residual = vec![0.0; rows.len()];
        let choices = routed.topk_ids.iter().zip(&routed.topk_weights);
        for (choice, (&expert, weight)) in choices.enumerate() {
            let begin = choice / self.geometry.top_k * self.geometry.hidden;
            let x = &rows[begin..begin + self.geometry.hidden];
            let y = self.node(layer, expert, Node::ROOT, x);
            for (sum, y) in residual[begin..].iter_mut().zip(y) {
                *sum += weight * y;
            }
        }
        residual
    }
}

impl Experts for FakeExperts {
    fn load(&self, slice: ExpertSlice, _weights: &ExpertWeights<'_>) -> Result<(), Error> {
        self.hold(slice.layer, slice.expert, slice.range);
        Ok(())
    }

    fn unload(&self, slice: ExpertSlice) {
        let mut held = self.held.lock();
        *held.entry((slice.layer.0, slice.expert.0)).or_default() &= !slice.range.mask();
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        let empty = !((1_u16 << self.geometry.num_segments()) - 1) as u8;
        self.held
            .lock()
            .get(&(layer.0, expert.0))
            .copied()
            .unwrap_or_default()
            | empty
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let mut state = self.state.lock();
        state.entered += 1;
        self.changed.notify_all();
        while state.closed {
            self.changed.wait(&mut state);
        }
        let short = state.short;
        let panics = state.panics > 0;
        state.panics = state.panics.saturating_sub(1);
        drop(state);
        assert!(!panics, "secret detail of the experts");
        out.clear();
        let (rows, hidden) = (floats(rows), self.geometry.hidden);
        assert_eq!(rows.len(), num_rows * hidden);
        for job in jobs {
            let slice = ExpertSlice {
                layer,
                expert: job.expert,
                range: job.range,
            };
            if self.held(layer, job.expert) & job.range.mask() != job.range.mask() {
                return Err(Error::NotHeld { slice });
            }
            for &row in job.row_ids {
                let x = &rows[row as usize * hidden..][..hidden];
                for node in job.range.nodes(self.geometry.num_segments()) {
                    out.extend(self.node(layer, job.expert, node, x));
                }
            }
        }
        if short {
            out.pop();
        }
        Ok(())
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}
