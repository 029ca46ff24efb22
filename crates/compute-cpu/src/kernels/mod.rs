//! The kernels, each written once over [`Simd`](crate::simd::Simd). They own no buffers and start no threads.

pub(crate) mod attention;
pub(crate) mod norm;
pub(crate) mod pack;
pub(crate) mod quantise;
pub(crate) mod swiglu;
pub(crate) mod tile;

#[cfg(test)]
pub(crate) mod tests;
