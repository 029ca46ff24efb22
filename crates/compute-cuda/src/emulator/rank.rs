//! A rank of emulated devices: what it is asked to exchange waits on its device's stream like everything else.

use std::sync::Arc;

use super::Emulator;
use super::queue::{Exchange, Operation};
use super::ring::Ring;
use crate::collective::Collective;
use crate::device::{DeviceError, Handle};

/// An emulated device among others.
#[derive(Debug)]
pub(super) struct Rank {
    pub(super) device: Arc<Emulator>,
    pub(super) ring: Arc<Ring>,
}

impl Rank {
    fn queue(&self, exchange: Exchange, stream: Handle) -> Result<(), DeviceError> {
        self.check()?;
        self.device.queue(stream, Operation::Exchange(exchange))
    }
}

impl Collective for Rank {
    fn rank(&self) -> u32 {
        self.ring.rank()
    }

    fn num_ranks(&self) -> u32 {
        self.ring.num_ranks()
    }

    unsafe fn all_gather(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError> {
        let exchange = Exchange {
            ring: Arc::clone(&self.ring),
            at,
            bytes: bytes * self.ring.num_ranks() as usize,
            is_gather: true,
        };
        self.queue(exchange, stream)
    }

    unsafe fn broadcast(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError> {
        let exchange = Exchange {
            ring: Arc::clone(&self.ring),
            at,
            bytes,
            is_gather: false,
        };
        self.queue(exchange, stream)
    }

    fn check(&self) -> Result<(), DeviceError> {
        self.ring.check()
    }

    fn abort(&self) {
        self.ring.end("the group was aborted".to_owned());
    }
}
