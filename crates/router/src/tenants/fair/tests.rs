//! Scenarios of the queue, and what holds in all of them.

use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;

const AGE: Duration = Duration::from_secs(10);

fn name(name: &str) -> TenantName {
    TenantName::new(name).unwrap()
}

fn ask(tenant: &str, prompt_tokens: u64) -> Ask {
    Ask {
        tenant: name(tenant),
        class: Class::Normal,
        limits: Limits::default(),
        places: 1,
        prompt_tokens,
        bytes: 10,
    }
}

fn queue(places: usize, requests: usize) -> FairQueue<&'static str> {
    let bytes = 1000;
    FairQueue::new(places, false, QueueMax { requests, bytes }, AGE)
}

fn waits<W>(entered: Entered<W>) -> Vec<W> {
    match entered {
        Entered::Waits { gone, .. } => gone,
        Entered::Now(_) => panic!("it runs"),
        Entered::Full(_) => panic!("it is refused"),
    }
}

fn runs<W>(entered: Entered<W>) -> Granted<W> {
    match entered {
        Entered::Now(granted) => granted,
        _ => panic!("it does not run"),
    }
}

/// Ends one request with one place and says who is next.
fn next(queue: &mut FairQueue<&'static str>, ended: &str, now: Instant) -> Option<&'static str> {
    queue.give_back(&name(ended), 1);
    queue.finish(&name(ended));
    queue.pop(now).map(|granted| granted.waiter)
}

#[test]
fn a_tenant_with_many_requests_does_not_go_before_one_with_few() {
    let (mut queue, now) = (queue(1, 10), Instant::now());
    runs(queue.enter(ask("a", 10), "a0", now));
    for what in ["a1", "a2", "a3"] {
        assert!(waits(queue.enter(ask("a", 10), what, now)).is_empty());
    }
    for what in ["b1", "b2"] {
        waits(queue.enter(ask("b", 10), what, now));
    }
    // Both have had the same when b comes: a's first request is older.
    let order = ["a1", "b1", "a2", "b2", "a3"];
    let mut ended = "a";
    for expected in order {
        assert_eq!(next(&mut queue, ended, now), Some(expected));
        ended = &expected[..1];
    }
    assert_eq!(next(&mut queue, ended, now), None);
}

#[test]
fn generated_tokens_count_and_a_weight_divides_them() {
    let (mut queue, now) = (queue(2, 10), Instant::now());
    let heavy = || {
        let mut heavy = ask("heavy", 1);
        heavy.limits.weight = NonZeroU32::new(4).unwrap();
        heavy
    };
    runs(queue.enter(heavy(), "h0", now));
    runs(queue.enter(ask("light", 1), "l0", now));
    waits(queue.enter(ask("light", 1), "l1", now));
    waits(queue.enter(heavy(), "h1", now));
    queue.generated(&name("heavy"), 100);
    queue.generated(&name("light"), 30);
    assert_eq!(next(&mut queue, "light", now), Some("h1"));
}

#[test]
fn who_was_away_does_not_save_up() {
    let (mut queue, now) = (queue(1, 10), Instant::now());
    runs(queue.enter(ask("a", 1000), "a0", now));
    waits(queue.enter(ask("a", 1000), "a1", now));
    // b never asked before: it does not get a thousand tokens at once.
    for what in ["b1", "b2", "b3"] {
        waits(queue.enter(ask("b", 900), what, now));
    }
    assert_eq!(next(&mut queue, "a", now), Some("a1"));
    waits(queue.enter(ask("a", 1000), "a2", now));
    assert_eq!(next(&mut queue, "a", now), Some("b1"));
    assert_eq!(next(&mut queue, "b", now), Some("b2"));
    assert_eq!(next(&mut queue, "b", now), Some("a2"));
}

#[test]
fn a_higher_class_goes_first_until_a_lower_one_has_waited() {
    let (mut queue, now) = (queue(1, 10), Instant::now());
    let of = |class| Ask {
        class,
        ..ask("a", 1)
    };
    runs(queue.enter(of(Class::Low), "0", now));
    waits(queue.enter(of(Class::Low), "low", now));
    waits(queue.enter(of(Class::Normal), "normal", now));
    waits(queue.enter(of(Class::High), "high", now));
    assert_eq!(next(&mut queue, "a", now), Some("high"));
    let later = now + 2 * AGE;
    waits(queue.enter(of(Class::High), "late", later));
    // All count as high by now, and the oldest goes first.
    for expected in ["low", "normal", "late"] {
        assert_eq!(next(&mut queue, "a", later), Some(expected));
    }
}

#[test]
fn a_large_request_waits_for_all_its_places_and_is_not_passed() {
    let (mut queue, now) = (queue(3, 10), Instant::now());
    runs(queue.enter(ask("a", 1), "a0", now));
    let large = Ask {
        places: 99,
        ..ask("b", 1)
    };
    waits(queue.enter(large, "large", now));
    waits(queue.enter(ask("c", 1), "c0", now));
    assert!(queue.pop(now).is_none());
    queue.finish(&name("a"));
    queue.give_back(&name("a"), 1);
    let large = queue.pop(now).unwrap();
    assert_eq!((large.waiter, large.places), ("large", 3));
    assert!(queue.pop(now).is_none());
    queue.give_back(&name("b"), 2);
    assert_eq!(queue.pop(now).unwrap().waiter, "c0");
}

#[test]
fn one_tenant_does_not_get_the_places_of_all() {
    let (max, now) = (
        QueueMax {
            requests: 10,
            bytes: 1000,
        },
        Instant::now(),
    );
    let mut queue = FairQueue::new(16, true, max, AGE);
    let of = |tenant: &str, places| Ask {
        places,
        ..ask(tenant, 1)
    };
    assert_eq!(runs(queue.enter(of("a", 99), "a0", now)).places, 14);
    waits(queue.enter(of("a", 1), "a1", now));
    // Though a has waited for longer.
    runs(queue.enter(of("b", 1), "b0", now));
    runs(queue.enter(of("c", 1), "c0", now));
    waits(queue.enter(of("b", 1), "b1", now));
    queue.give_back(&name("a"), 1);
    assert_eq!(queue.pop(now).unwrap().waiter, "a1");
    queue.give_back(&name("c"), 1);
    assert_eq!(queue.pop(now).unwrap().waiter, "b1");
    // A small one does not pass a large one of its own tenant, however many of them come.
    waits(queue.enter(of("a", 14), "large", now));
    waits(queue.enter(of("a", 1), "a2", now));
    queue.give_back(&name("a"), 13);
    assert!(queue.pop(now).is_none());
    queue.give_back(&name("a"), 1);
    assert_eq!(queue.pop(now).unwrap().waiter, "large");
    assert!(queue.pop(now).is_none());
}

#[test]
fn what_runs_keeps_its_places_where_there_are_fewer_now() {
    let (mut queue, now) = (queue(4, 10), Instant::now());
    for what in ["0", "1", "2", "3"] {
        runs(queue.enter(ask("a", 1), what, now));
    }
    queue.set_places(2);
    let large = Ask {
        places: 4,
        ..ask("a", 1)
    };
    waits(queue.enter(large, "large", now));
    for _ in 0..3 {
        queue.give_back(&name("a"), 1);
        assert!(queue.pop(now).is_none());
    }
    queue.give_back(&name("a"), 1);
    assert_eq!(queue.pop(now).unwrap().places, 2);
    queue.set_places(3);
    runs(queue.enter(ask("a", 1), "last", now));
}

#[test]
fn a_tenant_at_its_own_limit_holds_up_nobody() {
    let (mut queue, now) = (queue(3, 10), Instant::now());
    let narrow = || {
        let mut narrow = ask("narrow", 1);
        narrow.limits.concurrent = 1;
        narrow
    };
    runs(queue.enter(narrow(), "n0", now));
    waits(queue.enter(narrow(), "n1", now));
    runs(queue.enter(ask("b", 1), "b0", now));
    assert!(queue.pop(now).is_none());
    assert_eq!(next(&mut queue, "narrow", now), Some("n1"));
}

#[test]
fn a_full_queue_turns_out_the_last_of_whoever_has_most() {
    let (mut queue, now) = (queue(1, 3), Instant::now());
    runs(queue.enter(ask("a", 1), "a0", now));
    for what in ["a1", "a2", "a3"] {
        waits(queue.enter(ask("a", 1), what, now));
    }
    assert!(matches!(
        queue.enter(ask("a", 1), "a4", now),
        Entered::Full("a4")
    ));
    assert_eq!(waits(queue.enter(ask("b", 1), "b1", now)), ["a3"]);
    // Now a has two and b has one: one more of either would be as many.
    assert!(matches!(
        queue.enter(ask("b", 1), "b2", now),
        Entered::Full("b2")
    ));
    assert_eq!(queue.num_waiting(), 3);
}

#[test]
fn a_large_request_does_not_turn_out_those_of_tenants_that_take_less() {
    let (mut queue, now) = (queue(1, 10), Instant::now());
    for what in ["a0", "a1", "a2", "a3"] {
        queue.enter(ask("a", 1), what, now);
    }
    let large = |bytes| Ask {
        bytes,
        ..ask("c", 1)
    };
    for bytes in [971, 1001] {
        let entered = queue.enter(large(bytes), "c1", now);
        assert!(matches!(entered, Entered::Full("c1")), "{bytes}");
    }
    assert!(waits(queue.enter(large(970), "c2", now)).is_empty());
    // Memory is used up now, and c has most of it.
    assert_eq!(waits(queue.enter(ask("a", 1), "a4", now)), ["c2"]);
}

#[test]
fn nobody_gives_way_to_one_that_is_refused_all_the_same() {
    let (mut queue, now) = (queue(1, 10), Instant::now());
    runs(queue.enter(ask("a", 1), "a0", now));
    let large = |tenant: &str, bytes| Ask {
        bytes,
        ..ask(tenant, 1)
    };
    for what in ["b1", "b2", "b3"] {
        waits(queue.enter(large("b", 160), what, now));
    }
    for what in ["c1", "c2", "c3"] {
        waits(queue.enter(large("c", 160), what, now));
    }
    // When b and c have given one each, they have less than what d asks for, and there is still no room.
    for bytes in [400, 700] {
        let entered = queue.enter(large("d", bytes), "d1", now);
        assert!(matches!(entered, Entered::Full("d1")), "{bytes}");
        assert_eq!((queue.num_waiting(), queue.bytes()), (6, 960));
    }
    assert_eq!(waits(queue.enter(large("d", 330), "d1", now)), ["c3", "b3"]);
    assert_eq!((queue.num_waiting(), queue.bytes()), (5, 970));
}

#[test]
fn who_leaves_takes_up_no_room() {
    let (mut queue, now) = (queue(1, 1), Instant::now());
    runs(queue.enter(ask("a", 1), "a0", now));
    let Entered::Waits { ticket, .. } = queue.enter(ask("a", 1), "a1", now) else {
        panic!("it does not wait");
    };
    assert!(queue.leave(&name("a"), ticket));
    assert!(!queue.leave(&name("a"), ticket));
    assert_eq!((queue.num_waiting(), queue.bytes()), (0, 0));
    waits(queue.enter(ask("a", 1), "a2", now));
    assert_eq!(next(&mut queue, "a", now), Some("a2"));
}

#[test]
fn who_comes_is_refused_before_it_is_read_only_when_there_is_no_room() {
    let (mut queue, now) = (queue(1, 1), Instant::now());
    let limits = Limits::default();
    let (a, b) = (name("a"), name("b"));
    assert!(queue.arrive(&a, limits) && queue.arrive(&a, limits));
    // One place and one to wait are spoken for.
    assert!(!queue.arrive(&a, limits));
    // Another tenant might still push one out.
    assert!(queue.arrive(&b, limits));
    for tenant in [&a, &a, &b] {
        queue.settle(tenant);
    }
    runs(queue.enter(ask("a", 1), "a0", now));
    assert!(queue.arrive(&a, limits));
    assert!(!queue.arrive(&a, limits));
}

/// Requests of tenants, each with a prompt and an answer, one place each.
#[derive(Clone, Debug)]
struct Load {
    weights: Vec<u32>,
    /// Tenant, prompt tokens, generated tokens.
    requests: Vec<(usize, u64, u64)>,
    places: usize,
}

const PROMPT_MAX: u64 = 50;
const ANSWER_MAX: u64 = 40;

fn load() -> impl Strategy<Value = Load> {
    let requests = |tenants: usize| {
        let request = (0..tenants, 1..=PROMPT_MAX, 1..=ANSWER_MAX);
        prop::collection::vec(request, 50..300)
    };
    (2_usize..5, 1_usize..9).prop_flat_map(move |(tenants, places)| {
        let weights = prop::collection::vec(1_u32..=4, tenants);
        (weights, requests(tenants)).prop_map(move |(weights, requests)| Load {
            weights,
            requests,
            places,
        })
    })
}

/// One that runs: its tenant and the tokens that are left to generate.
struct Runs(usize, u64);

proptest! {
    /// While two tenants both wait all the time, what they were served differs by no more than what can be on its
    /// way, however many requests each has; and no place is free while anybody waits.
    #[test]
    fn tenants_that_wait_get_their_shares_and_no_place_stays_free(load in load()) {
        let now = Instant::now();
        let max = QueueMax { requests: 1000, bytes: usize::MAX };
        let mut queue = FairQueue::new(load.places, false, max, AGE);
        let mut running: Vec<Runs> = Vec::new();
        let mut left = vec![0_usize; load.weights.len()];
        let asked = |&(tenant, prompt, _): &(usize, u64, u64)| {
            let mut ask = ask(&format!("t{tenant}"), prompt);
            ask.limits.weight = NonZeroU32::new(load.weights[tenant]).unwrap();
            ask
        };
        let mut served = vec![0_u64; load.weights.len()];
        for request in &load.requests {
            match queue.enter(asked(request), *request, now) {
                Entered::Now(granted) => {
                    served[request.0] += granted.waiter.1 * PROMPT_COST;
                    running.push(Runs(request.0, request.2));
                }
                Entered::Waits { .. } => left[request.0] += 1,
                Entered::Full(_) => prop_assert!(false, "there is room"),
            }
        }
        let bound = PROMPT_MAX * PROMPT_COST + load.places as u64 * ANSWER_MAX * GENERATED_COST;
        let always = |left: &[usize]| left.iter().all(|&n| n > 0);
        let begin = served.clone();
        while !running.is_empty() {
            for Runs(tenant, tokens) in &mut running {
                *tokens -= 1;
                served[*tenant] += GENERATED_COST;
                queue.generated(&name(&format!("t{tenant}")), 1);
            }
            let ended: Vec<usize> = running.iter().filter(|r| r.1 == 0).map(|r| r.0).collect();
            running.retain(|r| r.1 > 0);
            for tenant in ended {
                queue.give_back(&name(&format!("t{tenant}")), 1);
                queue.finish(&name(&format!("t{tenant}")));
            }
            while let Some(granted) = queue.pop(now) {
                let (tenant, prompt, answer) = granted.waiter;
                left[tenant] -= 1;
                served[tenant] += prompt * PROMPT_COST;
                running.push(Runs(tenant, answer));
            }
            let is_full = running.len() == load.places;
            prop_assert!(is_full || queue.num_waiting() == 0, "a place is free");
            if always(&left) {
                for (a, b) in (0..left.len()).flat_map(|a| (0..a).map(move |b| (a, b))) {
                    let share = |i: usize| (served[i] - begin[i]) / u64::from(load.weights[i]);
                    let gap = share(a).abs_diff(share(b));
                    // Twice: what was on its way when the count began, and what is now.
                    prop_assert!(gap <= 2 * bound, "{gap} of at most {} for {load:?}", 2 * bound);
                }
            }
        }
        prop_assert_eq!(queue.num_waiting(), 0);
        prop_assert_eq!(queue.bytes(), 0);
    }
}
