//! Carries rows to experts and sums what comes back. Knows no model.
