//! Checkpoints that are opened without their files: the same tensors, from whoever has them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use tramontane_compute::HostTensor;
use tramontane_model::{Checkpoint, Description, Error, Part, Source};
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::slice::segment_columns;
use tramontane_types::{ExpertId, LayerId, SegmentRange};

/// Another process that has the files.
#[derive(Debug)]
pub(crate) struct Other {
    checkpoint: Checkpoint,
    bytes: AtomicUsize,
    /// Reads that came because a file of ours could not be read.
    instead: AtomicUsize,
}

impl Other {
    pub(crate) fn new(checkpoint: Checkpoint) -> Arc<Self> {
        Arc::new(Self {
            checkpoint,
            bytes: AtomicUsize::new(0),
            instead: AtomicUsize::new(0),
        })
    }

    fn take_bytes(&self) -> usize {
        self.bytes.swap(0, Ordering::Relaxed)
    }
}

impl Source for Other {
    fn read(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error> {
        self.bytes.fetch_add(out.len(), Ordering::Relaxed);
        let instead = usize::from(part.instead_of.is_some());
        self.instead.fetch_add(instead, Ordering::Relaxed);
        self.checkpoint.read_here(part, out)
    }
}

fn model() -> TinyModel {
    TinyModel::mixtral().experts(4).hidden(64).ff(256).shards(3)
}

fn written() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    model().write(folder.path()).unwrap();
    folder
}

fn open(path: &Path) -> Checkpoint {
    Checkpoint::open(path).unwrap()
}

fn opened_from(other: &Arc<Other>, directory: Option<&Path>) -> Checkpoint {
    let description = other.checkpoint.describe();
    let source = Arc::clone(other) as _;
    Checkpoint::open_described(&description, directory, source).unwrap()
}

fn assert_same(ours: &HostTensor<'_>, theirs: &HostTensor<'_>) {
    assert_eq!((ours.rows, ours.cols), (theirs.rows, theirs.cols));
    assert!(ours.data == theirs.data && ours.order == theirs.order);
}

fn assert_same_attention(ours: &Checkpoint, theirs: &Checkpoint) {
    let (ours, theirs) = (
        ours.attention_weights().unwrap(),
        theirs.attention_weights().unwrap(),
    );
    let (ours, theirs) = (ours.weights(), theirs.weights());
    assert_same(&ours.embed, &theirs.embed);
    assert_same(&ours.lm_head, &theirs.lm_head);
    for (ours, theirs) in ours.layers.iter().zip(&theirs.layers) {
        for (ours, theirs) in [
            (&ours.q, &theirs.q),
            (&ours.k, &theirs.k),
            (&ours.o, &theirs.o),
        ] {
            assert_same(ours, theirs);
        }
        assert_same(&ours.gate.unwrap(), &theirs.gate.unwrap());
    }
}

#[test]
fn without_files_everything_comes_from_who_has_them() {
    let folder = written();
    let other = Other::new(open(folder.path()));
    let here = opened_from(&other, None);
    assert_eq!(here.fingerprint(), other.checkpoint.fingerprint());
    assert_eq!(here.files_here(), (0, 3));
    assert_eq!(
        here.weight_format().unwrap(),
        other.checkpoint.weight_format().unwrap()
    );
    assert_same_attention(&here, &other.checkpoint);
    let whole = SegmentRange::WHOLE;
    for expert in (0..4).map(ExpertId) {
        let ours = here.expert_weights(LayerId(1), expert, whole).unwrap();
        let theirs = other.checkpoint.expert_weights(LayerId(1), expert, whole);
        let theirs = theirs.unwrap();
        assert_same(&ours.weights().w1, &theirs.weights().w1);
        assert_same(&ours.weights().w2, &theirs.weights().w2);
        assert_same(&ours.weights().w3, &theirs.weights().w3);
    }
    // Who has nothing has nothing to give.
    let third = Other::new(here);
    let error = Checkpoint::open_described(&other.checkpoint.describe(), None, third).unwrap_err();
    assert!(matches!(error, Error::NotHere { .. }), "{error}");
}

#[test]
fn a_slice_is_read_and_nothing_else_of_its_expert() {
    let folder = written();
    let other = Other::new(open(folder.path()));
    let here = opened_from(&other, None);
    let place = (LayerId(0), ExpertId(2));
    let whole = other
        .checkpoint
        .expert_weights(place.0, place.1, SegmentRange::WHOLE);
    let whole = whole.unwrap();
    let g = here.geometry();
    other.take_bytes();
    for (begin, end) in [(0, 1), (3, 5), (7, 8)] {
        let range = SegmentRange::new(begin, end).unwrap();
        let part = here.expert_weights(place.0, place.1, range).unwrap();
        let columns = segment_columns(g.ff, begin).start..segment_columns(g.ff, end - 1).end;
        // f32 of the tiny model, three matrices.
        let size = whole.weights().w1.data.len() / (g.ff * g.hidden);
        assert_eq!(other.take_bytes(), 3 * columns.len() * g.hidden * size);
        let values = |tensor: &HostTensor<'_>, row, first, len| {
            let mut out = vec![0.0; len];
            tensor.read_row(row, first, &mut out);
            out
        };
        for row in columns.clone() {
            for (ours, theirs) in [
                (part.weights().w1, whole.weights().w1),
                (part.weights().w3, whole.weights().w3),
            ] {
                assert_eq!(
                    values(&ours, row, 0, g.hidden),
                    values(&theirs, row, 0, g.hidden)
                );
            }
        }
        for row in 0..g.hidden {
            let of = |tensor| values(&tensor, row, columns.start, columns.len());
            assert_eq!(of(part.weights().w2), of(whole.weights().w2));
        }
    }
}

#[test]
fn files_that_are_here_and_the_same_are_read_here() {
    let (folder, partial) = (written(), written());
    let shard = |n: u8| {
        partial
            .path()
            .join(format!("model-0000{n}-of-00003.safetensors"))
    };
    fs::remove_file(shard(1)).unwrap();
    // Of the same length, with other numbers.
    let mut changed = fs::read(shard(2)).unwrap();
    let middle = changed.len() / 2;
    changed[middle..].reverse();
    fs::write(shard(2), changed).unwrap();
    let other = Other::new(open(folder.path()));
    let here = opened_from(&other, Some(partial.path()));
    assert_eq!(here.files_here(), (1, 3));
    assert_same_attention(&here, &other.checkpoint);
    assert_eq!(other.instead.load(Ordering::Relaxed), 0);
}

#[test]
fn a_file_that_is_cut_off_or_gone_while_it_is_used_is_read_elsewhere() {
    let (folder, ours) = (written(), written());
    let other = Other::new(open(folder.path()));
    let alone = open(ours.path());
    let here = alone.backed_by(Arc::clone(&other) as _);
    for file in fs::read_dir(ours.path()).unwrap() {
        let path = file.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            fs::File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(100)
                .unwrap();
        }
    }
    let error = alone.attention_weights().unwrap_err();
    assert!(error.to_string().contains("safetensors"), "{error}");
    assert_same_attention(&here, &other.checkpoint);
    assert!(other.instead.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_description_that_does_not_fit_is_refused() {
    let folder = written();
    let other = Other::new(open(folder.path()));
    type Change = fn(&mut Description);
    let refused = |change: Change| {
        let mut description = other.checkpoint.describe();
        change(&mut description);
        let source = Arc::clone(&other) as _;
        let error = Checkpoint::open_described(&description, None, source).unwrap_err();
        format!("{error}")
    };
    let cases: [(Change, &str); 8] = [
        (
            |d| d.fingerprint = "00".repeat(8),
            "expected 0000000000000000",
        ),
        (|d| d.config = "{}".to_owned(), "config.json"),
        (|d| d.sliding_window = Some(8), "fingerprint is"),
        (|d| d.files.clear(), "0 files"),
        (|d| d.files[0].name = "../secret".to_owned(), "../secret"),
        (|d| d.files[0].header_bytes = u64::MAX, "no weight file"),
        (|d| d.files[1].header_bytes -= 1, "truncated"),
        (|d| d.files[2].bytes += 1, "expected"),
    ];
    for (change, part) in cases {
        let text = refused(change);
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}
