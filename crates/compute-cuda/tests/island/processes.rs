//! Two ranks that are processes, as they are in production: on emulated devices, and on one GPU by NCCL. They have the bits
//! of one rank. A process that hangs or dies ends the test, which says what it was told.
//!
//! NCCL refuses two ranks of one device on one host. Each process says that it is a host of its own (`NCCL_HOSTID`), and the
//! ranks talk over the loopback interface.
#![expect(clippy::panic, reason = "a test may panic, its functions too")]

use std::io::{BufRead as _, BufReader};
use std::ops::Range;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tramontane_compute::{StepBatch, WeightFormat};
use tramontane_compute_cuda::device::{Device, DeviceError};
use tramontane_compute_cuda::{CudaBackend, Island, Lead, RankStep, Target};
use tramontane_types::ModelGeometry;

use super::Rank;
use crate::model::devices::{REQUIRE_GPU, emulator, gpu, variable};
use crate::model::{Checkpoint, Model, Prompt, bits, geometry};

/// Says to a process that it is a rank: its number, a space, the [`Case`], and behind rank 0 a space and the meeting in hex.
const RANK: &str = "TRAMONTANE_TEST_RANK";
const NUM_RANKS: u32 = 2;
/// How long a process may take for what it says next: to open a GPU, to load weights, to connect.
const SAY_MAX: Duration = Duration::from_secs(120);
/// How long it may take to end when it has said everything.
const END_MAX: Duration = Duration::from_secs(20);

/// What ranks compute on, and how wide a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Emulated,
    Gpu,
    /// Sums as long as those of real models, which tensor cores take in many steps.
    WideOnGpu,
}

impl Case {
    const ALL: [Self; 3] = [Self::Emulated, Self::Gpu, Self::WideOnGpu];

    fn named(name: &str) -> Self {
        let is_it = |case: &Self| format!("{case:?}") == name;
        Self::ALL.into_iter().find(is_it).unwrap()
    }

    fn geometry(self) -> ModelGeometry {
        match self {
            Self::Emulated | Self::Gpu => geometry(),
            Self::WideOnGpu => ModelGeometry {
                hidden: 1024,
                num_heads: 8,
                num_kv_heads: 2,
                head_dim: 128,
                ff: 2048,
                sliding_window: None,
                ..geometry()
            },
        }
    }

    fn device(self) -> Result<Arc<dyn Device>, String> {
        match self {
            Self::Emulated => Ok(emulator(Target::Sm80)),
            Self::Gpu | Self::WideOnGpu => {
                let gpu = gpu()?;
                // Without NCCL there is nowhere to meet.
                gpu.meeting().map_err(|error| error.to_string())?;
                Ok(gpu)
            }
        }
    }
}

/// Rows of the prompt that are a step.
struct Step {
    rows: Range<usize>,
    /// Computed by all ranks together; otherwise layer by layer at rank 0, and the others lack its pages.
    is_whole: bool,
    /// Pages that the others are sent before the step.
    pages: Option<Range<u32>>,
}

const fn whole(rows: Range<usize>) -> Step {
    Step {
        rows,
        is_whole: true,
        pages: None,
    }
}

/// A prompt's rows alone, then more rows than a graph has, then graphs of some sizes; the last two are the same graph again.
static STEPS: [Step; 7] = [
    Step {
        rows: 0..20,
        is_whole: false,
        pages: None,
    },
    Step {
        rows: 20..290,
        is_whole: true,
        // The prompt's first page, which is its last one by number.
        pages: Some(12..13),
    },
    whole(290..320),
    whole(320..337),
    whole(337..338),
    whole(338..339),
    whole(339..340),
];

fn prompt() -> Prompt {
    Prompt::new(1, 340, 7)
}

fn batch(rows: Range<usize>) -> StepBatch {
    let mut batch = StepBatch::default();
    prompt().add_to(&mut batch, rows, true);
    batch
}

/// Tells nobody: all ranks know the steps. What rank 0 thinks that the others lack must be what they know of.
#[derive(Debug, Default)]
struct Known(AtomicUsize);

impl Lead for Known {
    fn begin(&self, _epoch: u64, step: RankStep<'_>) -> Result<bool, DeviceError> {
        let nth = self.0.fetch_add(1, Ordering::Relaxed);
        let known = STEPS.iter().filter(|step| step.is_whole).nth(nth).unwrap();
        assert_eq!(
            step.pages,
            known.pages.as_slice(),
            "pages of step {:?}",
            known.rows
        );
        Ok(true)
    }

    fn end(&self, _epoch: u64, _result: Result<(), String>) {}
}

/// Computes the steps as one rank of a process; rank 0 prints the meeting and a digest of the logits.
#[test]
fn rank_process() {
    let Some(said) = variable(RANK) else {
        println!("skipped: no process of a rank");
        return;
    };
    let mut said = said.split(' ');
    let (rank, case) = (said.next().unwrap(), Case::named(said.next().unwrap()));
    let rank: u32 = rank.parse().unwrap();
    let device = case.device().unwrap();
    let meeting = match said.next() {
        Some(hex) => from_hex(hex),
        None => {
            let meeting = device.meeting().unwrap();
            let hex: String = meeting.iter().map(|b| format!("{b:02x}")).collect();
            println!("\nmeeting={hex}");
            meeting
        }
    };
    let geometry = case.geometry();
    let checkpoint = Checkpoint::new(geometry.clone());
    let ours = Rank::new(&device, &geometry, (rank, NUM_RANKS));
    if rank == 0 {
        lead(&ours, &checkpoint, &device, &meeting);
    } else {
        follow(&ours, &checkpoint, &device, &meeting, rank);
    }
    println!("\nended={rank}");
}

fn from_hex(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks(2);
    let byte = |d: &[u8]| u8::from_str_radix(std::str::from_utf8(d).unwrap(), 16).unwrap();
    digits.map(byte).collect()
}

fn lead(ours: &Rank, checkpoint: &Checkpoint, device: &Arc<dyn Device>, meeting: &[u8]) {
    // Own segments first: whole steps are computed with those. The others are for steps layer by layer.
    let cuts = [0, ours.segments.end(), 8];
    let mut model = Model::new(checkpoint, &ours.backend, &cuts);
    let collective = device.meet(meeting, 0, NUM_RANKS).unwrap();
    let island = Island::new(1, collective, Some(Arc::new(Known::default()))).unwrap();
    ours.backend.join(Some(Arc::new(island)));
    let mut got = vec![];
    for step in &STEPS {
        model.is_whole = step.is_whole;
        let begin = Instant::now();
        got.extend(bits(&model.step(&batch(step.rows.clone()))));
        println!("step {:?} took {:?}", step.rows, begin.elapsed());
    }
    println!("\nlogits={:016x}", digest(&got));
    ours.backend.join(None);
}

fn follow(
    ours: &Rank,
    checkpoint: &Checkpoint,
    device: &Arc<dyn Device>,
    meeting: &[u8],
    rank: u32,
) {
    let (mut attention, experts) = ours.follower(checkpoint);
    let collective = device.meet(meeting, rank, NUM_RANKS).unwrap();
    let island = Island::new(1, collective, None).unwrap();
    ours.backend.join(Some(Arc::new(island)));
    for step in STEPS.iter().filter(|step| step.is_whole) {
        let step = RankStep {
            batch: &batch(step.rows.clone()),
            pages: step.pages.as_slice(),
        };
        attention.follow(step, &*experts).unwrap();
    }
    ours.backend.join(None);
}

/// FNV-1a: two processes say with it whether they have the same.
fn digest(words: &[u32]) -> u64 {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A rank as a process of its own, which does not outlive its test.
struct Process {
    child: Child,
    lines: Receiver<String>,
    /// Everything that it has said.
    heard: Vec<String>,
    name: String,
}

impl Process {
    fn start(rank: u32, case: Case, meeting: Option<&str>) -> Self {
        let meeting = meeting.map_or_else(String::new, |meeting| format!(" {meeting}"));
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "island::processes::rank_process", "--nocapture"])
            .env(RANK, format!("{rank} {case:?}{meeting}"))
            .env("NCCL_HOSTID", format!("rank-{rank}"))
            .env("NCCL_SOCKET_IFNAME", "lo")
            .env("NCCL_NET", "Socket")
            .env(
                "NCCL_DEBUG",
                variable("NCCL_DEBUG").unwrap_or_else(|| "WARN".to_owned()),
            )
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let reader = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || {
            for line in reader.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            lines,
            heard: vec![],
            name: format!("rank {rank} ({case:?})"),
        }
    }

    /// What it says behind `name=`; waits for it.
    fn said(&mut self, name: &str) -> String {
        let end = Instant::now() + SAY_MAX;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|error| {
                panic!(
                    "{} has not said {name} ({error} after {SAY_MAX:?}), but:\n{}",
                    self.name,
                    self.heard.join("\n")
                )
            });
            let found = line.strip_prefix(name).and_then(|l| l.strip_prefix('='));
            if let Some(found) = found {
                return found.to_owned();
            }
            self.heard.push(line);
        }
    }

    /// How it ended; it does so within a time.
    fn ended(&mut self) -> ExitStatus {
        self.said("ended");
        let end = Instant::now() + END_MAX;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            let name = &self.name;
            assert!(
                Instant::now() < end,
                "{name} does not end: {:?}",
                self.heard
            );
            // Its output ends when it does.
            let left = end.saturating_duration_since(Instant::now());
            while let Ok(line) = self.lines.recv_timeout(left) {
                self.heard.push(line);
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, as it should.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// Where nobody asks for a GPU and there is none, why this case is left out.
fn why_not(case: Case) -> Option<&'static str> {
    static WHY_NO_GPU: OnceLock<Option<String>> = OnceLock::new();
    let is_required = variable(REQUIRE_GPU).is_some();
    if case == Case::Emulated {
        return is_required.then_some("tests are for the GPU alone");
    }
    let why = WHY_NO_GPU.get_or_init(|| case.device().err()).as_deref();
    if is_required && let Some(why) = why {
        panic!("{REQUIRE_GPU} is set, but two ranks cannot be tested on a GPU: {why}");
    }
    why
}

#[test]
fn two_processes_have_the_bits_of_one() {
    for case in Case::ALL {
        if let Some(why) = why_not(case) {
            println!("two ranks, {case:?}: skipped: {why}");
            continue;
        }
        let expected = {
            let (device, geometry) = (case.device().unwrap(), case.geometry());
            let backend = CudaBackend::new(&device, &geometry, WeightFormat::Bf16).unwrap();
            let mut alone = Model::new(&Checkpoint::new(geometry), &backend, &[0, 8]);
            alone.is_whole = true;
            digest(&alone.prompt(&prompt(), prompt().tokens.len()))
        };
        let mut first = Process::start(0, case, None);
        let meeting = first.said("meeting");
        let mut second = Process::start(1, case, Some(&meeting));
        let got = first.said("logits");
        for line in first.heard.iter().filter(|line| line.starts_with("step ")) {
            println!("two ranks, {case:?}: {line}");
        }
        assert_eq!(
            got,
            format!("{expected:016x}"),
            "{case:?}: digest of logits"
        );
        assert!(first.ended().success() && second.ended().success());
        println!("two ranks, {case:?}: {got}, as one rank");
    }
}
