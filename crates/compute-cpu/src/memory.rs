//! Memory that weights lie in while they are held: zeroed, on huge pages where the system has them. Knows no format.
//!
//! A product reads a matrix once and then not again for a long time: on pages of 4 KiB most of that time
//! goes into finding the pages. Nothing is touched here: a page becomes real where it is first written, so
//! the threads that pack share the zeroing, and on a machine with several memory nodes weights lie at the
//! nodes of those threads and not all at one.

use std::ops::Range;
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use parking_lot::Mutex;
use tramontane_compute::Error;

use crate::pack::Line;

/// A huge page of x86-64 and of most 64-bit ARM systems.
const HUGE_PAGE: usize = 2 << 20;

/// Regions begin at such pages, so that a dropped one gives back all of its memory.
const PAGE: usize = 4096;

/// Reserved at once for the weights of a backend: many matrices, since few fill a huge page on their own. What is
/// not written takes no memory.
const SLAB_BYTES: usize = 64 * HUGE_PAGE;

/// Memory for matrices, one mapping after another. What a dropped region gave back to the system is not handed out
/// again: it stays as address space until its mapping goes.
#[derive(Debug)]
pub(crate) struct Slab {
    /// Bytes of a mapping, unless a matrix is larger.
    bytes: usize,
    mapping: Mutex<Option<Mapping>>,
}

#[derive(Debug)]
struct Mapping {
    map: Arc<MmapRaw>,
    /// What is left, in bytes from the start of the mapping.
    free: Range<usize>,
}

/// One part of a mapping. Dropped, it gives its memory back, while other parts live on.
#[derive(Debug)]
pub(crate) struct Region {
    map: Arc<MmapRaw>,
    /// In bytes from the start of the mapping.
    begin: usize,
    num_lines: usize,
}

impl Slab {
    /// Room for all weights of a backend; takes no memory yet.
    pub(crate) fn new() -> Self {
        Self {
            bytes: SLAB_BYTES,
            mapping: Mutex::new(None),
        }
    }

    /// The next lines, all zero; of a new mapping when this one is used up.
    ///
    /// # Errors
    /// When the system refuses it.
    pub(crate) fn take(&self, num_lines: usize) -> Result<Region, Error> {
        let bytes = region_bytes(num_lines);
        let mut mapping = self.mapping.lock();
        let used_up = |mapping: &Mapping| mapping.free.len() < bytes;
        if mapping.as_ref().is_none_or(used_up) {
            *mapping = None;
        }
        let mapping = match &mut *mapping {
            Some(mapping) => mapping,
            none => none.insert(Mapping::reserve(bytes.max(self.bytes))?),
        };
        Ok(mapping.take(num_lines))
    }
}

impl Mapping {
    fn reserve(bytes: usize) -> Result<Self, Error> {
        let refused = |source| Error::Library {
            operation: "reserving memory for weights",
            source: Box::new(source),
        };
        // Room to begin at a huge page.
        let slack = if bytes < HUGE_PAGE { 0 } else { HUGE_PAGE };
        let len = bytes.max(PAGE) + slack;
        let map = MmapOptions::new().len(len).map_anon().map_err(refused)?;
        let begin = match slack {
            0 => 0,
            _ => map.as_ptr().align_offset(HUGE_PAGE),
        };
        advise_huge_pages(&map, begin, bytes);
        Ok(Self {
            map: Arc::new(MmapRaw::from(map)),
            free: begin..begin + bytes,
        })
    }

    /// Takes lines that fit.
    fn take(&mut self, num_lines: usize) -> Region {
        let begin = self.free.start;
        self.free.start += region_bytes(num_lines);
        Region {
            map: Arc::clone(&self.map),
            begin,
            num_lines,
        }
    }
}

/// Bytes that a region of so many lines takes: whole pages.
pub(crate) const fn region_bytes(num_lines: usize) -> usize {
    (num_lines * size_of::<Line>()).next_multiple_of(PAGE)
}

/// Only whole huge pages: one that reaches behind the end would be paid for and not used.
#[cfg(target_os = "linux")]
fn advise_huge_pages(map: &MmapMut, begin: usize, len: usize) {
    let len = len / HUGE_PAGE * HUGE_PAGE;
    if len == 0 {
        return;
    }
    if let Err(error) = map.advise_range(memmap2::Advice::HugePage, begin, len) {
        tracing::debug!(%error, "no huge pages for weights");
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_map: &MmapMut, _begin: usize, _len: usize) {}

impl Region {
    /// Lines that share no huge page with any others.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub(crate) fn alone(num_lines: usize) -> Result<Self, Error> {
        Ok(Mapping::reserve(region_bytes(num_lines))?.take(num_lines))
    }

    pub(crate) fn lines(&self) -> &[Line] {
        // SAFETY: the mapping holds the region (see `Mapping::take`), a page boundary is aligned for lines,
        // any bytes are lines, and only `lines_mut` writes, which borrows the region mutably.
        unsafe { std::slice::from_raw_parts(self.at().cast_const(), self.num_lines) }
    }

    pub(crate) fn lines_mut(&mut self) -> &mut [Line] {
        // SAFETY: as in `lines`; regions of a mapping do not overlap, and this one is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at(), self.num_lines) }
    }

    fn at(&self) -> *mut Line {
        // SAFETY: `begin` lies inside the mapping.
        unsafe { self.map.as_mut_ptr().add(self.begin).cast() }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if Arc::strong_count(&self.map) > 1 {
            let len = region_bytes(self.num_lines);
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: these pages belong to this region alone, which nobody can read any more.
            let freed = unsafe { self.map.unchecked_advise_range(advice, self.begin, len) };
            if let Err(error) = freed {
                tracing::warn!(%error, "memory of dropped weights is kept");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_are_zero_apart_and_outlive_each_other() {
        for num_lines in [vec![0], vec![1, 3], vec![70, 0, 1], vec![50_000, 7, 30_000]] {
            let bytes = num_lines.iter().map(|n| region_bytes(*n)).sum();
            let mut mapping = Mapping::reserve(bytes).unwrap();
            let regions = num_lines.iter().map(|n| mapping.take(*n));
            let mut regions: Vec<Region> = regions.collect();
            assert!(mapping.free.is_empty());
            for (i, region) in regions.iter_mut().enumerate() {
                assert_eq!(region.lines().len(), num_lines[i]);
                for line in region.lines_mut() {
                    assert_eq!(line.0, [0; 64]);
                    line.0 = [i as u8 + 1; 64];
                }
            }
            let last = regions.pop().unwrap();
            let value = regions.len() as u8 + 1;
            drop(regions);
            assert!(last.lines().iter().all(|line| line.0 == [value; 64]));
        }
    }

    #[test]
    fn a_mapping_that_is_used_up_is_followed_by_another() {
        let slab = Slab {
            bytes: region_bytes(1),
            ..Slab::new()
        };
        let mut first = slab.take(1).unwrap();
        let mut second = slab.take(100).unwrap();
        first.lines_mut()[0].0 = [1; 64];
        second.lines_mut().fill(Line([2; 64]));
        drop(slab);
        assert_eq!(first.lines()[0].0, [1; 64]);
        assert!(second.lines().iter().all(|line| line.0 == [2; 64]));
    }
}
