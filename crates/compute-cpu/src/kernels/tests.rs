//! Every kernel on every instruction set against the scalar one, and the scalar one against plain formulas.

use half::{bf16, f16};
use tramontane_compute::quant::{BLOCK, q4_weights, q8_row, q8_row_bytes, q8_weights};
use tramontane_compute::{RowFormat, WeightFormat};

use crate::isa::{Dispatch, Isa};
use crate::kernels::norm::{Dot, RmsNorm, Rotate, Softmax};
use crate::kernels::quantise::{
    QuantiseBlock, QuantiseToWire, QuantiseWeights, WeightBlock, padded_block,
};
use crate::kernels::swiglu::SwiGlu;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileRow};
use crate::pack::{PAIR_ROWS, PackFormat, PackedMatrix, packed_bytes};
use crate::rows::Rows;
use crate::simd::{LANES, Operation, Simd, exp};

const SCALAR: Dispatch = Dispatch::Scalar(crate::scalar::Scalar);

fn supported() -> impl Iterator<Item = (Isa, Dispatch)> {
    Isa::ALL.into_iter().filter_map(|isa| {
        let dispatch = isa.dispatch();
        if dispatch.is_none() {
            println!("skipped: this machine lacks {isa}");
        }
        dispatch.map(|dispatch| (isa, dispatch))
    })
}

/// Numbers in -1..1, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

struct Exp<'a>(&'a [f32], &'a mut [f32]);

impl Operation for Exp<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (x, _) = self.0.as_chunks::<LANES>();
        let (y, _) = self.1.as_chunks_mut::<LANES>();
        for (x, y) in x.iter().zip(y) {
            s.store(exp(s, s.load(x)), y);
        }
    }
}

#[test]
fn exp_is_accurate_and_the_same_everywhere() {
    let mut x: Vec<f32> = (0..17_600).map(|i| (i as f32 - 8_800.0) * 0.0099).collect();
    x.extend([
        0.0,
        -0.0,
        88.5,
        1e30,
        -88.0,
        -1e30,
        f32::NEG_INFINITY,
        1e-30,
    ]);
    x.resize(x.len().next_multiple_of(LANES), -1.0);
    let mut expected = vec![0.0; x.len()];
    SCALAR.run(Exp(&x, &mut expected));
    for (&x, &y) in x.iter().zip(&expected) {
        let exact = f64::from(x.min(88.0)).exp();
        if x < -87.3 {
            assert_eq!(y, 0.0, "exp({x})");
            continue;
        }
        let error = (f64::from(y) - exact).abs() / exact;
        assert!(
            error < 2.0 * f64::from(f32::EPSILON),
            "exp({x}) = {y}, {error:e}"
        );
    }
    for (isa, dispatch) in supported() {
        let mut y = vec![0.0; x.len()];
        dispatch.run(Exp(&x, &mut y));
        assert_eq!(bits(&y), bits(&expected), "{isa}");
    }
}

#[test]
fn the_activation_of_an_expert_is_silu_times_up() {
    for (isa, dispatch) in supported() {
        for seed in 0..50 {
            let x = noise(seed, 2 * LANES);
            let mut gate_up = TileRow::default();
            gate_up.as_flattened_mut().copy_from_slice(&x);
            for x in &mut gate_up[0] {
                *x *= 30.0;
            }
            let (mut y, mut expected) = ([0.0; LANES], [0.0; LANES]);
            dispatch.run(SwiGlu {
                gate_up: &gate_up,
                out: &mut y,
            });
            SCALAR.run(SwiGlu {
                gate_up: &gate_up,
                out: &mut expected,
            });
            assert_eq!(bits(&y), bits(&expected), "{isa}");
            for i in 0..LANES {
                let (g, u) = (f64::from(gate_up[0][i]), f64::from(gate_up[1][i]));
                let exact = g / (1.0 + (-g).exp()) * u;
                let error = (f64::from(y[i]) - exact).abs();
                assert!(error <= exact.abs() * 1e-6, "{g} {u}: {} {exact}", y[i]);
            }
        }
    }
}

#[test]
fn row_wise_kernels_are_right_and_the_same_everywhere() {
    for len in [1, 2, 15, 16, 17, 33, 80, 1024, 1027] {
        let x = noise(len as u64, len);
        let weight = noise(7, len);
        let dot: f64 = x.iter().zip(&weight).map(|(a, b)| f64::from(a * b)).sum();
        let square: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let inverse = 1.0 / (square / len as f64 + 1e-5).sqrt();
        let run = |dispatch: Dispatch| {
            let mut normed = vec![0.0; len];
            dispatch.run(RmsNorm {
                x: &x,
                weight: &weight,
                eps: 1e-5,
                out: &mut normed,
            });
            let dot = dispatch.run(Dot { a: &x, b: &weight });
            let mut p = x.clone();
            dispatch.run(Softmax { x: &mut p });
            (normed, dot, p)
        };
        let (normed, got_dot, p) = run(SCALAR);
        for i in 0..len {
            let exact = f64::from(x[i]) * inverse * f64::from(weight[i]);
            assert!((f64::from(normed[i]) - exact).abs() < 1e-5, "norm {len}");
        }
        assert!((f64::from(got_dot) - dot).abs() < 1e-4, "dot {len}");
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "softmax {len}");
        let ratio = (p[0] / p[len - 1]).ln();
        assert!((ratio - (x[0] - x[len - 1])).abs() < 1e-5, "softmax {len}");
        for (isa, dispatch) in supported() {
            let got = run(dispatch);
            assert_eq!(bits(&got.0), bits(&normed), "{isa} {len}");
            assert_eq!(got.1.to_bits(), got_dot.to_bits(), "{isa} {len}");
            assert_eq!(bits(&got.2), bits(&p), "{isa} {len}");
        }
    }
}

#[test]
fn a_rotation_turns_pairs_half_a_head_apart() {
    for (isa, dispatch) in supported() {
        for half in [1, 8, 12, 32, 64] {
            let head = noise(half as u64, 2 * half);
            let angles: Vec<f32> = (0..half).map(|i| i as f32 * 0.3).collect();
            let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
            let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
            let mut got = head.clone();
            dispatch.run(Rotate {
                head: &mut got,
                cos: &cos,
                sin: &sin,
            });
            for i in 0..half {
                let (x, y) = (head[i], head[i + half]);
                assert_eq!(got[i], x * cos[i] - y * sin[i], "{isa} {half}");
                assert_eq!(got[i + half], y * cos[i] + x * sin[i], "{isa} {half}");
            }
        }
    }
}

#[test]
fn quantisation_has_the_bits_of_the_specification() {
    for (isa, dispatch) in supported() {
        for len in [1, 31, 32, 33, 80, 1000] {
            let mut x = noise(len as u64, len);
            x[0] = -x[0];
            let mut expected = vec![0; q8_row_bytes(len)];
            q8_row(&x, &mut expected);
            let mut wire = vec![9; expected.len()];
            dispatch.run(QuantiseToWire {
                format: RowFormat::Q8,
                values: &x,
                out: &mut wire,
            });
            assert_eq!(wire, expected, "{isa} {len}");

            let mut from_wire = Rows::new(RowFormat::Q8, len);
            from_wire.reserve(1);
            // SAFETY: one thread.
            unsafe { from_wire.writer().copy_wire(0, &wire) };
            let direct = quantised(dispatch, RowFormat::Q8, len, std::slice::from_ref(&x));
            let blocks = len.div_ceil(BLOCK);
            let (a, b) = (from_wire.row(0, 0, blocks), direct.row(0, 0, blocks));
            assert_eq!((a.words, a.sums), (b.words, b.sums), "{isa} {len}");
            assert_eq!(bits(a.scales), bits(b.scales), "{isa} {len}");

            let mut wire = vec![9; 2 * len];
            dispatch.run(QuantiseToWire {
                format: RowFormat::Bf16,
                values: &x,
                out: &mut wire,
            });
            let expected: Vec<u8> = x
                .iter()
                .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
                .collect();
            assert_eq!(wire, expected, "{isa} {len}");
        }
        for seed in 0..100 {
            let values = *noise(seed, BLOCK).first_chunk::<BLOCK>().unwrap();
            let values = values.map(|x| x * (seed as f32 * 0.02 - 1.0));
            let (q, scale) = q8_weights(&values);
            let got = dispatch.run(QuantiseWeights {
                values: &values,
                is_q4: false,
            });
            assert_eq!(got, WeightBlock { q, scale }, "{isa}");
        }
    }
}

#[test]
fn a_block_that_is_not_finite_has_scale_nan_and_no_numbers() {
    for (isa, dispatch) in supported() {
        for poison in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 5, 16, 31] {
                let mut values = *noise(7, BLOCK).first_chunk::<BLOCK>().unwrap();
                values[at] = poison;
                let what = format!("{isa} {poison} at {at}");
                for is_q4 in [false, true] {
                    let got = dispatch.run(QuantiseWeights {
                        values: &values,
                        is_q4,
                    });
                    assert!(got.scale.is_nan() && got.q == [0; BLOCK], "{what}");
                }
                let mut wire = [9; BLOCK + 4];
                dispatch.run(QuantiseToWire {
                    format: RowFormat::Q8,
                    values: &values,
                    out: &mut wire,
                });
                let (q, scale) = wire.split_first_chunk::<BLOCK>().unwrap();
                assert_eq!(q, &[0; BLOCK], "{what}");
                let scale = f32::from_le_bytes(scale.try_into().unwrap());
                assert!(scale.is_nan(), "{what}");
                for format in [PackFormat::Bf16, PackFormat::Q8, PackFormat::Q4] {
                    check_poison(dispatch, format, &values);
                }
            }
        }
        let mut large = [0.5; BLOCK];
        large[4] = -65_600.0 * 127.0;
        for is_q4 in [false, true] {
            let values = &large;
            let got = dispatch.run(QuantiseWeights { values, is_q4 });
            assert!(got.scale.is_nan() && got.q == [0; BLOCK], "{isa}");
        }
    }
}

/// A product is NaN, or at least not finite, with `poisoned` as its row and as its weights.
fn check_poison(dispatch: Dispatch, format: PackFormat, poisoned: &[f32; BLOCK]) {
    let fine = noise(3, BLOCK);
    for (weights, row) in [(&fine[..], &poisoned[..]), (&poisoned[..], &fine[..])] {
        let matrix = PackedMatrix::pack(dispatch, format, (1, BLOCK), |_, out| {
            out.copy_from_slice(weights);
        });
        let x = quantised(dispatch, row_format(format), BLOCK, &[row.to_vec()]);
        let mut out = [TileRow::default(); TILE_ROWS_MAX];
        dispatch.run(Tile {
            matrix: &matrix,
            pair: 0,
            rows: &x,
            block_begin: 0,
            ids: &[0],
            out: &mut out,
        });
        assert!(!out[0][0][0].is_finite(), "{format:?} {:?}", out[0][0][0]);
    }
}

fn quantised(dispatch: Dispatch, format: RowFormat, cols: usize, values: &[Vec<f32>]) -> Rows {
    let mut rows = Rows::new(format, cols);
    rows.reserve(values.len());
    let writer = rows.writer();
    for (row, values) in values.iter().enumerate() {
        for (i, values) in values.chunks(BLOCK).enumerate() {
            dispatch.run(QuantiseBlock {
                format,
                values: &padded_block(values),
                // SAFETY: one thread.
                out: unsafe { writer.block(row, i) },
            });
        }
    }
    rows
}

/// One output by the formula of `compute::quant`, from the numbers and not from a packed layout.
fn plain_product(format: PackFormat, weights: &[f32], row: &[f32]) -> f32 {
    let mut acc = 0.0_f32;
    for (w, x) in weights.chunks(BLOCK).zip(row.chunks(BLOCK)) {
        let (w, x) = (padded_block(w), padded_block(x));
        if format == PackFormat::Bf16 {
            for (w, x) in w.iter().zip(x) {
                acc = bf16::from_f32(*w)
                    .to_f32()
                    .mul_add(bf16::from_f32(x).to_f32(), acc);
            }
            continue;
        }
        let (q, scale): (Vec<i32>, f16) = if format == PackFormat::Q8 {
            let (q, d) = q8_weights(&w);
            (q.iter().map(|&q| i32::from(q)).collect(), d)
        } else {
            let (q, d) = q4_weights(&w);
            (q.iter().map(|&q| i32::from(q) - 8).collect(), d)
        };
        let mut packed = [0; q8_row_bytes(BLOCK)];
        q8_row(&x, &mut packed);
        let (x, d) = packed.split_at(BLOCK);
        let d = f32::from_le_bytes([d[0], d[1], d[2], d[3]]);
        let isum: i32 = q.iter().zip(x).map(|(q, &x)| q * i32::from(x as i8)).sum();
        acc = (isum as f32).mul_add(d * scale.to_f32(), acc);
    }
    acc
}

fn row_format(format: PackFormat) -> RowFormat {
    match format {
        PackFormat::Bf16 => RowFormat::Bf16,
        PackFormat::Q8 | PackFormat::Q4 => RowFormat::Q8,
    }
}

#[test]
fn every_tile_has_the_bits_of_the_plain_formula() {
    let shapes = [
        (1, 1),
        (5, 31),
        (16, 32),
        (17, 33),
        (32, 64),
        (40, 100),
        (70, 448),
    ];
    for (rows, cols) in shapes {
        let weights: Vec<Vec<f32>> = (0..rows).map(|r| noise(100 + r as u64, cols)).collect();
        let inputs: Vec<Vec<f32>> = (0..7).map(|r| noise(900 + r, cols)).collect();
        for format in [PackFormat::Bf16, PackFormat::Q8, PackFormat::Q4] {
            for (isa, dispatch) in supported() {
                let what = format!("{isa} {format:?} {rows}x{cols}");
                let matrix = PackedMatrix::pack(dispatch, format, (rows, cols), |row, out| {
                    out.copy_from_slice(&weights[row]);
                });
                assert_eq!(matrix.bytes(), packed_bytes(format, rows, cols), "{what}");
                let x = quantised(dispatch, row_format(format), cols, &inputs);
                for num_ids in 1..=dispatch.tile_rows() {
                    // Not in order, and one row twice.
                    let ids: Vec<u32> = (0..num_ids).map(|i| (5 * i as u32 + 3) % 7).collect();
                    check_tile(dispatch, &matrix, &x, &ids, |row, id| {
                        plain_product(format, &weights[row], &inputs[id as usize])
                    });
                }
            }
        }
    }
}

fn check_tile(
    dispatch: Dispatch,
    matrix: &PackedMatrix,
    x: &Rows,
    ids: &[u32],
    expected: impl Fn(usize, u32) -> f32,
) {
    for pair in 0..matrix.pairs() {
        let mut out = [TileRow::default(); TILE_ROWS_MAX];
        dispatch.run(Tile {
            matrix,
            pair,
            rows: x,
            block_begin: 0,
            ids,
            out: &mut out,
        });
        for (tile_row, &id) in out.iter().zip(ids) {
            for (i, &got) in tile_row.as_flattened().iter().enumerate() {
                let row = pair * PAIR_ROWS + i;
                if row >= matrix.rows() {
                    assert_eq!(got, 0.0, "padding");
                    continue;
                }
                let expected = expected(row, id);
                if matrix.format() == PackFormat::Bf16 && dispatch.has_bf16_dot() {
                    assert!((got - expected).abs() < 2e-5, "{got} {expected}");
                } else {
                    assert_eq!(got.to_bits(), expected.to_bits(), "{got} {expected}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_in_every_tile() {
    let (rows, cols) = (32, 256);
    let inputs: Vec<Vec<f32>> = (0..6).map(|r| noise(r, cols)).collect();
    for format in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
        let format = PackFormat::try_from(format).unwrap();
        for (isa, dispatch) in supported() {
            let matrix = PackedMatrix::pack(dispatch, format, (rows, cols), |row, out| {
                out.copy_from_slice(&noise(50 + row as u64, cols));
            });
            let x = quantised(dispatch, row_format(format), cols, &inputs);
            let run = |ids: &[u32]| {
                let mut out = [TileRow::default(); TILE_ROWS_MAX];
                dispatch.run(Tile {
                    matrix: &matrix,
                    pair: 0,
                    rows: &x,
                    block_begin: 0,
                    ids,
                    out: &mut out,
                });
                out
            };
            let alone = run(&[0])[0];
            for num_ids in 2..=dispatch.tile_rows() as u32 {
                let ids: Vec<u32> = (0..num_ids).rev().collect();
                let together = run(&ids)[num_ids as usize - 1];
                assert_eq!(alone, together, "{isa} {format:?} {num_ids}");
            }
        }
    }
}
