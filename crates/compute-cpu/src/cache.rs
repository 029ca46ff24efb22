//! The paged KV cache: keys and values of every layer. Does not know which sequence owns a page.
//!
//! `[layer][page][kv_head]`, then keys, then values. Keys have tokens as the lanes of the score kernel, values
//! have dimensions as lanes:
//!
//! * f16: keys `[head_dim][64 tokens]`, values `[64 tokens][head_dim rounded up to 16]`;
//! * q8 ([`Q8Head`]): keys `[head_dim / 4][64 tokens][4]` and 64 scales, values
//!   `[64 tokens / 4][head_dim rounded up to 16][4]` and 64 scales; bytes are signed.
//!
//! Memory is touched only when a page is written.

use tramontane_compute::kv::Q8Head;
use tramontane_compute::{AttentionConfig, Error, KV_PAGE_TOKENS, KvFormat};
use tramontane_types::{ModelGeometry, PageId};

use crate::disjoint::Disjoint;
use crate::isa::Dispatch;
use crate::kernels::quantise::ToF16;
use crate::memory::Region;
use crate::pack::Line;
use crate::simd::LANES;

/// Keys and values.
#[derive(Debug)]
pub(crate) struct KvCache {
    layout: Layout,
    region: Region,
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    format: KvFormat,
    num_pages: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

impl Layout {
    fn padded_dim(self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Lines of the keys and of the values of one page and one head.
    fn lines(self) -> (usize, usize) {
        let line = size_of::<Line>();
        let keys = self.format.key_bytes(self.head_dim) / line;
        (keys, self.format.value_bytes(self.head_dim) / line)
    }

    /// First line of (layer, page, head).
    fn begin(self, layer: usize, page: usize, head: usize) -> usize {
        let (keys, values) = self.lines();
        ((layer * self.num_pages + page) * self.num_kv_heads + head) * (keys + values)
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

/// The pages of one layer and head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeadPages<'a> {
    pub(crate) format: KvFormat,
    layout: Layout,
    lines: &'a [Line],
    layer: usize,
    head: usize,
}

/// One page of an f16 cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F16Page<'a> {
    pub(crate) keys: &'a [u16],
    pub(crate) values: &'a [u16],
}

/// One page of a q8 cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Q8Page<'a> {
    pub(crate) keys: &'a [Line],
    pub(crate) key_scales: &'a [f32; KV_PAGE_TOKENS],
    pub(crate) values: &'a [Line],
    pub(crate) value_scales: &'a [f32; KV_PAGE_TOKENS],
}

/// Lines of the scales of a page.
const SCALE_LINES: usize = KV_PAGE_TOKENS * size_of::<f32>() / size_of::<Line>();

/// Stands where a page has no scales: never read, pages of a cache have theirs.
static NO_SCALES: [f32; KV_PAGE_TOKENS] = [f32::NAN; KV_PAGE_TOKENS];

impl KvCache {
    /// # Errors
    /// When the system refuses the memory.
    pub(crate) fn new(geometry: &ModelGeometry, config: AttentionConfig) -> Result<Self, Error> {
        let layout = Layout {
            format: config.kv_format,
            num_pages: config.num_pages,
            num_kv_heads: geometry.num_kv_heads,
            head_dim: geometry.head_dim,
        };
        let num_lines = layout.begin(geometry.num_layers, 0, 0);
        let region = Region::alone(num_lines)?;
        Ok(Self { layout, region })
    }

    /// The pages of one layer and head.
    pub(crate) fn pages(&self, layer: usize, head: usize) -> HeadPages<'_> {
        HeadPages {
            format: self.layout.format,
            layout: self.layout,
            lines: self.region.lines(),
            layer,
            head,
        }
    }

    /// For writing from the items of a parallel run.
    pub(crate) fn writer(&mut self, dispatch: Dispatch) -> KvWriter<'_> {
        KvWriter {
            layout: self.layout,
            dispatch,
            bytes: Disjoint::new(bytemuck::cast_slice_mut(self.region.lines_mut())),
        }
    }
}

impl<'a> HeadPages<'a> {
    #[inline]
    fn parts(&self, page: PageId) -> (&'a [Line], &'a [Line]) {
        let (keys, values) = self.layout.lines();
        let begin = self.layout.begin(self.layer, page.0 as usize, self.head);
        self.lines[begin..begin + keys + values].split_at(keys)
    }

    /// A page of an f16 cache.
    #[inline]
    pub(crate) fn f16(&self, page: PageId) -> F16Page<'a> {
        let (keys, values) = self.parts(page);
        F16Page {
            keys: bytemuck::cast_slice(keys),
            values: bytemuck::cast_slice(values),
        }
    }

    /// A page of a q8 cache.
    #[inline]
    pub(crate) fn q8(&self, page: PageId) -> Q8Page<'a> {
        let (keys, values) = self.parts(page);
        let (keys, key_scales) = keys.split_at(keys.len() - SCALE_LINES);
        let (values, value_scales) = values.split_at(values.len() - SCALE_LINES);
        Q8Page {
            keys,
            key_scales: scales(key_scales),
            values,
            value_scales: scales(value_scales),
        }
    }
}

#[inline]
fn scales(lines: &[Line]) -> &[f32; KV_PAGE_TOKENS] {
    bytemuck::cast_slice(lines)
        .first_chunk()
        .unwrap_or(&NO_SCALES)
}

/// Writes tokens from the items of one parallel run.
#[derive(Debug)]
pub(crate) struct KvWriter<'a> {
    layout: Layout,
    dispatch: Dispatch,
    bytes: Disjoint<'a, u8>,
}

impl KvWriter<'_> {
    /// Writes the key and the value of one token for one head, rounded to the format of the cache.
    ///
    /// # Safety
    /// While this runs, no other call may have the same slot and head.
    pub(crate) unsafe fn write(&self, slot: Slot, head: usize, key: &[f32], value: &[f32]) {
        let begin = self.layout.begin(slot.layer, slot.page, head) * size_of::<Line>();
        let values = begin + self.layout.format.key_bytes(self.layout.head_dim);
        let padded = self.layout.padded_dim();
        let offset = slot.offset;
        match self.layout.format {
            KvFormat::F16 => {
                self.dispatch.run(ToF16 {
                    values: key,
                    out: |first: usize, halves: &[[u8; 2]]| {
                        for (d, &half) in halves.iter().enumerate() {
                            let at = begin + 2 * ((first + d) * KV_PAGE_TOKENS + offset);
                            // SAFETY: these bytes belong to the slot and head, which the caller has alone.
                            unsafe { self.put(at, half) };
                        }
                    },
                });
                self.dispatch.run(ToF16 {
                    values: value,
                    out: |first: usize, halves: &[[u8; 2]]| {
                        let at = values + 2 * (offset * padded + first);
                        // SAFETY: as above.
                        let to = unsafe { self.bytes.range_mut(at..at + 2 * halves.len()) };
                        to.copy_from_slice(halves.as_flattened());
                    },
                });
            }
            KvFormat::Q8 => {
                let place = |d: usize| begin + d / 4 * 4 * KV_PAGE_TOKENS + 4 * offset + d % 4;
                let scales = values - SCALE_LINES * size_of::<Line>();
                // SAFETY: as above.
                unsafe { self.write_q8(key, place, scales + 4 * offset) };
                let place = |d: usize| values + offset / 4 * 4 * padded + 4 * d + offset % 4;
                let scales = values + KV_PAGE_TOKENS * padded;
                // SAFETY: as above.
                unsafe { self.write_q8(value, place, scales + 4 * offset) };
            }
        }
    }

    /// # Safety
    /// As [`write`](Self::write), for the bytes of `place` and `scale_at`.
    unsafe fn write_q8(&self, x: &[f32], place: impl Fn(usize) -> usize, scale_at: usize) {
        let head = Q8Head::new(x);
        // SAFETY: the caller has these bytes alone.
        unsafe { self.put(scale_at, head.scale.to_ne_bytes()) };
        for (d, &x) in x.iter().enumerate() {
            // SAFETY: as above.
            unsafe { self.put(place(d), [head.q(x) as u8]) };
        }
    }

    /// # Safety
    /// While this runs, no other call may have any of the bytes.
    unsafe fn put<const N: usize>(&self, at: usize, bytes: [u8; N]) {
        // SAFETY: the caller has these bytes alone.
        let target = unsafe { self.bytes.range_mut(at..at + N) };
        target.copy_from_slice(&bytes);
    }
}
