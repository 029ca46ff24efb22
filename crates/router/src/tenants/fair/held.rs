//! What tenants have waiting, while it is found out who gives way.

use super::Account;
use crate::tenants::TenantName;

/// What one tenant has waiting while it is found out who gives way.
pub(super) struct Held<'a, W> {
    pub(super) tenant: &'a TenantName,
    account: &'a Account<W>,
    /// Requests that were taken from it.
    num_gone: usize,
    bytes_gone: usize,
    /// The sizes of the others, who goes first first.
    sizes: Box<dyn Iterator<Item = usize> + 'a>,
}

impl<'a, W> Held<'a, W> {
    pub(super) fn of((tenant, account): (&'a TenantName, &'a Account<W>)) -> Self {
        Self {
            tenant,
            account,
            num_gone: 0,
            bytes_gone: 0,
            sizes: Box::new(account.last_first().map(|waiter| waiter.bytes)),
        }
    }

    /// Requests, or bytes of them.
    pub(super) const fn amount(&self, of_requests: bool) -> usize {
        if of_requests {
            self.account.num_waiting - self.num_gone
        } else {
            self.account.bytes - self.bytes_gone
        }
    }

    /// The size of the next one to go.
    pub(super) fn turn_out(&mut self) -> Option<usize> {
        let bytes = self.sizes.next()?;
        self.num_gone += 1;
        self.bytes_gone += bytes;
        Some(bytes)
    }
}
