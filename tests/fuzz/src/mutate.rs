//! Meddles with inputs, always in the same way for the same name: what a run without libFuzzer does.

/// Bytes that parsers care about.
const WORDS: [&[u8]; 20] = [
    b"null",
    b"{}",
    b"[",
    b"]",
    b"\"",
    b"\\u0000",
    b"\\ud800",
    b"-1",
    b"1e999",
    b"18446744073709551616",
    b"{{",
    b"{% for x in range(99999) %}",
    b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\x00",
    b"\x7f\xff\xff\xff",
    b"(((((((((",
    b"$ref",
    b"\xf0\x9f\xa6\x80",
    b"NaN",
    b"a{1,99999}",
];
/// Longest input.
const BYTES_MAX: usize = 64 << 10;

/// A stream of inputs that are close to those of a corpus.
#[derive(Debug)]
pub struct Mutator<'a> {
    corpus: &'a [Vec<u8>],
    state: u64,
}

impl<'a> Mutator<'a> {
    /// The stream of one name.
    #[must_use]
    pub fn new(name: &str, corpus: &'a [Vec<u8>]) -> Self {
        // FNV-1a.
        let state = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| {
            (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { corpus, state }
    }

    /// The next input.
    pub fn input(&mut self) -> Vec<u8> {
        let mut bytes = self.pick().to_vec();
        for _ in 0..=self.below(4) {
            self.meddle(&mut bytes);
        }
        bytes.truncate(BYTES_MAX);
        bytes
    }

    fn pick(&mut self) -> &'a [u8] {
        let at = self.below(self.corpus.len());
        self.corpus.get(at).map_or(&[], Vec::as_slice)
    }

    fn meddle(&mut self, bytes: &mut Vec<u8>) {
        let at = self.below(bytes.len() + 1);
        let end = (at + 1 + self.below(16)).min(bytes.len());
        match self.below(7) {
            0 => {
                let bit = self.below(8);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << bit;
                }
            }
            1 => drop(bytes.splice(at..end.max(at), [])),
            2 => {
                let word = WORDS
                    .get(self.below(WORDS.len()))
                    .copied()
                    .unwrap_or_default();
                drop(bytes.splice(at..at, word.iter().copied()));
            }
            3 => bytes.truncate(at),
            4 => {
                let again = bytes
                    .get(at..end)
                    .unwrap_or_default()
                    .repeat(1 + self.below(64));
                drop(bytes.splice(at..at, again));
            }
            5 => {
                let other = self.pick();
                let from = self.below(other.len() + 1);
                drop(bytes.splice(at.., other.iter().copied().skip(from)));
            }
            _ => {
                let word = WORDS
                    .get(self.below(WORDS.len()))
                    .copied()
                    .unwrap_or_default();
                drop(bytes.splice(at..end.max(at), word.iter().copied()));
            }
        }
    }

    /// SplitMix64 (Steele et al., 2014), below a bound.
    fn below(&mut self, bound: usize) -> usize {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}
