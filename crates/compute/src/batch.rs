//! What one engine step computes: which tokens of which sequences, and where their keys and values go.

use tramontane_types::{PageId, TokenId};

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

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.logits_rows.clear();
    }
}
