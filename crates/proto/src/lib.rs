//! Generated gRPC code of /proto and conversions to the shared types.
