//! What long work owes its caller: to say how far it is, to stop when asked, and to leave files
//! whole or not at all.

mod cancel;
mod output;
mod progress;

pub use cancel::Cancel;
pub(crate) use output::{directory, file, publish_directory, publish_file, replace, sweep};
pub use progress::{OnProgress, Progress, quietly};
pub(crate) use progress::{each_layer, report};
