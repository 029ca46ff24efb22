//! What one engine step computes: which tokens of which sequences, and where their keys and values go.

use tramontane_types::{PageId, TokenId};

use crate::Error;

/// Tokens of one page of the KV cache. Part of the exactness contract: attention sums page by page.
pub const KV_PAGE_TOKENS: usize = 64;

/// The rows of one step. A row is one token of one sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepBatch {
    /// Token of each row, `[num_rows]`.
    pub tokens: Vec<TokenId>,
    /// Position of each row in its sequence, `[num_rows]`.
    pub positions: Vec<u32>,
    /// The sequences, covering the rows in order without gaps.
    pub sequences: Vec<SequenceSpan>,
    /// Rows whose logits are wanted, ascending.
    pub logits_rows: Vec<u32>,
}

/// Consecutive rows of a [`StepBatch`] that belong to one sequence, at consecutive positions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceSpan {
    /// First row of this sequence in the batch.
    pub row_begin: u32,
    /// Number of rows.
    pub num_rows: u32,
    /// Pages of the sequence: position `p` lives in `block_table[p / 64]` at offset `p % 64`. Holds a
    /// page for every position that a row of this step may see; entries wholly behind the sliding
    /// window may be [`PageId::RELEASED`].
    pub block_table: Vec<PageId>,
}

impl StepBatch {
    /// Number of rows.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// Refuses a page that this step would write through two entries of the block tables: two tokens could
    /// have one place. `written` is emptied and receives the pages that the step writes, at most one per row.
    ///
    /// # Errors
    /// When a page is written twice, or rows or pages that a sequence names do not exist.
    pub fn check_written_pages(&self, written: &mut Vec<PageId>) -> Result<(), Error> {
        written.clear();
        for sequence in &self.sequences {
            let begin = sequence.row_begin as usize;
            let rows = begin..begin + sequence.num_rows as usize;
            let positions = self.positions.get(rows.clone());
            let (Some(&first), Some(&last)) = (
                positions.and_then(<[u32]>::first),
                positions.and_then(<[u32]>::last),
            ) else {
                return Err(Error::OutOfRange {
                    what: "rows of a sequence, to",
                    limit: self.positions.len(),
                    got: rows.end,
                });
            };
            let pages = first as usize / KV_PAGE_TOKENS..last as usize / KV_PAGE_TOKENS + 1;
            let named = sequence.block_table.get(pages.clone());
            written.extend(named.ok_or(Error::OutOfRange {
                what: "pages of a sequence, to",
                limit: sequence.block_table.len(),
                got: pages.end,
            })?);
        }
        written.sort_unstable();
        match written.windows(2).find(|pair| pair[0] == pair[1]) {
            None => Ok(()),
            Some(pair) => Err(Error::Shape {
                what: format!(
                    "sequences' entries that write page {} in one step",
                    pair[0].0
                ),
                expected: 1,
                got: written.iter().filter(|&&page| page == pair[0]).count(),
            }),
        }
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.logits_rows.clear();
    }
}
