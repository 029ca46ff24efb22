//! Why a checkpoint is refused: file, tensor or field, expected, got.

/// A checkpoint that cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("{file}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{file}: {what}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file ends too early.
    #[error("{file}: is truncated: {what} at byte {begin} has {len} bytes, {got} follow")]
    Truncated {
        /// The file.
        file: String,
        /// What was read.
        what: String,
        /// Where it begins.
        begin: usize,
        /// Its length.
        len: u64,
        /// What is there of it.
        got: usize,
    },
    /// A file is not here, and nobody was named who has it.
    #[error("{file}: tensor {tensor}: the file is not here, and nobody else is to be asked for it")]
    NotHere {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// Whoever was asked for the bytes did not give them.
    #[error("{file}: tensor {tensor}")]
    Elsewhere {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Who was asked, and what each said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A model that was described is another one.
    #[error("fingerprint is {got}, expected {expected} by its description")]
    Fingerprint {
        /// By its description.
        expected: String,
        /// By its bytes.
        got: String,
    },
    /// A field of `config.json` breaks its rule.
    #[error("config.json: {field} must be {rule}, got {got}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is allowed.
        rule: String,
        /// What came.
        got: String,
    },
    /// A tensor is not where or what it must be.
    #[error("{file}: tensor {tensor}: {what}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        what: String,
    },
    /// A tensor does not have the shape that the configuration asks for.
    #[error(
        "{file}: tensor {tensor} has shape {got:?}, expected {expected:?} by the configuration"
    )]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// By the configuration.
        expected: Vec<usize>,
        /// By the file.
        got: Vec<usize>,
    },
    /// No file has the tensor.
    #[error("tensor {tensor} is in none of {files}")]
    Missing {
        /// The tensor.
        tensor: String,
        /// Where it was looked for.
        files: String,
    },
    /// A file does not have the digest that the manifest promises.
    #[error("{file}: sha-256 is {got}, expected {expected} by {manifest}")]
    Digest {
        /// The file.
        file: String,
        /// By the manifest.
        expected: String,
        /// The manifest's name.
        manifest: String,
        /// By its bytes.
        got: String,
    },
    /// An expert or layer that the model does not have.
    #[error("{what} {got} is out of range, expected less than {limit}")]
    OutOfRange {
        /// Layer or expert.
        what: &'static str,
        /// One behind the last.
        limit: usize,
        /// What was asked for.
        got: usize,
    },
    /// The backend refused a slice.
    #[error(transparent)]
    Backend(#[from] tramontane_compute::Error),
}
