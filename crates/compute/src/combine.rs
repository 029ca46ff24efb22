//! Summing what the experts returned, in the one order that every placement shares.
//!
//! For each row: experts ascending by id; for each expert its nodes along the summation tree
//! ([`tramontane_types::slice`]); then `residual += weight * expert`. All in f32.

use std::ops::Range;

use tramontane_types::Node;

use crate::Error;

/// What the experts of one layer returned for one step.
#[derive(Clone, Copy, Debug)]
pub struct Contributions<'a> {
    /// Result buffers, one per answering worker.
    pub buffers: &'a [&'a [f32]],
    /// The vectors inside the buffers.
    pub pieces: &'a [Piece],
    /// One entry per (row, expert), sorted by row, then expert; together they name every piece once.
    pub sums: &'a [ExpertSum],
}

/// One partial output vector: `hidden` f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Which subtree of the expert it is the sum of.
    pub node: Node,
    /// Index into [`Contributions::buffers`].
    pub buffer: u32,
    /// First f32 in that buffer.
    pub offset: usize,
}

/// One expert's output for one row: its pieces, ascending by node, and its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertSum {
    /// Row of the step.
    pub row: u32,
    /// Gate weight.
    pub weight: f32,
    /// Indices into [`Contributions::pieces`].
    pub pieces: Range<u32>,
}

/// Adds every expert's weighted output to `residual`, `[num_rows, hidden]`.
///
/// # Errors
/// When a row, a buffer or a piece does not exist, or the pieces of an expert do not form its tree.
pub fn add_expert_sums(
    residual: &mut [f32],
    hidden: usize,
    contributions: &Contributions<'_>,
) -> Result<(), Error> {
    let mut scratch = Scratch::new(hidden);
    for sum in contributions.sums {
        let begin = sum.row as usize * hidden;
        let Some(row) = residual.get_mut(begin..begin + hidden) else {
            return Err(Error::OutOfRange {
                what: "row",
                limit: begin / hidden.max(1),
                got: sum.row as usize,
            });
        };
        let pieces = contributions
            .pieces
            .get(sum.pieces.start as usize..sum.pieces.end as usize)
            .ok_or(Error::OutOfRange {
                what: "piece",
                limit: contributions.pieces.len(),
                got: sum.pieces.end as usize,
            })?;
        add_one(row, sum.weight, pieces, contributions.buffers, &mut scratch)?;
    }
    Ok(())
}

/// Partial sums of the tree that is being walked: at most one per level.
struct Scratch {
    hidden: usize,
    levels: Vec<(Node, Vec<f32>)>,
    depth: usize,
}

impl Scratch {
    fn new(hidden: usize) -> Self {
        Self {
            hidden,
            levels: Vec::new(),
            depth: 0,
        }
    }

    /// Pushes a vector and merges equal halves, as a binary counter carries.
    fn push(&mut self, node: Node, vector: &[f32]) {
        if self.depth == self.levels.len() {
            self.levels.push((node, vec![0.0; self.hidden]));
        }
        let slot = &mut self.levels[self.depth];
        slot.0 = node;
        slot.1.copy_from_slice(vector);
        self.depth += 1;
        while self.depth >= 2 && self.merge_top() {}
    }

    /// Adds the top vector to the one below when they are the two halves of one node.
    fn merge_top(&mut self) -> bool {
        let (below, top) = self.levels.split_at_mut(self.depth - 1);
        let (Some(left), Some(right)) = (below.last_mut(), top.first()) else {
            return false;
        };
        let parent = Node {
            begin: left.0.begin,
            len: left.0.len * 2,
        };
        if left.0.len != right.0.len || parent.halves() != Some((left.0, right.0)) {
            return false;
        }
        for (a, b) in left.1.iter_mut().zip(&right.1) {
            *a += b;
        }
        left.0 = parent;
        self.depth -= 1;
        true
    }

    /// What remains are subtrees whose right sibling is empty (behind the last column): a node with an
    /// empty right half equals its left half, so they join from the right without a change of bits.
    fn finish(&mut self) -> Option<&[f32]> {
        while self.depth >= 2 {
            let (below, top) = self.levels.split_at_mut(self.depth - 1);
            let (left, right) = (below.last_mut()?, top.first()?);
            for (a, b) in left.1.iter_mut().zip(&right.1) {
                *a += b;
            }
            self.depth -= 1;
        }
        let done = (self.depth == 1).then_some(0);
        self.depth = 0;
        done.map(|i| self.levels[i].1.as_slice())
    }
}

fn add_one(
    row: &mut [f32],
    weight: f32,
    pieces: &[Piece],
    buffers: &[&[f32]],
    scratch: &mut Scratch,
) -> Result<(), Error> {
    let hidden = row.len();
    for piece in pieces {
        let vector = buffers
            .get(piece.buffer as usize)
            .and_then(|b| b.get(piece.offset..piece.offset + hidden))
            .ok_or(Error::OutOfRange {
                what: "expert output at",
                limit: buffers.get(piece.buffer as usize).map_or(0, |b| b.len()),
                got: piece.offset + hidden,
            })?;
        if let [only] = pieces {
            debug_assert_eq!(only.node.begin, 0, "a lone piece is the whole expert");
            accumulate(row, weight, vector);
            return Ok(());
        }
        scratch.push(piece.node, vector);
    }
    let Some(total) = scratch.finish() else {
        return Err(Error::Shape {
            what: "pieces of an expert".to_owned(),
            expected: 1,
            got: 0,
        });
    };
    accumulate(row, weight, total);
    Ok(())
}

fn accumulate(row: &mut [f32], weight: f32, vector: &[f32]) {
    for (x, y) in row.iter_mut().zip(vector) {
        *x += weight * y;
    }
}
