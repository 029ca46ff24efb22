//! The kernels that the backend launches, found once, with their shapes from `kernels/README.md`. Launches nothing.

use tramontane_compute::KvFormat;
use tramontane_types::ModelGeometry;

use super::format::{Formats, Packing};
use super::panels::PanelKernels;
use super::products::{Variant, products};
use crate::device::{Device, DeviceError, Kernel, Shape};
use crate::target::Target;

/// A product kernel and its tile.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiled {
    pub(super) kernel: Kernel,
    /// Tokens of one block.
    pub(super) tokens: usize,
    /// Rows of the matrix of one block.
    rows: usize,
    threads: u32,
    shared_bytes: u32,
    /// Time of a wave of blocks, one for each multiprocessor, relative to the other variants; 0 where nobody has measured it.
    wave: usize,
}

impl Tiled {
    /// Relative time of a product that has the device for itself.
    fn time(&self, tokens: usize, rows: usize, multiprocessors: usize) -> usize {
        let blocks = tokens.div_ceil(self.tokens) * rows.div_ceil(self.rows);
        blocks.div_ceil(multiprocessors) * self.wave
    }

    /// Blocks for so many tokens and rows of a matrix; `z` of them side by side.
    pub(super) fn shape(&self, tokens: usize, rows: usize, z: usize) -> Shape {
        self.grid(tokens, rows.div_ceil(self.rows), z)
    }

    /// The same where each of eight segments of `columns` rows begins a block.
    pub(super) fn segments_shape(&self, tokens: usize, columns: usize, z: usize) -> Shape {
        self.grid(tokens, 8 * columns.div_ceil(self.rows), z)
    }

    fn grid(&self, tokens: usize, y: usize, z: usize) -> Shape {
        let grid = [tokens.div_ceil(self.tokens) as u32, y as u32, z as u32];
        Shape::grid3(grid, self.threads, self.shared_bytes)
    }
}

/// Variants of one product by tokens of a tile, ascending; all give the same bits.
#[derive(Clone, Debug)]
pub(super) struct Variants(Vec<Tiled>);

impl Variants {
    /// The smallest that holds so many tokens, or the largest.
    pub(super) fn for_tokens(&self, tokens: usize) -> &Tiled {
        let fits = self.0.iter().position(|tiled| tokens <= tiled.tokens);
        &self.0[fits.unwrap_or(self.0.len() - 1)]
    }

    /// The one that takes least for a matrix of `rows`, where that was measured: few large tiles leave most of a device
    /// idle. Otherwise that for the tokens.
    pub(super) fn for_matrix(&self, tokens: usize, rows: usize, multiprocessors: usize) -> &Tiled {
        let by_tokens = self.for_tokens(tokens);
        if by_tokens.wave == 0 {
            return by_tokens;
        }
        let time = |tiled: &&Tiled| tiled.time(tokens, rows, multiprocessors);
        self.0.iter().min_by_key(time).unwrap_or(by_tokens)
    }

    fn find(device: &dyn Device, variants: &[Variant]) -> Result<Self, DeviceError> {
        let one = |&(name, tokens, rows, threads, shared_bytes, wave): &Variant| {
            Ok(Tiled {
                kernel: device.kernel(name, shared_bytes)?,
                tokens,
                rows,
                threads,
                shared_bytes,
                wave,
            })
        };
        Ok(Self(variants.iter().map(one).collect::<Result<_, _>>()?))
    }
}

/// Widths of heads that there are kernels for; others are padded.
const HEAD_DIMS: [usize; 3] = [32, 64, 128];
/// Rope, narrow and wide attention of each width, for 16 bits and for 8.
const ATTEND_F16: [[&str; 3]; 3] = [
    [
        "tr_rope_kv_f16_32",
        "tr_attend_narrow_f16_32",
        "tr_attend_wide_f16_32",
    ],
    [
        "tr_rope_kv_f16_64",
        "tr_attend_narrow_f16_64",
        "tr_attend_wide_f16_64",
    ],
    [
        "tr_rope_kv_f16_128",
        "tr_attend_narrow_f16_128",
        "tr_attend_wide_f16_128",
    ],
];
const ATTEND_Q8: [[&str; 3]; 3] = [
    [
        "tr_rope_kv_q8_32",
        "tr_attend_narrow_q8_32",
        "tr_attend_wide_q8_32",
    ],
    [
        "tr_rope_kv_q8_64",
        "tr_attend_narrow_q8_64",
        "tr_attend_wide_q8_64",
    ],
    [
        "tr_rope_kv_q8_128",
        "tr_attend_narrow_q8_128",
        "tr_attend_wide_q8_128",
    ],
];

/// Widest head that there are kernels for.
pub(super) const HEAD_DIM_MAX: usize = HEAD_DIMS[HEAD_DIMS.len() - 1];
/// Most experts of a layer that the route kernels know.
pub(super) const EXPERTS_MAX: usize = 256;
/// (row, head) pairs of a tile of the two attention kernels.
pub(super) const NARROW_PAIRS: usize = 16;
pub(super) const WIDE_PAIRS: usize = 128;
/// Rows of a block of `tr_norm_gate8_bf16`.
const GATE_ROWS: usize = 8;
/// From here on the gate is read once for so many rows; with fewer, blocks of one row end sooner.
const GATE8_ROWS_MIN: usize = 1024;
/// From here on several blocks choose experts, and one builds the lists.
pub(super) const ROUTE_ROWS_MAX: usize = 256;

const NORMS_BF16: [&str; 4] = [
    "tr_norm_bf16",
    "tr_combine_norm_bf16",
    "tr_norm_gate_bf16",
    "tr_norm_gate8_bf16",
];
const NORMS_E4M3: [&str; 4] = [
    "tr_norm_e4m3",
    "tr_combine_norm_e4m3",
    "tr_norm_gate_e4m3",
    "tr_norm_gate8_e4m3",
];

const NARROW_SHARED: u32 = 4_368;
/// Of `tr_norm*`: with no gate, with one row, and with eight.
const NORM_SHARED: u32 = 256;
const GATE_SHARED: u32 = 4 * 1024 + 256;
const GATE8_SHARED: u32 = 4 * 8 * 1024 + 256;
const SAMPLE_SHARED: u32 = 512;
const DRAW_SHARED: u32 = 8_456;
/// Tokens of a group of `tr_group_sums`.
const GROUP_TOKENS: usize = 1024;
/// From here on a block takes several groups of a row: other rows keep the device busy.
const SHARED_GROUPS_ROWS_MIN: usize = 64;
const ROUTE_SHARED: u32 = 4 * (EXPERTS_MAX as u32 + 1);

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Kernels {
    /// Of matrices as bf16, and of those of layers.
    linear_bf16: Variants,
    linear_of_layers: Variants,
    pub(super) gate_up: Variants,
    /// For long batches.
    pub(super) panels: Option<PanelKernels>,
    /// For any segments of experts, and for all of them.
    pub(super) down_of_some: Variants,
    pub(super) down: Variants,
    pack_bf16: Kernel,
    pack_experts: Kernel,
    pub(super) embed: Kernel,
    /// With rows as bf16, and as the products of layers read them.
    pub(super) norms: Norms,
    pub(super) norms_of_layers: Norms,
    /// Where those are e4m3.
    pub(super) round: Option<Kernel>,
    pub(super) choose: Kernel,
    pub(super) lists: Kernel,
    pub(super) route: Kernel,
    pub(super) combine_pieces: Kernel,
    pub(super) sum_nodes: Kernel,
    pub(super) argmax: Kernel,
    pub(super) group_sums: Kernel,
    pub(super) draw: Kernel,
}

/// Norms that write rows in one format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norms {
    norm: Kernel,
    combine_norm: Kernel,
    norm_gate: Kernel,
    norm_gate8: Kernel,
}

impl Norms {
    fn find(
        device: &dyn Device,
        [norm, combine_norm, norm_gate, norm_gate8]: [&'static str; 4],
    ) -> Result<Self, DeviceError> {
        let kernel = |name| device.kernel(name, 0);
        Ok(Self {
            norm: kernel(norm)?,
            combine_norm: kernel(combine_norm)?,
            norm_gate: kernel(norm_gate)?,
            norm_gate8: kernel(norm_gate8)?,
        })
    }

    pub(super) fn norm(&self, rows: usize) -> (Kernel, Shape) {
        (self.norm, Shape::new(rows as u32, 256, NORM_SHARED))
    }

    pub(super) fn combine_norm(&self, rows: usize) -> (Kernel, Shape) {
        (self.combine_norm, Shape::new(rows as u32, 256, NORM_SHARED))
    }

    /// Both kernels give the same bits.
    pub(super) fn norm_gate(&self, rows: usize) -> (Kernel, Shape) {
        if rows < GATE8_ROWS_MIN {
            return (self.norm_gate, Shape::new(rows as u32, 256, GATE_SHARED));
        }
        let blocks = rows.div_ceil(GATE_ROWS) as u32;
        (self.norm_gate8, Shape::new(blocks, 256, GATE8_SHARED))
    }
}

/// Those that know how keys and values are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttendKernels {
    pub(super) rope: Kernel,
    pub(super) narrow: Kernel,
    pub(super) wide: Kernel,
    /// Width that heads are padded to.
    pub(super) padded_dim: usize,
    wide_shared: u32,
    /// Keys and values of one page and one head.
    pub(super) page_bytes: usize,
}

impl AttendKernels {
    pub(super) fn find(
        device: &dyn Device,
        head_dim: usize,
        kv_format: KvFormat,
    ) -> Result<Self, DeviceError> {
        let width = HEAD_DIMS.iter().position(|&padded| head_dim <= padded);
        let width = width.unwrap_or(HEAD_DIMS.len() - 1);
        let padded_dim = HEAD_DIMS[width];
        let ([rope, narrow, wide], wide_shared, page_bytes) = match kv_format {
            KvFormat::F16 => (ATTEND_F16[width], 640 * padded_dim + 64, 256 * padded_dim),
            KvFormat::Q8 => (
                ATTEND_Q8[width],
                448 * padded_dim + 1_600,
                128 * padded_dim + 512,
            ),
        };
        let wide_shared = wide_shared as u32;
        Ok(Self {
            rope: device.kernel(rope, 0)?,
            narrow: device.kernel(narrow, NARROW_SHARED)?,
            wide: device.kernel(wide, wide_shared)?,
            padded_dim,
            wide_shared,
            page_bytes,
        })
    }

    pub(super) fn narrow_shape(blocks: u32, num_kv_heads: u32) -> Shape {
        Shape::grid2(blocks, num_kv_heads, 128, NARROW_SHARED)
    }

    /// `blocks` share items and key heads.
    pub(super) fn wide_shape(&self, blocks: u32) -> Shape {
        Shape::new(blocks, 128, self.wide_shared)
    }
}

impl Kernels {
    pub(super) fn find(
        device: &dyn Device,
        formats: Formats,
        geometry: &ModelGeometry,
    ) -> Result<Self, DeviceError> {
        let kernel = |name| device.kernel(name, 0);
        let is_hopper = device.info().target == Target::Sm90a;
        let linear = |packing| Variants::find(device, products(packing, is_hopper)[0]);
        let [_, gate_up, down] = products(formats.experts, is_hopper);
        let norms = Norms::find(device, NORMS_BF16)?;
        let is_rounded = formats.has_rounded_rows();
        Ok(Self {
            linear_bf16: linear(Packing::Bf16)?,
            linear_of_layers: linear(formats.dense)?,
            gate_up: Variants::find(device, gate_up)?,
            panels: PanelKernels::find(device, formats, geometry)?,
            down_of_some: Variants::find(device, if is_hopper { &down[..3] } else { down })?,
            down: Variants::find(device, down)?,
            pack_bf16: kernel("tr_pack_bf16")?,
            pack_experts: kernel(match formats.experts {
                Packing::Bf16 => "tr_pack_bf16",
                Packing::E4m3 => "tr_pack_e4m3",
                Packing::Q4 => "tr_pack_q4",
            })?,
            embed: kernel("tr_embed_bf16")?,
            norms,
            norms_of_layers: match is_rounded {
                true => Norms::find(device, NORMS_E4M3)?,
                false => norms,
            },
            round: match is_rounded {
                true => Some(kernel("tr_round_e4m3")?),
                false => None,
            },
            choose: kernel("tr_choose_experts")?,
            lists: kernel("tr_expert_lists")?,
            route: kernel("tr_route")?,
            combine_pieces: kernel("tr_combine_pieces")?,
            sum_nodes: kernel("tr_sum_nodes")?,
            argmax: kernel("tr_argmax")?,
            group_sums: kernel("tr_group_sums")?,
            draw: kernel("tr_draw")?,
        })
    }

    /// Of a dense matrix: one of the layers, or the LM head, which is bf16 always.
    pub(super) const fn linear(&self, packing: Packing) -> &Variants {
        match packing {
            Packing::Bf16 => &self.linear_bf16,
            Packing::E4m3 | Packing::Q4 => &self.linear_of_layers,
        }
    }

    /// What packs a part of so many steps and strips.
    pub(super) fn pack(&self, packing: Packing, steps: usize, strips: usize) -> (Kernel, Shape) {
        let (steps, strips) = (steps as u32, strips as u32);
        match packing {
            Packing::Bf16 => (self.pack_bf16, Shape::grid2(steps, strips, 32, 0)),
            Packing::E4m3 => (self.pack_experts, Shape::grid2(1, strips, 256, 64)),
            Packing::Q4 => (self.pack_experts, Shape::grid2(steps, strips, 32, 0)),
        }
    }

    pub(super) fn choose_shape(rows: usize) -> Shape {
        Shape::new(rows.div_ceil(8) as u32, 256, 0)
    }

    pub(super) fn lists_shape() -> Shape {
        Shape::new(1, 1024, ROUTE_SHARED)
    }

    pub(super) fn route_shape() -> Shape {
        Shape::new(1, 1024, ROUTE_SHARED)
    }

    pub(super) fn argmax_shape(rows: usize) -> Shape {
        Shape::new(rows as u32, 1024, SAMPLE_SHARED)
    }

    /// Groups of tokens whose weights are summed first.
    pub(super) const fn groups(vocab: usize) -> usize {
        vocab.div_ceil(GROUP_TOKENS)
    }

    pub(super) fn group_sums_shape(rows: usize, vocab: usize) -> Shape {
        let groups = Self::groups(vocab) as u32;
        let blocks = match rows {
            0..SHARED_GROUPS_ROWS_MIN => groups,
            _ => groups.div_ceil(4),
        };
        Shape::grid2(rows as u32, blocks, 1024, DRAW_SHARED)
    }

    pub(super) fn draw_shape(rows: usize) -> Shape {
        Shape::new(rows as u32, 1024, DRAW_SHARED)
    }

    pub(super) fn combine_shape(rows: usize, hidden: usize) -> Shape {
        Shape::grid2(rows as u32, hidden.div_ceil(1024) as u32, 256, 0)
    }
}
