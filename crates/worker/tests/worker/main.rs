//! Whole workers on loopback sockets, with a tiny model and a store in memory: what clients, peers and
//! the planner see of them.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it finds something wrong, also in what tests share"
)]

mod behaviour;
mod cluster;
mod drill;
mod exactness;
mod island;
mod mixed;
mod orphans;
mod roles;
mod weights;
