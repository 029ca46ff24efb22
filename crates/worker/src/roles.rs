//! Follows what the operator wants this worker to do: attention, experts, or both. Goes from what it does to
//! what is wanted one role at a time, and never leaves anybody without what it still does for them.
//!
//! A role that is taken on is in the record once the worker can do it. One that is given up is in the record
//! until nobody needs it: routers and the planner look at the intent and ask no more.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tramontane_coordination::{GroupPlacements, Part, Placements, Registration, Roles, SeenIntent};
use tramontane_types::WorkerId;

use crate::attention::{AttentionMaker, EngineSlot};
use crate::config::RoleSet;
use crate::state::Node;
use crate::{Error, WorkerConfig};

/// How long to wait before trying again to make an attention half that could not be made.
const MAKE_RETRY: Duration = Duration::from_secs(5);
/// How often a worker that waits for the planner to take slices away looks again.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the engine's last step may take once nothing runs, or what runs is handed back.
const STOP_MAX: Duration = Duration::from_secs(5);
/// How long a starting worker waits for the store to say what is wanted of it; then its configuration counts
/// until it does.
const INTENT_WAIT_MAX: Duration = Duration::from_secs(2);

/// Keeps the roles of one worker.
#[derive(Debug)]
pub(crate) struct RoleKeeper {
    pub(crate) node: Arc<Node>,
    pub(crate) config: WorkerConfig,
    pub(crate) part: Option<Part>,
    pub(crate) maker: AttentionMaker,
    pub(crate) slot: Arc<EngineSlot>,
    pub(crate) registration: Registration,
    pub(crate) placements: watch::Receiver<Arc<Placements>>,
    pub(crate) intent: watch::Receiver<Arc<SeenIntent>>,
}

/// The roles to start with: wanted ones if the store says so in time.
pub(crate) async fn initial(
    config: &WorkerConfig,
    part: Option<Part>,
    mut intent: watch::Receiver<Arc<SeenIntent>>,
) -> Roles {
    let synced = intent.wait_for(|seen| seen.synced);
    // Away or ended: the keeper follows when it is back.
    let seen = timeout(INTENT_WAIT_MAX, synced).await.ok();
    match seen.and_then(Result::ok) {
        Some(seen) => wanted(config, part, &seen),
        None => config.roles.0,
    }
}

/// What is wanted of this worker, as far as it can do that; what it was configured for where it can do nothing of it.
fn wanted(config: &WorkerConfig, part: Option<Part>, seen: &SeenIntent) -> Roles {
    let can = part.map_or(RoleSet::default().0, Part::roles);
    let wish = seen.intent.roles_of(&WorkerId::new(&config.id), can);
    wish.unwrap_or(config.roles.0)
}

impl RoleKeeper {
    /// Runs until `stop`, which leaves the worker with the roles that it has then.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let seen = Arc::clone(&self.intent.borrow_and_update());
            let wish = wanted(&self.config, self.part, &seen);
            let mut intent = self.intent.clone();
            let (config, part) = (self.config.clone(), self.part);
            let other_wish = async {
                let other = intent.wait_for(|seen| wanted(&config, part, seen) != wish);
                if other.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = other_wish => {}
                () = self.go_to(wish) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Takes on what is wanted, then gives up what is not, and stays so.
    async fn go_to(&self, wish: Roles) {
        let now = self.node.roles();
        if now != wish {
            let (worker, from, to) = (&self.node.id, RoleSet(now), RoleSet(wish));
            tracing::info!(%worker, %from, %to, "roles change");
        }
        // A wish that was taken back while sequences ended.
        if let Some(engine) = self.node.engine().filter(|_| wish.attention) {
            engine.accept_new();
        }
        if wish.experts && !self.node.roles().experts {
            self.become_with(|roles| roles.experts = true);
        }
        if wish.attention && self.node.engine().is_none() {
            self.take_attention_on().await;
        }
        if !wish.attention && self.node.roles().attention {
            self.give_attention_up().await;
        }
        if !wish.experts && self.node.roles().experts {
            self.placed_elsewhere().await;
            // What callers have not seen yet is served on until nobody asks.
            self.become_with(|roles| roles.experts = false);
        }
        // A role that was to come, and was taken back before it did, has left room for nothing.
        let capacity = self.capacity(wish);
        self.registration
            .update(|record| record.capacity_bytes = capacity);
        if now != wish {
            let (worker, roles) = (&self.node.id, RoleSet(wish));
            tracing::info!(%worker, %roles, "roles changed");
        }
        std::future::pending::<()>().await;
    }

    async fn take_attention_on(&self) {
        // First of all the memory that it takes: the planner moves what has no room any more.
        let capacity = || {
            self.capacity(Roles {
                attention: true,
                ..self.node.roles()
            })
        };
        self.registration
            .update(|record| record.capacity_bytes = capacity());
        let half = &self.node.experts;
        let held = || half.store.num_segments_held() * half.segment_bytes;
        while self.node.roles().experts && held() > capacity() {
            sleep(LOOK_EVERY).await;
        }
        loop {
            match self.maker.make(&self.node).await {
                Ok(made) => {
                    self.slot.put(made);
                    break;
                }
                Err(error) => self.report(&error),
            }
            sleep(MAKE_RETRY).await;
        }
        self.become_with(|roles| roles.attention = true);
    }

    fn report(&self, error: &Error) {
        let (worker, error) = (&self.node.id, error as &dyn std::error::Error);
        tracing::error!(%worker, error, retry_in = ?MAKE_RETRY, "attention role not taken on");
    }

    /// Waits until no placement names this worker.
    async fn placed_elsewhere(&self) {
        let mut placements = self.placements.clone();
        let me = &self.node.id;
        let elsewhere = placements.wait_for(|seen| {
            let of_group = |group: &GroupPlacements| {
                let mut placements = group.published.iter().chain(&group.pending);
                placements.any(|placement| placement.workers.contains(me))
            };
            seen.synced && !seen.groups.values().any(of_group)
        });
        // The watch ends with the worker.
        if elsewhere.await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn give_attention_up(&self) {
        let (worker, limit) = (&self.node.id, self.config.drain_deadline);
        if let Some(engine) = self.node.engine() {
            engine.refuse_new();
            let idle = timeout(limit, engine.idle()).await;
            if idle.is_err() {
                let left = engine.num_running();
                tracing::warn!(%worker, left, ?limit, "sequences did not end, handed back");
            }
        }
        // From here on a wish that is taken back makes a new engine.
        if !self.slot.take_out(STOP_MAX).await {
            tracing::warn!(%worker, "the engine's step did not end in time");
        }
        self.become_with(|roles| roles.attention = false);
    }

    /// Changes what the worker does, and says so.
    fn become_with(&self, change: impl Fn(&mut Roles)) {
        self.node.roles.send_modify(|roles| change(roles));
        let roles = self.node.roles();
        self.registration.update(|record| {
            record.roles = roles;
            // Inside: ranks of an island come and go meanwhile, and the last one to say so is right.
            record.capacity_bytes = self.capacity(roles);
        });
    }

    fn capacity(&self, roles: Roles) -> u64 {
        self.node.capacity(&self.config, roles)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles(text: &str) -> Roles {
        text.parse::<RoleSet>().unwrap().0
    }

    #[test]
    fn a_worker_wants_what_the_operator_wants_as_far_as_it_can() {
        let config = WorkerConfig {
            id: "w".to_owned(),
            roles: "experts".parse().unwrap(),
            ..WorkerConfig::default()
        };
        let mut seen = SeenIntent::default();
        let part = |attention, end_layer| {
            Some(Part {
                attention,
                first_layer: 0,
                end_layer,
            })
        };
        assert_eq!(wanted(&config, None, &seen), roles("experts"));
        for (wish, part, expected) in [
            ("attention,experts", None, "attention,experts"),
            ("attention,experts", part(false, 2), "experts"),
            ("attention,experts", part(true, 0), "attention"),
            ("attention,experts", part(true, 1), "attention,experts"),
            // Nothing of it: as configured.
            ("attention", part(false, 2), "experts"),
        ] {
            seen.intent.roles.insert(WorkerId::new("w"), roles(wish));
            assert_eq!(wanted(&config, part, &seen), roles(expected), "{wish}");
        }
    }
}
