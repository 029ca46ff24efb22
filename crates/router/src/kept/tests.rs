//! What is kept of answers, and for how long.

use std::task::Poll;

use super::*;
use crate::answer::Spent;
use crate::sequence::Delta;

fn kept(limits: KeepLimits) -> Arc<KeptAnswers> {
    KeptAnswers::new(limits)
}

const LIMITS: KeepLimits = KeepLimits {
    answers_max: 2,
    bytes_max: 1 << 20,
    keep: Duration::from_secs(60),
    grace: Duration::from_secs(10),
    stall: Duration::from_secs(30),
};

fn key(n: u8) -> KeyDigest {
    KeyDigest([n; 32])
}

fn version() -> Arc<Version> {
    Arc::new(Version {
        model: "f".into(),
        numeric_class: "c".into(),
    })
}

const BODY: BodyDigest = BodyDigest([0; 32]);

/// Keys up to 99 are of one tenant, the others of another.
fn find(kept: &Arc<KeptAnswers>, n: u8) -> Result<Found, ApiError> {
    let tenant = TenantName::new(if n < 100 { "a" } else { "b" }).unwrap();
    kept.find((&tenant, key(n)), BODY, AnswerId::unique(7))
}

fn begin(kept: &Arc<KeptAnswers>, n: u8) -> (Recorder, Reader) {
    match find(kept, n).unwrap() {
        Found::Nothing(recorder, reader) => (recorder, reader),
        Found::Answer(_) => panic!("an answer to key {n}"),
    }
}

fn join(kept: &Arc<KeptAnswers>, n: u8) -> Reader {
    match find(kept, n).unwrap() {
        Found::Nothing(..) => panic!("no answer to key {n}"),
        Found::Answer(reader) => reader,
    }
}

fn told(text: &str) -> Told {
    Told {
        delta: Ok(Delta {
            text: text.to_owned(),
            ..Delta::default()
        }),
        spent: Spent::default(),
    }
}

async fn text(reader: &mut Reader) -> String {
    let mut text = String::new();
    while let Some(told) = reader.next().await {
        text.push_str(&told.delta.unwrap().text);
    }
    text
}

#[tokio::test(start_paused = true)]
async fn everybody_reads_the_whole_answer_whenever_they_come() {
    let kept = kept(LIMITS);
    let (recorder, mut first) = begin(&kept, 1);
    recorder.began(Ok(version()));
    recorder.push(told("a"));
    let mut second = join(&kept, 1);
    second.began().await.unwrap();
    recorder.push(told("b"));
    let mut keeping = Box::pin(recorder.keep());
    assert!(futures::poll!(&mut keeping).is_pending());
    let mut third = join(&kept, 1);
    for reader in [&mut first, &mut second, &mut third] {
        assert_eq!(text(reader).await, "ab");
    }
    assert!(kept.num_bytes() > 0);
    drop((first, second, third));
    let begin = Instant::now();
    keeping.await;
    assert_eq!(begin.elapsed(), LIMITS.keep);
    assert_eq!((kept.num_answers(), kept.num_bytes()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_unread_answer_is_given_up_after_the_grace_and_not_before() {
    let kept = kept(LIMITS);
    let (recorder, reader) = begin(&kept, 1);
    drop(reader);
    let mut abandoned = Box::pin(recorder.abandoned());
    let early = tokio::time::timeout(LIMITS.grace / 2, &mut abandoned).await;
    assert!(early.is_err());
    let back = join(&kept, 1);
    let read = tokio::time::timeout(LIMITS.grace * 5, &mut abandoned).await;
    assert!(read.is_err());
    let left = Instant::now();
    drop(back);
    abandoned.await;
    assert_eq!(left.elapsed(), LIMITS.grace);
    // Whoever comes now comes too late, and begins anew.
    let (_again, _reader) = begin(&kept, 1);
    drop(recorder);
    assert_eq!(
        kept.num_answers(),
        1,
        "the old recorder leaves the new answer alone"
    );
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_breaks_off_ends_its_readers_and_is_made_again() {
    let kept = kept(LIMITS);
    let (recorder, mut reader) = begin(&kept, 1);
    let mut waiting = join(&kept, 1);
    drop(recorder);
    waiting.began().await.unwrap_err();
    assert!(reader.next().await.is_none());
    let (recorder, mut reader) = begin(&kept, 1);
    let full = ApiError::new(ErrorKind::QueueFull, "full");
    recorder.began(Err(full.clone()));
    drop(recorder);
    assert_eq!(reader.began().await, Err(full));
    begin(&kept, 1);
}

#[tokio::test(start_paused = true)]
async fn the_oldest_whole_answer_makes_room_and_running_ones_do_not() {
    let kept = kept(LIMITS);
    let (one, reader) = begin(&kept, 1);
    drop(reader);
    let mut one = Box::pin(one.keep());
    assert!(futures::poll!(&mut one).is_pending());
    let _two = begin(&kept, 2);
    let _three = begin(&kept, 3);
    assert_eq!(
        futures::poll!(&mut one),
        Poll::Ready(()),
        "its task ends too"
    );
    drop(one);
    let refused = find(&kept, 4).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::Unavailable);
    assert_eq!(kept.num_answers(), 2);
}

#[tokio::test(start_paused = true)]
async fn memory_is_bounded_and_what_lost_its_beginning_is_not_given_out() {
    let kept = kept(LIMITS);
    let (old, reader) = begin(&kept, 1);
    old.push(told(&"x".repeat(LIMITS.bytes_max / 2)));
    drop(reader);
    let mut old = Box::pin(old.keep());
    assert!(futures::poll!(&mut old).is_pending());
    let (recorder, mut reader) = begin(&kept, 2);
    for _ in 0..1000 {
        recorder.push(told(&"y".repeat(4096)));
        assert!(kept.num_bytes() <= LIMITS.bytes_max);
    }
    assert_eq!(
        futures::poll!(&mut old),
        Poll::Ready(()),
        "whole answers go first"
    );
    assert!(reader.next().await.is_none(), "a reader that lags is told");
    begin(&kept, 2);
    recorder.keep().await;
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_never_reads_holds_neither_memory_nor_a_place_beyond_the_stall() {
    let kept = kept(LIMITS);
    let (recorder, mut stalled) = begin(&kept, 1);
    recorder.push(told("a"));
    let begin_of_stall = Instant::now();
    recorder.abandoned().await;
    assert_eq!(begin_of_stall.elapsed(), LIMITS.stall + LIMITS.grace);
    assert_eq!(kept.num_bytes(), 0);
    recorder.part().await;
    assert_eq!(kept.num_answers(), 0);
    assert!(stalled.next().await.is_none(), "it is told when it wakes");

    // A whole answer: it is kept for its time and not a moment longer for the sleeper.
    let (recorder, _stalled) = begin(&kept, 2);
    recorder.push(told("b"));
    let begin_of_keep = Instant::now();
    recorder.keep().await;
    assert_eq!(begin_of_keep.elapsed(), LIMITS.keep);
    assert_eq!((kept.num_answers(), kept.num_bytes()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn one_reader_that_reads_is_enough_and_reads_to_the_end() {
    let kept = kept(LIMITS);
    let (recorder, _stalled) = begin(&kept, 1);
    let mut slow = join(&kept, 1);
    for _ in 0..10 {
        recorder.push(told("a"));
    }
    let mut keeping = Box::pin(recorder.keep());
    let mut read = String::new();
    for _ in 0..10 {
        let pause = tokio::time::timeout(LIMITS.stall / 2, &mut keeping).await;
        assert!(pause.is_err(), "kept for {read:?}");
        read.push_str(&slow.next().await.unwrap().delta.unwrap().text);
    }
    assert_eq!(read, "a".repeat(10));
    assert!(slow.next().await.is_none());
    keeping.await;
    assert_eq!(kept.num_bytes(), 0);
}

#[tokio::test(start_paused = true)]
async fn who_keeps_most_loses_its_own_and_not_anothers() {
    let kept = kept(KeepLimits {
        answers_max: 3,
        ..LIMITS
    });
    let mut keeping = Vec::new();
    for n in [100, 1, 2, 3, 4] {
        let (recorder, reader) = begin(&kept, n);
        drop(reader);
        let mut kept = Box::pin(recorder.keep());
        assert!(futures::poll!(&mut kept).is_pending());
        keeping.push(kept);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    for n in [100, 3, 4] {
        drop(join(&kept, n));
    }
    assert_eq!(kept.num_answers(), 3);
}
