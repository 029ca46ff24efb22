//! The activation of an expert: `silu(gate) * up`. Reads what a tile of interleaved panels left.

use crate::kernels::tile::TileRow;
use crate::simd::{LANES, Operation, Simd, silu};

/// Panel a of the tile row holds 16 gate columns, panel b the same columns of up.
pub(crate) struct SwiGlu<'a> {
    pub(crate) gate_up: &'a TileRow,
    pub(crate) out: &'a mut [f32; LANES],
}

impl Operation for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [gate, up] = self.gate_up;
        let x = s.mul(silu(s, s.load(gate)), s.load(up));
        s.store(x, self.out);
    }
}
