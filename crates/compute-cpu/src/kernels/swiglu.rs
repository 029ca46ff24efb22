//! The activation of an expert: `silu(gate) * up`. Reads what tiles of interleaved panels left.

use tramontane_compute::RowFormat;
use tramontane_compute::quant::BLOCK;

use crate::kernels::quantise::quantise_block;
use crate::kernels::tile::TileRow;
use crate::rows::BlockMut;
use crate::simd::{LANES, Operation, Simd, silu};

/// One block of columns of some rows: activated, then rounded to the row format. All rows are one
/// operation, so that the long chains of their exponentials overlap.
pub(crate) struct Activate<'a, F> {
    /// By row: panel a of a tile row holds 16 gate columns, panel b the same columns of up.
    pub(crate) gate_up: [&'a [TileRow]; BLOCK / LANES],
    pub(crate) format: RowFormat,
    /// Where the block of a row goes.
    pub(crate) out: F,
}

impl<'a, F: Fn(usize) -> BlockMut<'a>> Operation for Activate<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [low, high] = self.gate_up;
        for (row, (low, high)) in low.iter().zip(high).enumerate() {
            let mut values = [0.0; BLOCK];
            let (halves, _) = values.as_chunks_mut::<LANES>();
            s.store(swiglu(s, low), &mut halves[0]);
            s.store(swiglu(s, high), &mut halves[1]);
            quantise_block(s, self.format, &values, (self.out)(row));
        }
    }
}

/// 16 columns of one row.
#[inline(always)]
pub(crate) fn swiglu<S: Simd>(s: S, [gate, up]: &TileRow) -> S::F {
    s.mul(silu(s, s.load(gate)), s.load(up))
}
