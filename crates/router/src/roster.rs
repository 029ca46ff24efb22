//! Who is there: the workers that the store lists, and attention workers that it lost sight of but that answer.
//! A lease that runs out says that a worker and the store do not reach each other; whether the worker
//! serves, its pulse says. Never plans: the planner goes by the store alone.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{Members, WorkerRecord, WorkerState};
use tramontane_types::WorkerId;

use crate::pulse::Pulse;
use crate::worker_link::{Connect, WorkerLink};

/// How often it is looked who is listed and, of those who are not, who still answers: about as often as workers are
/// asked.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// One attention worker and the way to it.
#[derive(Debug)]
pub(crate) struct Contact {
    pub(crate) id: WorkerId,
    pub(crate) link: Arc<dyn WorkerLink>,
    pub(crate) pulse: Pulse,
    address: String,
    incarnation: u64,
}

impl Contact {
    fn is_of(&self, record: &WorkerRecord) -> bool {
        (&self.address, self.incarnation) == (&record.address, record.incarnation)
    }
}

/// Where the pulses of workers are felt.
#[derive(Clone, Debug, Default)]
pub(crate) struct PulseTasks {
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

/// The ways to all attention workers.
#[derive(Clone, Debug)]
pub(crate) struct Roster {
    contacts: Arc<RwLock<HashMap<WorkerId, Arc<Contact>>>>,
    members: watch::Receiver<Arc<Members>>,
}

impl Roster {
    /// Follows whom the store lists until `pulses` stop, reaching attention workers through `connect`.
    pub(crate) fn follow(
        listed: watch::Receiver<Arc<Members>>,
        connect: Arc<dyn Connect>,
        pulses: PulseTasks,
    ) -> Self {
        let (sender, members) = watch::channel(Arc::default());
        let contacts = Arc::default();
        let (tasks, stop) = (pulses.tasks.clone(), pulses.stop.clone());
        let mut keeper = Keeper {
            connect,
            pulses,
            contacts: Arc::clone(&contacts),
            known: Arc::default(),
            lapsed: BTreeMap::new(),
            sender,
        };
        // Who is there already can be asked at once.
        keeper.look(&listed.borrow().clone());
        tasks.spawn(async move {
            stop.run_until_cancelled(keeper.run(listed)).await;
        });
        Self { contacts, members }
    }

    /// The members, those included that are kept for their signs of life; they count as unconfirmed.
    pub(crate) fn members(&self) -> watch::Receiver<Arc<Members>> {
        self.members.clone()
    }

    /// The way to an attention worker that is a member.
    pub(crate) fn contact(&self, id: &WorkerId) -> Option<Arc<Contact>> {
        self.contacts.read().get(id).cloned()
    }
}

/// Keeps contacts and members in step with what the store lists and with the pulses.
struct Keeper {
    connect: Arc<dyn Connect>,
    pulses: PulseTasks,
    contacts: Arc<RwLock<HashMap<WorkerId, Arc<Contact>>>>,
    /// What the store listed last.
    known: Arc<Members>,
    /// Workers that vanished from it without a word, as they were.
    lapsed: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    sender: watch::Sender<Arc<Members>>,
}

impl Keeper {
    async fn run(mut self, mut listed: watch::Receiver<Arc<Members>>) {
        loop {
            let seen = listed.borrow_and_update().clone();
            self.look(&seen);
            tokio::select! {
                changed = listed.changed() => if changed.is_err() { return },
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    fn look(&mut self, listed: &Arc<Members>) {
        if self.lapsed.is_empty() && Arc::ptr_eq(&self.known, listed) {
            return;
        }
        self.notice_lapsed(listed);
        let mut members = Members::clone(listed);
        for (id, record) in &self.lapsed {
            members.workers.insert(id.clone(), Arc::clone(record));
            members.unconfirmed.insert(id.clone());
        }
        self.connect(&members);
        self.known = Arc::clone(listed);
        self.sender.send_if_modified(|shown| {
            let changed = **shown != members;
            if changed {
                *shown = Arc::new(members);
            }
            changed
        });
    }

    /// Who is gone from the store but was ready, said no goodbye, and answers.
    fn notice_lapsed(&mut self, listed: &Members) {
        let is_gone = |id: &WorkerId| !listed.workers.contains_key(id);
        let contacts = self.contacts.read();
        let is_alive = |id: &WorkerId| contacts.get(id).is_some_and(|c| c.pulse.is_alive());
        for (id, record) in self.known.workers.iter().filter(|(id, _)| is_gone(id)) {
            if record.roles.attention && record.state == WorkerState::Ready && is_alive(id) {
                tracing::warn!(worker = %id, "the store lost sight of a worker that answers, going on with it");
                self.lapsed.insert(id.clone(), Arc::clone(record));
            }
        }
        self.lapsed.retain(|id, _| is_gone(id) && is_alive(id));
    }

    /// Connects to workers that came and forgets those that left or were replaced.
    fn connect(&self, members: &Members) {
        let mut contacts = self.contacts.write();
        let is_needed = |record: &Arc<WorkerRecord>| record.roles.attention;
        contacts.retain(|id, contact| {
            let record = members.workers.get(id).filter(|record| is_needed(record));
            record.is_some_and(|record| contact.is_of(record))
        });
        for (id, record) in &members.workers {
            if !is_needed(record) || contacts.contains_key(id) {
                continue;
            }
            match self.connect.connect(&record.address) {
                Ok(link) => {
                    let PulseTasks { tasks, stop } = &self.pulses;
                    let contact = Contact {
                        id: id.clone(),
                        pulse: Pulse::start(id.clone(), Arc::clone(&link), tasks, stop),
                        link,
                        address: record.address.clone(),
                        incarnation: record.incarnation,
                    };
                    contacts.insert(id.clone(), Arc::new(contact));
                }
                Err(error) => {
                    tracing::warn!(worker = %id, address = record.address, %error, "address not usable");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::time::timeout;
    use tonic::{Status, async_trait};
    use tramontane_proto::v1::{GenerateSequenceRequest, WorkerStatus};

    use super::*;
    use crate::events::changes::tests::record;
    use crate::worker_link::SequenceEvents;

    const LONG: Duration = Duration::from_secs(60);

    /// Workers that answer as long as it is said so.
    #[derive(Clone, Debug)]
    struct Workers(Arc<AtomicBool>);

    impl Connect for Workers {
        fn connect(&self, _: &str) -> Result<Arc<dyn WorkerLink>, tonic::transport::Error> {
            Ok(Arc::new(self.clone()))
        }
    }

    #[async_trait]
    impl WorkerLink for Workers {
        async fn generate(&self, _: GenerateSequenceRequest) -> Result<SequenceEvents, Status> {
            Err(Status::unimplemented("only pulses"))
        }

        async fn status(&self) -> Result<WorkerStatus, Status> {
            let is_alive = self.0.load(Ordering::Relaxed);
            let gone = || Status::unavailable("gone");
            is_alive.then(WorkerStatus::default).ok_or_else(gone)
        }
    }

    struct Scene {
        store: watch::Sender<Arc<Members>>,
        answers: Arc<AtomicBool>,
        roster: Roster,
        pulses: PulseTasks,
    }

    impl Scene {
        fn new() -> Self {
            let (store, listed) = watch::channel(Arc::default());
            let (answers, pulses) = (Arc::new(AtomicBool::new(true)), PulseTasks::default());
            let connect = Arc::new(Workers(Arc::clone(&answers)));
            Self {
                roster: Roster::follow(listed, connect, pulses.clone()),
                store,
                answers,
                pulses,
            }
        }

        fn list(&self, records: &[WorkerRecord]) {
            let entry = |record: &WorkerRecord| (record.id.clone(), Arc::new(record.clone()));
            let members = Members {
                workers: records.iter().map(entry).collect(),
                synced: true,
                ..Members::default()
            };
            self.store.send_replace(Arc::new(members));
        }

        /// Waits until the members are these, `name` or `name?` for those without a lease.
        async fn until(&self, expected: &[&str]) {
            let mut members = self.roster.members();
            let named = |members: &Arc<Members>| {
                let mark = |id: &WorkerId| {
                    if members.unconfirmed.contains(id) {
                        "?"
                    } else {
                        ""
                    }
                };
                let names = members.workers.keys().map(|id| format!("{id}{}", mark(id)));
                names.collect::<Vec<_>>() == expected
            };
            let reached = timeout(LONG, members.wait_for(named)).await;
            let reached = reached.map(|seen| seen.map(|_| ()));
            assert!(
                reached.is_ok(),
                "never {expected:?}: {:?}",
                self.roster.members().borrow()
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_ends_takes_nobody_who_answers() {
        let scene = Scene::new();
        let workers = [
            record("a", WorkerState::Ready),
            record("b", WorkerState::Ready),
        ];
        scene.list(&workers);
        scene.until(&["a", "b"]).await;
        let a = scene.roster.contact(&workers[0].id).unwrap();
        // All leases end at once: the store's side is broken, not ours.
        scene.list(&[]);
        scene.until(&["a?", "b?"]).await;
        scene.list(&workers[..1]);
        scene.until(&["a", "b?"]).await;
        let again = scene.roster.contact(&workers[0].id).unwrap();
        assert!(Arc::ptr_eq(&a, &again), "the connection is kept");
        // Who does not answer either is gone.
        scene.answers.store(false, Ordering::Relaxed);
        scene.until(&["a"]).await;
        scene.pulses.stop.cancel();
        scene.pulses.tasks.close();
        timeout(LONG, scene.pulses.tasks.wait()).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_said_goodbye_or_is_another_process_is_not_kept() {
        let scene = Scene::new();
        let mut worker = record("a", WorkerState::Ready);
        scene.list(&[worker.clone()]);
        scene.until(&["a"]).await;
        let first = scene.roster.contact(&worker.id).unwrap();
        scene.list(&[]);
        scene.until(&["a?"]).await;
        worker.incarnation += 1;
        scene.list(&[worker.clone()]);
        scene.until(&["a"]).await;
        let second = scene.roster.contact(&worker.id).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        worker.state = WorkerState::Draining;
        scene.list(&[worker.clone()]);
        let mut members = scene.roster.members();
        let drains = |members: &Arc<Members>| {
            let worker = members.workers.get(&worker.id);
            worker.is_some_and(|worker| worker.state == WorkerState::Draining)
        };
        let drains = timeout(LONG, members.wait_for(drains)).await;
        drop(drains.unwrap().unwrap());
        scene.list(&[]);
        scene.until(&[]).await;
        assert!(scene.roster.contact(&worker.id).is_none());
        scene.pulses.stop.cancel();
    }
}
