//! Turns a plan into the rows of a step. Never decides anything.

use tramontane_compute::{SequenceSpan, StepBatch, Wanted};

use crate::sampler;
use crate::scheduler::Chunk;
use crate::sequence::Sequences;

/// Fills `batch` with the planned rows, in order: of the tokens that there are, then of guessed ones. Logits
/// rows are those of [`Sequence::wanted_logits`](crate::sequence::Sequence::wanted_logits); `wanted` becomes what is
/// wanted of each.
pub(crate) fn fill(
    (batch, wanted): (&mut StepBatch, &mut Vec<Wanted>),
    chunks: &[Chunk],
    sequences: &Sequences,
) {
    batch.clear();
    wanted.clear();
    for chunk in chunks {
        let Some(sequence) = sequences.get(&chunk.key) else {
            debug_assert!(false, "only living sequences are planned");
            continue;
        };
        let (begin, end) = (
            sequence.num_computed,
            sequence.num_computed + chunk.num_rows,
        );
        let asked = sequence.wanted_logits(chunk.num_rows);
        let row_begin = batch.tokens.len();
        batch.sequences.push(SequenceSpan {
            row_begin: row_begin as u32,
            num_rows: chunk.num_rows as u32,
            block_table: sequence.table.pages().to_vec(),
        });
        batch.positions.extend(begin as u32..end as u32);
        let known = end.min(sequence.tokens.len());
        batch
            .tokens
            .extend_from_slice(&sequence.tokens[begin..known]);
        batch
            .tokens
            .extend_from_slice(&sequence.draft[..end - known]);
        let sampled = end - asked.num_sampled..end;
        // A prompt's tokens are told with their log probabilities.
        wanted.resize(wanted.len() + asked.prompt.len(), Wanted::Logits);
        let first = sequence.num_output();
        let positions = first..first + asked.num_sampled;
        wanted.extend(positions.map(|at| sampler::wanted(&sequence.params, at as u32)));
        let rows = asked
            .prompt
            .chain(sampled)
            .map(|at| (row_begin + at - begin) as u32);
        batch.logits_rows.extend(rows);
    }
}
