//! What every process does at start and stop: configuration, telemetry, health, shutdown.
