//! Looks at a constraint before llguidance does: sizes that its own limits do not bound. Never says whether a
//! constraint makes sense.
//!
//! llguidance and derivre call themselves along brackets and references, and look at their fuel only between the
//! derivatives of an expression: one derivative of an intersection takes as many steps as the parts of its operands
//! multiply to. Nothing can end either from outside, so both are bounded here.

mod expression;
mod lark;
mod meet;
mod places;
mod schema;

pub(crate) use expression::expression;
pub(crate) use lark::lark;
pub(crate) use schema::schema;

use crate::GrammarError;

/// Refuses what is more than its limit.
pub(crate) fn at_most(what: &'static str, limit: usize, got: usize) -> Result<(), GrammarError> {
    if got > limit {
        return Err(GrammarError::TooLarge { what, limit, got });
    }
    Ok(())
}
