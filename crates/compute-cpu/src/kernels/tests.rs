//! Every kernel on every instruction set against the scalar one, and the scalar one against plain formulas.

use half::bf16;
use tramontane_compute::quant::{
    BLOCK, Q4Block, Q8Block, q4_weights, q8_row, q8_row_bytes, q8_weights,
};
use tramontane_compute::{DType, HostTensor, RowFormat};

use crate::isa::{Dispatch, Isa};
use crate::kernels::norm::{Gate, RmsNorm, Rotate, Softmax};
use crate::kernels::pack::RowSource;
use crate::kernels::quantise::{QuantiseRow, padded_block};
use crate::kernels::swiglu::swiglu;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileRow};
use crate::memory::Slab;
use crate::pack::{PAIR_ROWS, PackFormat, PackedMatrix, Packing};
use crate::rows::Rows;
use crate::simd::{LANES, Operation, Simd, exp};

mod quantise;

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

struct SwiGlu<'a> {
    gate_up: &'a TileRow,
    out: &'a mut [f32; LANES],
}

impl Operation for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        s.store(swiglu(s, self.gate_up), self.out);
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
            let mut dots = [0.0; 9];
            dispatch.run(Gate {
                x: &x,
                weights: &weight.repeat(9),
                out: &mut dots,
            });
            assert_eq!(dots[0].to_bits(), dots[8].to_bits(), "alone and in a group");
            let dot = dots[0];
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
                heads: &mut got,
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

/// Rows of the same length as a matrix.
pub(crate) fn packed(dispatch: Dispatch, format: PackFormat, rows: &[Vec<f32>]) -> PackedMatrix {
    let bytes: Vec<u8> = rows
        .iter()
        .flatten()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    let tensor = HostTensor {
        dtype: DType::F32,
        rows: rows.len(),
        cols: rows[0].len(),
        order: Default::default(),
        data: &bytes,
    };
    let source = |row| {
        Some(RowSource {
            tensor,
            row,
            col: 0,
        })
    };
    let packing = Packing {
        dispatch,
        format,
        rows: tensor.rows,
        cols: tensor.cols,
        source: &source,
    };
    packing.run(&Slab::new()).unwrap()
}

fn quantised(dispatch: Dispatch, format: RowFormat, cols: usize, values: &[Vec<f32>]) -> Rows {
    let mut rows = Rows::new(format, cols);
    rows.reserve(values.len());
    let writer = rows.writer();
    for (row, values) in values.iter().enumerate() {
        dispatch.run(QuantiseRow {
            format,
            values,
            // SAFETY: one thread.
            out: |block| unsafe { writer.block(row, block) },
        });
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
        let (q, scale, min) = if format == PackFormat::Q8 {
            let Q8Block { q, scale } = q8_weights(&w);
            (q.map(i32::from), scale, None)
        } else {
            let Q4Block { q, scale, min } = q4_weights(&w);
            (q.map(i32::from), scale, Some(min))
        };
        let mut packed = [0; q8_row_bytes(BLOCK)];
        q8_row(&x, &mut packed);
        let (x, d) = packed.split_at(BLOCK);
        let d = f32::from_le_bytes([d[0], d[1], d[2], d[3]]);
        let isum: i32 = q.iter().zip(x).map(|(q, &x)| q * i32::from(x as i8)).sum();
        acc = (isum as f32).mul_add(d * scale.to_f32(), acc);
        if let Some(min) = min {
            let row_sum: i32 = x.iter().map(|&x| i32::from(x as i8)).sum();
            acc = min.to_f32().mul_add(d * row_sum as f32, acc);
        }
    }
    acc
}

fn row_format(format: PackFormat) -> RowFormat {
    match format {
        PackFormat::Bf16 => RowFormat::Bf16,
        PackFormat::Q8 | PackFormat::Q4 => RowFormat::Q8,
    }
}

/// The first rows of a table times one pair of panels.
fn tile(
    dispatch: Dispatch,
    matrix: &PackedMatrix,
    pair: usize,
    rows: &Rows,
    num_rows: usize,
) -> [TileRow; TILE_ROWS_MAX] {
    let mut out = [TileRow::default(); TILE_ROWS_MAX];
    dispatch.tile(Tile {
        matrix,
        pair,
        rows,
        row_begin: 0,
        num_rows,
        block_begin: 0,
        next: matrix.pair(pair + 1),
        out: &mut out,
    });
    out
}

/// One output of `cpu-bf16-amx`: the rounding of `TDPBF16PS`, see [`crate::amx`].
fn plain_matrix_unit(weights: &[f32], row: &[f32]) -> f32 {
    // A product sum that rounds to the smallest normal number from below is flushed by the unit and not
    // here: one in 2^24 of those that are so small.
    let flush = |x: f32| {
        if x.is_subnormal() {
            0.0_f32.copysign(x)
        } else {
            x
        }
    };
    let input = |x: f32| flush(bf16::from_f32(x).to_f32());
    let mut acc = 0.0_f32;
    for (w, x) in weights.chunks(BLOCK).zip(row.chunks(BLOCK)) {
        // The columns that are missing are zeros, which turn -0 into 0.
        let (w, x) = (padded_block(w), padded_block(x));
        let mut chains = [0.0_f32; 2];
        for (i, (&w, &x)) in w.iter().zip(&x).enumerate() {
            chains[i % 2] = flush(input(x).mul_add(input(w), chains[i % 2]));
        }
        acc = flush(acc + flush(chains[0] + chains[1]));
    }
    acc
}

/// Counts of rows on both sides of every tile's and group's edge.
const NUM_ROWS: [usize; 15] = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 32, 33, 48, 63];

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
        (33, 1056),
    ];
    for (rows, cols) in shapes {
        let weights: Vec<Vec<f32>> = (0..rows).map(|r| noise(100 + r as u64, cols)).collect();
        let inputs: Vec<Vec<f32>> = (0..63).map(|r| noise(900 + r, cols)).collect();
        for format in [PackFormat::Bf16, PackFormat::Q8, PackFormat::Q4] {
            check_tiles(format, &weights, &inputs);
        }
    }
}

#[test]
fn numbers_near_the_smallest_are_as_specified() {
    for (weight_exponent, input_exponent) in [(-63, -63), (-120, -5), (-127, 3), (3, -130)] {
        let scaled = |seed, exponent: i32| -> Vec<f32> {
            let scale = 2.0_f32.powi(exponent / 2) * 2.0_f32.powi(exponent - exponent / 2);
            noise(seed, 200).iter().map(|x| x * scale).collect()
        };
        let weights: Vec<Vec<f32>> = (0..32).map(|r| scaled(r, weight_exponent)).collect();
        let inputs: Vec<Vec<f32>> = (0..40).map(|r| scaled(99 + r, input_exponent)).collect();
        check_tiles(PackFormat::Bf16, &weights, &inputs);
    }
}

/// Checks all counts of rows on every instruction set.
fn check_tiles(format: PackFormat, weights: &[Vec<f32>], inputs: &[Vec<f32>]) {
    let cols = weights[0].len();
    let expected = |product: fn(PackFormat, &[f32], &[f32]) -> f32| -> Vec<Vec<f32>> {
        let of_input = |x: &Vec<f32>| weights.iter().map(|w| product(format, w, x)).collect();
        inputs.iter().map(of_input).collect()
    };
    let plain = expected(plain_product);
    let matrix_unit = expected(|_, w, x| plain_matrix_unit(w, x));
    for (isa, dispatch) in supported() {
        let matrix = packed(dispatch, format, weights);
        assert_eq!(matrix.rows(), weights.len());
        let x = quantised(dispatch, row_format(format), cols, inputs);
        for num_rows in NUM_ROWS.into_iter().filter(|n| *n <= inputs.len()) {
            for pair in 0..matrix.pairs() {
                let out = tile(dispatch, &matrix, pair, &x, num_rows);
                for (row, got) in out[..num_rows].iter().enumerate() {
                    let what = format!("{isa} {format:?} row {row} of {num_rows}, pair {pair}");
                    let begin = pair * PAIR_ROWS;
                    let end = matrix.rows().min(begin + PAIR_ROWS);
                    let (got, padding) = got.as_flattened().split_at(end - begin);
                    assert_eq!(padding, vec![0.0; padding.len()], "{what}");
                    if format != PackFormat::Bf16 || dispatch.bf16_class() == "cpu-bf16" {
                        assert_eq!(bits(got), bits(&plain[row][begin..end]), "{what}");
                    } else if isa == Isa::Amx {
                        assert_eq!(bits(got), bits(&matrix_unit[row][begin..end]), "{what}");
                    } else {
                        let alone = tile(dispatch, &matrix, pair, &x, 1);
                        assert!(row > 0 || got == &alone[0].as_flattened()[..got.len()]);
                        for (a, b) in got.iter().zip(&plain[row][begin..end]) {
                            assert!((a - b).abs() < 5e-5, "{what}: {a} {b}");
                        }
                    }
                }
            }
        }
    }
}
