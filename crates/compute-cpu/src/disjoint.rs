//! A slice that the items of one parallel run write at places of their own. Never reads, never resizes.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice shared by the items of one [`Pool::run`](crate::pool::Pool::run).
#[derive(Debug)]
pub(crate) struct Disjoint<'a, T> {
    data: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: `range_mut` hands out `&mut [T]` to other threads, which needs `T: Send`; that the ranges of
// two threads do not meet is what its callers promise.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            data: slice.as_mut_ptr(),
            len: slice.len(),
            owner: PhantomData,
        }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// While the result lives, no other call may ask for any of the same elements.
    #[expect(
        clippy::mut_from_ref,
        reason = "the promise of the caller is the exclusion"
    )]
    pub(crate) unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "range {range:?} of {}",
            self.len
        );
        // SAFETY: the range is inside the slice that `self` borrows, and the caller promises that
        // nobody else holds these elements.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}
