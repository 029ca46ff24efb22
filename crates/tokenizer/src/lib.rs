//! Tokenizer files, chat templates, incremental decoding and stop strings.
