//! Finds pages by what they hold. A key covers all tokens from the start of the sequence, so a page is
//! found only where it is exactly what would be computed. Never holds a page that is not full.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};
use tramontane_compute::KV_PAGE_TOKENS;
use tramontane_types::{PageId, TokenId};

/// SHA-256 over a page's tokens and the key of the page before it. Wide, because a collision (found
/// by chance or on purpose) would show one tenant's text to another.
pub(crate) type PageKey = [u8; 32];

/// Separates these hashes from any other use of SHA-256; changes when the chaining changes.
const KEY_DOMAIN: &[u8] = b"tramontane kv page 1";

/// The keys of one sequence's full pages, computed as they are asked for.
#[derive(Clone, Debug)]
pub(crate) struct PageKeys {
    root: PageKey,
    keys: Vec<PageKey>,
}

impl PageKeys {
    /// Keys under a salt: sequences of different salts share nothing.
    pub(crate) fn new(salt: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(KEY_DOMAIN);
        hash.update(salt.to_le_bytes());
        Self {
            root: hash.finalize().into(),
            keys: Vec::new(),
        }
    }

    /// Keys of the first `num_pages` pages of `tokens`. The tokens of one sequence only grow.
    pub(crate) fn first(&mut self, num_pages: usize, tokens: &[TokenId]) -> &[PageKey] {
        for page in tokens
            .chunks_exact(KV_PAGE_TOKENS)
            .take(num_pages)
            .skip(self.keys.len())
        {
            let mut hash = Sha256::new();
            hash.update(self.keys.last().unwrap_or(&self.root));
            for token in page {
                hash.update(token.to_le_bytes());
            }
            self.keys.push(hash.finalize().into());
        }
        &self.keys[..num_pages.min(self.keys.len())]
    }
}

/// Which pages hold which content, and which of them nobody reads: those may be evicted, the longest
/// unread first.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    by_key: HashMap<PageKey, PageId>,
    by_page: HashMap<PageId, Entry>,
    /// Pages without a reader, by when they lost the last one.
    idle: BTreeMap<u64, PageId>,
    next_stamp: u64,
}

#[derive(Debug)]
struct Entry {
    key: PageKey,
    idle_since: Option<u64>,
}

impl PrefixCache {
    pub(super) fn get(&self, key: &PageKey) -> Option<PageId> {
        self.by_key.get(key).copied()
    }

    pub(super) fn holds(&self, page: PageId) -> bool {
        self.by_page.contains_key(&page)
    }

    pub(super) fn num_idle(&self) -> usize {
        self.idle.len()
    }

    pub(super) fn len(&self) -> usize {
        self.by_page.len()
    }

    /// Remembers a page that somebody reads. The first page of a key is kept, later ones are not.
    pub(super) fn insert(&mut self, page: PageId, key: PageKey) {
        if self.by_key.contains_key(&key) || self.holds(page) {
            return;
        }
        self.by_key.insert(key, page);
        self.by_page.insert(
            page,
            Entry {
                key,
                idle_since: None,
            },
        );
    }

    /// The page got its first reader again.
    pub(super) fn wake(&mut self, page: PageId) {
        if let Some(entry) = self.by_page.get_mut(&page)
            && let Some(stamp) = entry.idle_since.take()
        {
            self.idle.remove(&stamp);
        }
    }

    /// The page lost its last reader.
    pub(super) fn rest(&mut self, page: PageId) {
        let Some(entry) = self.by_page.get_mut(&page) else {
            return;
        };
        entry.idle_since = Some(self.next_stamp);
        self.idle.insert(self.next_stamp, page);
        self.next_stamp += 1;
    }

    /// Forgets what a page holds. Says whether it was idle: then it is nobody's now.
    pub(super) fn remove(&mut self, page: PageId) -> bool {
        let Some(entry) = self.by_page.remove(&page) else {
            return false;
        };
        self.by_key.remove(&entry.key);
        entry
            .idle_since
            .is_some_and(|stamp| self.idle.remove(&stamp).is_some())
    }

    /// Takes the page that was unread for longest.
    pub(super) fn evict(&mut self) -> Option<PageId> {
        let (_, &page) = self.idle.first_key_value()?;
        self.remove(page);
        Some(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_covers_everything_before_the_page_and_the_salt() {
        let tokens: Vec<TokenId> = (0..200).collect();
        let mut changed = tokens.clone();
        changed[3] = 7;
        let keys = |salt, tokens: &[TokenId]| PageKeys::new(salt).first(9, tokens).to_vec();
        let base = keys(0, &tokens);
        assert_eq!(base.len(), 3, "only full pages have a key");
        assert_eq!(base, keys(0, &tokens[..192]));
        for (a, b) in base.iter().zip(keys(0, &changed)) {
            assert_ne!(*a, b);
        }
        for (a, b) in base.iter().zip(keys(1, &tokens)) {
            assert_ne!(*a, b);
        }
    }

    #[test]
    fn keys_asked_for_piece_by_piece_are_the_same() {
        let tokens: Vec<TokenId> = (0..640).map(|i| i * 3).collect();
        let mut grown = PageKeys::new(5);
        for len in [0, 63, 64, 100, 500, 640] {
            grown.first(len / KV_PAGE_TOKENS, &tokens[..len]);
        }
        assert_eq!(
            grown.first(10, &tokens),
            PageKeys::new(5).first(10, &tokens)
        );
        assert_eq!(grown.first(2, &tokens).len(), 2);
    }
}
