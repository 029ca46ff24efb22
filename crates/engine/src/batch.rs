//! Turns a plan into the rows of a step. Never decides anything.

use tramontane_compute::{SequenceSpan, StepBatch};

use crate::scheduler::Chunk;
use crate::sequence::Sequences;

/// Fills `batch` with the planned rows, in order. The last row of every sequence that has all its
/// tokens computed after this step wants logits.
pub(crate) fn fill(batch: &mut StepBatch, chunks: &[Chunk], sequences: &Sequences) {
    batch.clear();
    for chunk in chunks {
        let Some(sequence) = sequences.get(&chunk.key) else {
            debug_assert!(false, "only living sequences are planned");
            continue;
        };
        let rows = sequence.num_computed..sequence.num_computed + chunk.num_rows;
        batch.sequences.push(SequenceSpan {
            row_begin: batch.tokens.len() as u32,
            num_rows: chunk.num_rows as u32,
            block_table: sequence.table.pages().to_vec(),
        });
        batch.positions.extend(rows.start as u32..rows.end as u32);
        batch
            .tokens
            .extend_from_slice(&sequence.tokens[rows.clone()]);
        if rows.end == sequence.tokens.len() {
            batch.logits_rows.push(batch.tokens.len() as u32 - 1);
        }
    }
}
