//! Who gets memory for bodies, who waits, and who makes way.

use tokio::time::{advance, timeout};

use super::*;
use crate::error::ErrorKind;

const KIB: usize = 1024;

fn room(kib: usize) -> Arc<BodyRoom> {
    Arc::new(BodyRoom::new(kib * KIB))
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// A body of which nothing has come, and that takes nothing before.
fn newcomer(room: &Arc<BodyRoom>) -> ArrivingBody {
    room.enter(known(0))
}

fn known(kib: usize) -> Newcomer {
    Newcomer {
        bytes: kib * KIB,
        is_known: true,
    }
}

/// A body that has come so far.
async fn body(room: &Arc<BodyRoom>, kib: usize) -> ArrivingBody {
    let mut body = newcomer(room);
    body.grow(kib * KIB, soon()).await.unwrap();
    body
}

fn has_to_go(body: &ArrivingBody) -> bool {
    body.give_up.is_cancelled()
}

#[tokio::test(start_paused = true)]
async fn a_full_room_is_waited_for_a_second_and_then_the_oldest_makes_way() {
    let room = room(4);
    let oldest = body(&room, 2).await;
    advance(Duration::from_millis(500)).await;
    let younger = body(&room, 2).await;
    let began = Instant::now();
    let mut last = newcomer(&room);
    let growing = last.grow(KIB, soon());
    let leaving = async {
        let error = oldest.gives_up().await;
        drop(oldest);
        error
    };
    let (grown, error) = tokio::join!(growing, leaving);
    grown.unwrap();
    assert_eq!(error.kind, ErrorKind::Unavailable);
    assert_eq!(began.elapsed(), SLOW_AFTER - Duration::from_millis(500));
    assert!(!has_to_go(&younger));
    assert_eq!(room.left.available_permits(), 1);
}

#[tokio::test(start_paused = true)]
async fn only_as_many_make_way_as_it_takes() {
    let room = room(8);
    let mut slow = Vec::new();
    for _ in 0..4 {
        slow.push(body(&room, 2).await);
    }
    advance(SLOW_AFTER).await;
    let (mut a, mut b, mut c) = (newcomer(&room), newcomer(&room), newcomer(&room));
    let three = async {
        tokio::try_join!(
            a.grow(KIB, soon()),
            b.grow(KIB, soon()),
            c.grow(2 * KIB, soon())
        )
    };
    let leaving = async {
        for _ in 0..2 {
            let first = slow.remove(0);
            first.gives_up().await;
        }
    };
    let (grown, ()) = tokio::join!(three, leaving);
    grown.unwrap();
    assert_eq!(slow.iter().filter(|body| has_to_go(body)).count(), 0);
}

#[tokio::test(start_paused = true)]
async fn of_bodies_that_wait_for_each_other_one_goes_on() {
    let room = room(4);
    let (a, b) = (body(&room, 2).await, body(&room, 2).await);
    let grow = async |mut body: ArrivingBody| {
        let grown = body.grow(4 * KIB, soon()).await;
        grown.map(|()| body)
    };
    let began = Instant::now();
    let (a, b) = tokio::join!(grow(a), grow(b));
    assert_eq!([&a, &b].iter().filter(|grown| grown.is_ok()).count(), 1);
    assert_eq!(began.elapsed(), SLOW_AFTER);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_its_client_goes_before_who_waits_for_memory() {
    let room = room(6);
    let mut moves = body(&room, 2).await;
    let (stands, other) = (body(&room, 2).await, body(&room, 2).await);
    advance(SLOW_AFTER).await;
    let mut asks = newcomer(&room);
    let leaving = async {
        stands.gives_up().await;
        drop(stands);
        other.gives_up().await;
        drop(other);
    };
    let grown = async { tokio::try_join!(moves.grow(4 * KIB, soon()), asks.grow(KIB, soon())) };
    let (grown, ()) = tokio::join!(grown, leaving);
    grown.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_there_makes_way_for_nobody_and_gives_its_share_back_at_the_end() {
    let room = room(2);
    let share = body(&room, 2).await.arrived();
    let mut waits = newcomer(&room);
    let late = waits
        .grow(KIB, Instant::now() + SLOW_AFTER * 3)
        .await
        .unwrap_err();
    assert_eq!(late.kind, ErrorKind::Unavailable);
    drop(share);
    waits.grow(KIB, Instant::now()).await.unwrap();
    drop(waits);
    assert_eq!(room.left.available_permits(), 2);
    let arriving = room.arriving.lock();
    assert_eq!((arriving.wanted, arriving.leaving), (0, 0));
    assert!(arriving.bodies.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_larger_than_the_room_has_it_alone() {
    let room = room(2);
    let large = body(&room, 100).await;
    assert_eq!(room.left.available_permits(), 0);
    let mut other = newcomer(&room);
    let waiting = timeout(SLOW_AFTER / 2, other.grow(KIB, soon()));
    assert!(waiting.await.is_err());
    drop(large.arrived());
    other.grow(KIB, Instant::now()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_has_to_go_and_took_memory_meanwhile_leaves_with_all_of_it() {
    let room = room(4);
    let mut slow = body(&room, 2).await;
    let holds = body(&room, 1).await;
    advance(SLOW_AFTER).await;
    let mut asks = newcomer(&room);
    let asking = timeout(Duration::from_millis(1), asks.grow(2 * KIB, soon()));
    assert!(asking.await.is_err());
    assert!(has_to_go(&slow) && !has_to_go(&holds));
    // The one KiB that was left.
    slow.grow(3 * KIB, soon()).await.unwrap();
    drop(slow);
    assert_eq!(room.arriving.lock().leaving, 0);
    asks.grow(2 * KIB, soon()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn bodies_of_which_nothing_comes_make_way_for_who_asks_now() {
    let room = room(8);
    let mut mute = Vec::new();
    for _ in 0..4 {
        mute.push(room.arrive(known(2), soon()).await.unwrap());
    }
    assert_eq!(room.left.available_permits(), 0);
    let began = Instant::now();
    let asks = async {
        let mut body = room.arrive(known(2), soon()).await?;
        body.grow(KIB, soon()).await?;
        Ok::<_, ApiError>(body)
    };
    let leaving = async {
        for _ in 0..2 {
            let oldest = mute.remove(0);
            oldest.gives_up().await;
        }
    };
    let (grown, ()) = tokio::join!(asks, leaving);
    assert_eq!(began.elapsed(), SLOW_AFTER);
    // What it took before it was here is others' now.
    let share = grown.unwrap().arrived().unwrap();
    assert_eq!(share.num_permits(), 1);
    assert_eq!(room.left.available_permits(), 3);
    assert_eq!(mute.iter().filter(|body| has_to_go(body)).count(), 0);
    drop((share, mute));
    assert_eq!(room.left.available_permits(), 8);
    let arriving = room.arriving.lock();
    assert_eq!((arriving.wanted, arriving.leaving), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn whom_nobody_knows_goes_before_who_is_known() {
    let room = room(4);
    let known_one = room.arrive(known(2), soon()).await.unwrap();
    let unknown = Newcomer {
        is_known: false,
        ..known(2)
    };
    let unknown = room.arrive(unknown, soon()).await.unwrap();
    advance(SLOW_AFTER).await;
    let asks = room.arrive(known(1), soon());
    let leaving = async {
        unknown.gives_up().await;
        drop(unknown);
    };
    let (asked, ()) = tokio::join!(asks, leaving);
    asked.unwrap();
    assert!(!has_to_go(&known_one));
}
