//! Two versions of the weights side by side: the whole planner, with workers that load at once.

use super::*;
use crate::placements::{GROUPS_MAX, GroupPlacements};

fn version(model: &str) -> Version {
    Version::of(&worker(&format!("x:model={model}")))
}

impl Cluster {
    async fn until(
        &mut self,
        what: &str,
        reached: impl Fn(&Placements) -> bool,
    ) -> Arc<Placements> {
        let seen = timeout(LONG, self.placements.wait_for(|p| reached(p))).await;
        let seen = seen.unwrap_or_else(|_| panic!("never: {what}"));
        Arc::clone(&seen.unwrap())
    }

    async fn until_serves(&mut self, model: &str) -> Arc<Placements> {
        let version = version(model);
        let serves = |p: &Placements| p.serving.as_deref() == Some(&version);
        self.until(&format!("{model} serves"), serves).await
    }

    async fn until_placed(&mut self, model: &str) -> Epoch {
        let version = version(model);
        let epoch = |p: &Placements| p.of(&version).map(GroupPlacements::published_epoch);
        let placed = |p: &Placements| epoch(p).is_some_and(|epoch| epoch > Epoch(0));
        let seen = self.until(&format!("{model} is placed"), placed).await;
        epoch(&seen).unwrap()
    }

    async fn wish(&self, model: &str) {
        let (mut wish, revision) = intent(&self.memory).await.unwrap();
        wish.weights = Some(version(model));
        set_intent(&self.memory, &wish, revision).await.unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        timeout(LONG, self.tasks.wait()).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_rolling_update_and_back_and_the_old_version_is_forgotten() {
    let mut cluster = Cluster::new();
    cluster.planner.config.min_workers = NonZeroUsize::new(2).unwrap();
    cluster.lead();
    let old = [cluster.start("a0:model=a"), cluster.start("a1:model=a")];
    cluster.until_serves("a").await;
    let epoch_of_a = cluster.until_placed("a").await;
    // One worker of a larger kind: it is placed beside, and gets no requests.
    let new = cluster.start("b0:model=b,segments=900");
    cluster.until_placed("b").await;
    let seen = cluster.placements.borrow().clone();
    assert_eq!(seen.serving.as_deref(), Some(&version("a")));
    assert_eq!(seen.published_epoch(), epoch_of_a, "nothing moved for it");
    cluster.wish("b").await;
    cluster.until_serves("b").await;
    cluster.wish("a").await;
    let seen = cluster.until_serves("a").await;
    assert_eq!(seen.published_epoch(), epoch_of_a, "back without loading");
    cluster.wish("b").await;
    cluster.until_serves("b").await;
    old.iter().for_each(CancellationToken::cancel);
    let key = version("a").key().published();
    let forgotten = async {
        while cluster.memory.get(&key).await.unwrap().is_some() {
            sleep(Duration::from_secs(5)).await;
        }
    };
    let begin = Instant::now();
    timeout(LONG, forgotten).await.unwrap();
    assert!(begin.elapsed() >= GROUP_FORGET, "{:?}", begin.elapsed());
    // With the new one gone too its placement stays: it is the one that serves.
    new.cancel();
    sleep(GROUP_FORGET * 2).await;
    let key = version("b").key().published();
    assert!(cluster.memory.get(&key).await.unwrap().is_some());
    cluster.end().await;
}

#[tokio::test(start_paused = true)]
async fn when_nobody_is_left_the_other_version_takes_over_and_stays() {
    let mut cluster = Cluster::new();
    cluster.lead();
    let old = cluster.start("a0:model=a");
    cluster.until_serves("a").await;
    let _new = cluster.start("b0:model=b");
    cluster.until_placed("b").await;
    old.cancel();
    let begin = Instant::now();
    cluster.until_serves("b").await;
    assert!(begin.elapsed() >= MOVE_AFTER, "{:?}", begin.elapsed());
    let _old = cluster.start("a1:model=a");
    sleep(LONG).await;
    let serving = cluster.placements.borrow().serving.clone();
    assert_eq!(serving.as_deref(), Some(&version("b")));
    cluster.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_group_that_cannot_be_written_holds_up_nobody() {
    let mut cluster = Cluster::new();
    // Its placement is too large for the store: 32 Ki experts, each of 8 slices.
    let mut huge = worker("x:model=x,segments=999999");
    (huge.model.num_layers, huge.model.num_experts) = (1024, 32);
    let stop = cluster.stop.clone();
    let _huge = cluster.register(huge, &stop);
    let (wish, revision) = intent(&cluster.memory).await.unwrap();
    let wish = Intent {
        slices_per_expert: Some(8),
        ..wish
    };
    set_intent(&cluster.memory, &wish, revision).await.unwrap();
    let _a = cluster.start("a0:model=a");
    cluster.lead();
    let first = cluster.until_placed("a").await;
    cluster.until_serves("a").await;
    let _b = cluster.start("a1:model=a");
    let second = cluster.until_served_by(&["a0", "a1"]).await;
    assert!(second.epoch > first);
    cluster.end().await;
}

#[tokio::test(start_paused = true)]
async fn junk_under_the_keys_is_removed_and_the_version_that_serves_is_written_again() {
    let mut cluster = Cluster::new();
    cluster.lead();
    let _a = cluster.start("a0:model=a");
    cluster.until_serves("a").await;
    let junk = || bytes::Bytes::from_static(b"{");
    let unused = version("unused").key().pending();
    for key in [unused.as_str(), keys::SERVING, "placement/nonsense"] {
        cluster.memory.put(key, junk(), None).await.unwrap();
    }
    let serving = || cluster.memory.get(keys::SERVING);
    let whole = async {
        while cluster.memory.get(&unused).await.unwrap().is_some()
            || serving().await.unwrap().unwrap().value == junk()
        {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LONG, whole).await.unwrap();
    let seen = cluster.placements.borrow().clone();
    assert_eq!(seen.serving.as_deref(), Some(&version("a")));
    // It is nobody's: whoever put it there may keep it.
    let kept = cluster.memory.get("placement/nonsense").await.unwrap();
    assert!(kept.is_some());
    cluster.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_crowd_of_versions_leaves_the_one_that_serves_alone() {
    let mut cluster = Cluster::new();
    cluster.lead();
    let _a = cluster.start("a0:model=a");
    cluster.until_serves("a").await;
    let crowd =
        (0..GROUPS_MAX * 2).map(|i| cluster.start(&format!("c{i}:model=c{i},segments=999")));
    let _crowd: Vec<_> = crowd.collect();
    cluster
        .until("many are placed", |p| p.groups.len() == GROUPS_MAX)
        .await;
    let _b = cluster.start("a1:model=a");
    cluster.until_served_by(&["a0", "a1"]).await;
    let stored = cluster.memory.list(keys::PLACEMENTS).await.unwrap();
    assert!(stored.entries.len() <= GROUPS_MAX * 2 + 1);
    cluster.end().await;
}
