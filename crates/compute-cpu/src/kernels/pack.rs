//! Weights into the layout of [`pack`](crate::pack): convert, quantise, interleave. Never multiplies.
//!
//! A panel's 16 rows become the 16 lanes, a few hundred columns at a time, so that all arithmetic of
//! [`tramontane_compute::quant`] runs lane by lane, in the order of its formulas: the same bits
//! everywhere. Blocks that are stored in the packed format already are copied and never rounded again.

use half::f16;
use tramontane_compute::quant::{
    BLOCK, Q4_MAX, Q4_STEP_MIN, Q4_TRIMS, Q4Block, Q8Block, weight_scale,
};
use tramontane_compute::{DType, HostTensor};

use super::quantise::to_bf16;
use crate::pack::{Line, PAIR_ROWS, PackFormat};
use crate::simd::{LANES, Operation, Simd};

/// Columns that are converted at once: 16 rows of them fit the first cache.
const CHUNK_COLS: usize = 256;

/// 1.5 * 2^23: added to a small f32 it rounds it to an integer, ties to even, and leaves that in the low bits.
const ROUND: f32 = 12_582_912.0;

/// One block of a panel, by column.
type Values = [[f32; LANES]; BLOCK];

/// Where a row of a matrix comes from: the columns of a tensor's row from `col` on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowSource<'a> {
    pub(crate) tensor: HostTensor<'a>,
    pub(crate) row: usize,
    /// A multiple of the block.
    pub(crate) col: usize,
}

/// One pair of panels.
pub(crate) struct PackPair<'a> {
    pub(crate) format: PackFormat,
    /// Columns without padding.
    pub(crate) cols: usize,
    /// `None` is a row of zeros.
    pub(crate) rows: &'a [Option<RowSource<'a>>; PAIR_ROWS],
    /// All blocks of the pair.
    pub(crate) lines: &'a mut [Line],
}

impl Operation for PackPair<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panels = self.rows.as_chunks::<LANES>().0;
        let chunk_lines = CHUNK_COLS / BLOCK * self.format.block_lines();
        let mut values = [[0.0; CHUNK_COLS]; LANES];
        for (i, lines) in self.lines.chunks_mut(chunk_lines).enumerate() {
            let begin = i * CHUNK_COLS;
            let chunk = Chunk {
                format: self.format,
                begin,
                len: CHUNK_COLS.min(self.cols - begin),
            };
            for (panel, rows) in panels.iter().enumerate() {
                chunk.pack(s, rows, panel, &mut values, lines);
            }
        }
    }
}

/// Some columns of a pair.
#[derive(Clone, Copy)]
struct Chunk {
    format: PackFormat,
    begin: usize,
    len: usize,
}

impl Chunk {
    #[inline(always)]
    fn pack<S: Simd>(
        self,
        s: S,
        rows: &[Option<RowSource<'_>>; LANES],
        panel: usize,
        values: &mut [[f32; CHUNK_COLS]; LANES],
        lines: &mut [Line],
    ) {
        if self.copy_stored(rows, panel, lines) {
            return;
        }
        for (row, values) in rows.iter().zip(values.iter_mut()) {
            self.read(s, row.as_ref(), values);
        }
        for (b, lines) in lines.chunks_mut(self.format.block_lines()).enumerate() {
            let values = transposed(values, b * BLOCK);
            let mut out = PanelBlock::new(self.format, panel, lines);
            match self.format {
                PackFormat::Bf16 => pack_bf16(&values, &mut out),
                PackFormat::Q8 => pack_q8(s, &values, &mut out),
                PackFormat::Q4 => pack_q4(s, &values, &mut out),
            }
        }
        // Over what was rounded a second time.
        self.copy_stored(rows, panel, lines);
    }

    /// Copies the blocks that the rows have in the packed format already; says whether those are all.
    fn copy_stored(
        self,
        rows: &[Option<RowSource<'_>>; LANES],
        panel: usize,
        lines: &mut [Line],
    ) -> bool {
        let mut is_complete = true;
        for (lane, row) in rows.iter().enumerate() {
            let Some(RowSource { tensor, row, col }) = row else {
                is_complete = false;
                continue;
            };
            if self.format == PackFormat::Bf16 || tensor.dtype.block_len() == 1 {
                is_complete = false;
                continue;
            }
            let first = (col + self.begin) / BLOCK;
            for (b, lines) in lines.chunks_mut(self.format.block_lines()).enumerate() {
                let mut out = PanelBlock::new(self.format, panel, lines);
                is_complete &= match self.format {
                    PackFormat::Bf16 => false,
                    PackFormat::Q8 => tensor
                        .q8_block(*row, first + b)
                        .is_some_and(|block| out.copy_q8(lane, &block)),
                    PackFormat::Q4 => tensor
                        .q4_block(*row, first + b)
                        .is_some_and(|block| out.copy_q4(lane, &block)),
                };
            }
        }
        is_complete
    }

    /// The chunk's columns of one row, padded with zeros.
    #[inline(always)]
    fn read<S: Simd>(self, s: S, row: Option<&RowSource<'_>>, out: &mut [f32; CHUNK_COLS]) {
        let (out, padding) = out.split_at_mut(self.len);
        padding.fill(0.0);
        let Some(RowSource { tensor, row, col }) = row else {
            out.fill(0.0);
            return;
        };
        let col = col + self.begin;
        let bytes = tensor.row_bytes(*row).unwrap_or_default();
        match bytes.get(2 * col..2 * (col + out.len())) {
            // The common case, which must wait for nothing but memory.
            Some(bytes) if tensor.dtype == DType::Bf16 => read_bf16(s, bytes, out),
            _ => tensor.read_row(*row, col, out),
        }
    }
}

#[inline(always)]
fn read_bf16<S: Simd>(s: S, bytes: &[u8], out: &mut [f32]) {
    let (vectors, rest) = bytes.as_chunks::<{ 2 * LANES }>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for (bytes, out) in vectors.iter().zip(out) {
        let mut halves = [0; LANES];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *half = u16::from_le_bytes(*bytes);
        }
        s.store(s.load_bf16(&halves), out);
    }
    for (bytes, out) in rest.as_chunks::<2>().0.iter().zip(out_rest) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
    }
}

/// The block that begins at `col`, by column.
#[inline(always)]
fn transposed(values: &[[f32; CHUNK_COLS]; LANES], col: usize) -> Values {
    let mut out = [[0.0; LANES]; BLOCK];
    for (lane, row) in values.iter().enumerate() {
        for (out, x) in out.iter_mut().zip(&row[col..col + BLOCK]) {
            out[lane] = *x;
        }
    }
    out
}

/// Where one block of one panel goes.
struct PanelBlock<'a> {
    lines: &'a mut [Line],
    /// Of both panels: the scales, then for q4 the minima.
    scales: &'a mut [Line],
    panel: usize,
}

impl<'a> PanelBlock<'a> {
    /// The part of one block of a pair that belongs to a panel.
    #[inline(always)]
    fn new(format: PackFormat, panel: usize, lines: &'a mut [Line]) -> Self {
        let len = format.panel_lines();
        let (lines, scales) = lines.split_at_mut(2 * len);
        Self {
            lines: &mut lines[panel * len..(panel + 1) * len],
            scales,
            panel,
        }
    }

    /// Writes one lane; true, for a block that is there.
    fn copy_q8(&mut self, lane: usize, block: &Q8Block) -> bool {
        let quads = block.q.as_chunks::<4>().0;
        for (line, quad) in self.lines.iter_mut().zip(quads) {
            for (k, &q) in quad.iter().enumerate() {
                line.0[4 * lane + k] = q as u8;
            }
        }
        self.copy_scale(0, lane, block.scale);
        true
    }

    /// As [`copy_q8`](Self::copy_q8).
    fn copy_q4(&mut self, lane: usize, block: &Q4Block) -> bool {
        let (low, high) = block.q.split_at(BLOCK / 2);
        let quads = low.as_chunks::<4>().0.iter().zip(high.as_chunks::<4>().0);
        for (line, (low, high)) in self.lines.iter_mut().zip(quads) {
            for k in 0..4 {
                line.0[4 * lane + k] = low[k] | high[k] << 4;
            }
        }
        self.copy_scale(0, lane, block.scale);
        self.copy_scale(1, lane, block.min);
        true
    }

    fn copy_scale(&mut self, line: usize, lane: usize, scale: f16) {
        let at = 2 * (self.panel * LANES + lane);
        self.scales[line].0[at..at + 2].copy_from_slice(&scale.to_le_bytes());
    }

    #[inline(always)]
    fn write_words(&mut self, line: usize, words: &[u32; LANES]) {
        let (targets, _) = self.lines[line].0.as_chunks_mut::<4>();
        for (target, word) in targets.iter_mut().zip(words) {
            *target = word.to_le_bytes();
        }
    }

    #[inline(always)]
    fn write_scales(&mut self, line: usize, scales: &[f16; LANES]) {
        let begin = self.panel * 2 * LANES;
        let (targets, _) = self.scales[line].0[begin..].as_chunks_mut::<2>();
        for (target, scale) in targets.iter_mut().zip(scales) {
            *target = scale.to_le_bytes();
        }
    }

    /// The weights of a lane without a scale are 0.
    #[inline(always)]
    fn clear_lanes_without_scale(&mut self, scales: &[f16; LANES]) {
        for (lane, scale) in scales.iter().enumerate() {
            if !scale.is_nan() {
                continue;
            }
            for line in self.lines.iter_mut() {
                line.0[4 * lane..4 * lane + 4].fill(0);
            }
        }
    }
}

#[inline(always)]
fn pack_bf16(values: &Values, out: &mut PanelBlock<'_>) {
    for (line, [even, odd]) in values.as_chunks::<2>().0.iter().enumerate() {
        let mut words = [0; LANES];
        for i in 0..LANES {
            words[i] = u32::from(to_bf16(even[i])) | u32::from(to_bf16(odd[i])) << 16;
        }
        out.write_words(line, &words);
    }
}

// Plain loops from here on: a closure that is handed to the standard library is compiled for any CPU, and
// calls every instruction of ours as a function.

/// See [`q8_weights`](tramontane_compute::quant::q8_weights).
#[inline(always)]
fn pack_q8<S: Simd>(s: S, values: &Values, out: &mut PanelBlock<'_>) {
    let zero = s.splat(0.0);
    let mut amax = zero;
    let mut poison = zero;
    for x in values {
        let x = s.load(x);
        amax = s.max(x, amax);
        amax = s.max(s.sub(zero, x), amax);
        // 0 * x is NaN where x is not finite, and stays it; the maximum loses a NaN.
        poison = s.fma(zero, x, poison);
    }
    let scale = to_array(s, s.add(s.div(amax, s.splat(127.0)), poison));
    let mut scales = [f16::ZERO; LANES];
    for i in 0..LANES {
        scales[i] = weight_scale(scale[i]);
    }
    let inverse = inverses(s, &scales);
    for (line, columns) in values.as_chunks::<4>().0.iter().enumerate() {
        let mut words = [0; LANES];
        for (k, x) in columns.iter().enumerate() {
            let q = s.mul(s.load(x), inverse);
            let q = s.min(s.max(q, s.splat(-127.0)), s.splat(127.0));
            add_byte(&mut words, &to_array(s, s.add(q, s.splat(ROUND))), 8 * k);
        }
        out.write_words(line, &words);
    }
    out.write_scales(0, &scales);
    out.clear_lanes_without_scale(&scales);
}

/// Puts the low bytes of rounded numbers (see [`ROUND`]) at a bit of words.
#[inline(always)]
fn add_byte(words: &mut [u32; LANES], rounded: &[f32; LANES], bit: usize) {
    for i in 0..LANES {
        words[i] |= (rounded[i].to_bits() & 0xff) << bit;
    }
}

/// See [`q4_weights`](tramontane_compute::quant::q4_weights).
#[inline(always)]
fn pack_q4<S: Simd>(s: S, values: &Values, out: &mut PanelBlock<'_>) {
    let (scales, minima) = q4_scales(s, values);
    let min = s.load(&to_f32(&minima));
    let inverse = inverses(s, &scales);
    for line in 0..BLOCK / 8 {
        let mut words = [0; LANES];
        for k in 0..8 {
            // The upper half of the block lies in the high nibbles.
            let (column, bit) = (
                4 * line + k % 4 + k / 4 * (BLOCK / 2),
                8 * (k % 4) + k / 4 * 4,
            );
            let q = s.mul(s.sub(s.load(&values[column]), min), inverse);
            let rounded = s.add(q4_clamp(s, q), s.splat(ROUND));
            add_byte(&mut words, &to_array(s, rounded), bit);
        }
        out.write_words(line, &words);
    }
    out.write_scales(0, &scales);
    out.write_scales(1, &minima);
    out.clear_lanes_without_scale(&scales);
}

#[inline(always)]
fn q4_clamp<S: Simd>(s: S, q: S::F) -> S::F {
    s.min(s.max(q, s.splat(0.0)), s.splat(Q4_MAX))
}

/// The scale and the minimum of every lane.
#[inline(always)]
fn q4_scales<S: Simd>(s: S, values: &Values) -> ([f16; LANES], [f16; LANES]) {
    let zero = s.splat(0.0);
    let (mut low, mut high, mut poison) = (s.load(&values[0]), s.load(&values[0]), zero);
    for x in values {
        let x = s.load(x);
        low = s.min(x, low);
        high = s.max(x, high);
        poison = s.fma(zero, x, poison);
    }
    let step = s.div(s.sub(high, low), s.splat(Q4_MAX));
    let mut inverse = to_array(s, step);
    for x in &mut inverse {
        *x = if *x > Q4_STEP_MIN { 1.0 / *x } else { 0.0 };
    }
    let best = best_line(s, &in_steps(s, values, low, s.load(&inverse)));
    // NaN in the lanes that have no scale.
    let scale = to_array(s, s.add(s.mul(best.scale, step), poison));
    let min = to_array(s, s.fma(best.min, step, low));
    let mut scales = [f16::NAN; LANES];
    let mut minima = [f16::ZERO; LANES];
    for i in 0..LANES {
        let (scale, min) = (f16::from_f32(scale[i]), f16::from_f32(min[i]));
        if scale.is_finite() && min.is_finite() {
            (scales[i], minima[i]) = (scale, min);
        }
    }
    (scales, minima)
}

#[inline(always)]
fn in_steps<S: Simd>(s: S, values: &Values, low: S::F, inverse: S::F) -> Values {
    let mut u = [[0.0; LANES]; BLOCK];
    for (u, x) in u.iter_mut().zip(values) {
        s.store(s.mul(s.sub(s.load(x), low), inverse), u);
    }
    u
}

/// `scale * q + min` of every lane, and what it gains.
#[derive(Clone, Copy)]
struct Fit<S: Simd> {
    scale: S::F,
    min: S::F,
    gain: S::F,
}

#[inline(always)]
fn best_line<S: Simd>(s: S, u: &Values) -> Fit<S> {
    let zero = s.splat(0.0);
    let mut sum_u = zero;
    for u in u {
        sum_u = s.add(sum_u, s.load(u));
    }
    let (mut scale, mut min, mut gain) = (zero, zero, zero);
    for trim_low in Q4_TRIMS {
        for trim_high in Q4_TRIMS {
            let slope = Q4_MAX / (Q4_MAX - trim_low - trim_high);
            let guess = (s.splat(slope), s.splat(-trim_low * slope));
            let tried = fit(s, u, sum_u, guess);
            scale = if_gains(s, (&tried, gain), tried.scale, scale);
            min = if_gains(s, (&tried, gain), tried.min, min);
            gain = s.max(tried.gain, gain);
        }
    }
    let mut slope = to_array(s, scale);
    for x in &mut slope {
        *x = inverse(*x);
    }
    let slope = s.load(&slope);
    fit(s, u, sum_u, (slope, s.mul(s.sub(zero, min), slope)))
}

/// `new` in the lanes where `tried` gains at least as much, else `old`; neither is ever -0.
#[inline(always)]
fn if_gains<S: Simd>(s: S, (tried, best): (&Fit<S>, S::F), new: S::F, old: S::F) -> S::F {
    let new = s.zero_below(tried.gain, best, new);
    let replaced = s.zero_below(tried.gain, best, old);
    s.add(new, s.sub(old, replaced))
}

/// The least-squares fit of `u` by the numbers nearest to `u * slope + offset`.
#[inline(always)]
fn fit<S: Simd>(s: S, u: &Values, sum_u: S::F, (slope, offset): (S::F, S::F)) -> Fit<S> {
    let count = s.splat(BLOCK as f32);
    let zero = s.splat(0.0);
    let (mut sum_q, mut sum_qq, mut sum_uq) = (zero, zero, zero);
    for u in u {
        let u = s.load(u);
        let q = s.round(q4_clamp(s, s.fma(u, slope, offset)));
        sum_q = s.add(sum_q, q);
        sum_qq = s.fma(q, q, sum_qq);
        sum_uq = s.fma(u, q, sum_uq);
    }
    let spread = s.sub(s.mul(count, sum_qq), s.mul(sum_q, sum_q));
    let scale = s.sub(s.mul(count, sum_uq), s.mul(sum_u, sum_q));
    // The spread is a whole number, and 0 where all numbers are equal.
    let one = s.splat(1.0);
    let scale = s.zero_below(spread, one, s.div(scale, s.max(spread, one)));
    // A power of two: as exact as the division.
    let min = s.mul(
        s.sub(sum_u, s.mul(scale, sum_q)),
        s.splat(1.0 / BLOCK as f32),
    );
    let gain = s.fma(scale, sum_uq, s.mul(min, sum_u));
    Fit { scale, min, gain }
}

#[inline(always)]
fn to_array<S: Simd>(s: S, x: S::F) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    s.store(x, &mut lanes);
    lanes
}

#[inline(always)]
fn to_f32(x: &[f16; LANES]) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    for (lane, x) in lanes.iter_mut().zip(x) {
        *lane = x.to_f32();
    }
    lanes
}

/// One over each scale, and 0 for 0.
#[inline(always)]
fn inverses<S: Simd>(s: S, scales: &[f16; LANES]) -> S::F {
    let mut lanes = to_f32(scales);
    for x in &mut lanes {
        *x = inverse(*x);
    }
    s.load(&lanes)
}

#[inline(always)]
fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use tramontane_compute::RowOrder;
    use tramontane_compute::quant::{q4_weights, q8_weights};

    use super::*;
    use crate::isa::{Dispatch, Isa};
    use crate::kernels::quantise::padded_block;
    use crate::kernels::tests::{noise, packed};
    use crate::memory::Slab;
    use crate::pack::{PackedMatrix, Packing};

    /// The four bytes of column `4 word..4 word + 4` of a row in a panel of 8 lines.
    fn quad(lines: &[Line], lane: usize, word: usize) -> [u8; 4] {
        *lines[word].0[4 * lane..].first_chunk().unwrap()
    }

    fn half_at(line: &Line, row: usize) -> f16 {
        f16::from_le_bytes([line.0[2 * row], line.0[2 * row + 1]])
    }

    /// Compares the bytes of a packed matrix with those of the specification, block by block.
    fn check(matrix: &PackedMatrix, values: &[Vec<f32>], what: &str) {
        let format = matrix.format();
        let panel_lines = format.panel_lines();
        for (r, values) in values.iter().enumerate() {
            let (row, lane) = (r % PAIR_ROWS, r % LANES);
            let blocks = matrix
                .pair(r / PAIR_ROWS)
                .chunks_exact(format.block_lines());
            for (values, lines) in values.chunks(BLOCK).zip(blocks) {
                let values = padded_block(values);
                let (weights, scales) = lines.split_at(2 * panel_lines);
                let panel = &weights[row / LANES * panel_lines..][..panel_lines];
                match format {
                    PackFormat::Bf16 => {
                        for (k, x) in values.iter().enumerate() {
                            let got = quad(panel, lane, k / 2);
                            let got = &got[2 * (k % 2)..2 * (k % 2) + 2];
                            assert_eq!(got, bf16::from_f32(*x).to_le_bytes(), "{what} row {r}");
                        }
                    }
                    PackFormat::Q8 => {
                        let Q8Block { q, scale } = q8_weights(&values);
                        let got = std::array::from_fn(|k| quad(panel, lane, k / 4)[k % 4] as i8);
                        assert_eq!(got, q, "{what} row {r}");
                        let got = half_at(&scales[0], row);
                        assert_eq!(got.to_bits(), scale.to_bits(), "{what} row {r}");
                    }
                    PackFormat::Q4 => {
                        let Q4Block { q, scale, min } = q4_weights(&values);
                        let got = std::array::from_fn(|k| {
                            let byte = quad(panel, lane, k % 16 / 4)[k % 4];
                            if k < 16 { byte & 15 } else { byte >> 4 }
                        });
                        assert_eq!(got, q, "{what} row {r}");
                        let got = [&scales[0], &scales[1]].map(|line| half_at(line, row).to_bits());
                        assert_eq!(got, [scale.to_bits(), min.to_bits()], "{what} row {r}");
                    }
                }
            }
        }
    }

    fn dispatches() -> Vec<(Isa, Dispatch)> {
        let all = Isa::ALL.into_iter();
        all.filter_map(|isa| Some((isa, isa.dispatch()?))).collect()
    }

    const FORMATS: [PackFormat; 3] = [PackFormat::Bf16, PackFormat::Q8, PackFormat::Q4];

    #[test]
    fn packed_weights_are_those_of_the_specification() {
        for (rows, cols) in [(1, 1), (5, 31), (33, 33), (64, 300), (40, 1100)] {
            let values: Vec<Vec<f32>> = (0..rows)
                .map(|r| {
                    let scale = [1.0, 0.03, 1e-6, 3e4][r % 4];
                    let row = noise(r as u64, cols).into_iter();
                    row.map(|x| x * x * x * scale).collect()
                })
                .collect();
            for format in FORMATS {
                for (isa, dispatch) in dispatches() {
                    let matrix = packed(dispatch, format, &values);
                    check(&matrix, &values, &format!("{isa} {format:?} {rows}x{cols}"));
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_or_has_no_scale_is_packed_as_the_specification_says() {
        for poison in [
            f32::NAN,
            f32::from_bits(0xff80_0001),
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::MAX,
            -65_600.0 * 127.0,
            65_600.0 * 15.0,
            -65_600.0,
            1e-40,
        ] {
            let mut values: Vec<Vec<f32>> = (0..20).map(|r| noise(r, 70)).collect();
            for (row, at) in [(0, 0), (1, 31), (4, 40), (17, 69)] {
                values[row][at] = poison;
            }
            values[7].fill(poison);
            values[8].fill(0.25);
            for format in [PackFormat::Q8, PackFormat::Q4] {
                for (isa, dispatch) in dispatches() {
                    let matrix = packed(dispatch, format, &values);
                    check(&matrix, &values, &format!("{isa} {format:?} {poison}"));
                }
            }
        }
    }

    #[test]
    fn columns_of_a_tensor_of_any_type_are_packed_alike() {
        let (rows, cols, begin) = (18, 352, 32);
        let numbers: Vec<f32> = noise(5, rows * cols)
            .into_iter()
            .map(|x| bf16::from_f32((x * 64.0).round() / 64.0).to_f32())
            .collect();
        let as_bytes = |dtype| -> Vec<u8> {
            let bytes = numbers.iter().map(|&x| match dtype {
                DType::Bf16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                _ => x.to_le_bytes().to_vec(),
            });
            bytes.flatten().collect()
        };
        let expected: Vec<Vec<f32>> = numbers
            .chunks_exact(cols)
            .map(|row| row[begin..begin + 300].to_vec())
            .collect();
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            // Not aligned, as in a file.
            let data = [vec![0], as_bytes(dtype)].concat();
            let tensor = HostTensor {
                dtype,
                rows,
                cols,
                order: Default::default(),
                data: &data[1..],
            };
            let source = |row| {
                let col = begin;
                Some(RowSource { tensor, row, col })
            };
            for format in FORMATS {
                for (isa, dispatch) in dispatches() {
                    let packing = Packing {
                        dispatch,
                        format,
                        rows,
                        cols: 300,
                        source: &source,
                    };
                    let matrix = packing.run(&Slab::new()).unwrap();
                    check(&matrix, &expected, &format!("{isa} {format:?} {dtype:?}"));
                }
            }
        }
    }

    /// 18 rows of two blocks as they lie in a GGUF file: noise, but for the scales.
    fn gguf_rows(dtype: DType) -> Vec<u8> {
        let len = dtype.block_bytes();
        let mut bytes: Vec<u8> = noise(9, 36 * len)
            .iter()
            .map(|x| (x * 127.0) as i8 as u8)
            .collect();
        for (i, block) in bytes.chunks_exact_mut(len).enumerate() {
            block[..2].copy_from_slice(&f16::from_f32(0.01 + i as f32 * 0.001).to_le_bytes());
            if dtype == DType::Q4_1 {
                block[2..4].copy_from_slice(&f16::from_f32(-0.3).to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn stored_blocks_are_copied_and_what_q8_does_not_know_is_rounded() {
        for (dtype, format) in [
            (DType::Q8_0, PackFormat::Q8),
            (DType::Q4_0, PackFormat::Q4),
            (DType::Q4_1, PackFormat::Q4),
        ] {
            let mut data = gguf_rows(dtype);
            if dtype == DType::Q8_0 {
                // Row 3, block 1.
                data[7 * dtype.block_bytes() + 2] = 0x80;
            }
            let tensor = HostTensor {
                dtype,
                rows: 18,
                cols: 64,
                order: RowOrder::Plain,
                data: &data,
            };
            let source = |row| {
                Some(RowSource {
                    tensor,
                    row,
                    col: 0,
                })
            };
            for (isa, dispatch) in dispatches() {
                let packing = Packing {
                    dispatch,
                    format,
                    rows: 18,
                    cols: 64,
                    source: &source,
                };
                let matrix = packing.run(&Slab::new()).unwrap();
                for (r, b) in (0..18).flat_map(|r| [(r, 0), (r, 1)]) {
                    let lines = matrix
                        .pair(0)
                        .chunks_exact(format.block_lines())
                        .nth(b)
                        .unwrap();
                    let mut values = [0.0; BLOCK];
                    tensor.read_row(r, b * BLOCK, &mut values);
                    let rounded = format == PackFormat::Q8 && (r, b) == (3, 1);
                    let half = if rounded {
                        q8_weights(&values).scale.to_f32() / 2.0
                    } else {
                        0.0
                    };
                    for (got, x) in unpacked(format, lines, r).iter().zip(values) {
                        assert!(
                            (got - x).abs() <= half,
                            "{isa} {dtype:?} row {r}: {got} {x}"
                        );
                    }
                }
            }
        }
    }

    /// The values of a row of a block of a pair.
    fn unpacked(format: PackFormat, lines: &[Line], row: usize) -> [f32; BLOCK] {
        let len = format.panel_lines();
        let (weights, scales) = lines.split_at(2 * len);
        let panel = &weights[row / LANES * len..][..len];
        let scale = half_at(&scales[0], row).to_f32();
        std::array::from_fn(|k| {
            let byte = quad(panel, row % LANES, k % (4 * len) / 4)[k % 4];
            match format {
                PackFormat::Q4 => {
                    let q = if k < 16 { byte & 15 } else { byte >> 4 };
                    f32::from(q) * scale + half_at(&scales[1], row).to_f32()
                }
                _ => f32::from(byte as i8) * scale,
            }
        })
    }
}
