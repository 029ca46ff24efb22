//! AVX-512 and AVX2 kernels behind one run-time choice, and their compute pool.
