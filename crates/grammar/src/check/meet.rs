//! How much of a constraint must hold at the same place. Knows no notation.

use super::at_most;
use crate::GrammarError;
use crate::limits::{CONJUNCTION_PARTS_MAX, CONJUNCTS_MAX, MULTIPLE_MAX};

/// What must hold at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meet {
    /// Expressions that are intersected or negated.
    operands: usize,
    /// At most as many ways to go on from any state.
    parts: usize,
    /// What numbers must be a multiple of, without the zeros at its end.
    divisor: usize,
}

impl Meet {
    /// Anything.
    pub(super) const NOTHING: Self = Self::new(0, 1, 1);

    const fn new(operands: usize, parts: usize, divisor: usize) -> Self {
        Self {
            operands,
            parts,
            divisor,
        }
    }

    /// One expression of this many [parts](super::expression::Size::parts).
    pub(super) const fn expression(parts: usize) -> Self {
        Self::new(1, parts, 1)
    }

    /// What is checked without an intersection: a literal, the length of a string.
    pub(super) const fn simple() -> Self {
        Self::NOTHING
    }

    /// A number that is a multiple of one of such digits.
    pub(super) const fn multiple_of(divisor: usize) -> Self {
        Self::new(0, 1, divisor)
    }

    /// Both must hold.
    pub(super) fn and(self, other: Self) -> Result<Self, GrammarError> {
        let operands = self.operands.saturating_add(other.operands);
        let parts = self.parts.saturating_mul(other.parts);
        if self.operands > 0 && other.operands > 0 {
            at_most(
                "expressions that must hold at once",
                CONJUNCTS_MAX,
                operands,
            )?;
            let what = "as product of the lengths of expressions that must hold at once";
            at_most(what, CONJUNCTION_PARTS_MAX, parts)?;
        }
        let divisor = common_multiple(self.divisor, other.divisor);
        at_most(
            "as multipleOf, apart from the zeros at its end",
            MULTIPLE_MAX,
            divisor,
        )?;
        Ok(Self::new(operands, parts, divisor))
    }

    /// One of them, or one behind the other.
    pub(super) fn beside(self, other: Self) -> Self {
        let widest = self.widest(other);
        Self {
            parts: self.parts.saturating_add(other.parts),
            ..widest
        }
    }

    /// Each at a place of its own.
    pub(super) fn widest(self, other: Self) -> Self {
        Self::new(
            self.operands.max(other.operands),
            self.parts.max(other.parts),
            self.divisor.max(other.divisor),
        )
    }

    /// So many of them, one behind the other.
    pub(super) fn times(self, count: usize) -> Self {
        Self {
            parts: self.parts.saturating_mul(count.max(1)),
            ..self
        }
    }
}

fn common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a.checked_div(x).unwrap_or(0).saturating_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_meets_multiplies_and_what_is_beside_adds_up() {
        let ten = Meet::expression(10);
        let both = ten.and(ten).unwrap();
        assert_eq!(both, Meet::new(2, 100, 1));
        assert_eq!(both.beside(ten), Meet::new(2, 110, 1));
        assert_eq!(ten.times(5), Meet::expression(50));
        let error = both.and(both).unwrap().and(ten).unwrap_err().to_string();
        assert_eq!(
            error,
            "must have at most 4 expressions that must hold at once, got 5"
        );
        let long = Meet::expression(1000);
        assert!(long.and(long).is_err());
        assert!(long.and(Meet::simple()).is_ok());
        let multiple = |n| Meet::multiple_of(n);
        assert_eq!(multiple(12).and(multiple(18)), Ok(multiple(36)));
        assert!(multiple(9973).and(multiple(9967)).is_err());
    }
}
