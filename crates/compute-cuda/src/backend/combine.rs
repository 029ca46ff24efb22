//! Expert outputs that came from other workers join the residual stream, in passes of bounded size. Sums nothing itself.

use std::ops::Range;

use tramontane_compute::error::check_size;
use tramontane_compute::{Contributions, Error, ExpertSum, Piece};

use super::context::{Context, failed};
use super::kernels::Kernels;
use crate::device::{Args, Buffer, Pinned, Stream};

/// Vectors of one pass; a row never has more than eight of each of its experts, so at least 64 rows of top-2 fit.
const VECTORS_MAX: usize = 2048;
/// (row, expert) pairs of one pass.
const SUMS_MAX: usize = VECTORS_MAX;

/// What a pass sends: one copy.
#[derive(Debug)]
pub(super) struct Combine {
    host: Pinned,
    device: Buffer,
    layout: Layout,
}

/// Where things are, in bytes. Vectors are last: only those of the pass are copied.
#[derive(Clone, Copy, Debug)]
struct Layout {
    sum_begins: usize,
    weights: usize,
    piece_offsets: usize,
    piece_lens: usize,
    vectors: usize,
}

impl Layout {
    fn new() -> Self {
        let align = |bytes: usize| bytes.next_multiple_of(256);
        // The number of rows is first.
        let sum_begins = 256;
        let weights = sum_begins + align((SUMS_MAX + 1) * 4);
        let piece_offsets = weights + align(SUMS_MAX * 4);
        let piece_lens = piece_offsets + align(VECTORS_MAX * 8);
        Self {
            sum_begins,
            weights,
            piece_offsets,
            piece_lens,
            vectors: piece_lens + align(VECTORS_MAX * 4),
        }
    }
}

/// Where the residual stream is, and how it is added to.
pub(super) struct Target<'a> {
    pub(super) context: &'a Context,
    pub(super) stream: &'a Stream,
    pub(super) residual: &'a Buffer,
    pub(super) num_rows: usize,
}

impl Combine {
    pub(super) fn new(context: &Context) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let layout = Layout::new();
        // One row of whole cuts fits in every model.
        check_size(
            "top_k times segments, at most",
            VECTORS_MAX,
            VECTORS_MAX.max(geometry.top_k * 8),
        )?;
        let bytes = layout.vectors + VECTORS_MAX * geometry.hidden * size_of::<f32>();
        Ok(Self {
            host: context.pinned(bytes)?,
            device: context.buffer(bytes)?,
            layout,
        })
    }

    /// Queues adding everything: the next layer's attention is queued behind it without a wait.
    pub(super) fn run(
        &mut self,
        target: &Target<'_>,
        contributions: &Contributions<'_>,
    ) -> Result<(), Error> {
        check(target, contributions)?;
        let top_k = target.context.geometry.top_k;
        let (mut begin, mut vectors) = (0, 0);
        for row in 0..target.num_rows {
            let sums = &contributions.sums[row * top_k..(row + 1) * top_k];
            let of_row: usize = sums.iter().map(|sum| sum.pieces.len()).sum();
            let is_full = vectors + of_row > VECTORS_MAX || (row - begin + 1) * top_k > SUMS_MAX;
            if is_full && row > begin {
                self.pass(target, contributions, begin..row)?;
                (begin, vectors) = (row, 0);
            }
            vectors += of_row;
        }
        self.pass(target, contributions, begin..target.num_rows)
    }

    fn pass(
        &mut self,
        target: &Target<'_>,
        contributions: &Contributions<'_>,
        rows: Range<usize>,
    ) -> Result<(), Error> {
        let (context, layout) = (target.context, self.layout);
        let (hidden, top_k) = (context.geometry.hidden, context.geometry.top_k);
        let sums = &contributions.sums[rows.start * top_k..rows.end * top_k];
        // What was queued from this memory is done; in the first pass it was waited for when the rows went out.
        let waited = target.stream.synchronize();
        waited.map_err(failed("adding expert outputs"))?;
        let vectors = self.fill(hidden, contributions, sums, rows.len());
        let device = &self.device;
        let args = Args::new()
            .address(target.residual.at(rows.start * hidden * size_of::<f32>()))
            .address(device.at(layout.vectors))
            .address(device.at(layout.sum_begins))
            .address(device.at(layout.piece_offsets))
            .address(device.at(layout.piece_lens))
            .address(device.at(layout.weights))
            .address(device.address())
            .size(top_k)
            .size(hidden);
        let shape = Kernels::combine_shape(rows.len(), hidden);
        let bytes = layout.vectors + vectors * hidden * size_of::<f32>();
        // SAFETY: everything lives as long as the stream, which is waited for before it changes; offsets were checked
        // against the vectors that are sent.
        let queued = unsafe {
            let sent = target.stream.upload(device, &self.host, bytes);
            let kernel = context.kernels.combine_pieces;
            sent.and_then(|()| target.stream.launch(kernel, shape, args))
        };
        queued.map_err(failed("adding expert outputs"))
    }

    /// Writes what a pass reads; how many vectors it has. Everything was checked.
    fn fill(
        &mut self,
        hidden: usize,
        contributions: &Contributions<'_>,
        sums: &[ExpertSum],
        num_rows: usize,
    ) -> usize {
        let layout = self.layout;
        let bytes = self.host.as_mut_slice::<u8>();
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(num_rows as u32).to_ne_bytes());
        let mut vectors = 0;
        for (i, sum) in sums.iter().enumerate() {
            put(layout.sum_begins + 4 * i, &(vectors as u32).to_ne_bytes());
            put(layout.weights + 4 * i, &sum.weight.to_ne_bytes());
            for piece in &contributions.pieces[sum.pieces.start as usize..sum.pieces.end as usize] {
                let offset = (vectors * hidden) as u64;
                put(layout.piece_offsets + 8 * vectors, &offset.to_ne_bytes());
                put(
                    layout.piece_lens + 4 * vectors,
                    &u32::from(piece.node.len).to_ne_bytes(),
                );
                let vector = vector_of(contributions, piece, hidden).unwrap_or_default();
                let at = layout.vectors + vectors * hidden * size_of::<f32>();
                put(at, bytemuck::cast_slice(vector));
                vectors += 1;
            }
        }
        put(
            layout.sum_begins + 4 * sums.len(),
            &(vectors as u32).to_ne_bytes(),
        );
        vectors
    }
}

fn vector_of<'a>(
    contributions: &Contributions<'a>,
    piece: &Piece,
    hidden: usize,
) -> Option<&'a [f32]> {
    let buffer = contributions.buffers.get(piece.buffer as usize)?;
    buffer.get(piece.offset..piece.offset.checked_add(hidden)?)
}

/// Refuses what does not name every expert of every row in order, with whole trees that exist.
fn check(target: &Target<'_>, contributions: &Contributions<'_>) -> Result<(), Error> {
    let geometry = &target.context.geometry;
    let num_sums = target.num_rows * geometry.top_k;
    check_size("expert sums of a step", num_sums, contributions.sums.len())?;
    for (i, sum) in contributions.sums.iter().enumerate() {
        check_size("row of an expert sum", i / geometry.top_k, sum.row as usize)?;
        let range = sum.pieces.start as usize..sum.pieces.end as usize;
        let pieces = contributions.pieces.get(range.clone());
        let pieces = pieces.ok_or(Error::OutOfRange {
            what: "piece",
            limit: contributions.pieces.len(),
            got: range.end,
        })?;
        let mut next = 0_u8;
        for piece in pieces {
            let expected = usize::from(next);
            check_size(
                "first segment of the next piece of an expert",
                expected,
                usize::from(piece.node.begin),
            )?;
            next = next.saturating_add(piece.node.len);
            if vector_of(contributions, piece, geometry.hidden).is_none() {
                return Err(Error::OutOfRange {
                    what: "expert output at",
                    limit: contributions
                        .buffers
                        .get(piece.buffer as usize)
                        .map_or(0, |buffer| buffer.len()),
                    got: piece.offset,
                });
            }
        }
        if next < contributions.num_segments || next == 0 {
            let expected = usize::from(contributions.num_segments.max(1));
            check_size(
                "segments in the pieces of an expert",
                expected,
                usize::from(next),
            )?;
        }
    }
    Ok(())
}
