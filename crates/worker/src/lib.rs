//! Serves an engine and its experts to the cluster.
