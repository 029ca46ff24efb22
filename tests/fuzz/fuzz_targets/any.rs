//! The target that `TRAMONTANE_FUZZ` names, for libFuzzer: one binary, because every one of them is large.
#![no_main]

use std::sync::LazyLock;

use tramontane_fuzz::{Target, named};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("TRAMONTANE_FUZZ").unwrap_or_default();
    named(&name).unwrap_or_else(|| std::process::abort())
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| (TARGET.run)(bytes));
