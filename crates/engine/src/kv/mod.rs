//! Book-keeping of the paged KV cache: which pages are free, whose, and what they hold. Never touches
//! keys and values themselves: those live in the attention backend.

mod block_pool;
mod block_table;
mod prefix_cache;

pub(crate) use block_pool::BlockPool;
pub(crate) use block_table::BlockTable;
pub(crate) use prefix_cache::PageKeys;

use tramontane_compute::KV_PAGE_TOKENS;

/// The first page that a query at `position` can see. `window` counts visible keys, the query's own
/// included.
pub(crate) fn first_visible_page(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| {
        (position + 1).saturating_sub(window) / KV_PAGE_TOKENS
    })
}

/// Most pages that a sequence of `num_tokens` computed tokens must hold at once, one row at a time.
pub(crate) fn pages_needed(num_tokens: usize, window: Option<usize>) -> usize {
    let all = num_tokens.div_ceil(KV_PAGE_TOKENS);
    window.map_or(all, |window| {
        // A window may begin at the last token of a page.
        all.min((window.max(1) - 1).div_ceil(KV_PAGE_TOKENS) + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_needs_as_many_pages_as_it_can_touch() {
        for window in 1..400 {
            let most = (0..1000_usize)
                .map(|p| p / KV_PAGE_TOKENS + 1 - first_visible_page(p, Some(window)))
                .max();
            assert_eq!(
                Some(pages_needed(1000, Some(window))),
                most,
                "window {window}"
            );
        }
        assert_eq!(pages_needed(65, None), 2);
        assert_eq!(first_visible_page(1_000, None), 0);
    }
}
