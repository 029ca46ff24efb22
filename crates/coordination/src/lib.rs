//! Registry, leases, watch, election, placement and balance over etcd or memory.
