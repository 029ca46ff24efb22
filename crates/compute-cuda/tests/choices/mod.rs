//! Tokens that the device chooses are those that the host would have chosen from the logits, and rows are refused alike.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

mod kernels;

use tramontane_compute::sampling::Multinomial;
use tramontane_compute::{Choice, SampleError, StepBatch, StepOutputs, Wanted};
use tramontane_types::ModelGeometry;

use crate::backend;
use crate::model::devices::devices;
use crate::model::{Checkpoint, Model, Prompt, bits, geometry};

const VOCAB: usize = 75;

/// What a step must give, by the logits of all its rows.
pub(crate) fn expected(logits: &[f32], wanted: &[Wanted]) -> StepOutputs {
    let mut outputs = StepOutputs::default();
    for (row, wanted) in logits.chunks_exact(VOCAB).zip(wanted) {
        match wanted.choose(row) {
            None => outputs.logits.extend(row),
            Some(choice) => outputs.choices.push(choice),
        }
    }
    outputs
}

/// Some rows want this and others that, or all the same.
fn mixes(rows: usize) -> [Vec<Wanted>; 5] {
    let drawn = |row: usize| {
        Wanted::Drawn(Multinomial {
            temperature: 0.5 + (row % 4) as f32 * 0.5,
            min_p: (row % 3) as f32 * 0.01,
            uniform: (row * 7919 % 1009) as f64 / 1009.0,
        })
    };
    let mix = |of_row: &dyn Fn(usize) -> Wanted| (0..rows).map(of_row).collect();
    [
        mix(&|row| match row % 5 {
            0 | 1 => Wanted::Logits,
            2 => Wanted::Best,
            _ => drawn(row),
        }),
        mix(&drawn),
        mix(&|_| Wanted::Best),
        mix(&|_| Wanted::Logits),
        mix(&|row| match row + 1 == rows {
            true => Wanted::Logits,
            false => drawn(row),
        }),
    ]
}

/// Bits and choices: what is compared.
fn told(outputs: &StepOutputs) -> (Vec<u32>, &[Choice]) {
    (bits(&outputs.logits), &outputs.choices)
}

/// Rows for every bucket of graphs, full or not, for launches without one, and for more turns than one.
#[test]
fn a_step_gives_of_each_row_what_is_wanted_of_it() {
    let geometry = ModelGeometry {
        num_layers: 1,
        ..geometry()
    };
    let checkpoint = Checkpoint::new(geometry.clone());
    for device in devices() {
        let backend = backend(&device, &geometry);
        let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
        let sizes = [1, 2, 3, 8, 13, 24, 32, 48, 61, 96, 128, 160, 192, 256, 270];
        for rows in sizes {
            let mut batch = StepBatch::default();
            Prompt::new(4, rows, 0).add_to(&mut batch, 0..rows, true);
            if rows % 2 == 1 {
                // Another bucket for the logits than for the rows.
                batch.logits_rows.retain(|row| row % 3 != 1);
            }
            let logits = model.try_whole(&batch).unwrap();
            // Large steps are slow where they are emulated.
            let mixes = mixes(batch.logits_rows.len());
            let num_mixes = if rows > 24 { 2 } else { mixes.len() };
            for wanted in mixes.into_iter().take(num_mixes) {
                let got = model.try_outputs(&batch, &wanted).unwrap();
                let expected = expected(&logits, &wanted);
                assert!(told(&got) == told(&expected), "{rows} rows on {device:?}");
            }
        }
    }
}

#[test]
fn rows_whose_logits_are_no_numbers_are_refused_with_the_first_of_them() {
    let mut checkpoint = Checkpoint::new(geometry());
    for id in [74, 31] {
        checkpoint.set_lm_head(id, f32::NAN);
    }
    for device in devices() {
        let backend = backend(&device, &geometry());
        let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
        let mut batch = StepBatch::default();
        Prompt::new(4, 9, 0).add_to(&mut batch, 0..9, true);
        let got = model.try_outputs(&batch, &[Wanted::Best; 9]).unwrap();
        let refused = Err(SampleError::NotFinite { id: 31 });
        assert_eq!(got.choices, [refused; 9]);
        assert!(got.logits.is_empty());
    }
}
