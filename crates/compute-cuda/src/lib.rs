//! CUDA: kernels compiled at run time for the device that is there, and NCCL. Without a GPU it says so, and never panics.
//!
//! Nothing of CUDA is needed to build, and every library is opened when it is first asked for: the driver behind one
//! door ([`cuda`]), NVRTC ([`nvrtc`]) and NCCL ([`nccl`]) through tables of their own. Kernels are the sources in
//! `kernels/` ([`kernels`]). Everything above the seam ([`device`]) runs on the emulator of the tests as well.
#![expect(
    unsafe_code,
    reason = "calls into libraries that are opened at run time, and launches of kernels"
)]

mod backend;
mod cache;
mod choose;
pub mod collective;
mod cubin;
pub mod cuda;
pub mod device;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod kernels;
mod libraries;
pub mod measure;
pub mod nccl;
pub mod nvrtc;
mod target;

pub use backend::{
    CudaBackend, Island, Lead, RandomModel, RankAttention, RankStep, WeightBytes, check_format,
    check_geometry, rank_segments, working_bytes,
};
pub use cache::KernelCache;
pub use choose::{CudaConfig, DeviceChoice, Unusable, find, open};
pub use cubin::KernelUsage;
pub use cuda::DeviceSummary;
pub use libraries::{LibraryDirs, NotFound};
pub use target::Target;
