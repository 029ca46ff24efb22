//! The model as clients see it. Knows nothing of weights.

use crate::error::{ApiError, ErrorKind};

/// The model as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedModel {
    /// Its name.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// Longest prompt and answer together, in tokens.
    pub context_length: u32,
    /// Token ids are below this.
    pub vocab: usize,
}

impl ServedModel {
    /// Whether `name` names this model; nobody's name does.
    pub(crate) fn check(&self, name: Option<&str>) -> Result<(), ApiError> {
        match name {
            Some(name) if name != self.id && !self.aliases.iter().any(|alias| alias == name) => {
                let message = format!(
                    "this server serves the model {}, not the one asked for",
                    self.id
                );
                Err(ApiError::new(ErrorKind::ModelNotFound, message).at("model"))
            }
            _ => Ok(()),
        }
    }
}
