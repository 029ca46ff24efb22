//! The block types of GGUF files against what llama.cpp's own Python package makes of them, bit for bit.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

use std::fs;
use std::path::PathBuf;

use half::f16;
use tramontane_compute::quant::{BLOCK, q8_weights};
use tramontane_compute::{DType, HostTensor, RowOrder};

const COLS: usize = 512;
const TYPES: [(&str, DType); 8] = [
    ("Q8_0", DType::Q8_0),
    ("Q4_0", DType::Q4_0),
    ("Q4_1", DType::Q4_1),
    ("Q5_0", DType::Q5_0),
    ("Q5_1", DType::Q5_1),
    ("Q4_K", DType::Q4K),
    ("Q5_K", DType::Q5K),
    ("Q6_K", DType::Q6K),
];

/// Two rows of a type: the bytes, one byte off any alignment, and the numbers.
struct Golden {
    dtype: DType,
    bytes: Vec<u8>,
    numbers: Vec<f32>,
}

impl Golden {
    fn read((name, dtype): (&str, DType)) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/gguf");
        let file = fs::read(folder.join(format!("{name}.bin"))).unwrap();
        let (blocks, numbers) = file.split_at(2 * dtype.row_bytes(COLS).unwrap());
        let numbers = numbers.as_chunks().0.iter();
        let numbers: Vec<f32> = numbers.map(|b| f32::from_le_bytes(*b)).collect();
        assert_eq!(numbers.len(), 2 * COLS);
        Self {
            dtype,
            bytes: [&[0], blocks].concat(),
            numbers,
        }
    }

    fn tensor(&self) -> HostTensor<'_> {
        HostTensor {
            dtype: self.dtype,
            rows: 2,
            cols: COLS,
            order: RowOrder::Plain,
            data: &self.bytes[1..],
        }
    }

    fn block(&self, row: usize, block: usize) -> &[f32; BLOCK] {
        self.numbers[row * COLS + block * BLOCK..]
            .first_chunk()
            .unwrap()
    }
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_type_reads_the_numbers_of_the_reference() {
    for kind in TYPES {
        let golden = Golden::read(kind);
        let tensor = golden.tensor();
        assert_eq!(tensor.expected_bytes(), Some(tensor.data.len()));
        assert_eq!(bits(&tensor.to_f32()), bits(&golden.numbers), "{}", kind.0);
    }
}

#[test]
fn any_columns_of_a_row_are_read() {
    for kind in TYPES {
        let golden = Golden::read(kind);
        for (begin, len) in [
            (0, 1),
            (31, 2),
            (32, 32),
            (96, 300),
            (255, 3),
            (480, 40),
            (512, 4),
        ] {
            let mut out = vec![9.0; len];
            golden.tensor().read_row(1, begin, &mut out);
            let inside = len.min(COLS - begin);
            let expected = &golden.numbers[COLS + begin..][..inside];
            assert_eq!(bits(&out[..inside]), bits(expected), "{} {begin}", kind.0);
            assert!(out[inside..].iter().all(|x| *x == 0.0));
        }
    }
}

#[test]
fn blocks_are_those_of_the_file() {
    for kind in TYPES {
        let golden = Golden::read(kind);
        let tensor = golden.tensor();
        let mut seen = [0; 2];
        for (row, block) in (0..2).flat_map(|row| (0..COLS / BLOCK).map(move |b| (row, b))) {
            let expected = golden.block(row, block);
            if let Some(q8) = tensor.q8_block(row, block) {
                let numbers = q8.q.map(|q| f32::from(q) * q8.scale.to_f32());
                assert_eq!(bits(&numbers), bits(expected), "{}", kind.0);
                seen[0] += 1;
            }
            if let Some(q4) = tensor.q4_block(row, block) {
                let (scale, min) = (q4.scale.to_f32(), q4.min.to_f32());
                for (q, x) in q4.q.iter().zip(expected) {
                    assert!(*q < 16);
                    let got = scale.mul_add(f32::from(*q), min);
                    // Exact but for Q4_K, whose scale and minimum are rounded to f16 (and below its range to a step).
                    let limit = match golden.dtype {
                        DType::Q4K => {
                            let parts = (scale * 15.0).abs() + min.abs();
                            parts / 2048.0 + 16.0 * f16::MIN_POSITIVE_SUBNORMAL.to_f32()
                        }
                        _ => (x.abs() + (scale * 15.0).abs()) * f32::EPSILON,
                    };
                    assert!((got - x).abs() <= limit, "{}: {got} {x}", kind.0);
                }
                seen[1] += 1;
            }
        }
        let expected = match golden.dtype {
            DType::Q8_0 => seen[0] > 16 && seen[1] == 0,
            DType::Q4_0 | DType::Q4_1 | DType::Q4K => seen[0] == 0 && seen[1] > 16,
            _ => seen == [0, 0],
        };
        assert!(expected, "{} gave {seen:?} blocks", kind.0);
    }
}

/// Blocks that q8 itself made are made again from their numbers.
#[test]
fn quantising_the_numbers_of_a_q8_block_gives_the_block() {
    let golden = Golden::read(TYPES[0]);
    for block in 0..COLS / BLOCK {
        let stored = golden.tensor().q8_block(0, block).unwrap();
        assert_eq!(q8_weights(golden.block(0, block)), stored);
    }
}

#[test]
fn blocks_that_q8_and_q4_do_not_know_are_none() {
    fn tensor(dtype: DType, data: &[u8]) -> HostTensor<'_> {
        HostTensor {
            dtype,
            rows: 1,
            cols: BLOCK,
            order: RowOrder::Plain,
            data,
        }
    }
    let mut bytes = [1_u8; 34];
    assert!(tensor(DType::Q8_0, &bytes).q8_block(0, 0).is_some());
    assert!(tensor(DType::Q8_0, &bytes).q8_block(0, 1).is_none());
    assert!(tensor(DType::Q8_0, &bytes).q8_block(1, 0).is_none());
    bytes[9] = 128;
    assert!(tensor(DType::Q8_0, &bytes).q8_block(0, 0).is_none());
    bytes[..2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    assert!(tensor(DType::Q4_0, &bytes[..18]).q4_block(0, 0).is_none());
    // Eight steps below zero are no f16.
    bytes[..2].copy_from_slice(&f16::from_f32(9000.0).to_le_bytes());
    assert!(tensor(DType::Q4_0, &bytes[..18]).q4_block(0, 0).is_none());
}

#[test]
fn rows_in_rotary_pairs_come_back_in_order() {
    let data: Vec<u8> = (0..12_u8)
        .flat_map(|x| f32::from(x).to_le_bytes())
        .collect();
    let tensor = HostTensor {
        dtype: DType::F32,
        rows: 12,
        cols: 1,
        order: RowOrder::RotaryPairs { head_dim: 6 },
        data: &data,
    };
    // The heads hold rows 0 3 1 4 2 5 and 6 9 7 10 8 11.
    let expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11];
    assert_eq!(tensor.to_f32(), expected.map(|x: u8| f32::from(x)));
}
