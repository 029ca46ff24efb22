//! What a step gave of its logits rows, handed out in their order: logits here, a token that the backend has chosen there.

use tramontane_compute::{Choice, StepOutputs, Wanted};

/// What there is of one row.
#[derive(Debug)]
pub(crate) enum Row<'a> {
    /// `[vocab]`.
    Logits(&'a mut [f32]),
    Chosen(Choice),
}

/// The rows that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    vocab: usize,
    /// What there is of each.
    wanted: &'a [Wanted],
    logits: &'a mut [f32],
    choices: &'a [Choice],
}

impl<'a> Rows<'a> {
    /// All rows of a step that has given what was wanted.
    pub(crate) fn new(wanted: &'a [Wanted], outputs: &'a mut StepOutputs, vocab: usize) -> Self {
        Self {
            vocab,
            wanted,
            logits: &mut outputs.logits,
            choices: &outputs.choices,
        }
    }

    /// Takes the next `num_rows`.
    pub(crate) fn take_rows(&mut self, num_rows: usize) -> Self {
        let (wanted, rest) = self.wanted.split_at(num_rows);
        let num_logits = num_logits(wanted);
        let logits = std::mem::take(&mut self.logits);
        let (logits, rest_logits) = logits.split_at_mut(num_logits * self.vocab);
        let (choices, rest_choices) = self.choices.split_at(num_rows - num_logits);
        (self.wanted, self.logits, self.choices) = (rest, rest_logits, rest_choices);
        Self {
            vocab: self.vocab,
            wanted,
            logits,
            choices,
        }
    }

    /// The logits of those rows that have them, `[rows, vocab]`.
    pub(crate) fn into_logits(self) -> &'a mut [f32] {
        self.logits
    }
}

impl<'a> Iterator for Rows<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Row<'a>> {
        if self.wanted.is_empty() {
            return None;
        }
        let Rows {
            logits, choices, ..
        } = self.take_rows(1);
        Some(match choices.first() {
            Some(choice) => Row::Chosen(*choice),
            None => Row::Logits(logits),
        })
    }
}

/// How many rows want logits.
pub(crate) fn num_logits(wanted: &[Wanted]) -> usize {
    wanted.iter().filter(|wanted| wanted.wants_logits()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_order_whatever_there_is_of_them() {
        let wanted = [Wanted::Best, Wanted::Logits, Wanted::Logits, Wanted::Best];
        let mut outputs = StepOutputs {
            logits: vec![1.0, 2.0, 3.0, 4.0],
            choices: vec![Ok(7), Ok(9)],
        };
        let mut rows = Rows::new(&wanted, &mut outputs, 2);
        let first: Vec<Row<'_>> = rows.take_rows(2).collect();
        assert!(matches!(
            &first[..],
            [Row::Chosen(Ok(7)), Row::Logits([1.0, 2.0])]
        ));
        assert_eq!(rows.take_rows(1).into_logits(), [3.0, 4.0]);
        assert!(matches!(rows.next(), Some(Row::Chosen(Ok(9)))));
        assert!(rows.next().is_none());
    }
}
