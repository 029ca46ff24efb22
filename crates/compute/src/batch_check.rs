//! Everything that must hold of a step's batch before a row of it is computed. Never begins the step.

use std::ops::Range;

use tramontane_types::{ModelGeometry, PageId};

use crate::error::{check_index, check_size};
use crate::{AttentionConfig, Error, KV_PAGE_TOKENS, SequenceSpan, StepBatch};

/// First position that a query at `position` sees.
#[must_use]
pub fn first_visible(geometry: &ModelGeometry, position: usize) -> usize {
    let window = geometry.sliding_window.unwrap_or(usize::MAX);
    (position + 1).saturating_sub(window)
}

/// Pages that hold what rows at `positions` see, as indices into a block table.
#[must_use]
pub fn visible_pages(geometry: &ModelGeometry, positions: Range<usize>) -> Range<usize> {
    first_visible(geometry, positions.start) / KV_PAGE_TOKENS
        ..positions.end.div_ceil(KV_PAGE_TOKENS)
}

impl StepBatch {
    /// Refuses a batch that does not fit the model or the cache, or that writes a page through two sequences.
    /// `written` is scratch, see [`StepBatch::check_written_pages`].
    ///
    /// # Errors
    /// With the first number that does not fit.
    pub fn check(
        &self,
        geometry: &ModelGeometry,
        config: AttentionConfig,
        written: &mut Vec<PageId>,
    ) -> Result<(), Error> {
        let num_rows = self.num_rows();
        if num_rows > config.max_rows {
            check_size("rows of a step, at most", config.max_rows, num_rows)?;
        }
        check_size("positions of a step", num_rows, self.positions.len())?;
        for &token in &self.tokens {
            check_index("token", geometry.vocab, token as usize)?;
        }
        let mut next_row = 0;
        for sequence in &self.sequences {
            check_size(
                "first row of a sequence",
                next_row,
                sequence.row_begin as usize,
            )?;
            next_row += sequence.num_rows as usize;
            if next_row > num_rows {
                check_size("rows of all sequences", num_rows, next_row)?;
            }
            check_sequence(geometry, config, self, sequence)?;
        }
        check_size("rows of all sequences", num_rows, next_row)?;
        self.check_written_pages(written)?;
        let mut after = 0;
        for &row in &self.logits_rows {
            check_index("logits row", num_rows, row as usize)?;
            if (row as usize) < after {
                check_size("next logits row, at least", after, row as usize)?;
            }
            after = row as usize + 1;
        }
        Ok(())
    }
}

fn check_sequence(
    geometry: &ModelGeometry,
    config: AttentionConfig,
    batch: &StepBatch,
    sequence: &SequenceSpan,
) -> Result<(), Error> {
    let rows = sequence.row_begin as usize..(sequence.row_begin + sequence.num_rows) as usize;
    let positions = &batch.positions[rows];
    let Some(&first) = positions.first() else {
        return check_size("rows of a sequence, at least", 1, 0);
    };
    for (i, &position) in positions.iter().enumerate() {
        check_size("position", first as usize + i, position as usize)?;
        check_index("position", geometry.max_positions, position as usize)?;
    }
    let end = first as usize + positions.len();
    let pages = visible_pages(geometry, first as usize..end);
    if sequence.block_table.len() < pages.end {
        check_size(
            "pages of a sequence, at least",
            pages.end,
            sequence.block_table.len(),
        )?;
    }
    for page in &sequence.block_table[pages] {
        check_index("page", config.num_pages, page.0 as usize)?;
    }
    Ok(())
}
