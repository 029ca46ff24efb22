//! Whose request is next: fair queueing between tenants by the tokens that they use, after Sheng et al., "Fairness
//! in Serving Large Language Models" (<https://arxiv.org/abs/2401.00588>). Each tenant has a counter of what it was
//! served, prompt tokens when a request begins and generated ones as they come, divided by its weight; the tenant
//! with the lowest goes next. Within a tenant and class it is first come, first served. Running requests keep their places,
//! so no tenant gets all of them. Pure: it never waits, and
//! time is an argument.

mod held;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::TenantName;
use super::config::{CLASSES, Class, Limits};
use held::Held;

/// What a prompt token counts.
pub(crate) const PROMPT_COST: u64 = 1;
/// What a generated token counts: it takes a step of its own, a prompt's tokens share steps.
pub(crate) const GENERATED_COST: u64 = 2;
/// Units of a counter per unit of cost, so that large weights still move it.
const SCALE: u64 = 1 << 12;
/// Tenants that are remembered. Those with nothing to do are forgotten beyond it, their use with them.
const ACCOUNTS_MAX: usize = 16_384;

/// One of so many places is for tenants that have not got all the others: where there are several, none of them gets
/// more.
const OTHERS_SHARE: usize = 8;

/// How much may wait, of all tenants together. Who has more waiting than others gives way to them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueueMax {
    pub(crate) requests: usize,
    pub(crate) bytes: usize,
}

/// What a request asks for.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) tenant: TenantName,
    pub(crate) class: Class,
    pub(crate) limits: Limits,
    /// Sequences.
    pub(crate) places: usize,
    pub(crate) prompt_tokens: u64,
    /// Memory that it takes while it waits.
    pub(crate) bytes: usize,
}

/// Names a request that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

/// A request that may run.
#[derive(Debug)]
pub(crate) struct Granted<W> {
    pub(crate) tenant: TenantName,
    pub(crate) places: usize,
    pub(crate) waiter: W,
}

/// What became of a request that came.
#[derive(Debug)]
pub(crate) enum Entered<W> {
    /// It runs.
    Now(Granted<W>),
    /// It waits; `gone` had to give way.
    Waits { ticket: Ticket, gone: Vec<W> },
    /// There is no room for it.
    Full(W),
}

/// All who wait, and what everybody has had.
#[derive(Debug)]
pub(crate) struct FairQueue<W> {
    accounts: BTreeMap<TenantName, Account<W>>,
    max: QueueMax,
    /// A request that waits so long counts as one class higher.
    age: Duration,
    places: usize,
    places_used: usize,
    /// Whether there are several tenants.
    is_shared: bool,
    num_waiting: usize,
    num_arrived: usize,
    bytes: usize,
    next_ticket: u64,
    /// Whose queue was the last to become empty.
    last_left: Option<TenantName>,
}

#[derive(Debug)]
struct Account<W> {
    limits: Limits,
    /// Cost of what it was served, in [`SCALE`] units, divided by its weight.
    served: u64,
    /// Requests that run.
    running: usize,
    /// Places that these have.
    places: usize,
    /// Requests that came and do not wait yet.
    arrived: usize,
    waiting: [VecDeque<Waiter<W>>; CLASSES],
    num_waiting: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Waiter<W> {
    ticket: Ticket,
    places: usize,
    prompt_tokens: u64,
    bytes: usize,
    since: Instant,
    what: W,
}

/// Where the next request is: class as it counts after its wait, use of its tenant, order of arrival.
type Turn = (usize, u64, Ticket);

impl<W> FairQueue<W> {
    /// With `is_shared` no tenant gets all places.
    pub(crate) fn new(places: usize, is_shared: bool, max: QueueMax, age: Duration) -> Self {
        Self {
            accounts: BTreeMap::new(),
            max,
            age,
            places,
            places_used: 0,
            is_shared,
            num_waiting: 0,
            num_arrived: 0,
            bytes: 0,
            next_ticket: 0,
            last_left: None,
        }
    }

    /// How many places there are from now on. What runs keeps those that it has.
    pub(crate) const fn set_places(&mut self, places: usize) {
        self.places = places;
    }

    const fn places_free(&self) -> usize {
        self.places.saturating_sub(self.places_used)
    }

    /// Places that one request may have, and all of one tenant together.
    const fn places_max(&self) -> (usize, usize) {
        if self.is_shared {
            let of_one = self.places - self.places / OTHERS_SHARE;
            return (of_one, of_one);
        }
        (self.places, usize::MAX)
    }

    /// Requests that wait.
    pub(crate) const fn num_waiting(&self) -> usize {
        self.num_waiting
    }

    /// Memory that they take.
    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a request that comes can have a place, or wait for one. Only who has as many here as any other tenant
    /// cannot.
    pub(crate) fn has_room(&self, tenant: &TenantName) -> bool {
        let room = self.places_free().saturating_add(self.max.requests);
        if self.num_arrived + self.num_waiting < room {
            return true;
        }
        let own = self.accounts.get(tenant).map_or(0, Account::num_here);
        let others = self.accounts.iter().filter(|(name, _)| *name != tenant);
        others.map(|(_, account)| account.num_here()).max() > Some(own)
    }

    /// Notes a request that came and is not understood yet; whether there is room for it.
    pub(crate) fn arrive(&mut self, tenant: &TenantName, limits: Limits) -> bool {
        if !self.has_room(tenant) {
            return false;
        }
        self.account(tenant, limits).arrived += 1;
        self.num_arrived += 1;
        true
    }

    /// The request that arrived is understood, or is gone.
    pub(crate) fn settle(&mut self, tenant: &TenantName) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.arrived = account.arrived.saturating_sub(1);
            self.num_arrived = self.num_arrived.saturating_sub(1);
        }
    }

    /// A request comes: it runs, it waits, or there is no room.
    pub(crate) fn enter(&mut self, ask: Ask, what: W, now: Instant) -> Entered<W> {
        let (places_max, tenant_max) = self.places_max();
        let places = ask.places.min(places_max);
        let floor = self.floor();
        let account = self.account(&ask.tenant, ask.limits);
        // Who had nothing to do does not save up for later.
        if account.num_waiting == 0 {
            account.served = account.served.max(floor);
        }
        // Behind a larger one of its own that has to wait it waits as well.
        let may_run = account.num_waiting == 0 && account.may_have(places, tenant_max);
        if may_run && places <= self.places_free() && self.next(now).is_none() {
            return Entered::Now(self.grant(ask.tenant, places, ask.prompt_tokens, what));
        }
        let Some(gone) = self.make_room(&ask) else {
            return Entered::Full(what);
        };
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.num_waiting += 1;
        self.bytes += ask.bytes;
        let account = self.account(&ask.tenant, ask.limits);
        account.num_waiting += 1;
        account.bytes += ask.bytes;
        account.waiting[ask.class.index()].push_back(Waiter {
            ticket,
            places: ask.places,
            prompt_tokens: ask.prompt_tokens,
            bytes: ask.bytes,
            since: now,
            what,
        });
        Entered::Waits { ticket, gone }
    }

    /// The next request that may run.
    pub(crate) fn pop(&mut self, now: Instant) -> Option<Granted<W>> {
        let (tenant, class) = self.next(now)?;
        let ((places_max, _), places_free) = (self.places_max(), self.places_free());
        let account = self.accounts.get_mut(&tenant)?;
        let queue = &mut account.waiting[class];
        let fits = queue
            .front()
            .is_some_and(|head| head.places.min(places_max) <= places_free);
        // A large request is not passed by smaller ones: they would keep it from ever running.
        let head = fits.then(|| queue.pop_front())??;
        account.num_waiting -= 1;
        account.bytes -= head.bytes;
        self.num_waiting -= 1;
        self.bytes -= head.bytes;
        if account.num_waiting == 0 {
            self.last_left = Some(tenant.clone());
        }
        let places = head.places.min(places_max);
        Some(self.grant(tenant, places, head.prompt_tokens, head.what))
    }

    /// Takes a request out that waits no longer. Whether it was there.
    pub(crate) fn leave(&mut self, tenant: &TenantName, ticket: Ticket) -> bool {
        let Some(account) = self.accounts.get_mut(tenant) else {
            return false;
        };
        for queue in &mut account.waiting {
            let Some(index) = queue.iter().position(|waiter| waiter.ticket == ticket) else {
                continue;
            };
            let bytes = queue.remove(index).map_or(0, |waiter| waiter.bytes);
            account.num_waiting -= 1;
            account.bytes -= bytes;
            self.num_waiting -= 1;
            self.bytes -= bytes;
            return true;
        }
        false
    }

    /// Notes tokens that a request of `tenant` generated.
    pub(crate) fn generated(&mut self, tenant: &TenantName, num_tokens: u64) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.charge(num_tokens.saturating_mul(GENERATED_COST));
        }
    }

    /// Takes places back, of a request of `tenant` that ends or goes on with fewer.
    pub(crate) fn give_back(&mut self, tenant: &TenantName, places: usize) {
        self.places_used = self.places_used.saturating_sub(places);
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.places = account.places.saturating_sub(places);
        }
    }

    /// A request of `tenant` has ended.
    pub(crate) fn finish(&mut self, tenant: &TenantName) {
        if let Some(account) = self.accounts.get_mut(tenant) {
            account.running = account.running.saturating_sub(1);
        }
    }

    /// What a tenant that comes back is counted as having had at least: the least of those who wait, or what
    /// the last who waited has had.
    fn floor(&self) -> u64 {
        let waiting = self.accounts.values().filter(|a| a.num_waiting > 0);
        let least = waiting.map(|account| account.served).min();
        let last = || {
            let last = self.last_left.as_ref()?;
            Some(self.accounts.get(last)?.served)
        };
        least.or_else(last).unwrap_or(0)
    }

    fn account(&mut self, tenant: &TenantName, limits: Limits) -> &mut Account<W> {
        if self.accounts.len() >= ACCOUNTS_MAX && !self.accounts.contains_key(tenant) {
            self.accounts.retain(|_, account| !account.is_idle());
        }
        let account = self.accounts.entry(tenant.clone());
        account.or_insert_with(|| Account::new(limits))
    }

    /// The tenant and class of whoever is next, whether there are places or not.
    fn next(&self, now: Instant) -> Option<(TenantName, usize)> {
        let mut best: Option<(Turn, &TenantName, usize)> = None;
        let (places_max, tenant_max) = self.places_max();
        for (tenant, account) in &self.accounts {
            if account.num_waiting == 0 {
                continue;
            }
            for (class, queue) in account.waiting.iter().enumerate() {
                let Some(head) = queue.front() else { continue };
                if !account.may_have(head.places.min(places_max), tenant_max) {
                    continue;
                }
                let turn = (
                    self.aged(class, head.since, now),
                    account.served,
                    head.ticket,
                );
                if best.as_ref().is_none_or(|(other, ..)| turn < *other) {
                    best = Some((turn, tenant, class));
                }
            }
        }
        best.map(|(_, tenant, class)| (tenant.clone(), class))
    }

    fn aged(&self, class: usize, since: Instant, now: Instant) -> usize {
        let waited = now.saturating_duration_since(since).as_nanos();
        let steps = waited.checked_div(self.age.as_nanos()).unwrap_or(0);
        class.saturating_sub(usize::try_from(steps).unwrap_or(usize::MAX))
    }

    fn grant(
        &mut self,
        tenant: TenantName,
        places: usize,
        prompt_tokens: u64,
        waiter: W,
    ) -> Granted<W> {
        self.places_used += places;
        if let Some(account) = self.accounts.get_mut(&tenant) {
            account.running += 1;
            account.places += places;
            account.charge(prompt_tokens.saturating_mul(PROMPT_COST));
        }
        Granted {
            tenant,
            places,
            waiter,
        }
    }

    /// Makes room for one that is to wait, at the cost of the tenants that have most waiting; `None`, and nobody gives
    /// way, when that would not suffice. What is large may turn out several that are small.
    fn make_room(&mut self, ask: &Ask) -> Option<Vec<W>> {
        if self.max.requests == 0 || ask.bytes > self.max.bytes {
            return None;
        }
        // The common case needs no list of all tenants.
        if self.has_space(self.num_waiting, self.bytes, ask) {
            return Some(Vec::new());
        }
        let gone = self.who_gives_way(ask)?;
        Some(gone.iter().filter_map(|name| self.turn_out(name)).collect())
    }

    const fn has_space(&self, num_waiting: usize, bytes: usize, ask: &Ask) -> bool {
        num_waiting < self.max.requests && bytes.saturating_add(ask.bytes) <= self.max.bytes
    }

    /// The tenants that one request each has to be taken from, in order, so that `ask` can wait: at each step the one
    /// that has most of what there is too little of. `None` when that is not more than the one who asks would have.
    fn who_gives_way(&self, ask: &Ask) -> Option<Vec<TenantName>> {
        let mut held: Vec<Held<'_, W>> = self.accounts.iter().map(Held::of).collect();
        let own = self.accounts.get(&ask.tenant);
        let (mut num_waiting, mut bytes) = (self.num_waiting, self.bytes);
        let mut gone = Vec::new();
        while !self.has_space(num_waiting, bytes, ask) {
            let is_crowded = num_waiting >= self.max.requests;
            let (own, asked) = if is_crowded {
                (own.map_or(0, |own| own.num_waiting), 1)
            } else {
                (own.map_or(0, |own| own.bytes), ask.bytes)
            };
            let longest = held.iter_mut().max_by_key(|held| held.amount(is_crowded))?;
            if longest.amount(is_crowded) <= own.saturating_add(asked) {
                return None;
            }
            let freed = longest.turn_out()?;
            num_waiting -= 1;
            bytes -= freed;
            gone.push(longest.tenant.clone());
        }
        Some(gone)
    }

    /// Takes the last that came of the lowest class out of a tenant's queue.
    fn turn_out(&mut self, tenant: &TenantName) -> Option<W> {
        let account = self.accounts.get_mut(tenant)?;
        // In the order of `Account::last_first`.
        let queue = account.waiting.iter_mut().rev().find(|q| !q.is_empty())?;
        let last = queue.pop_back()?;
        account.num_waiting -= 1;
        account.bytes -= last.bytes;
        self.num_waiting -= 1;
        self.bytes -= last.bytes;
        Some(last.what)
    }
}

impl<W> Account<W> {
    fn new(limits: Limits) -> Self {
        Self {
            limits,
            served: 0,
            running: 0,
            places: 0,
            arrived: 0,
            waiting: std::array::from_fn(|_| VecDeque::new()),
            num_waiting: 0,
            bytes: 0,
        }
    }

    /// Who waits, of the lowest class first, and in it who came last.
    fn last_first(&self) -> impl Iterator<Item = &Waiter<W>> {
        self.waiting
            .iter()
            .rev()
            .flat_map(|queue| queue.iter().rev())
    }

    /// Whether it may have so many places more, of at most `max`.
    const fn may_have(&self, places: usize, max: usize) -> bool {
        self.running < self.limits.concurrent && self.places + places <= max
    }

    const fn num_here(&self) -> usize {
        self.arrived + self.num_waiting
    }

    const fn is_idle(&self) -> bool {
        self.running == 0 && self.num_here() == 0
    }

    fn charge(&mut self, cost: u64) {
        let share = cost.saturating_mul(SCALE) / u64::from(self.limits.weight.get());
        self.served = self.served.saturating_add(share);
    }
}

#[cfg(test)]
mod tests;
