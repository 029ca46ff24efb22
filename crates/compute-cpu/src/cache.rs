//! The paged KV cache: bf16 keys and values of every layer. Does not know which sequence owns a page.
//!
//! `[layer][page][kv_head]`, then keys `[head_dim][64 tokens]` (tokens are the lanes of the score kernel)
//! and values `[64 tokens][head_dim rounded up to 16]`. Memory is touched only when a page is written.

use tramontane_compute::KV_PAGE_TOKENS;
use tramontane_types::ModelGeometry;

use crate::disjoint::Disjoint;
use crate::kernels::quantise::to_bf16;
use crate::simd::LANES;

/// Keys and values.
#[derive(Debug)]
pub(crate) struct KvCache {
    layout: Layout,
    keys: Vec<u16>,
    values: Vec<u16>,
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    num_pages: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Layout {
    fn padded_dim(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Index of (layer, page, head).
    fn index(self, layer: usize, page: usize, head: usize) -> usize {
        (layer * self.num_pages + page) * self.num_kv_heads + head
    }
}

/// Place of one token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) layer: usize,
    pub(crate) page: usize,
    /// Position in the page.
    pub(crate) offset: usize,
}

impl KvCache {
    pub(crate) fn new(geometry: &ModelGeometry, num_pages: usize) -> Self {
        let layout = Layout {
            num_pages,
            num_kv_heads: geometry.num_kv_heads,
            head_dim: geometry.head_dim,
        };
        let tokens = layout.index(geometry.num_layers, 0, 0) * KV_PAGE_TOKENS;
        Self {
            layout,
            keys: vec![0; tokens * layout.head_dim],
            values: vec![0; tokens * layout.padded_dim()],
        }
    }

    /// Keys and values of one page for one head.
    pub(crate) fn page(&self, layer: usize, page: usize, head: usize) -> (&[u16], &[u16]) {
        let tokens = self.layout.index(layer, page, head) * KV_PAGE_TOKENS;
        let (dim, padded) = (self.layout.head_dim, self.layout.padded_dim());
        (
            &self.keys[tokens * dim..][..KV_PAGE_TOKENS * dim],
            &self.values[tokens * padded..][..KV_PAGE_TOKENS * padded],
        )
    }

    /// For writing from the items of a parallel run.
    pub(crate) fn writer(&mut self) -> KvWriter<'_> {
        KvWriter {
            layout: self.layout,
            keys: Disjoint::new(&mut self.keys),
            values: Disjoint::new(&mut self.values),
        }
    }
}

/// Writes tokens from the items of one parallel run.
#[derive(Debug)]
pub(crate) struct KvWriter<'a> {
    layout: Layout,
    keys: Disjoint<'a, u16>,
    values: Disjoint<'a, u16>,
}

impl KvWriter<'_> {
    /// Writes the key and the value of one token for one head, rounded to bf16.
    ///
    /// # Safety
    /// While this runs, no other call may have the same slot and head.
    pub(crate) unsafe fn write(&self, slot: Slot, head: usize, key: &[f32], value: &[f32]) {
        let Layout { head_dim, .. } = self.layout;
        let page = self.layout.index(slot.layer, slot.page, head) * KV_PAGE_TOKENS;
        for (d, &x) in key.iter().enumerate() {
            let at = page * head_dim + d * KV_PAGE_TOKENS + slot.offset;
            // SAFETY: the element belongs to this slot and head, which the caller has alone.
            let target = unsafe { self.keys.range_mut(at..at + 1) };
            target.fill(to_bf16(x));
        }
        let at = (page + slot.offset) * self.layout.padded_dim();
        // SAFETY: as above.
        let target = unsafe { self.values.range_mut(at..at + head_dim) };
        for (target, &x) in target.iter_mut().zip(value) {
            *target = to_bf16(x);
        }
    }
}
