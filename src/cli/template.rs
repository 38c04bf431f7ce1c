//! How a model is asked: by its chat template, or as a text to go on with.

use super::console::Console;
use lowkey::checkpoint::ChatTemplate;
use lowkey::{Error, Model, Result};

/// The model's chat template; where it has none that works, says so.
///
/// # Errors
/// [`Error::Argument`] where there is none and a `--system` message is to be `placed`.
pub fn template(model: &Model, placed: bool, console: &Console) -> Result<Option<ChatTemplate>> {
    match model.checkpoint().chat_template() {
        Ok(template) => Ok(Some(template)),
        Err(_) if placed => {
            let message = format!("{} has no chat template, and so no place for it", model.checkpoint().path().display());
            Err(Error::Argument { name: "system".into(), message })
        }
        Err(error) => {
            console.remark(&format!("continuing the text as it is: {error}"));
            Ok(None)
        }
    }
}
