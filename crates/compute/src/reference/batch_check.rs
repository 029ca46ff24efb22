//! Everything that must hold of a step's batch before a row of it is computed. Changes nothing.

use tramontane_types::ModelGeometry;

use super::ops::{check_index, check_size};
use crate::{AttentionConfig, Error, KV_PAGE_TOKENS, SequenceSpan, StepBatch};

/// First position that a query at `position` sees.
pub(super) fn first_visible(geometry: &ModelGeometry, position: usize) -> usize {
    match geometry.sliding_window {
        Some(window) => (position + 1).saturating_sub(window),
        None => 0,
    }
}

/// Refuses a batch that does not fit the model or the cache.
pub(super) fn check_batch(
    geometry: &ModelGeometry,
    config: AttentionConfig,
    batch: &StepBatch,
) -> Result<(), Error> {
    let num_rows = batch.num_rows();
    if num_rows > config.max_rows {
        check_size("rows of a step, at most", config.max_rows, num_rows)?;
    }
    check_size("positions of a step", num_rows, batch.positions.len())?;
    for &token in &batch.tokens {
        check_index("token", geometry.vocab, token as usize)?;
    }
    let mut next_row = 0;
    for sequence in &batch.sequences {
        let begin = sequence.row_begin as usize;
        check_size("first row of a sequence", next_row, begin)?;
        next_row += sequence.num_rows as usize;
        let Some(positions) = batch.positions.get(begin..next_row) else {
            return check_size("rows of all sequences", num_rows, next_row);
        };
        check_sequence(geometry, config, sequence, positions)?;
    }
    check_size("rows of all sequences", num_rows, next_row)?;
    batch.check_written_pages(&mut Vec::new())?;
    let mut after = 0;
    for &row in &batch.logits_rows {
        check_index("logits row", num_rows, row as usize)?;
        if (row as usize) < after {
            check_size("next logits row, at least", after, row as usize)?;
        }
        after = row as usize + 1;
    }
    Ok(())
}

fn check_sequence(
    geometry: &ModelGeometry,
    config: AttentionConfig,
    sequence: &SequenceSpan,
    positions: &[u32],
) -> Result<(), Error> {
    let Some(&first) = positions.first() else {
        return check_size("rows of a sequence, at least", 1, 0);
    };
    let first = first as usize;
    for (i, &position) in positions.iter().enumerate() {
        check_size("position", first + i, position as usize)?;
        check_index("position", geometry.max_positions, position as usize)?;
    }
    let end = (first + positions.len()).div_ceil(KV_PAGE_TOKENS);
    if sequence.block_table.len() < end {
        let got = sequence.block_table.len();
        check_size("pages of a sequence, at least", end, got)?;
    }
    let begin = first_visible(geometry, first) / KV_PAGE_TOKENS;
    for page in &sequence.block_table[begin..end] {
        check_index("page", config.num_pages, page.0 as usize)?;
    }
    Ok(())
}
