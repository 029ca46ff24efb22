//! The pages of one sequence, by position. Dropping it gives them back; it never holds a page twice.

use tramontane_compute::KV_PAGE_TOKENS;
use tramontane_types::PageId;

use super::BlockPool;
use super::prefix_cache::PageKey;

/// The pages of one sequence: position `p` lives in page `p / KV_PAGE_TOKENS`.
#[derive(Debug)]
pub(crate) struct BlockTable {
    pool: BlockPool,
    pages: Vec<PageId>,
    /// Leading entries that are [`PageId::RELEASED`].
    num_released: usize,
}

impl BlockTable {
    /// A table without pages.
    pub(crate) const fn new(pool: BlockPool) -> Self {
        Self {
            pool,
            pages: Vec::new(),
            num_released: 0,
        }
    }

    /// The pages, released ones included.
    pub(crate) fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Tokens that have a place.
    pub(crate) const fn capacity(&self) -> usize {
        self.pages.len() * KV_PAGE_TOKENS
    }

    /// Pages that this table really holds.
    pub(crate) const fn num_held(&self) -> usize {
        self.pages.len() - self.num_released
    }

    /// One page more at the end; false when the pool has none.
    pub(crate) fn grow(&mut self) -> bool {
        let Some(page) = self.pool.take() else {
            return false;
        };
        self.pages.push(page);
        true
    }

    /// Starts from cached pages: those before `first_visible` are not needed, those behind it are read
    /// together with others. Returns how many entries the table has now: fewer than `keys` when a page
    /// is not cached. The table must be empty.
    pub(crate) fn adopt(&mut self, keys: &[PageKey], first_visible: usize) -> usize {
        debug_assert!(
            self.pages.is_empty(),
            "only an empty table starts from the cache"
        );
        self.num_released = first_visible.min(keys.len());
        self.pages.resize(self.num_released, PageId::RELEASED);
        for key in &keys[self.num_released..] {
            let Some(page) = self.pool.share(key) else {
                break;
            };
            self.pages.push(page);
        }
        self.pages.len()
    }

    /// Gives back the pages before `first_visible`: a sliding window has left them behind.
    pub(crate) fn release_behind(&mut self, first_visible: usize) {
        let end = first_visible.min(self.pages.len());
        for page in self
            .pages
            .get_mut(self.num_released..end)
            .unwrap_or_default()
        {
            self.pool.give(std::mem::replace(page, PageId::RELEASED));
        }
        self.num_released = self.num_released.max(end);
    }

    /// Lets others find the page at `index`, unless it was released.
    pub(crate) fn register(&self, index: usize, key: PageKey) {
        if let Some(&page) = self.pages.get(index)
            && page != PageId::RELEASED
        {
            self.pool.register(page, key);
        }
    }

    /// Nobody finds these pages by their content any more: it turned out to be wrong.
    pub(crate) fn forget(&self) {
        for &page in &self.pages[self.num_released..] {
            self.pool.forget(page);
        }
    }

    /// Gives all pages back. The end of the sequence goes first: the cache keeps the beginning, which
    /// more sequences share, for longer.
    pub(crate) fn clear(&mut self) {
        for page in self.pages.drain(..).skip(self.num_released).rev() {
            self.pool.give(page);
        }
        self.num_released = 0;
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fmt::Write;

    use super::*;
    use crate::kv::PageKeys;

    /// Runs a scenario on a pool of 4 pages. `a+2` grows table a, `a-1` releases its first page,
    /// `a!` registers all its pages (as tokens of sequence a), `b=a` lets b adopt what a registered,
    /// `a.` drops the table, `a?` forgets its content. Each line prints pages, then available/idle.
    fn check(scenario: &str, expected: &str) {
        let pool = BlockPool::new(4);
        let mut tables: BTreeMap<char, BlockTable> = BTreeMap::new();
        let keys = |name: char| {
            let tokens = vec![name as u32; 4 * KV_PAGE_TOKENS];
            PageKeys::new(0).first(4, &tokens).to_vec()
        };
        let mut got = String::new();
        for line in scenario.split_whitespace() {
            let mut chars = line.chars();
            let (name, verb) = (chars.next().unwrap(), chars.next().unwrap());
            let rest = chars.as_str();
            let table = tables
                .entry(name)
                .or_insert_with(|| BlockTable::new(pool.clone()));
            let mut said = String::new();
            match verb {
                '+' => {
                    let grown = (0..rest.parse().unwrap()).all(|_| table.grow());
                    said = if grown {
                        String::new()
                    } else {
                        "full ".to_owned()
                    };
                }
                '-' => table.release_behind(rest.parse().unwrap()),
                '!' => {
                    for (i, key) in keys(name).into_iter().enumerate() {
                        table.register(i, key);
                    }
                }
                '=' => {
                    let keys = keys(rest.chars().next().unwrap());
                    let len = pool.longest_prefix(&keys, |_| 0);
                    table.adopt(&keys[..len], 0);
                }
                '?' => table.forget(),
                _ => drop(tables.remove(&name)),
            }
            let pages: Vec<String> = tables
                .get(&name)
                .iter()
                .flat_map(|t| t.pages())
                .map(|p| {
                    if *p == PageId::RELEASED {
                        "-".to_owned()
                    } else {
                        p.0.to_string()
                    }
                })
                .collect();
            let (available, idle) = (pool.num_available(), pool.num_idle());
            writeln!(
                got,
                "{line}: {said}[{}] {available}/{idle}",
                pages.join(" ")
            )
            .unwrap();
            pool.check_integrity(tables.values().map(BlockTable::pages))
                .unwrap();
        }
        let expected: Vec<&str> = expected.lines().map(str::trim).collect();
        assert_eq!(got.trim().lines().collect::<Vec<_>>(), expected, "{got}");
    }

    #[test]
    fn a_full_pool_refuses_and_a_dropped_table_gives_its_pages_back() {
        check(
            "a+3 b+2 a. b+2",
            "a+3: [0 1 2] 1/0
             b+2: full [3] 0/0
             a.: [] 3/0
             b+2: [3 0 1] 1/0",
        );
    }

    #[test]
    fn cached_pages_outlive_their_sequence_and_are_shared() {
        check(
            "a+2 a! a. b=a c=a b. c.",
            "a+2: [0 1] 2/0
             a!: [0 1] 2/0
             a.: [] 4/2
             b=a: [0 1] 2/0
             c=a: [0 1] 2/0
             b.: [] 2/0
             c.: [] 4/2",
        );
    }

    #[test]
    fn idle_pages_are_evicted_when_free_ones_run_out_the_tail_of_a_prefix_first() {
        check(
            "a+3 a! a. b+2 c=a b. c.",
            "a+3: [0 1 2] 1/0
             a!: [0 1 2] 1/0
             a.: [] 4/3
             b+2: [3 2] 2/2
             c=a: [0 1] 0/0
             b.: [] 2/0
             c.: [] 4/2",
        );
    }

    #[test]
    fn a_forgotten_page_is_not_found_again() {
        check(
            "a+2 a! a? a. b=a",
            "a+2: [0 1] 2/0
             a!: [0 1] 2/0
             a?: [0 1] 2/0
             a.: [] 4/0
             b=a: [] 4/0",
        );
    }

    #[test]
    fn released_pages_go_back_once() {
        check(
            "a+3 a-1 a-1 b+2 a-9 a.",
            "a+3: [0 1 2] 1/0
             a-1: [- 1 2] 2/0
             a-1: [- 1 2] 2/0
             b+2: [0 3] 0/0
             a-9: [- - -] 2/0
             a.: [] 2/0",
        );
    }
}
