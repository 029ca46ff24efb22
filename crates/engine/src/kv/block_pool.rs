//! The pages of the KV cache: free, read by sequences, or kept by the prefix cache. Never waits for a
//! page.

use std::sync::Arc;

use parking_lot::Mutex;
use tramontane_types::PageId;

use super::prefix_cache::{PageKey, PrefixCache};

/// A handle to the pool; block tables hold one, so that dropping them gives pages back.
///
/// The lock is never contended (one thread owns the engine); it makes the handle `Send`.
#[derive(Clone, Debug)]
pub(crate) struct BlockPool {
    pages: Arc<Mutex<Pages>>,
}

#[derive(Debug)]
struct Pages {
    /// Sequences that read each page, `[num_pages]`.
    num_readers: Vec<u32>,
    /// Pages without reader and content.
    free: Vec<PageId>,
    cache: PrefixCache,
}

impl BlockPool {
    /// A pool of free pages `0..num_pages`.
    pub(crate) fn new(num_pages: usize) -> Self {
        let pages = Pages {
            num_readers: vec![0; num_pages],
            free: (0..num_pages).rev().map(|i| PageId(i as u32)).collect(),
            cache: PrefixCache::default(),
        };
        Self {
            pages: Arc::new(Mutex::new(pages)),
        }
    }

    /// All pages.
    pub(crate) fn num_pages(&self) -> usize {
        self.pages.lock().num_readers.len()
    }

    /// Pages that [`take`](Self::take) can still give: free ones and idle ones of the cache.
    pub(crate) fn num_available(&self) -> usize {
        let pages = self.pages.lock();
        pages.free.len() + pages.cache.num_idle()
    }

    /// Idle pages of the cache.
    pub(crate) fn num_idle(&self) -> usize {
        self.pages.lock().cache.num_idle()
    }

    /// A page of unknown content with one reader: a free one, else the coldest idle one.
    pub(crate) fn take(&self) -> Option<PageId> {
        let mut pages = self.pages.lock();
        let page = match pages.free.pop() {
            Some(page) => page,
            None => pages.cache.evict()?,
        };
        pages.num_readers[page.0 as usize] = 1;
        Some(page)
    }

    /// One reader less. A page of the cache is kept until it is evicted.
    pub(crate) fn give(&self, page: PageId) {
        let mut pages = self.pages.lock();
        let readers = &mut pages.num_readers[page.0 as usize];
        debug_assert!(
            *readers > 0,
            "page {} is given back once per reader",
            page.0
        );
        *readers = readers.saturating_sub(1);
        if *readers > 0 {
            return;
        }
        if pages.cache.holds(page) {
            pages.cache.rest(page);
        } else {
            pages.free.push(page);
        }
    }

    /// Length in pages of the longest cached prefix that can be continued. `first_visible(n)` is the
    /// first page that the token behind `n` pages sees; what lies before it need not be cached.
    pub(crate) fn longest_prefix(
        &self,
        keys: &[PageKey],
        first_visible: impl Fn(usize) -> usize,
    ) -> usize {
        let pages = self.pages.lock();
        let mut longest = 0;
        let mut run = 0; // cached pages in a row
        for (i, key) in keys.iter().enumerate() {
            run = if pages.cache.get(key).is_some() {
                run + 1
            } else {
                0
            };
            if run >= i + 1 - first_visible(i + 1).min(i + 1) && run > 0 {
                longest = i + 1;
            }
        }
        longest
    }

    /// The page that holds this content, with one reader more.
    pub(crate) fn share(&self, key: &PageKey) -> Option<PageId> {
        let mut pages = self.pages.lock();
        let page = pages.cache.get(key)?;
        pages.cache.wake(page);
        pages.num_readers[page.0 as usize] += 1;
        Some(page)
    }

    /// Says what a page holds. Its rows must have been computed, all of them.
    pub(crate) fn register(&self, page: PageId, key: PageKey) {
        self.pages.lock().cache.insert(page, key);
    }

    /// Nobody finds this page by its content any more.
    pub(crate) fn forget(&self, page: PageId) {
        let mut pages = self.pages.lock();
        if pages.cache.remove(page) {
            pages.free.push(page);
        }
    }

    /// Checks that every page is in exactly one place and is read by exactly the `tables` given.
    ///
    /// # Errors
    /// Says which page is wrong.
    pub(crate) fn check_integrity<'a>(
        &self,
        tables: impl Iterator<Item = &'a [PageId]>,
    ) -> Result<(), String> {
        let pages = self.pages.lock();
        let mut num_readers = vec![0_u32; pages.num_readers.len()];
        for page in tables.flatten().filter(|&&page| page != PageId::RELEASED) {
            num_readers[page.0 as usize] += 1;
        }
        let mut is_free = vec![false; num_readers.len()];
        for page in &pages.free {
            if std::mem::replace(&mut is_free[page.0 as usize], true) {
                return Err(format!("page {} is free twice", page.0));
            }
        }
        let mut num_used = 0;
        for (i, &expected) in num_readers.iter().enumerate() {
            if expected != pages.num_readers[i] {
                let got = pages.num_readers[i];
                return Err(format!(
                    "page {i} counts {got} readers, expected {expected}"
                ));
            }
            if expected > 0 && is_free[i] {
                return Err(format!("page {i} is free and has {expected} readers"));
            }
            if is_free[i] && pages.cache.holds(PageId(i as u32)) {
                return Err(format!("page {i} is free and cached"));
            }
            num_used += usize::from(expected > 0);
        }
        let (free, idle) = (pages.free.len(), pages.cache.num_idle());
        if free + idle + num_used != num_readers.len() || pages.cache.len() < idle {
            let total = num_readers.len();
            return Err(format!(
                "free {free} + idle {idle} + used {num_used} is not {total}"
            ));
        }
        Ok(())
    }
}
