//! Mistral and Mixtral checkpoints: config, safetensors, slices.
