//! What an engine wants of a row of logits, and which token is taken from one: the best, or one that is drawn. A backend that
//! chooses tokens itself chooses these, and refuses the same rows: this is its specification. Looks at nothing but the row.

mod multinomial;

pub use multinomial::{Multinomial, Scale, Sums, at_least, exp, multinomial, per_temperature};
use tramontane_types::TokenId;

/// Logits that are looked at together before anything is decided.
const SCAN_BLOCK: usize = 1024;
/// Maxima that a scan keeps: enough for the widest vectors.
const SCAN_LANES: usize = 16;

/// What is wanted of a row of logits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Wanted {
    /// The logits.
    #[default]
    Logits,
    /// The [`best`] token alone.
    Best,
    /// A token alone, drawn as [`multinomial`] does.
    Drawn(Multinomial),
}

impl Wanted {
    /// Whether it is the logits.
    #[must_use]
    pub const fn wants_logits(self) -> bool {
        matches!(self, Self::Logits)
    }

    /// The token that is wanted of a row; `None` where that is the logits.
    #[must_use]
    pub fn choose(self, logits: &[f32]) -> Option<Choice> {
        match self {
            Self::Logits => None,
            Self::Best => Some(best(logits)),
            Self::Drawn(draw) => Some(multinomial(logits, &draw)),
        }
    }
}

/// Why there is no token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model computed something that is no logit.
    #[error("the logit of token {id} is not a number or infinite")]
    NotFinite {
        /// The first such token.
        id: usize,
    },
    /// Every logit is minus infinity.
    #[error("no token is left to choose from")]
    NoCandidate,
}

/// The token of a row of logits, or why there is none.
pub type Choice = Result<TokenId, SampleError>;

/// What a step gives of its logits rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutputs {
    /// Of the rows that want logits, in order: `[rows, vocab]`.
    pub logits: Vec<f32>,
    /// Of all other rows, in order.
    pub choices: Vec<Choice>,
}

impl StepOutputs {
    /// Empties both and keeps their memory.
    pub fn clear(&mut self) {
        self.logits.clear();
        self.choices.clear();
    }
}

/// The best token of a row: highest logit, lowest id.
///
/// # Errors
/// When a logit is NaN or infinity, or all are minus infinity.
pub fn best(logits: &[f32]) -> Choice {
    check_numbers(logits)?;
    match argmax(logits) {
        Some((id, logit)) if logit > f32::NEG_INFINITY => Ok(id),
        _ => Err(SampleError::NoCandidate),
    }
}

/// Refuses NaN and infinity. Minus infinity is a token that the model itself excludes.
///
/// # Errors
/// [`SampleError::NotFinite`] with the first of them.
pub fn check_numbers(logits: &[f32]) -> Result<(), SampleError> {
    let is_bad = |l: f32| l.is_nan() | (l == f32::INFINITY);
    // A block is counted without a way out, as vectors; the bad one is looked for where there is one.
    for (n, block) in logits.chunks(SCAN_BLOCK).enumerate() {
        let num_bad: u32 = block.iter().map(|&l| u32::from(is_bad(l))).sum();
        if num_bad > 0 {
            let at = block.iter().position(|&l| is_bad(l)).unwrap_or(0);
            let id = n * SCAN_BLOCK + at;
            return Err(SampleError::NotFinite { id });
        }
    }
    Ok(())
}

/// The highest of logits without NaN; minus infinity of none.
#[must_use]
pub fn max(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; SCAN_LANES];
    let (vectors, rest) = logits.as_chunks::<SCAN_LANES>();
    for vector in vectors {
        for (lane, &x) in lanes.iter_mut().zip(vector) {
            *lane = larger(*lane, x);
        }
    }
    lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, larger)
}

/// Highest logit, lowest id, of logits without NaN; -0 and 0 are equal. `None` of none.
#[must_use]
pub fn argmax(logits: &[f32]) -> Option<(TokenId, f32)> {
    let mut best = (0, *logits.first()?);
    for (n, block) in logits.chunks(SCAN_BLOCK).enumerate() {
        let largest = max(block);
        if largest > best.1 {
            let at = block.iter().position(|&l| l == largest).unwrap_or(0);
            best = ((n * SCAN_BLOCK + at) as TokenId, largest);
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFINITY: f32 = f32::INFINITY;

    #[test]
    fn the_best_token_is_the_first_of_the_highest() {
        assert_eq!(best(&[1.0, 3.0, 2.0, 3.0]), Ok(1));
        assert_eq!(best(&[-0.0, 0.0, -1.0]), Ok(0));
        assert_eq!(best(&[-INFINITY, f32::MIN, -INFINITY]), Ok(1));
        let mut long = vec![-2.0; 3001];
        (long[2047], long[2048]) = (-1.0, -1.0);
        assert_eq!(best(&long), Ok(2047));
    }

    #[test]
    fn rows_without_a_token_are_refused_and_the_first_fault_is_named() {
        assert_eq!(best(&[-INFINITY; 3]), Err(SampleError::NoCandidate));
        assert_eq!(best(&[]), Err(SampleError::NoCandidate));
        let mut long = vec![0.0; 3001];
        (long[2999], long[1500], long[3000]) = (f32::NAN, INFINITY, f32::NAN);
        assert_eq!(best(&long), Err(SampleError::NotFinite { id: 1500 }));
        long[1025] = -f32::NAN;
        assert_eq!(best(&long), Err(SampleError::NotFinite { id: 1025 }));
    }
}
