//! Stop strings: text that may be the beginning of one is held back, and a stop string is never emitted.
//! The first stop string to end in the text wins, whatever pieces the text arrives in.

use crate::Error;

/// Stop strings per request, as in the OpenAI API.
pub const STOPS_MAX: usize = 4;
/// Length of one stop string in bytes; more would hold back too much text.
pub const STOP_BYTES_MAX: usize = 256;

/// What may be sent to the client after a [`StopDecoder::push`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that is certainly not part of a stop string.
    pub emit: String,
    /// True once a stop string was found: nothing comes after it.
    pub stopped: bool,
}

/// Watches one stream of text for stop strings.
#[derive(Debug, Clone)]
pub struct StopDecoder {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopDecoder {
    /// Refuses more than [`STOPS_MAX`] strings, empty ones, and ones over [`STOP_BYTES_MAX`] bytes.
    pub fn new(stops: &[String]) -> Result<Self, Error> {
        if stops.len() > STOPS_MAX {
            return Err(Error::InvalidStop {
                expected: format!("at most {STOPS_MAX} strings"),
                actual: format!("{} strings", stops.len()),
            });
        }
        for stop in stops {
            if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
                return Err(Error::InvalidStop {
                    expected: format!("strings of 1 to {STOP_BYTES_MAX} bytes"),
                    actual: format!("a string of {} bytes", stop.len()),
                });
            }
        }
        Ok(Self {
            stops: stops.to_vec(),
            held: String::new(),
            stopped: false,
        })
    }

    /// Takes the next piece of text; after a stop string was found everything is swallowed.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome {
                emit: String::new(),
                stopped: true,
            };
        }
        self.held.push_str(text);
        if let Some(start) = self.first_match() {
            self.stopped = true;
            self.held.truncate(start);
            return StopOutcome {
                emit: std::mem::take(&mut self.held),
                stopped: true,
            };
        }
        let keep = self.possible_beginning();
        let held = self.held.split_off(self.held.len() - keep);
        StopOutcome {
            emit: std::mem::replace(&mut self.held, held),
            stopped: false,
        }
    }

    /// The end of the text: what was held back was not a stop string after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Start of the match that ends first; of several that end there, the longest.
    fn first_match(&self) -> Option<usize> {
        let mut best: Option<(usize, usize)> = None; // (end, start)
        for stop in &self.stops {
            let Some(start) = self.held.find(stop.as_str()) else {
                continue;
            };
            let found = (start + stop.len(), start);
            if best.is_none_or(|best| found < best) {
                best = Some(found);
            }
        }
        best.map(|(_, start)| start)
    }

    /// Length in bytes of the longest end of `held` that begins a stop string.
    fn possible_beginning(&self) -> usize {
        let mut longest = 0;
        for stop in &self.stops {
            for (end, _) in stop.char_indices().skip(1) {
                if end > longest && self.held.ends_with(&stop[..end]) {
                    longest = end;
                }
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoder(stops: &[&str]) -> StopDecoder {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        StopDecoder::new(&stops).unwrap()
    }

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut decoder = decoder(stops);
        let mut out = String::new();
        for piece in pieces {
            let outcome = decoder.push(piece);
            out.push_str(&outcome.emit);
            if outcome.stopped {
                return (out, true);
            }
        }
        out.push_str(&decoder.finish());
        (out, false)
    }

    /// The definition: the first position at which a stop string ends, the longest one ending there.
    fn naive(stops: &[&str], text: &str) -> (String, bool) {
        for (end, _) in text.char_indices().chain([(text.len(), ' ')]) {
            let ended = stops.iter().filter(|stop| text[..end].ends_with(**stop));
            if let Some(longest) = ended.map(|stop| stop.len()).max() {
                return (text[..end - longest].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    #[test]
    fn text_that_may_begin_a_stop_string_waits_for_the_next_piece() {
        let mut decoder = decoder(&["\n\nUser:"]);
        assert_eq!(decoder.push("Hello\n").emit, "Hello");
        assert_eq!(decoder.push("\nUs").emit, "");
        assert_eq!(decoder.push("ually").emit, "\n\nUsually");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn a_stop_string_is_swallowed_with_all_that_follows() {
        assert_eq!(run(&["END"], &["a E", "N", "D b"]), ("a ".to_owned(), true));
        let mut decoder = decoder(&["END"]);
        assert!(decoder.push("xENDy").stopped);
        assert_eq!(decoder.push("z").emit, "");
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn too_many_empty_and_overlong_stop_strings_are_refused() {
        let five = vec!["a".to_owned(); STOPS_MAX + 1];
        for stops in [
            five,
            vec![String::new()],
            vec!["x".repeat(STOP_BYTES_MAX + 1)],
        ] {
            let error = StopDecoder::new(&stops).unwrap_err();
            assert!(
                error.is_invalid_request() && error.param() == Some("stop"),
                "{error}"
            );
        }
        assert!(StopDecoder::new(&["é".to_owned()]).is_ok());
    }

    proptest! {
        #[test]
        fn chunking_never_changes_what_is_found(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,5}", 0..=4),
            cuts in proptest::collection::vec(0usize..24, 0..6),
        ) {
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut places: Vec<usize> = cuts
                .into_iter()
                .filter(|cut| *cut <= text.len() && text.is_char_boundary(*cut))
                .chain([0, text.len()])
                .collect();
            places.sort_unstable();
            let pieces: Vec<&str> = places.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(run(&stops, &pieces), naive(&stops, &text));
        }
    }
}
