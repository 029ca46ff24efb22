//! The variants of products in each format: names, tiles and shared memory, from `kernels/README.md`. Launches nothing.

use super::format::Packing;

/// Name, tokens, rows, threads, shared bytes, time of a wave.
pub(super) type Variant = (&'static str, usize, usize, u32, u32, usize);

/// Variants of a product, by what its kernels are called, from what `kernels/README.md` says of their tiles.
macro_rules! variants {
    ($what:literal, $format:literal, [$(($n:literal, $tokens:literal, $rows:literal, $threads:literal, $shared:expr, $wave:literal)),* $(,)?]) => {
        const {
            &[$((
                concat!("tr_", $what, "_", $format, "_", $n),
                $tokens,
                $rows,
                $threads,
                $shared,
                $wave,
            )),*]
        }
    };
}

macro_rules! tree {
    ($what:literal, $format:literal) => {
        variants!(
            $what,
            $format,
            [
                ("n8", 8, 16, 256, 29_696, 0),
                ("n16", 16, 32, 256, 67_584, 0),
                ("n32", 32, 64, 128, 36_864, 0),
                ("n64", 64, 64, 128, 73_728, 0),
            ]
        )
    };
}

macro_rules! gate_up {
    ($format:literal) => {
        variants!(
            "gate_up",
            $format,
            [
                ("n8", 8, 32, 128, 4_096, 0),
                ("n16", 16, 32, 128, 8_192, 0),
                ("n32", 32, 32, 128, 16_384, 0),
                ("n64", 64, 32, 128, 32_768, 0),
                ("n128", 128, 32, 128, 49_152, 0),
            ]
        )
    };
}

/// By wgmma: a numeric class of its own, on Hopper. Times are microseconds on an H200 in bf16 (docs/perf/cuda.md); e4m3 has
/// half as many steps of the same bytes, so the times relative to each other are taken to be the same.
macro_rules! linear_wg {
    ($format:literal) => {
        variants!(
            "linear",
            $format,
            [
                ("wg_n8", 8, 64, 640, tree_by_parts_wg(8, 5, 2048), 12),
                ("wg_n16", 16, 64, 640, tree_by_parts_wg(16, 5, 2048), 12),
                ("wg_n32", 32, 64, 640, tree_by_parts_wg(32, 4, 2048), 17),
                ("wg_n64", 64, 64, 640, tree_by_parts_wg(64, 2, 2048), 22),
                (
                    "wg_n128",
                    128,
                    128,
                    384,
                    tree_in_turn_wg(128, 5, 1, 2048),
                    49
                ),
            ]
        )
    };
}

/// Those for any segments of an expert, then two for all of them only.
macro_rules! down_wg {
    ($format:literal, $step:literal) => {
        variants!(
            "down",
            $format,
            [
                ("wg_n8", 8, 64, 640, tree_by_parts_wg(8, 5, $step), 0),
                ("wg_n16", 16, 64, 640, tree_by_parts_wg(16, 5, $step), 0),
                ("wg_n32", 32, 64, 640, tree_by_parts_wg(32, 4, $step), 0),
                ("wg_n64", 64, 128, 384, tree_in_turn_wg(64, 6, 2, $step), 0),
                (
                    "wg_n128",
                    128,
                    128,
                    384,
                    tree_in_turn_wg(128, 5, 1, $step),
                    0
                ),
            ]
        )
    };
}

macro_rules! gate_up_wg {
    ($format:literal, $step:literal) => {
        variants!(
            "gate_up",
            $format,
            [
                ("wg_n8", 8, 32, 160, gate_up_shared_wg(8, 1, 6, $step), 0),
                ("wg_n16", 16, 32, 160, gate_up_shared_wg(16, 1, 5, $step), 0),
                ("wg_n32", 32, 64, 320, gate_up_shared_wg(32, 2, 4, $step), 0),
                (
                    "wg_n64",
                    64,
                    128,
                    640,
                    gate_up_shared_wg(64, 4, 4, $step),
                    0
                ),
                (
                    "wg_n128",
                    128,
                    64,
                    384,
                    gate_up_shared_wg(128, 2, 6, $step),
                    0
                ),
                (
                    "wg_n256",
                    256,
                    64,
                    384,
                    gate_up_shared_wg(256, 2, 4, $step),
                    0
                ),
            ]
        )
    };
}

/// A stage of a ring: a step of every strip of `groups` x 64 rows, then the tokens'.
const fn stage(tokens: u32, groups: u32, step_bytes: u32) -> u32 {
    (4 * groups * step_bytes).next_multiple_of(1024) + 128 * tokens
}

const fn tree_by_parts_wg(tokens: u32, stages: u32, step_bytes: u32) -> u32 {
    4 * stages * (stage(tokens, 1, step_bytes) + 16) + 4 * tokens * 68 * 4
}

const fn tree_in_turn_wg(tokens: u32, stages: u32, levels: u32, step_bytes: u32) -> u32 {
    stages * (stage(tokens, 2, step_bytes) + 16) + levels * 128 * tokens * 4
}

const fn gate_up_shared_wg(tokens: u32, groups: u32, stages: u32, step_bytes: u32) -> u32 {
    stages * (stage(tokens, groups, step_bytes) + 16)
}

/// Of the products by panels.
pub(super) const TREE_PANELS_SHARED: u32 = tree_in_turn_wg(128, 5, 1, 2048);
pub(super) const GATE_UP_PANELS_SHARED: u32 = gate_up_shared_wg(256, 2, 4, 2048);

/// Linear, gate_up and down.
pub(super) type Products = [&'static [Variant]; 3];

/// Products with weights in a format; those of q4 have no linear.
pub(super) const fn products(packing: Packing, is_hopper: bool) -> Products {
    match (packing, is_hopper) {
        (Packing::Bf16, false) => [
            tree!("linear", "bf16"),
            gate_up!("bf16"),
            tree!("down", "bf16"),
        ],
        (Packing::E4m3, false) => [
            tree!("linear", "e4m3"),
            gate_up!("e4m3"),
            tree!("down", "e4m3"),
        ],
        (Packing::Q4, false) => [&[], gate_up!("q4"), tree!("down", "q4")],
        (Packing::Bf16, true) => [
            linear_wg!("bf16"),
            gate_up_wg!("bf16", 2048),
            down_wg!("bf16", 2048),
        ],
        (Packing::E4m3, true) => [
            linear_wg!("e4m3"),
            gate_up_wg!("e4m3", 2048),
            down_wg!("e4m3", 2048),
        ],
        (Packing::Q4, true) => [&[], gate_up_wg!("q4", 640), down_wg!("q4", 640)],
    }
}
