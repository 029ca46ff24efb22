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
    /// Segments of an expert that have columns
    /// ([`num_segments`](tramontane_types::slice::num_segments)): the pieces of every sum reach this far.
    pub num_segments: u8,
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
    add_expert_sums_from(0, residual, hidden, contributions)
}

/// As [`add_expert_sums`] for the rows of the step from `first_row` on: `residual` begins there, and so do the
/// sums of `contributions`. Threads that have different rows share a step so.
///
/// # Errors
/// As [`add_expert_sums`].
pub fn add_expert_sums_from(
    first_row: usize,
    residual: &mut [f32],
    hidden: usize,
    contributions: &Contributions<'_>,
) -> Result<(), Error> {
    let mut scratch = Scratch::new(hidden);
    let num_rows = residual.len() / hidden.max(1);
    for sum in contributions.sums {
        let begin = (sum.row as usize)
            .checked_sub(first_row)
            .map(|row| row * hidden);
        let row = begin.and_then(|begin| residual.get_mut(begin..begin + hidden));
        let Some(row) = row else {
            return Err(Error::OutOfRange {
                what: "row",
                limit: first_row + num_rows,
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
        add_one(row, sum.weight, pieces, contributions, &mut scratch)?;
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

/// Refuses a hole between the pieces of an expert or behind the last one: it would be summed silently.
fn check_pieces(pieces: &[Piece], num_segments: u8) -> Result<(), Error> {
    let mut next = 0;
    for piece in pieces {
        if piece.node.begin != next {
            return Err(Error::Shape {
                what: "first segment of the next piece of an expert".to_owned(),
                expected: usize::from(next),
                got: usize::from(piece.node.begin),
            });
        }
        next = piece.node.begin.saturating_add(piece.node.len);
    }
    if next < num_segments {
        return Err(Error::Shape {
            what: "segments in the pieces of an expert".to_owned(),
            expected: usize::from(num_segments),
            got: usize::from(next),
        });
    }
    Ok(())
}

fn add_one(
    row: &mut [f32],
    weight: f32,
    pieces: &[Piece],
    contributions: &Contributions<'_>,
    scratch: &mut Scratch,
) -> Result<(), Error> {
    check_pieces(pieces, contributions.num_segments)?;
    let hidden = row.len();
    let buffers = contributions.buffers;
    for piece in pieces {
        let vector = buffers
            .get(piece.buffer as usize)
            .and_then(|b| b.get(piece.offset..piece.offset + hidden))
            .ok_or(Error::OutOfRange {
                what: "expert output at",
                limit: buffers.get(piece.buffer as usize).map_or(0, |b| b.len()),
                got: piece.offset + hidden,
            })?;
        if pieces.len() == 1 {
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

#[cfg(test)]
mod tests {
    use tramontane_types::{SegmentRange, slice};

    use super::*;

    const HIDDEN: usize = 3;

    /// Outputs of the leaves; no two sums of them are equal in f32 unless added in the same order.
    fn leaf(segment: u8) -> [f32; HIDDEN] {
        std::array::from_fn(|i| (f32::from(segment) * 1.7 + i as f32).sin() * 10_f32.powi(i as i32))
    }

    fn subtree(node: Node, num_segments: u8) -> Option<[f32; HIDDEN]> {
        let Some((left, right)) = node.halves() else {
            return (node.begin < num_segments).then(|| leaf(node.begin));
        };
        let left = subtree(left, num_segments)?;
        let right = subtree(right, num_segments);
        Some(right.map_or(left, |right| std::array::from_fn(|i| left[i] + right[i])))
    }

    fn add(nodes: &[Node], num_segments: u8) -> Result<Vec<f32>, Error> {
        let vectors = nodes.iter().filter_map(|&n| subtree(n, num_segments));
        let buffer: Vec<f32> = vectors.flatten().collect();
        let pieces: Vec<Piece> = nodes
            .iter()
            .enumerate()
            .map(|(i, &node)| Piece {
                node,
                buffer: 0,
                offset: i * HIDDEN,
            })
            .collect();
        let contributions = Contributions {
            buffers: &[&buffer],
            pieces: &pieces,
            sums: &[ExpertSum {
                row: 0,
                weight: 0.3,
                pieces: 0..nodes.len() as u32,
            }],
            num_segments,
        };
        let mut residual = vec![0.5; HIDDEN];
        add_expert_sums(&mut residual, HIDDEN, &contributions)?;
        Ok(residual)
    }

    #[test]
    fn every_cut_of_an_expert_gives_the_same_bits() {
        for ff in [100, 160, 192, 384] {
            let num_segments = slice::num_segments(ff);
            let whole = add(&[Node::ROOT], num_segments).unwrap();
            for cuts in 0_u8..128 {
                let mut nodes = Vec::new();
                let mut begin = 0;
                for end in 1..=8 {
                    if end == 8 || cuts & (1 << (end - 1)) != 0 {
                        let range = SegmentRange::new(begin, end).unwrap();
                        nodes.extend(range.nodes(num_segments));
                        begin = end;
                    }
                }
                assert_eq!(
                    add(&nodes, num_segments).unwrap(),
                    whole,
                    "ff {ff} cuts {cuts:b}"
                );
            }
        }
    }

    #[test]
    fn a_hole_between_or_behind_the_pieces_is_refused() {
        let node = |begin, len| Node { begin, len };
        assert!(add(&[node(0, 2), node(4, 4)], 8).is_err());
        assert!(add(&[node(4, 4)], 8).is_err());
        assert!(add(&[node(0, 4), node(0, 4)], 8).is_err());
        assert!(add(&[], 8).is_err());
        assert!(add(&[node(0, 4)], 8).is_err(), "one piece");
        assert!(add(&[node(0, 4), node(4, 2)], 8).is_err());
        assert!(add(&[node(0, 4)], 5).is_err());
        assert!(add(&[node(0, 4)], 4).is_ok(), "segments 4..8 are empty");
        assert!(add(&[node(0, 4), node(4, 4)], 5).is_ok());
    }
}
