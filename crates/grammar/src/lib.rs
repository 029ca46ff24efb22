//! Which tokens may come next when an answer must be a word of a language: the one door to llguidance.
