//! An island computes what one device computes, to the bit, for any number of ranks; and ranks that are lost end nothing but
//! the step. Ranks are threads with emulated devices here; [`processes`] has two of one GPU.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

mod processes;

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tramontane_compute::{Backend as _, StepBatch, Wanted, WeightFormat};
use tramontane_compute_cuda::device::{Device, DeviceError};
use tramontane_compute_cuda::{
    CudaBackend, Island, Lead, RankAttention, RankStep, Target, rank_segments,
};
use tramontane_types::{ModelGeometry, SegmentRange};

use crate::choices;
use crate::model::devices::{REQUIRE_GPU, emulator, variable};
use crate::model::{ATTENTION, Checkpoint, Model, Prompt, bits, geometry, load};

/// What a rank that follows is told.
struct Step {
    batch: StepBatch,
    pages: Vec<Range<u32>>,
}

/// Rank 0 tells the others through channels.
#[derive(Debug)]
struct Channels(Mutex<Vec<Sender<Step>>>);

impl Lead for Channels {
    fn begin(&self, epoch: u64, step: RankStep<'_>) -> Result<bool, DeviceError> {
        assert_eq!(epoch, 1);
        for sender in &*self.0.lock().unwrap() {
            let step = Step {
                batch: step.batch.clone(),
                pages: step.pages.to_vec(),
            };
            // One that has ended hears nothing.
            let _gone = sender.send(step);
        }
        Ok(true)
    }

    fn end(&self, _epoch: u64, _result: Result<(), String>) {}
}

/// A rank with its segments of all experts.
struct Rank {
    backend: CudaBackend,
    segments: SegmentRange,
}

impl Rank {
    fn new(
        device: &Arc<dyn Device>,
        geometry: &ModelGeometry,
        (rank, num_ranks): (u32, u32),
    ) -> Self {
        Self {
            backend: CudaBackend::new(device, geometry, WeightFormat::Bf16).unwrap(),
            segments: rank_segments(rank, num_ranks).unwrap(),
        }
    }

    fn follower(
        &self,
        checkpoint: &Checkpoint,
    ) -> (RankAttention, Arc<dyn tramontane_compute::Experts>) {
        let attention = self.backend.follower(&checkpoint.attention(), ATTENTION);
        let experts = self.backend.experts();
        load(checkpoint, &*experts, self.segments);
        (attention.unwrap(), experts)
    }
}

/// Follows until nobody leads any more, a step fails, or so many steps were computed.
fn follow(
    target: Target,
    meeting: &[u8],
    (rank, num_ranks): (u32, u32),
    steps: &Receiver<Step>,
    most: usize,
) -> usize {
    let device = emulator(target);
    let ours = Rank::new(&device, &geometry(), (rank, num_ranks));
    let (mut attention, experts) = ours.follower(&Checkpoint::new(geometry()));
    let collective = device.meet(meeting, rank, num_ranks).unwrap();
    let island = Arc::new(Island::new(1, collective, None).unwrap());
    ours.backend.join(Some(Arc::clone(&island)));
    let mut done = 0;
    for step in steps {
        if done == most {
            // It hangs: the connection stays, and nothing is answered.
            let _until_nobody_leads = steps.iter().count();
            break;
        }
        let step = RankStep {
            batch: &step.batch,
            pages: &step.pages,
        };
        if attention.follow(step, &*experts).is_err() {
            break;
        }
        done += 1;
    }
    done
}

/// Rank 0, as a model that can be driven.
struct Leader {
    backend: CudaBackend,
    model: Model,
    island: Arc<Island>,
    followers: Vec<JoinHandle<usize>>,
}

impl Leader {
    fn new(target: Target, num_ranks: u32, most: usize) -> Self {
        let device = emulator(target);
        let meeting = device.meeting().unwrap();
        let (mut senders, mut followers) = (vec![], vec![]);
        for rank in 1..num_ranks {
            let (sender, steps) = channel();
            senders.push(sender);
            let meeting = meeting.clone();
            followers.push(std::thread::spawn(move || {
                follow(target, &meeting, (rank, num_ranks), &steps, most)
            }));
        }
        let Rank { backend, segments } = Rank::new(&device, &geometry(), (0, num_ranks));
        let checkpoint = Checkpoint::new(geometry());
        // Own segments first: whole steps are computed with those. The others are for steps layer by layer.
        let cuts = [0, segments.end(), 8];
        let cuts = if num_ranks == 1 {
            &cuts[..2]
        } else {
            &cuts[..]
        };
        let model = Model::new(&checkpoint, &backend, cuts);
        let collective = device.meet(&meeting, 0, num_ranks).unwrap();
        let lead = Arc::new(Channels(Mutex::new(senders)));
        let island = Arc::new(Island::new(1, collective, Some(lead)).unwrap());
        backend.join(Some(Arc::clone(&island)));
        Self {
            backend,
            model,
            island,
            followers,
        }
    }

    /// Rows of a prompt in one step, whole or layer by layer.
    fn rows(&mut self, prompt: &Prompt, rows: Range<usize>, is_whole: bool) -> Vec<u32> {
        let mut batch = StepBatch::default();
        prompt.add_to(&mut batch, rows, true);
        self.model.is_whole = is_whole;
        bits(&self.model.step(&batch))
    }

    /// Ends the followers; how many steps each has computed.
    fn end(self) -> Vec<usize> {
        let Self {
            backend,
            model,
            island,
            followers,
        } = self;
        backend.join(None);
        drop((model, backend, island));
        followers.into_iter().map(|f| f.join().unwrap()).collect()
    }
}

fn expected(target: Target, prompt: &Prompt) -> Vec<u32> {
    let backend = CudaBackend::new(&emulator(target), &geometry(), WeightFormat::Bf16).unwrap();
    let mut alone = Model::new(&Checkpoint::new(geometry()), &backend, &[0, 8]);
    alone.is_whole = true;
    alone.prompt(prompt, prompt.tokens.len())
}

fn is_for_a_gpu() -> bool {
    let is_required = variable(REQUIRE_GPU).is_some();
    if is_required {
        println!("skipped: ranks of one process have emulated devices");
    }
    is_required
}

#[test]
fn any_number_of_ranks_has_the_bits_of_one() {
    if is_for_a_gpu() {
        return;
    }
    for (target, ranks) in [
        (Target::Sm80, &[1, 2, 3, 4, 8][..]),
        (Target::Sm90a, &[2, 5]),
    ] {
        let prompt = Prompt::new(1, 40, 7);
        let expected = expected(target, &prompt);
        for &num_ranks in ranks {
            let mut leader = Leader::new(target, num_ranks, usize::MAX);
            let mut got = leader.rows(&prompt, 0..30, true);
            got.extend(leader.rows(&prompt, 30..37, true));
            // Decode: one row a step, by a graph that is made and one that is there.
            for row in 37..40 {
                got.extend(leader.rows(&prompt, row..row + 1, true));
            }
            assert!(got == expected, "{target}, {num_ranks} ranks");
            assert!(leader.end().iter().all(|&steps| steps == 5));
        }
    }
}

/// Rank 0 alone gives tokens, and graphs are made in the same steps as by the others, whatever rows want.
#[test]
fn ranks_choose_the_tokens_of_one() {
    if is_for_a_gpu() {
        return;
    }
    let prompt = Prompt::new(1, 300, 7);
    let expected = expected(Target::Sm90a, &prompt);
    let mut leader = Leader::new(Target::Sm90a, 3, usize::MAX);
    let mut begin = 0;
    for (rows, wants_logits) in [(4, false), (4, true), (4, false), (270, false), (18, true)] {
        let mut batch = StepBatch::default();
        prompt.add_to(&mut batch, begin..begin + rows, true);
        // The first row wants its token in any case.
        let mut wanted = vec![Wanted::Best; rows];
        if wants_logits {
            wanted[1..].fill(Wanted::Logits);
        }
        let got = leader.model.try_outputs(&batch, &wanted).unwrap();
        let logits = &expected[begin * 75..(begin + rows) * 75];
        let logits: Vec<f32> = logits.iter().map(|&x| f32::from_bits(x)).collect();
        assert!(got == choices::expected(&logits, &wanted), "{rows} rows");
        begin += rows;
    }
    assert!(leader.end().iter().all(|&steps| steps == 5));
}

#[test]
fn more_rows_than_a_graph_has_and_steps_without_the_ranks_change_no_bit() {
    if is_for_a_gpu() {
        return;
    }
    let prompt = Prompt::new(2, 300, 3);
    let expected = expected(Target::Sm80, &prompt);
    let mut leader = Leader::new(Target::Sm80, 3, usize::MAX);
    // What rank 0 computes alone, the others get as pages.
    let mut got = leader.rows(&prompt, 0..20, false);
    got.extend(leader.rows(&prompt, 20..290, true));
    got.extend(leader.rows(&prompt, 290..295, false));
    got.extend(leader.rows(&prompt, 295..300, true));
    assert!(got == expected);
    assert_eq!(leader.end(), [2, 2]);
}

#[test]
fn a_rank_that_hangs_ends_the_step_and_not_the_model() {
    if is_for_a_gpu() {
        return;
    }
    let prompt = Prompt::new(1, 40, 7);
    let expected = expected(Target::Sm80, &prompt);
    let mut leader = Leader::new(Target::Sm80, 2, 1);
    let mut got = leader.rows(&prompt, 0..30, true);
    // Somebody watches, as a worker does.
    let island = Arc::clone(&leader.island);
    let (begun, is_begun) = channel::<()>();
    let watch = std::thread::spawn(move || {
        is_begun.recv().unwrap();
        island.part();
    });
    begun.send(()).unwrap();
    let mut batch = StepBatch::default();
    prompt.add_to(&mut batch, 30..40, true);
    let failed = leader.model.try_whole(&batch);
    watch.join().unwrap();
    let error = failed.unwrap_err();
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.starts_with("rank 0 of 2: "), "{cause}");
    // Alone, with what the other one had: not one bit is lost.
    leader.backend.join(None);
    let rest = rank_segments(1, 2).unwrap();
    load(&Checkpoint::new(geometry()), leader.model.own(), rest);
    got.extend(leader.rows(&prompt, 30..40, true));
    assert!(got == expected);
    assert_eq!(leader.end(), [1]);
}
