//! What waits for the same thing on behalf of several owners, who take turns. Where there is no room, whoever has most
//! waiting gives way: who asks for much waits for itself.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound::{Excluded, Unbounded};

/// All that wait: of each owner in the order in which they came.
#[derive(Clone, Debug)]
pub struct TurnQueue<K, T> {
    /// Never an empty one.
    owners: BTreeMap<K, VecDeque<T>>,
    len: usize,
    /// Whose turn was the last.
    last: Option<K>,
}

impl<K, T> Default for TurnQueue<K, T> {
    fn default() -> Self {
        Self {
            owners: BTreeMap::new(),
            len: 0,
            last: None,
        }
    }
}

impl<K: Ord + Clone, T> TurnQueue<K, T> {
    /// Adds an item to at most `max`, and returns the one that gives way to it, if any has to: the last of the owner with
    /// most.
    ///
    /// # Errors
    /// The item itself, when nobody has more than its owner would.
    pub fn push(&mut self, owner: K, item: T, max: usize) -> Result<Option<T>, T> {
        let gone = if self.len < max {
            None
        } else {
            match self.give_way(&owner) {
                Some(gone) => Some(gone),
                None => return Err(item),
            }
        };
        self.owners.entry(owner).or_default().push_back(item);
        self.len += 1;
        Ok(gone)
    }

    fn give_way(&mut self, asking: &K) -> Option<T> {
        let own = self.owners.get(asking).map_or(0, VecDeque::len);
        let longest = self.owners.iter().max_by_key(|(_, items)| items.len());
        let (owner, _) = longest.filter(|(_, items)| items.len() > own + 1)?;
        let owner = owner.clone();
        self.take(&owner, VecDeque::pop_back)
    }

    /// The first item of whoever is next.
    pub fn pop(&mut self) -> Option<T> {
        let behind = self.last.as_ref().and_then(|last| {
            let behind = (Excluded(last), Unbounded);
            self.owners.range::<K, _>(behind).next()
        });
        let (owner, _) = behind.or_else(|| self.owners.first_key_value())?;
        let owner = owner.clone();
        let first = self.take(&owner, VecDeque::pop_front);
        self.last = Some(owner);
        first
    }

    /// Says that `owner` has had a turn without waiting.
    pub fn had_turn(&mut self, owner: K) {
        self.last = Some(owner);
    }

    /// Takes out the item of `owner` that is meant, if it still waits.
    pub fn remove(&mut self, owner: &K, is_meant: impl FnMut(&T) -> bool) -> Option<T> {
        let index = self.owners.get(owner)?.iter().position(is_meant)?;
        self.take(owner, |items| items.remove(index))
    }

    /// Takes out an owner's first item that is meant. Nobody's turn passes by it.
    pub fn pop_front_if(&mut self, is_meant: impl Fn(&T) -> bool) -> Option<T> {
        let is_first = |items: &VecDeque<T>| items.front().is_some_and(&is_meant);
        let (owner, _) = self.owners.iter().find(|(_, items)| is_first(items))?;
        let owner = owner.clone();
        self.take(&owner, VecDeque::pop_front)
    }

    fn take(&mut self, owner: &K, end: impl FnOnce(&mut VecDeque<T>) -> Option<T>) -> Option<T> {
        let items = self.owners.get_mut(owner)?;
        let taken = end(items)?;
        if items.is_empty() {
            self.owners.remove(owner);
        }
        self.len -= 1;
        Some(taken)
    }

    /// The first item of each owner.
    pub fn fronts(&self) -> impl Iterator<Item = &T> {
        self.owners.values().filter_map(VecDeque::front)
    }

    /// Items of all owners.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(items: &[(char, u32)]) -> TurnQueue<char, u32> {
        let mut queue = TurnQueue::default();
        for &(owner, item) in items {
            assert_eq!(queue.push(owner, item, usize::MAX), Ok(None));
        }
        queue
    }

    fn rest(queue: &mut TurnQueue<char, u32>) -> Vec<u32> {
        let rest = std::iter::from_fn(|| queue.pop()).collect();
        assert!(queue.is_empty() && queue.owners.is_empty());
        rest
    }

    #[test]
    fn owners_take_turns_however_much_one_of_them_asks_for() {
        let mut waiting = queue(&[('a', 1), ('a', 2), ('a', 3), ('c', 4), ('b', 5), ('b', 6)]);
        waiting.had_turn('a');
        assert_eq!(rest(&mut waiting), [5, 4, 1, 6, 2, 3]);
    }

    #[test]
    fn where_there_is_no_room_who_has_most_gives_way() {
        let mut waiting = queue(&[('a', 1), ('a', 2), ('a', 3)]);
        assert_eq!(waiting.push('a', 4, 3), Err(4));
        assert_eq!(waiting.push('b', 5, 3), Ok(Some(3)));
        // It would have as many as the other.
        assert_eq!(waiting.push('b', 6, 3), Err(6));
        assert_eq!(waiting.push('c', 7, 0), Ok(Some(2)));
        assert_eq!(rest(&mut waiting), [1, 5, 7]);
    }

    #[test]
    fn items_leave_before_their_turn() {
        let mut waiting = queue(&[('a', 1), ('a', 2), ('b', 3), ('b', 4)]);
        assert_eq!(waiting.remove(&'a', |&item| item == 2), Some(2));
        assert_eq!(waiting.remove(&'a', |&item| item == 3), None);
        assert_eq!(waiting.pop_front_if(|&item| item > 2), Some(3));
        assert_eq!(waiting.pop_front_if(|&item| item > 4), None);
        assert_eq!(waiting.fronts().copied().collect::<Vec<_>>(), [1, 4]);
        assert_eq!(waiting.len(), 2);
        assert_eq!(rest(&mut waiting), [1, 4]);
    }
}
