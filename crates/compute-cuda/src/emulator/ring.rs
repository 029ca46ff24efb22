//! Ranks of emulated devices, in one process or several: rank 0 carries everything over loopback sockets. Moves bytes and
//! sums nothing.
//!
//! It fails as NCCL does: an operation of a lost or aborted group ends at once, with whatever is in memory then, and
//! only a question afterwards tells.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::device::DeviceError;

/// How long ranks wait for each other when they meet.
const MEET_MAX: Duration = Duration::from_secs(30);
/// How long rank 0 waits before it looks for a newcomer again.
const LOOK_EVERY: Duration = Duration::from_millis(1);
/// How long an operation waits for another rank, which may have to compile its first kernels or be starved of time.
const EXCHANGE_MAX: Duration = Duration::from_secs(120);

/// One rank's connections.
#[derive(Debug)]
pub(super) struct Ring {
    rank: u32,
    num_ranks: u32,
    /// Of rank 0: those of the others, in order; of another: that of rank 0. One operation at a time.
    peers: Mutex<Vec<TcpStream>>,
    /// The same, to cut them while an operation waits.
    cut: Vec<TcpStream>,
    failed: OnceLock<String>,
}

/// Where rank 0 listens, as bytes.
pub(super) fn listen() -> io::Result<(Vec<u8>, TcpListener)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok((listener.local_addr()?.to_string().into_bytes(), listener))
}

fn late(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("{what} within {MEET_MAX:?}"),
    )
}

/// The streams of the others, in order of their ranks.
fn accept(listener: &TcpListener, num_ranks: u32) -> io::Result<Vec<TcpStream>> {
    listener.set_nonblocking(true)?;
    let end = Instant::now() + MEET_MAX;
    let mut found: Vec<Option<TcpStream>> = (1..num_ranks).map(|_| None).collect();
    while found.iter().any(Option::is_none) {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= end {
                    return Err(late("not all ranks came"));
                }
                #[expect(clippy::disallowed_methods, reason = "std has no accept with a limit")]
                std::thread::sleep(LOOK_EVERY);
                continue;
            }
            Err(error) => return Err(error),
        };
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(MEET_MAX))?;
        let mut rank = [0; 4];
        stream.read_exact(&mut rank)?;
        let rank = u32::from_le_bytes(rank);
        match found.get_mut((rank as usize).wrapping_sub(1)) {
            Some(place) if place.is_none() => *place = Some(stream),
            _ => return Err(io::Error::other(format!("rank {rank} is not expected"))),
        }
    }
    Ok(found.into_iter().flatten().collect())
}

fn connect(meeting: &[u8], rank: u32) -> io::Result<Vec<TcpStream>> {
    let address = std::str::from_utf8(meeting).ok();
    let address: Option<SocketAddr> = address.and_then(|text| text.parse().ok());
    let address = address.ok_or_else(|| io::Error::other("the meeting is no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, MEET_MAX)?;
    stream.write_all(&rank.to_le_bytes())?;
    Ok(vec![stream])
}

impl Ring {
    /// Connects; rank 0 has the listener of the meeting.
    pub(super) fn meet(
        listener: Option<&TcpListener>,
        meeting: &[u8],
        (rank, num_ranks): (u32, u32),
    ) -> io::Result<Self> {
        let peers = match listener {
            Some(listener) => accept(listener, num_ranks)?,
            None => connect(meeting, rank)?,
        };
        for peer in &peers {
            peer.set_nodelay(true)?;
            peer.set_read_timeout(Some(EXCHANGE_MAX))?;
            peer.set_write_timeout(Some(EXCHANGE_MAX))?;
        }
        let cut = peers.iter().map(TcpStream::try_clone);
        Ok(Self {
            rank,
            num_ranks,
            cut: cut.collect::<io::Result<_>>()?,
            peers: Mutex::new(peers),
            failed: OnceLock::new(),
        })
    }

    pub(super) const fn rank(&self) -> u32 {
        self.rank
    }

    pub(super) const fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    /// Every rank's part of `all`, of which this rank's is there.
    pub(super) fn all_gather(&self, all: &mut [u8]) {
        let bytes = all.len() / self.num_ranks.max(1) as usize;
        let own = self.rank as usize * bytes;
        self.run(|peers| {
            if self.rank > 0 {
                for peer in &mut *peers {
                    peer.write_all(&all[own..own + bytes])?;
                    peer.read_exact(all)?;
                }
                return Ok(());
            }
            for (peer, part) in peers
                .iter_mut()
                .zip(all[bytes..].chunks_exact_mut(bytes.max(1)))
            {
                peer.read_exact(part)?;
            }
            peers.iter_mut().try_for_each(|peer| peer.write_all(all))
        });
    }

    /// What rank 0 has.
    pub(super) fn broadcast(&self, all: &mut [u8]) {
        self.run(|peers| {
            if self.rank > 0 {
                return peers.iter_mut().try_for_each(|peer| peer.read_exact(all));
            }
            peers.iter_mut().try_for_each(|peer| peer.write_all(all))
        });
    }

    fn run(&self, exchange: impl FnOnce(&mut Vec<TcpStream>) -> io::Result<()>) {
        let mut peers = self.peers.lock();
        if self.failed.get().is_none()
            && let Err(error) = exchange(&mut peers)
        {
            // The others wait for us, or will.
            self.end(format!("a rank is lost: {error}"));
        }
    }

    /// Ends it, here and for the others; the first reason stays.
    pub(super) fn end(&self, why: String) {
        // The first one stays.
        let _known = self.failed.set(why);
        for stream in &self.cut {
            // One that is broken already is what was wanted.
            let _broken = stream.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn check(&self) -> Result<(), DeviceError> {
        self.failed.get().map_or(Ok(()), |message| {
            Err(DeviceError::Ranks {
                rank: self.rank,
                num_ranks: self.num_ranks,
                message: message.clone(),
            })
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.end("the group was left".to_owned());
    }
}
