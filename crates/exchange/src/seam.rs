//! What an engine knows of an exchange. Does nothing by itself.

use std::fmt;
use std::sync::Arc;

use tramontane_compute::{Contributions, Experts, RoutedRows};
use tramontane_types::LayerId;

use crate::Error;
use crate::flight::Ticket;

/// Carries the rows of one layer to their experts and hands back what they return. One engine thread owns it.
pub trait Exchange: Send + fmt::Debug {
    /// Sends what is for others; does not wait.
    ///
    /// # Errors
    /// [`Error::Routing`] when `routed` does not fit the model. An absent worker is no error here.
    fn dispatch(&mut self, layer: LayerId, routed: &RoutedRows) -> Result<Ticket, Error>;

    /// Computes the local jobs, waits for the replies and calls `add` once with all of them.
    ///
    /// # Errors
    /// [`Error::Deadline`] when a slice found nobody to compute it in time; what the backend or `add`
    /// refuse. Then `add` was not called, or failed itself.
    fn combine(
        &mut self,
        ticket: Ticket,
        add: &mut dyn FnMut(&Contributions<'_>) -> Result<(), tramontane_compute::Error>,
    ) -> Result<(), Error>;

    /// The experts of the whole model, when the placement gives all of them to this worker: then nothing travels,
    /// and a backend that can may compute a step without an exchange.
    fn whole_model(&mut self) -> Option<Arc<dyn Experts>> {
        None
    }

    /// Counts what rows of such steps chose, `[num_layers * num_experts]`, layer-major.
    fn count_chosen(&mut self, chosen: &[u64]) {
        let _ = chosen;
    }

    /// The engine has nothing to do until further notice.
    fn rest(&mut self) {}
}
