//! The kernels alone, with logits that no model computes.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use tramontane_compute::sampling::best;
use tramontane_compute::{Choice, SampleError};
use tramontane_compute_cuda::device::{Args, Buffer, Device, Shape, Stream};

use crate::model::devices::devices;

/// As `kernels/README.md` has it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct Best {
    id: u32,
    logit: f32,
    bad_id: u32,
    zero: u32,
}

impl Best {
    fn choice(self) -> Choice {
        if self.bad_id != u32::MAX {
            let id = self.bad_id as usize;
            return Err(SampleError::NotFinite { id });
        }
        match self.logit > f32::NEG_INFINITY {
            true => Ok(self.id),
            false => Err(SampleError::NoCandidate),
        }
    }
}

/// Xorshift (Marsaglia, 2003).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

fn upload(device: &Arc<dyn Device>, stream: &Stream, bytes: &[u8]) -> Buffer {
    let buffer = Buffer::new(device, bytes.len()).unwrap();
    stream.write(&buffer, 0, bytes).unwrap();
    buffer
}

/// The best tokens of rows of logits, `[rows, vocab]`, with more blocks than rows.
#[expect(unsafe_code, reason = "what is queued is kept here until it is done")]
fn argmax(device: &Arc<dyn Device>, logits: &[f32], vocab: usize) -> Vec<Choice> {
    let rows = logits.len() / vocab;
    let stream = Stream::new(device).unwrap();
    let logits = upload(device, &stream, bytemuck::cast_slice(logits));
    let num_rows = upload(device, &stream, &(rows as u32).to_ne_bytes());
    let out = Buffer::new(device, rows * size_of::<Best>()).unwrap();
    stream.fill(&out, 0xA5).unwrap();
    let args = Args::new()
        .address(out.address())
        .address(logits.address())
        .address(num_rows.address())
        .size(vocab);
    let kernel = device.kernel("tr_argmax", 512).unwrap();
    // SAFETY: the arguments of the kernel; all of them live until the read below.
    unsafe { stream.launch(kernel, Shape::new(rows as u32 + 2, 1024, 512), args) }.unwrap();
    let mut told = vec![Best::zeroed(); rows];
    stream
        .read(&out, 0, bytemuck::cast_slice_mut(&mut told))
        .unwrap();
    told.into_iter().map(Best::choice).collect()
}

/// One row of so many logits: of few values, so that there are ties, with zeros of both signs, and now and then what a
/// model must not compute.
pub(super) fn row(random: &mut Random, vocab: usize) -> Vec<f32> {
    let infinity = f32::INFINITY;
    let kind = random.below(8);
    let values: &[f32] = match kind {
        0 => &[-0.0, 0.0, -1.0],
        1 => &[-infinity],
        2 => &[-infinity, f32::MIN, f32::MIN],
        3 => &[f32::MAX, f32::MIN_POSITIVE, 0.0],
        4 => &[1e-45, -1e-45, 0.0],
        _ => &[-3.5, 2.25, 2.25, 2.0, -infinity],
    };
    let mut row: Vec<f32> = (0..vocab)
        .map(|_| values[random.below(values.len() as u64) as usize])
        .collect();
    if kind >= 6 {
        for _ in 0..=random.below(3) {
            let bad = [f32::NAN, -f32::NAN, infinity][random.below(3) as usize];
            row[random.below(vocab as u64) as usize] = bad;
        }
    }
    row
}

#[test]
fn the_best_token_is_that_of_the_host_whatever_the_logits() {
    let mut random = Random(0x5DEE_CE66);
    for device in devices() {
        for vocab in [1, 2, 31, 75, 1023, 1024, 1025, 4099] {
            let rows: Vec<Vec<f32>> = (0..40).map(|_| row(&mut random, vocab)).collect();
            let got = argmax(&device, &rows.concat(), vocab);
            for (row, got) in rows.iter().zip(got) {
                assert_eq!(got, best(row), "{vocab} logits on {device:?}");
            }
        }
    }
}
