//! Rounding of rows on every instruction set: the bits of the specification, and what becomes of numbers that are none.

use half::{bf16, f16};
use tramontane_compute::RowFormat;
use tramontane_compute::quant::{BLOCK, q8_row, q8_row_bytes};

use super::{bits, noise, packed, quantised, row_format, supported, tile};
use crate::isa::Dispatch;
use crate::kernels::quantise::{QuantiseToWire, ToF16};
use crate::pack::PackFormat;
use crate::rows::Rows;

#[test]
fn quantisation_has_the_bits_of_the_specification() {
    for (isa, dispatch) in supported() {
        // The last one's scale is so small that its inverse is infinite, with numbers of both signs.
        for len in [1, 31, 32, 33, 80, 1000, 64] {
            let mut x = noise(len as u64, len);
            if len == 64 {
                x.iter_mut().for_each(|x| *x *= 1e-40);
            }
            // Alone in its block so small a number has a scale whose inverse overflows.
            x[0] *= if len == 1 { -1e-39 } else { -1.0 };
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
            let (a, b) = (
                from_wire.part(0, 1, 0, blocks),
                direct.part(0, 1, 0, blocks),
            );
            assert_eq!((a.words, a.offsets), (b.words, b.offsets), "{isa} {len}");
            assert_eq!(bits(a.scales), bits(b.scales), "{isa} {len}");
            assert_eq!(bits(a.sums), bits(b.sums), "{isa} {len}");

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
    }
}

#[test]
fn numbers_become_binary16_and_large_ones_its_largest() {
    let mut x = noise(5, 60);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= 2.0_f32.powi(i as i32 % 44 - 27);
    }
    x.extend([
        0.0,
        -0.0,
        65_519.0,
        65_520.0,
        -1e30,
        f32::INFINITY,
        f32::NAN,
    ]);
    for (isa, dispatch) in supported() {
        let got = std::sync::Mutex::new(vec![[0; 2]; x.len()]);
        dispatch.run(ToF16 {
            values: &x,
            out: |first: usize, halves: &[[u8; 2]]| {
                got.lock().unwrap()[first..][..halves.len()].copy_from_slice(halves);
            },
        });
        for (x, got) in x.iter().zip(got.into_inner().unwrap()) {
            let got = f16::from_le_bytes(got);
            if x.is_finite() {
                let expected = f16::from_f32(x.clamp(-65_504.0, 65_504.0));
                assert_eq!(got.to_bits(), expected.to_bits(), "{isa} {x}");
            } else {
                assert!(got.is_nan(), "{isa} {x}");
            }
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
    }
}

/// A product is NaN, or at least not finite, with `poisoned` as its row and as its weights.
fn check_poison(dispatch: Dispatch, format: PackFormat, poisoned: &[f32; BLOCK]) {
    let fine = noise(3, BLOCK);
    for (weights, row) in [(&fine[..], &poisoned[..]), (&poisoned[..], &fine[..])] {
        let matrix = packed(dispatch, format, &[weights.to_vec()]);
        let x = quantised(dispatch, row_format(format), BLOCK, &[row.to_vec()]);
        let out = tile(dispatch, &matrix, 0, &x, 1);
        assert!(!out[0][0][0].is_finite(), "{format:?} {:?}", out[0][0][0]);
    }
}
