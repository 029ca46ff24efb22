//! Generated gRPC code of `/proto`, and the conversions between wire messages and shared types.
//!
//! Engine, model, compute and tokenizer never see these types.

mod convert;

pub use convert::{InvalidWire, finish_reason_from_wire, finish_reason_to_wire};

/// Messages, clients and servers of package `tramontane.v1`.
#[expect(
    clippy::all,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unused_qualifications,
    reason = "generated code"
)]
pub mod v1 {
    tonic::include_proto!("tramontane.v1");
}

/// Messages, clients and servers of the Open Inference Protocol.
#[expect(
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    unused_qualifications,
    reason = "generated code"
)]
pub mod inference {
    tonic::include_proto!("inference");
}

/// Encoded `FileDescriptorSet` of all services, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
