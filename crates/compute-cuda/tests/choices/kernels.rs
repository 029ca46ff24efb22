//! The kernels alone, with logits that no model computes.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use tramontane_compute::sampling::{Multinomial, Scale, best, max, per_temperature};
use tramontane_compute::{Choice, SampleError, Wanted};
use tramontane_compute_cuda::Target;
use tramontane_compute_cuda::device::{Args, Buffer, Device, Shape, Stream};
use tramontane_compute_cuda::emulator::Emulator;

use crate::model::devices::{REQUIRE_GPU, devices, variable, work_dir};

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

/// As there.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Draw {
    per_temperature: f64,
    min_weight: f64,
    uniform: f64,
}

impl Draw {
    fn of(wanted: Wanted) -> Self {
        let Wanted::Drawn(draw) = wanted else {
            return Self::default();
        };
        Self {
            per_temperature: per_temperature(draw.temperature),
            min_weight: f64::from(draw.min_p),
            uniform: draw.uniform,
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

    /// In `[0, 1)`.
    fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

fn upload(device: &Arc<dyn Device>, stream: &Stream, bytes: &[u8]) -> Buffer {
    let buffer = Buffer::new(device, bytes.len()).unwrap();
    stream.write(&buffer, 0, bytes).unwrap();
    buffer
}

/// Rows of logits on a device, and what the kernels say of them. Outputs are poisoned first.
struct Rows {
    device: Arc<dyn Device>,
    stream: Stream,
    vocab: usize,
    logits: Buffer,
    num_rows: Buffer,
    best: Buffer,
    rows: u32,
}

impl Rows {
    fn new(device: &Arc<dyn Device>, logits: &[f32], vocab: usize) -> Self {
        let rows = logits.len() / vocab;
        let stream = Stream::new(device).unwrap();
        let best = Buffer::new(device, rows * size_of::<Best>()).unwrap();
        stream.fill(&best, 0xA5).unwrap();
        Self {
            logits: upload(device, &stream, bytemuck::cast_slice(logits)),
            num_rows: upload(device, &stream, &(rows as u32).to_ne_bytes()),
            device: Arc::clone(device),
            stream,
            vocab,
            best,
            rows: rows as u32,
        }
    }

    #[expect(unsafe_code, reason = "what is queued is kept here until it is done")]
    fn launch(&self, kernel: &'static str, shape: Shape, args: Args) {
        let kernel = self.device.kernel(kernel, shape.shared_bytes).unwrap();
        // SAFETY: the arguments of the kernel, which live as long as this; and it is waited for.
        unsafe { self.stream.launch(kernel, shape, args) }.unwrap();
        self.stream.synchronize().unwrap();
    }

    /// With more blocks than rows.
    fn argmax(&self) {
        let args = Args::new()
            .address(self.best.address())
            .address(self.logits.address())
            .address(self.num_rows.address())
            .size(self.vocab);
        self.launch("tr_argmax", Shape::new(self.rows + 2, 1024, 512), args);
    }

    /// Behind `argmax`: with so many blocks for the groups of a row.
    fn draw(&self, draws: &[Draw], blocks: u32) {
        let groups = self.vocab.div_ceil(1024);
        let sums = Buffer::new(&self.device, self.rows as usize * groups * 8).unwrap();
        self.stream.fill(&sums, 0xA5).unwrap();
        let draws = upload(&self.device, &self.stream, bytemuck::cast_slice(draws));
        let how = |args: Args| {
            let args = args
                .address(draws.address())
                .address(self.num_rows.address());
            args.size(groups).size(self.vocab)
        };
        let [sums, logits, best] = [&sums, &self.logits, &self.best].map(Buffer::address);
        let args = how(Args::new().address(sums).address(logits).address(best));
        let shape = Shape::grid2(self.rows + 1, blocks, 1024, 8_456);
        self.launch("tr_group_sums", shape, args);
        let args = how(Args::new().address(best).address(sums).address(logits));
        self.launch("tr_draw", Shape::new(self.rows + 1, 1024, 8_456), args);
    }

    fn told(&self) -> Vec<Choice> {
        let mut told = vec![Best::zeroed(); self.rows as usize];
        let bytes = bytemuck::cast_slice_mut(&mut told);
        self.stream.read(&self.best, 0, bytes).unwrap();
        told.into_iter().map(Best::choice).collect()
    }
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
    let mut row: Vec<f32> = (0..vocab).map(|_| random.one_of(values)).collect();
    if kind >= 6 {
        for _ in 0..=random.below(3) {
            let bad = random.one_of(&[f32::NAN, -f32::NAN, infinity]);
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
            let on_device = Rows::new(&device, &rows.concat(), vocab);
            on_device.argmax();
            for (row, got) in rows.iter().zip(on_device.told()) {
                assert_eq!(got, best(row), "{vocab} logits on {device:?}");
            }
        }
    }
}

/// A row as a model gives it, in one of many spreads, or with all weight on few tokens.
fn likely_row(random: &mut Random, vocab: usize) -> Vec<f32> {
    let infinity = f32::INFINITY;
    let spread = random.one_of(&[0.0, 1e-30, 0.1, 1.0, 5.0, 100.0, 1e30]);
    let mut row: Vec<f32> = (0..vocab)
        // A sum of four is bell-shaped enough.
        .map(|_| (0..4).map(|_| random.uniform() as f32 - 0.5).sum::<f32>() * spread)
        .collect();
    let mut fill = |value, times| {
        for _ in 0..times {
            row[random.below(vocab as u64) as usize] = value;
        }
    };
    match spread {
        1.0 => fill(-infinity, vocab),
        5.0 => fill(1e6, 2),
        1e30 => fill(f32::MAX, 1),
        _ => {}
    }
    row
}

/// A draw whose number lies at the edge of a token, or anywhere.
fn draw(random: &mut Random, row: &[f32]) -> Wanted {
    let temperature = random.one_of(&[1.0, 1.0, 0.7, 2.0, 0.01, 1e-6, 1e-30, 1e-45]);
    let min_p = random.one_of(&[0.0, 0.0, 1e-12, 0.05, 0.5, 1.0]);
    let largest = 1.0 - f64::EPSILON / 2.0;
    let uniform = match random.below(4) {
        0 => random.one_of(&[0.0, f64::MIN_POSITIVE, 0.5, largest]),
        1 => {
            let scale = Scale::new(max(row), temperature);
            let weights: Vec<f64> = row.iter().map(|&l| scale.weight(l)).collect();
            let until = random.below(row.len() as u64) as usize;
            let share = weights[..until].iter().sum::<f64>() / weights.iter().sum::<f64>();
            let share = random.one_of(&[share.next_down(), share, share.next_up()]);
            if share >= 0.0 {
                share.min(largest)
            } else {
                0.0
            }
        }
        _ => random.uniform(),
    };
    Wanted::Drawn(Multinomial {
        temperature,
        min_p,
        uniform,
    })
}

/// Thousands of rows, of which some want logits or their best token: those are left as `tr_argmax` has told them.
#[test]
fn a_draw_falls_on_the_token_of_the_host() {
    let mut random = Random(0x1234_5678_9ABC);
    let mut distinct = 0;
    for (vocab, num_rows) in [
        (1, 50),
        (33, 800),
        (75, 800),
        (1024, 400),
        (1025, 400),
        (4099, 250),
    ] {
        let rows: Vec<Vec<f32>> = (0..num_rows)
            .map(|i| match i % 16 {
                0 => row(&mut random, vocab),
                _ => likely_row(&mut random, vocab),
            })
            .collect();
        let wanted: Vec<Wanted> = rows
            .iter()
            .enumerate()
            .map(|(i, row)| match i % 11 {
                0 => Wanted::Best,
                _ if best(row).is_err() => Wanted::Drawn(Multinomial {
                    temperature: 1.0,
                    min_p: 0.0,
                    uniform: 0.5,
                }),
                _ => draw(&mut random, row),
            })
            .collect();
        let draws: Vec<Draw> = wanted.iter().copied().map(Draw::of).collect();
        for device in drawing_devices() {
            let on_device = Rows::new(&device, &rows.concat(), vocab);
            on_device.argmax();
            on_device.draw(&draws, 3);
            for ((row, wanted), got) in rows.iter().zip(&wanted).zip(on_device.told()) {
                let expected = wanted.choose(row).unwrap();
                assert_eq!(got, expected, "{wanted:?} of {vocab} on {device:?}");
                distinct += usize::from(got.is_ok() && got != best(row));
            }
        }
    }
    assert!(distinct > 700, "{distinct} draws are not the best token");
}

#[test]
fn the_order_of_warps_changes_no_draw() {
    if variable(REQUIRE_GPU).is_some() {
        println!("skipped: a GPU has an order of its own");
        return;
    }
    let mut random = Random(0xFEED);
    let vocab = 3001;
    let rows: Vec<Vec<f32>> = (0..20).map(|_| likely_row(&mut random, vocab)).collect();
    let wanted: Vec<Wanted> = rows.iter().map(|row| draw(&mut random, row)).collect();
    let draws: Vec<Draw> = wanted.iter().copied().map(Draw::of).collect();
    let expected: Vec<Choice> = wanted
        .iter()
        .zip(&rows)
        .filter_map(|(wanted, row)| wanted.choose(row))
        .collect();
    for seed in [1, 2, 77] {
        let emulator = Emulator::new(&work_dir().join("emulator"), Target::Sm90a).unwrap();
        emulator.set_seed(seed);
        let device: Arc<dyn Device> = emulator;
        for blocks in [1, 3, 9] {
            let on_device = Rows::new(&device, &rows.concat(), vocab);
            on_device.argmax();
            on_device.draw(&draws, blocks);
            assert_eq!(on_device.told(), expected, "seed {seed}, {blocks} blocks");
        }
    }
}

/// One emulator: it does the same for all targets here.
fn drawing_devices() -> Vec<Arc<dyn Device>> {
    let mut devices = devices();
    devices.drain(1..devices.len().min(2));
    devices
}
