//! Which tiles a step's attention is cut into, and which of them are shared by several blocks. Pure: launches nothing.
//!
//! A tile is some consecutive rows of one sequence, inside one page. Neither its size nor how many parts it has
//! changes a bit: chunks of pages have softmaxes of their own, and are merged in one order by whoever is last.

use std::cmp::Reverse;

use tramontane_compute::batch_check::first_visible;
use tramontane_compute::{KV_PAGE_TOKENS, SequenceSpan, StepBatch};
use tramontane_types::ModelGeometry;

use super::abi::AttendItem;
use super::kernels::{NARROW_PAIRS, WIDE_PAIRS};

/// Tokens of one chunk of pages. Part of the exactness contract, as on the CPU.
const CHUNK_TOKENS: usize = 8 * KV_PAGE_TOKENS;
/// Softmaxes of a step that are kept for the last part of a tile: one per row and chunk of a shared tile.
pub(super) const SLOTS_MAX: usize = 2_048;
/// Tiles of a step that may be shared.
pub(super) const COUNTERS_MAX: usize = 1_024;
/// Items of a step beyond one per row.
pub(super) const EXTRA_ITEMS: usize = 2_048;

/// The tiles of a step.
#[derive(Debug, Default)]
pub(super) struct AttendPlan {
    /// Tiles of up to [`NARROW_PAIRS`] (row, head).
    pub(super) narrow: Vec<AttendItem>,
    /// Those of more, the longest contexts first.
    pub(super) wide: Vec<AttendItem>,
    slots: usize,
    counters: usize,
}

/// What a tile sees.
struct Tile {
    item: AttendItem,
    chunks: std::ops::Range<usize>,
    /// Positions.
    seen: usize,
}

impl AttendPlan {
    /// Plans a step that was checked. `blocks` is how many items keep the device busy, for all key heads together.
    pub(super) fn plan(&mut self, geometry: &ModelGeometry, batch: &StepBatch, blocks: usize) {
        self.narrow.clear();
        self.wide.clear();
        (self.slots, self.counters) = (0, 0);
        let group = geometry.num_heads / geometry.num_kv_heads;
        let rows_max = wide_rows(geometry, batch.positions.len(), blocks);
        let mut tiles = Vec::new();
        for (index, span) in batch.sequences.iter().enumerate() {
            tiles_of(geometry, batch, (index, span), rows_max, &mut tiles);
        }
        // What begins last is what the device waits for in the end.
        tiles.sort_by_key(|tile| Reverse(tile.seen));
        let wanted = blocks.div_ceil(geometry.num_kv_heads).max(1);
        let parts_each = wanted / tiles.len().max(1);
        for tile in tiles {
            let is_narrow = tile.item.num_rows as usize * group <= NARROW_PAIRS;
            let parts = parts_each.clamp(1, tile.chunks.len());
            self.add(tile, parts, is_narrow);
        }
    }

    fn add(&mut self, tile: Tile, parts: usize, is_narrow: bool) {
        let Tile { item, chunks, .. } = tile;
        let slots = item.num_rows as usize * chunks.len();
        let fits = self.slots + slots <= SLOTS_MAX && self.counters < COUNTERS_MAX;
        let items = if is_narrow {
            &mut self.narrow
        } else {
            &mut self.wide
        };
        if parts == 1 || !fits || items.len() + parts > EXTRA_ITEMS {
            items.push(AttendItem {
                num_parts: 1,
                ..item
            });
            return;
        }
        // As even as whole chunks allow, the first ones larger.
        let mut begin = chunks.start;
        for part in 0..parts {
            let len = chunks.len() / parts + usize::from(part < chunks.len() % parts);
            items.push(AttendItem {
                chunk_begin: begin as u32,
                chunk_end: (begin + len) as u32,
                num_parts: parts as u32,
                slot_begin: self.slots as u32,
                counter: self.counters as u32,
                ..item
            });
            begin += len;
        }
        self.slots += slots;
        self.counters += 1;
    }
}

/// Rows of a wide tile: as many as it has room for if that leaves half of `blocks`, which is what the device holds at a time.
/// Otherwise half as many: keys are loaded twice as often, by twice as many blocks.
fn wide_rows(geometry: &ModelGeometry, num_rows: usize, blocks: usize) -> usize {
    let tiles = num_rows * geometry.num_heads / WIDE_PAIRS;
    let pairs = if 2 * tiles < blocks {
        WIDE_PAIRS / 2
    } else {
        WIDE_PAIRS
    };
    (pairs * geometry.num_kv_heads / geometry.num_heads).max(1)
}

/// Cuts a sequence's rows into tiles: at the ends of pages, and after `rows_max` rows.
fn tiles_of(
    geometry: &ModelGeometry,
    batch: &StepBatch,
    (index, span): (usize, &SequenceSpan),
    rows_max: usize,
    tiles: &mut Vec<Tile>,
) {
    let mut row = span.row_begin as usize;
    let end = row + span.num_rows as usize;
    while row < end {
        let position = batch.positions[row] as usize;
        let to_page_end = KV_PAGE_TOKENS - position % KV_PAGE_TOKENS;
        let num_rows = rows_max.min(to_page_end).min(end - row);
        let first = first_visible(geometry, position);
        tiles.push(Tile {
            item: AttendItem {
                row_begin: row as u32,
                num_rows: num_rows as u32,
                sequence: index as u32,
                ..AttendItem::default()
            },
            chunks: first / CHUNK_TOKENS..(position + num_rows).div_ceil(CHUNK_TOKENS),
            seen: position + num_rows - first,
        });
        row += num_rows;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(num_heads: usize, num_kv_heads: usize, window: Option<usize>) -> ModelGeometry {
        ModelGeometry {
            hidden: 64,
            num_layers: 1,
            num_heads,
            num_kv_heads,
            head_dim: 16,
            ff: 96,
            num_experts: 4,
            top_k: 2,
            vocab: 50,
            rope_theta: 1e6,
            rms_eps: 1e-5,
            sliding_window: window,
            max_positions: 65_536,
        }
    }

    /// One sequence of so many rows from a position on.
    fn batch(spans: &[(usize, usize)]) -> StepBatch {
        let mut batch = StepBatch::default();
        for &(begin, len) in spans {
            batch.sequences.push(SequenceSpan {
                row_begin: batch.positions.len() as u32,
                num_rows: len as u32,
                block_table: Vec::new(),
            });
            batch
                .positions
                .extend((begin..begin + len).map(|position| position as u32));
        }
        batch
    }

    fn plan(geometry: &ModelGeometry, batch: &StepBatch, blocks: usize) -> AttendPlan {
        let mut plan = AttendPlan::default();
        plan.plan(geometry, batch, blocks);
        plan
    }

    /// Every row is in one tile; the parts of a tile cover its chunks; no two tiles share a slot or a counter.
    fn check(geometry: &ModelGeometry, batch: &StepBatch, plan: &AttendPlan) {
        let mut seen = vec![0_usize; batch.positions.len()];
        let mut next_part = std::collections::BTreeMap::new();
        for item in plan.narrow.iter().chain(&plan.wide) {
            let rows = item.row_begin as usize..(item.row_begin + item.num_rows) as usize;
            let pages = rows.clone().map(|row| batch.positions[row] / 64);
            assert!(pages.clone().eq(std::iter::repeat_n(
                batch.positions[rows.start] / 64,
                rows.len()
            )));
            if item.num_parts == 1
                || item.chunk_begin as usize == {
                    first_visible(geometry, batch.positions[rows.start] as usize) / CHUNK_TOKENS
                }
            {
                rows.for_each(|row| seen[row] += 1);
            }
            if item.num_parts > 1 {
                let next = next_part.entry(item.counter).or_insert(item.chunk_begin);
                assert_eq!(*next, item.chunk_begin);
                assert!(item.chunk_end > item.chunk_begin);
                *next = item.chunk_end;
            }
        }
        assert!(seen.iter().all(|&times| times == 1), "{seen:?}");
        assert!(plan.slots <= SLOTS_MAX && plan.counters <= COUNTERS_MAX);
    }

    #[test]
    fn rows_are_cut_at_pages_and_tiles() {
        let geometry = geometry(8, 2, None);
        // 16 rows of 4 heads are a wide tile, 4 a narrow one.
        let batch = batch(&[(60, 40), (7, 3), (64, 16)]);
        let plan = plan(&geometry, &batch, 1);
        check(&geometry, &batch, &plan);
        let sizes =
            |items: &[AttendItem]| -> Vec<u32> { items.iter().map(|i| i.num_rows).collect() };
        assert_eq!(sizes(&plan.narrow), [4, 4, 3]);
        assert_eq!(sizes(&plan.wide), [32, 16]);
    }

    #[test]
    fn long_contexts_come_first_and_a_short_step_has_smaller_tiles() {
        let geometry = geometry(32, 8, None);
        let rows = |batch: &StepBatch| -> Vec<u32> {
            let plan = plan(&geometry, batch, 528);
            check(&geometry, batch, &plan);
            let begins = plan
                .wide
                .iter()
                .map(|item| batch.positions[item.row_begin as usize]);
            assert!(begins.is_sorted_by(|a, b| a >= b));
            let firsts = plan.wide.iter().filter(|item| item.chunk_begin == 0);
            firsts.map(|item| item.num_rows).collect()
        };
        // 264 tiles of 128 (row, head) are two for each of 132 multiprocessors.
        assert_eq!(rows(&batch(&[(0, 1_056)])), [32; 33]);
        assert_eq!(rows(&batch(&[(0, 1_024)])), [16; 64]);
        assert_eq!(rows(&batch(&[(64, 640), (0, 512)])), [32; 36]);
        // The rest of a prompt, whose context several blocks share.
        assert_eq!(rows(&batch(&[(6_400, 64)])), [16; 4]);
    }

    #[test]
    fn a_long_context_is_shared_by_parts_that_cover_it() {
        for window in [None, Some(3_000)] {
            let geometry = geometry(8, 2, window);
            let batch = batch(&[(40_000, 1), (600, 1), (3, 1)]);
            let plan = plan(&geometry, &batch, 64);
            check(&geometry, &batch, &plan);
            let parts: Vec<u32> = plan.narrow.iter().map(|item| item.num_parts).collect();
            assert!(parts.contains(&1), "one chunk is not shared");
            assert!(parts.iter().any(|&parts| parts > 2), "{parts:?}");
        }
    }

    #[test]
    fn memory_for_shared_tiles_is_bounded() {
        let geometry = geometry(8, 8, None);
        let batch = batch(&[(60_000, 1); 30]);
        let plan = plan(&geometry, &batch, 100_000);
        check(&geometry, &batch, &plan);
        assert!(plan.narrow.iter().any(|item| item.num_parts == 1));
        assert!(plan.narrow.len() <= 30 + EXTRA_ITEMS);
    }
}
