//! Ports that were free a moment ago. Opens nothing that stays open.

use std::io;
use std::net::{Ipv4Addr, TcpListener};

/// A loopback port that nobody listens on.
///
/// # Errors
/// When the system has none left.
pub fn free_port() -> io::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port())
}

/// `count` different loopback ports that nobody listens on.
///
/// # Errors
/// When the system has not enough left.
pub fn free_ports(count: usize) -> io::Result<Vec<u16>> {
    // All are held until the last is found, so none comes twice.
    let listeners: Vec<TcpListener> = (0..count)
        .map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
        .collect::<io::Result<_>>()?;
    let ports = listeners.iter().map(|l| Ok(l.local_addr()?.port()));
    ports.collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ports_are_different_and_can_be_bound() {
        let ports = free_ports(8).unwrap();
        let different: HashSet<u16> = ports.iter().copied().collect();
        assert_eq!(different.len(), 8);
        assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, free_port().unwrap())).is_ok());
    }
}
