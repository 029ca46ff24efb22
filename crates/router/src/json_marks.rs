//! The marks that make the values of a JSON text, counted while it arrives: a text of a few megabytes can be values of
//! a gigabyte. Never says whether it is JSON.

use crate::error::{ApiError, ErrorKind};

/// Most commas, colons and opening brackets outside of strings in one body. A prompt of 32,768 token ids has one for
/// each, so that nineteen of these fit, as do the longest conversations and the largest schemas many times over.
/// Values of as many marks took at most 184 MiB (arrays in arrays to the largest depth, counted by an allocator).
pub(crate) const BODY_MARKS_MAX: usize = 640 * 1024;
/// Most of them in all JSON texts of one gRPC message: 128 tools of 512 marks each. At most 19 MiB.
pub(crate) const FIELD_MARKS_MAX: usize = 64 * 1024;
/// Memory that one mark makes at most, as measured: an array of one element is room for four, of 72 bytes each.
const MARK_BYTES: usize = 300;

/// The marks of a text that comes in pieces.
#[derive(Debug)]
pub(crate) struct JsonMarks {
    count: usize,
    max: usize,
    in_string: bool,
    is_escaped: bool,
}

impl JsonMarks {
    /// Of texts that may have at most so many together.
    pub(crate) const fn at_most(max: usize) -> Self {
        Self {
            count: 0,
            max,
            in_string: false,
            is_escaped: false,
        }
    }

    /// Counts those of the next piece. `what` has them.
    pub(crate) fn count(&mut self, piece: &[u8], what: &str) -> Result<(), ApiError> {
        for byte in piece {
            if self.is_escaped {
                self.is_escaped = false;
                continue;
            }
            match byte {
                b'"' => self.in_string = !self.in_string,
                b'\\' => self.is_escaped = self.in_string,
                b',' | b':' | b'[' | b'{' if !self.in_string => self.count += 1,
                _ => {}
            }
        }
        if self.count <= self.max {
            return Ok(());
        }
        let (max, got) = (self.max, self.count);
        let rule = format!("at most {max} commas, colons and opening brackets outside of strings");
        let message = format!("{what} must have {rule}, got {got} or more");
        Err(ApiError::new(ErrorKind::TooLarge, message))
    }

    /// Counts those of a whole text.
    pub(crate) fn count_text(&mut self, text: &str, what: &str) -> Result<(), ApiError> {
        (self.in_string, self.is_escaped) = (false, false);
        self.count(text.as_bytes(), what)
    }

    /// Memory that the values take at most.
    pub(crate) const fn values_bytes(&self) -> usize {
        self.count * MARK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(pieces: &[&str]) -> usize {
        let mut marks = JsonMarks::at_most(100);
        for piece in pieces {
            marks.count(piece.as_bytes(), "the body").unwrap();
        }
        marks.count
    }

    #[test]
    fn marks_count_outside_of_strings_wherever_the_text_is_cut() {
        let text = r#"{"a,:[{":[1,"b\",[",{"\\":2}],"é":["\\\"{"]}"#;
        assert_eq!(count(&[text]), 10);
        for cut in (0..text.len()).filter(|&cut| text.is_char_boundary(cut)) {
            let (before, after) = text.split_at(cut);
            assert_eq!(count(&[before, after]), 10, "cut at {cut}");
        }
    }

    #[test]
    fn a_refusal_says_what_was_expected_and_what_came() {
        let mut marks = JsonMarks::at_most(3);
        marks.count(b"[[[0]]]", "the body").unwrap();
        assert_eq!(marks.values_bytes(), 3 * MARK_BYTES);
        let error = marks.count(b",,", "the body").unwrap_err();
        assert_eq!(error.kind, ErrorKind::TooLarge);
        assert_eq!(
            error.message,
            "the body must have at most 3 commas, colons and opening brackets outside of strings, got 5 or more"
        );
    }

    #[test]
    fn texts_of_one_message_count_together_and_do_not_run_into_each_other() {
        let mut marks = JsonMarks::at_most(4);
        marks.count_text("[1,2", "a").unwrap();
        // The string that never ends is the parser's to refuse.
        marks.count_text("\"[[[", "b").unwrap();
        marks.count_text("[[", "c").unwrap();
        assert!(marks.count_text("[", "d").is_err());
    }

    #[test]
    fn nineteen_prompts_of_the_longest_context_fit() {
        let ids = vec!["32767"; 32_768].join(",");
        let prompts = vec![format!("[{ids}]"); 19].join(",");
        let body = format!(r#"{{"model":"m","prompt":[{prompts}],"logit_bias":{{"1":2}}}}"#);
        let mut marks = JsonMarks::at_most(BODY_MARKS_MAX);
        marks.count(body.as_bytes(), "the body").unwrap();
        assert!(body.len() < crate::config::BODY_BYTES_MAX);
    }
}
