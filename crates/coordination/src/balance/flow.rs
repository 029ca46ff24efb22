//! Fills a table with given row and column sums by augmenting paths (Ford and Fulkerson), so that a
//! solution is found whenever there is one. Never lowers a cell below its floor.

use std::collections::VecDeque;

/// A table of counts and how much its rows and columns still lack.
#[derive(Clone, Debug)]
pub(super) struct Table {
    /// `[num_rows][num_columns]`
    pub(super) cells: Vec<Vec<usize>>,
    /// What is missing to each row's sum.
    pub(super) row_lack: Vec<usize>,
    /// What is missing to each column's sum.
    pub(super) column_lack: Vec<usize>,
}

impl Table {
    /// Adds units until no row lacks any, or no path is left within the cells' `most` and `floor`.
    pub(super) fn fill(
        &mut self,
        most: impl Fn(usize, usize) -> usize,
        floor: impl Fn(usize, usize) -> usize,
    ) {
        for row in 0..self.cells.len() {
            while self.row_lack[row] > 0 && self.augment(row, &most, &floor) {}
        }
    }

    /// Whether every row and column has its sum.
    pub(super) fn is_complete(&self) -> bool {
        let mut lacks = self.row_lack.iter().chain(&self.column_lack);
        lacks.all(|&lack| lack == 0)
    }

    /// Adds one unit to `row` on a shortest path; false when there is none.
    fn augment(
        &mut self,
        row: usize,
        most: &impl Fn(usize, usize) -> usize,
        floor: &impl Fn(usize, usize) -> usize,
    ) -> bool {
        // The row from which each column was reached, and the column from which each row was.
        let mut column_from: Vec<Option<usize>> = vec![None; self.column_lack.len()];
        let mut row_from: Vec<Option<usize>> = vec![None; self.cells.len()];
        let mut rows = VecDeque::from([row]);
        while let Some(at) = rows.pop_front() {
            let mut reached: Vec<usize> = (0..column_from.len())
                .filter(|&c| column_from[c].is_none() && self.cells[at][c] < most(at, c))
                .collect();
            // The neediest column first; ties in order.
            reached.sort_by_key(|&c| std::cmp::Reverse(self.column_lack[c]));
            for column in reached {
                column_from[column] = Some(at);
                if self.column_lack[column] > 0 {
                    self.apply(row, column, &column_from, &row_from);
                    return true;
                }
                for (next, cells) in self.cells.iter().enumerate() {
                    let new = next != row && row_from[next].is_none();
                    if new && cells[column] > floor(next, column) {
                        row_from[next] = Some(column);
                        rows.push_back(next);
                    }
                }
            }
        }
        false
    }

    fn apply(
        &mut self,
        row: usize,
        column: usize,
        column_from: &[Option<usize>],
        row_from: &[Option<usize>],
    ) {
        self.column_lack[column] -= 1;
        self.row_lack[row] -= 1;
        let mut column = column;
        while let Some(at) = column_from[column] {
            self.cells[at][column] += 1;
            let Some(from) = row_from[at].filter(|_| at != row) else {
                return;
            };
            self.cells[at][from] -= 1;
            column = from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_found_through_cells_that_must_give_way() {
        let mut table = Table {
            cells: vec![vec![0; 2]; 2],
            row_lack: vec![1, 1],
            column_lack: vec![1, 1],
        };
        // Row 1 can only use column 0, which row 0 takes first.
        table.fill(|row, column| usize::from(row == 0 || column == 0), |_, _| 0);
        assert!(table.is_complete());
        assert_eq!(table.cells, [[0, 1], [1, 0]]);
    }

    #[test]
    fn floors_hold_and_an_impossible_table_stays_incomplete() {
        let mut table = Table {
            cells: vec![vec![1, 0], vec![0, 0]],
            row_lack: vec![0, 1],
            column_lack: vec![0, 1],
        };
        let most = |row: usize, column: usize| usize::from(row == 0 || column == 0);
        table.fill(most, |row, column| usize::from(row == 0 && column == 0));
        assert!(!table.is_complete());
        table.fill(most, |_, _| 0);
        assert!(table.is_complete());
        assert_eq!(table.cells, [[0, 1], [1, 0]]);
    }
}
