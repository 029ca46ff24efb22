//! One contract for every store, run on memory and on a real etcd; and etcd losing its leader or
//! losing its data. Without an etcd binary in `PATH` the etcd tests say so and pass, unless the
//! environment variable `TRAMONTANE_TEST_REQUIRE_ETCD` is set: then they fail.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests are not seen as tests by the lints"
)]

use std::future::Future;
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use tempfile::TempDir;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::registry::RECORD_SCHEMA;
use tramontane_coordination::store::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use tramontane_coordination::{
    CasOutcome, Error, EtcdConfig, EtcdStore, LeaseId, Measured, Members, MemoryStore, ModelFacts,
    Revision, Roles, Store, Watch, WatchEvent, WorkerLoad, WorkerRecord, WorkerState,
    watch_members,
};
use tramontane_types::{Epoch, WorkerId};

/// Looked for in `PATH`.
const ETCD: &str = "etcd";
/// Looked for in `PATH`.
const ETCDCTL: &str = "etcdctl";
/// Where this is set, etcd must be there: its absence fails the tests.
const REQUIRE_ETCD: &str = "TRAMONTANE_TEST_REQUIRE_ETCD";
/// Longest wait for anything that must happen.
const LONG: Duration = Duration::from_secs(60);
/// Pause between two looks at a process that tells nobody when it is ready.
const LOOK_EVERY: Duration = Duration::from_millis(50);

fn text(value: &'static str) -> Bytes {
    Bytes::from_static(value.as_bytes())
}

async fn next(watch: &mut Watch) -> Result<WatchEvent, Error> {
    let event = timeout(LONG, watch.next()).await;
    event.expect("no event").expect("the watch ended")
}

async fn put<S: Store>(store: &S, key: &str, value: &'static str) -> Revision {
    store.put(key, text(value), None).await.unwrap()
}

/// What every store promises. `compact` forgets history before a revision.
async fn contract<S: Store, F: Future<Output = ()>>(store: S, compact: impl Fn(Revision) -> F) {
    keys_and_swaps(&store).await;
    lists(&store).await;
    watches(&store, compact).await;
    leases(&store).await;
    limits(&store).await;
}

async fn keys_and_swaps<S: Store>(store: &S) {
    assert_eq!(store.get("a/1").await.unwrap(), None);
    let first = put(store, "a/1", "one").await;
    let entry = store.get("a/1").await.unwrap().unwrap();
    assert_eq!(
        (entry.key.as_str(), &entry.value, entry.revision),
        ("a/1", &text("one"), first)
    );
    let cas = |expected, value| store.compare_and_swap("a/1", expected, text(value), None);
    assert_eq!(
        cas(None, "x").await.unwrap(),
        CasOutcome::Conflict(Some(entry))
    );
    let CasOutcome::Swapped(second) = cas(Some(first), "two").await.unwrap() else {
        panic!("not swapped");
    };
    assert!(second > first);
    assert!(matches!(
        cas(Some(first), "x").await.unwrap(),
        CasOutcome::Conflict(Some(_))
    ));
    assert!(!store.delete_if("a/1", first).await.unwrap());
    assert!(store.delete_if("a/1", second).await.unwrap());
    assert_eq!(
        cas(Some(second), "x").await.unwrap(),
        CasOutcome::Conflict(None)
    );
    assert!(matches!(
        cas(None, "three").await.unwrap(),
        CasOutcome::Swapped(_)
    ));
    assert!(store.delete("a/1").await.unwrap());
    assert!(!store.delete("a/1").await.unwrap());
}

async fn lists<S: Store>(store: &S) {
    // More than one page of a paged store.
    for i in 0..150 {
        put(store, &format!("list/{i:03}"), "v").await;
    }
    let last = put(store, "list0", "not below the prefix").await;
    let listing = store.list("list/").await.unwrap();
    assert_eq!(listing.entries.len(), 150);
    assert!(listing.entries.is_sorted_by(|a, b| a.key < b.key));
    assert!(listing.revision >= last);
    assert!(store.list("none/").await.unwrap().entries.is_empty());
}

async fn watches<S: Store, F: Future<Output = ()>>(store: &S, compact: impl Fn(Revision) -> F) {
    let start = store.list("w/").await.unwrap().revision;
    let first = put(store, "w/1", "one").await;
    put(store, "v/1", "somebody else's").await;
    // From the past, then live.
    let mut watch = store.watch("w/", start.next());
    assert!(matches!(next(&mut watch).await, Ok(WatchEvent::Put(e)) if e.revision == first));
    put(store, "w/2", "two").await;
    let event = next(&mut watch).await.unwrap();
    assert!(matches!(event, WatchEvent::Put(ref e) if e.key == "w/2" && e.value == text("two")));
    store.delete("w/1").await.unwrap();
    let event = next(&mut watch).await.unwrap();
    assert!(
        matches!(event, WatchEvent::Delete { ref key, .. } if key == "w/1"),
        "{event:?}"
    );
    compact(event.revision()).await;
    let mut behind = store.watch("w/", first);
    let error = next(&mut behind).await.unwrap_err();
    assert!(matches!(error, Error::Compacted { .. }), "{error}");
    assert!(
        timeout(LONG, behind.next()).await.unwrap().is_none(),
        "goes on after an error"
    );
    // The other one is not behind.
    let third = put(store, "w/3", "three").await;
    assert_eq!(next(&mut watch).await.unwrap().revision(), third);
}

async fn leases<S: Store>(store: &S) {
    let start = store.list("l/").await.unwrap().revision;
    let mut watch = store.watch("l/", start.next());
    let lease = store.grant_lease(Duration::from_secs(2)).await.unwrap();
    store.put("l/kept", text("v"), Some(lease)).await.unwrap();
    assert!(store.keep_alive(lease).await.unwrap());
    let other = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let swapped = store
        .compare_and_swap("l/revoked", None, text("v"), Some(other))
        .await;
    assert!(matches!(swapped.unwrap(), CasOutcome::Swapped(_)));
    store.revoke(other).await.unwrap();
    store.revoke(other).await.unwrap();
    assert!(!store.keep_alive(other).await.unwrap());
    assert_eq!(store.get("l/revoked").await.unwrap(), None);
    let mut gone = Vec::new();
    while gone.len() < 2 {
        if let WatchEvent::Delete { key, .. } = next(&mut watch).await.unwrap() {
            gone.push(key);
        }
    }
    assert_eq!(
        gone,
        ["l/revoked", "l/kept"],
        "the second by its time to live"
    );
    assert!(!store.keep_alive(lease).await.unwrap());
    let late = store
        .put("l/late", text("v"), Some(lease))
        .await
        .unwrap_err();
    assert_eq!(late, Error::LeaseNotFound { lease });
    assert!(!store.keep_alive(LeaseId(7)).await.unwrap());
}

async fn limits<S: Store>(store: &S) {
    let huge = Bytes::from(vec![b'x'; VALUE_BYTES_MAX + 1]);
    let error = store.put("huge", huge.clone(), None).await.unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let largest = huge.slice(1..);
    store.put("large", largest.clone(), None).await.unwrap();
    assert_eq!(store.get("large").await.unwrap().unwrap().value, largest);
    assert!(matches!(
        store.get("/tramontane/other/x").await,
        Err(Error::Invalid { .. })
    ));
    assert!(store.get(&"k".repeat(KEY_BYTES_MAX + 1)).await.is_err());
    assert!(matches!(
        next(&mut store.watch("ä", Revision(1))).await,
        Err(Error::Invalid { .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn memory_keeps_the_contract() {
    let store = MemoryStore::new();
    let compacted = store.clone();
    contract(store, |revision| {
        compacted.compact(revision);
        std::future::ready(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_keeps_the_contract() {
    let Some(cluster) = EtcdCluster::start(1).await else {
        return;
    };
    let store = cluster.store("contract");
    let endpoint = cluster.members[0].client.clone();
    let elsewhere = cluster.store("another");
    put(&elsewhere, "a/1", "must stay apart").await;
    contract(store.clone(), |revision| {
        let arguments = ["--endpoints", &endpoint, "compact", &revision.to_string()];
        let run = Command::new(ETCDCTL).args(arguments).output();
        async move {
            let output = run.await.unwrap();
            assert!(output.status.success(), "{output:?}");
        }
    })
    .await;
    assert_eq!(elsewhere.list("").await.unwrap().entries.len(), 1);
    // Nobody there: a typed error within the deadline.
    drop(cluster);
    let before = Instant::now();
    let error = store.get("a/1").await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
    assert!(
        before.elapsed() < Duration::from_secs(10),
        "{:?}",
        before.elapsed()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_leases_and_watches_outlive_the_leader_of_etcd() {
    let Some(mut cluster) = EtcdCluster::start(3).await else {
        return;
    };
    let store = Arc::new(cluster.store("leader"));
    let lease = store.grant_lease(Duration::from_secs(60)).await.unwrap();
    let start = store.put("n/lease", text("v"), Some(lease)).await.unwrap();
    let mut watch = store.watch("n/", start.next());
    let leader = cluster.leader().await;
    for round in 0..20 {
        if round == 5 {
            cluster.members[leader].process.kill().await.unwrap();
        }
        // A call may meet the election and run out of time, but not for long.
        let before = Instant::now();
        let key = format!("n/{round}");
        while let Err(error) = store.put(&key, text("v"), None).await {
            assert!(error.is_retryable(), "{error}");
            assert!(before.elapsed() < LONG, "{error}");
        }
    }
    assert!(
        store.keep_alive(lease).await.unwrap(),
        "the lease was lost with the leader"
    );
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 20 {
        seen.insert(next(&mut watch).await.unwrap().key().to_owned());
    }
    assert!(
        cluster.members[leader]
            .process
            .try_wait()
            .unwrap()
            .is_some()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_outlives_a_restart_and_notices_that_etcd_lost_its_data() {
    let Some(mut cluster) = EtcdCluster::start(1).await else {
        return;
    };
    let store = Arc::new(cluster.store("wiped"));
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let mut members = watch_members(Arc::clone(&store) as _, &tasks, stop.clone());
    let mut newest = put(&*store, "m/first", "v").await;
    for _ in 0..100 {
        newest = put(&*store, "m/busy", "v").await;
    }
    register(&store, "old", Duration::from_secs(600)).await;
    until(&mut members, "old", true).await;

    // Its data kept: the same watch goes on, nothing is missed.
    let mut watch = store.watch("m/", newest.next());
    cluster.restart(0, false).await;
    newest = put(&*store, "m/kept", "v").await;
    assert_eq!(next(&mut watch).await.unwrap().revision(), newest);
    register(&store, "kept", Duration::from_secs(600)).await;
    until(&mut members, "kept", true).await;

    // Its data lost: whoever comes and dies afterwards is seen, and nobody is thrown out at once.
    cluster.restart(0, true).await;
    let begun = put(&*store, "m/first", "v").await;
    assert!(begun < newest, "{begun} is not behind {newest}");
    let mut ahead = store.watch("m/", newest.next());
    let error = next(&mut ahead).await.unwrap_err();
    let replaced = |expected, found| Error::Replaced { expected, found };
    assert_eq!(error, replaced(newest, begun));
    assert!(timeout(LONG, ahead.next()).await.unwrap().is_none());
    register(&store, "young", Duration::from_secs(3)).await;
    let seen = until(&mut members, "young", true).await;
    assert!(seen.unconfirmed.contains(&WorkerId::new("old")), "{seen:?}");
    until(&mut members, "young", false).await;
    stop.cancel();
    tasks.close();
    timeout(LONG, tasks.wait()).await.unwrap();
}

/// Writes a worker's record under a lease that nobody keeps alive.
async fn register(store: &EtcdStore, id: &str, ttl: Duration) {
    let record = WorkerRecord {
        schema: RECORD_SCHEMA,
        id: WorkerId::new(id),
        address: "worker:7000".to_owned(),
        socket: None,
        roles: Roles {
            attention: true,
            experts: true,
        },
        capacity_bytes: 64_000,
        segment_bytes: 1000,
        numeric_class: "cpu-q8".to_owned(),
        model: ModelFacts {
            fingerprint: "f".to_owned(),
            name: "tiny".to_owned(),
            num_layers: 2,
            num_experts: 4,
            num_segments: 8,
        },
        state: WorkerState::Ready,
        loaded: Epoch(0),
        incarnation: 1,
        started_ms: 1,
        version: "1".to_owned(),
        load: WorkerLoad::default(),
        measured: Measured::default(),
        sequences_max: 0,
        part: None,
    };
    let lease = store.grant_lease(ttl).await.unwrap();
    let value = serde_json::to_vec(&record).unwrap();
    store
        .put(&record.key(), value.into(), Some(lease))
        .await
        .unwrap();
}

async fn until(
    members: &mut tokio::sync::watch::Receiver<Arc<Members>>,
    id: &str,
    there: bool,
) -> Arc<Members> {
    let worker = WorkerId::new(id);
    let reached = members.wait_for(|m| !m.stale && m.workers.contains_key(&worker) == there);
    let seen = timeout(LONG, reached).await;
    let seen = seen.unwrap_or_else(|_| panic!("worker {id} never: there={there}"));
    Arc::clone(&seen.unwrap())
}

struct EtcdCluster {
    members: Vec<EtcdMember>,
    /// `--initial-cluster` of every member.
    initial: String,
    data: TempDir,
}

struct EtcdMember {
    client: String,
    peer: String,
    process: Child,
}

fn there_is(binary: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(binary).is_file())
}

/// Starts member `index` on its own folder below `data`.
fn spawn_etcd(index: usize, client: &str, peer: &str, initial: &str, data: &Path) -> Child {
    let name = format!("m{index}");
    let mut command = Command::new(ETCD);
    command
        .args(["--name", &name, "--initial-cluster", initial])
        .args(["--listen-client-urls", client])
        .args(["--advertise-client-urls", client])
        .args(["--listen-peer-urls", peer])
        .args(["--initial-advertise-peer-urls", peer])
        .args(["--heartbeat-interval", "100", "--election-timeout", "1000"])
        .args(["--log-level", "error"])
        .arg("--data-dir")
        .arg(data.join(name));
    command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

impl EtcdCluster {
    async fn start(size: usize) -> Option<Self> {
        if !there_is(ETCD) || !there_is(ETCDCTL) {
            let required = std::env::var_os(REQUIRE_ETCD).is_some();
            assert!(
                !required,
                "no {ETCD} and {ETCDCTL} in PATH, and {REQUIRE_ETCD} is set"
            );
            println!("skipped: there is no {ETCD} and {ETCDCTL} in PATH");
            return None;
        }
        let data = TempDir::new().unwrap();
        let urls: Vec<(String, String)> = (0..size).map(|_| (free_url(), free_url())).collect();
        let named = urls
            .iter()
            .enumerate()
            .map(|(i, (_, peer))| format!("m{i}={peer}"));
        let initial = named.collect::<Vec<_>>().join(",");
        let start = |(i, (client, peer)): (usize, (String, String))| EtcdMember {
            process: spawn_etcd(i, &client, &peer, &initial, data.path()),
            client,
            peer,
        };
        let members = urls.into_iter().enumerate().map(start).collect();
        let cluster = Self {
            members,
            initial,
            data,
        };
        cluster.until_healthy().await;
        Some(cluster)
    }

    /// Kills a member and starts it again on the same addresses, with its data or without.
    async fn restart(&mut self, index: usize, wipe: bool) {
        let member = &mut self.members[index];
        member.process.kill().await.unwrap();
        if wipe {
            let folder = self.data.path().join(format!("m{index}"));
            std::fs::remove_dir_all(folder).unwrap();
        }
        let (client, peer) = (&member.client, &member.peer);
        member.process = spawn_etcd(index, client, peer, &self.initial, self.data.path());
        self.until_healthy().await;
    }

    async fn until_healthy(&self) {
        for member in &self.members {
            let before = Instant::now();
            while !etcdctl(&member.client, &["endpoint", "health"]).await.0 {
                assert!(before.elapsed() < LONG, "{} never healthy", member.client);
                sleep(LOOK_EVERY).await;
            }
        }
    }

    fn store(&self, cluster: &str) -> EtcdStore {
        let endpoints = self.members.iter().map(|m| m.client.clone()).collect();
        EtcdStore::new(EtcdConfig::new(endpoints, cluster)).unwrap()
    }

    /// Index of the member that leads.
    async fn leader(&self) -> usize {
        for (index, member) in self.members.iter().enumerate() {
            let (_, status) = etcdctl(&member.client, &["endpoint", "status"]).await;
            // endpoint, id, version, size, is leader, ...
            if status.split(", ").nth(4) == Some("true") {
                return index;
            }
        }
        panic!("no leader");
    }
}

async fn etcdctl(endpoint: &str, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(ETCDCTL);
    command.args(["--endpoints", endpoint]).args(arguments);
    let output = command.output().await.unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

fn free_url() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}
