//! The reference backend: plain f32 with candle-core, one row at a time. Slow, and obviously right.
