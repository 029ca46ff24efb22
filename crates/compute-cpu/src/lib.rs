//! AVX-512 and AVX2 kernels behind one run-time choice, and their compute pool. Never decides what to compute.
//!
//! [`CpuBackend`] implements the traits of `tramontane_compute`. Kernels are written once over sixteen
//! lanes and compiled for every instruction set ([`Isa`]); plain Rust is the specification. Results of
//! `cpu-q8`, `cpu-q4` and `cpu-bf16` have the same bits on every instruction set. `cpu-bf16-dp` uses the
//! bfloat16 dot product of AVX-512 and `cpu-bf16-amx` that of AMX, whose roundings are their own. No result depends on the number of
//! threads, on the other rows of a batch or on how experts are sliced.
#![expect(
    unsafe_code,
    reason = "intrinsics, unchecked reads in the matrix kernel, and a thread pool with borrowed work"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
mod cache;
mod context;
mod disjoint;
mod experts;
mod guided;
mod isa;
mod kernels;
mod linear;
mod memory;
mod pack;
mod pool;
mod rows;
mod scalar;
mod simd;

pub use backend::{CpuBackend, CpuConfig};
pub use isa::{Isa, UnsupportedIsa};
