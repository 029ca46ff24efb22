//! Experts that take rows as bf16, whatever rows their kernels consume: in a group whose attention is of another
//! numeric class than its experts, rows travel in one format that both know. Computes nothing itself.

use std::sync::Arc;

use half::bf16;
use tramontane_types::{ExpertId, ExpertSlice, LayerId};

use crate::error::check_size;
use crate::{Error, ExpertJob, ExpertWeights, Experts, RowFormat};

/// A backend's experts behind rows of [`RowFormat::Bf16`].
///
/// Exactness: a row is rounded to the kernels' format by itself, so its outputs still depend on its bytes and the weights
/// alone.
#[derive(Debug)]
pub struct Bf16Rows {
    inner: Arc<dyn Experts>,
    format: RowFormat,
    hidden: usize,
}

impl Bf16Rows {
    /// Before `inner`, whose kernels consume rows of `hidden` elements in `format`.
    #[must_use]
    pub fn new(inner: Arc<dyn Experts>, format: RowFormat, hidden: usize) -> Self {
        Self {
            inner,
            format,
            hidden,
        }
    }

    /// Rows that the kernels consume.
    fn converted(&self, rows: &[u8], num_rows: usize) -> Vec<u8> {
        let row_bytes = self.format.row_bytes(self.hidden);
        let mut out = vec![0; num_rows * row_bytes];
        let mut row = vec![0.0; self.hidden];
        let bf16_rows = rows.chunks_exact(RowFormat::Bf16.row_bytes(self.hidden));
        for (from, to) in bf16_rows.zip(out.chunks_exact_mut(row_bytes)) {
            for (x, bytes) in row.iter_mut().zip(from.chunks_exact(2)) {
                *x = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
            }
            self.format.write_row(&row, to);
        }
        out
    }
}

impl Experts for Bf16Rows {
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error> {
        self.inner.load(slice, weights)
    }

    fn unload(&self, slice: ExpertSlice) {
        self.inner.unload(slice);
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        self.inner.held(layer, expert)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let expected = num_rows * RowFormat::Bf16.row_bytes(self.hidden);
        check_size("bytes of bf16 rows", expected, rows.len())?;
        let rows = self.converted(rows, num_rows);
        self.inner.compute(layer, &rows, num_rows, jobs, out)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::quant;

    /// Keeps the rows that it is given.
    #[derive(Debug, Default)]
    struct Given(Mutex<Vec<u8>>);

    impl Experts for Given {
        fn load(&self, _slice: ExpertSlice, _weights: &ExpertWeights<'_>) -> Result<(), Error> {
            Ok(())
        }

        fn unload(&self, _slice: ExpertSlice) {}

        fn held(&self, _layer: LayerId, _expert: ExpertId) -> u8 {
            0
        }

        fn compute(
            &self,
            _layer: LayerId,
            rows: &[u8],
            _num_rows: usize,
            _jobs: &[ExpertJob<'_>],
            _out: &mut Vec<f32>,
        ) -> Result<(), Error> {
            *self.0.lock().unwrap() = rows.to_vec();
            Ok(())
        }
    }

    const HIDDEN: usize = 40;

    fn bf16_row(seed: f32) -> Vec<f32> {
        let wave = (0..HIDDEN).map(|i| bf16::from_f32((i as f32 * 0.7 + seed).sin()).to_f32());
        wave.collect()
    }

    fn given(format: RowFormat, rows: &[u8], num_rows: usize) -> Result<Vec<u8>, Error> {
        let kept = Arc::new(Given::default());
        let experts = Bf16Rows::new(Arc::clone(&kept) as Arc<dyn Experts>, format, HIDDEN);
        experts.compute(LayerId(0), rows, num_rows, &[], &mut Vec::new())?;
        let rows = kept.0.lock().unwrap().clone();
        Ok(rows)
    }

    #[test]
    fn rows_arrive_in_the_format_of_the_kernels() {
        let rows = [bf16_row(0.0), bf16_row(1.0)];
        let in_format = |format: RowFormat| {
            let row_bytes = format.row_bytes(HIDDEN);
            let mut bytes = vec![0; 2 * row_bytes];
            for (row, to) in rows.iter().zip(bytes.chunks_exact_mut(row_bytes)) {
                format.write_row(row, to);
            }
            bytes
        };
        let sent = in_format(RowFormat::Bf16);
        for format in [RowFormat::F32, RowFormat::Bf16, RowFormat::Q8] {
            assert_eq!(given(format, &sent, 2).unwrap(), in_format(format));
        }
        let q8 = given(RowFormat::Q8, &sent, 2).unwrap();
        let again = quant::q8_row_to_f32(&q8[..RowFormat::Q8.row_bytes(HIDDEN)], HIDDEN);
        let near = rows[0].iter().zip(again);
        assert!(near.into_iter().all(|(x, y)| (x - y).abs() < 0.005));
    }

    #[test]
    fn rows_of_another_size_are_refused() {
        for format in [RowFormat::F32, RowFormat::Q8] {
            let error = given(format, &[0; HIDDEN * 2], 2).unwrap_err();
            assert_eq!(
                error.to_string(),
                "bytes of bf16 rows: expected 160, got 80"
            );
        }
    }
}
