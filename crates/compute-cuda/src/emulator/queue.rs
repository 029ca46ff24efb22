//! What streams of the emulator have been asked to do, and what it knows of its memory. Does none of it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::TcpListener;
use std::ptr;
use std::sync::Arc;

use super::ring::Ring;
use crate::device::{Args, DeviceError, Handle, Kernel, Shape};

/// One thing that a stream does.
#[derive(Clone)]
pub(super) enum Operation {
    CopyIn(u64, Host, usize),
    CopyOut(Host, u64, usize),
    CopyWithin(u64, u64, usize),
    Fill(u64, u8, usize),
    Launch(Kernel, Shape, Args),
    Graph(Arc<[Self]>),
    /// What ranks do together.
    Exchange(Exchange),
    /// What an event's record left in the queue.
    Mark(u64),
    /// Another stream is run until it has passed this mark.
    Await(Handle, u64),
}

/// One operation of ranks.
#[derive(Clone)]
pub(super) struct Exchange {
    pub(super) ring: Arc<Ring>,
    pub(super) at: u64,
    pub(super) bytes: usize,
    /// Every rank has its part, or rank 0 has all.
    pub(super) is_gather: bool,
}

/// Memory of the host that somebody keeps until the stream was waited for.
#[derive(Clone, Copy)]
pub(super) struct Host(pub(super) *mut u8);

// SAFETY: the promise of `Device`'s unsafe functions: good until the stream has passed it, whoever runs it.
unsafe impl Send for Host {}
// SAFETY: as above; only the thread that holds the state's lock uses it.
unsafe impl Sync for Host {}

#[derive(Default)]
pub(super) struct State {
    pub(super) next_handle: u64,
    /// Bytes of every allocation, by address.
    pub(super) allocations: BTreeMap<u64, usize>,
    pub(super) queues: HashMap<u64, VecDeque<Operation>>,
    /// What a stream that captures has seen.
    pub(super) captures: HashMap<u64, Vec<Operation>>,
    pub(super) graphs: HashMap<u64, Arc<[Operation]>>,
    /// Where and at which mark an event was last recorded.
    pub(super) events: HashMap<u64, (Handle, u64)>,
    /// The first error; as with CUDA, nothing works after it.
    pub(super) failed: Option<DeviceError>,
    pub(super) launches: u64,
    /// Where ranks of others may come, until they have.
    pub(super) meetings: HashMap<Vec<u8>, TcpListener>,
}

impl State {
    /// A place in an allocation.
    pub(super) fn place(
        &self,
        what: &'static str,
        address: u64,
        bytes: usize,
    ) -> Result<*mut u8, DeviceError> {
        let below = self.allocations.range(..=address).next_back();
        let (begin, size) = below.map_or((0, 0), |(begin, size)| (*begin, *size));
        let first = (address - begin) as usize;
        if first.saturating_add(bytes) > size {
            return Err(DeviceError::Outside {
                what,
                begin: first,
                end: first.saturating_add(bytes),
                bytes: size,
            });
        }
        Ok(ptr::with_exposed_provenance_mut(address as usize))
    }

    pub(super) fn handle(&mut self) -> Handle {
        self.next_handle += 1;
        Handle(self.next_handle)
    }
}
