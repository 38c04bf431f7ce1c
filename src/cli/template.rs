//! How a model is asked: by its chat template, or as a text to go on with.

use super::console::Console;
use lowkey::checkpoint::{ChatTemplate, Message};
use lowkey::{Error, Model, Result};

/// The model's chat template; where it has none, says so.
///
/// # Errors
/// [`Error::Argument`] where there is none and a `--system` message is to be `placed`;
/// [`Error::Tokenizer`] where there is one that does not work.
pub fn template(model: &Model, placed: bool, console: &Console) -> Result<Option<ChatTemplate>> {
    let checkpoint = model.checkpoint();
    match checkpoint.has_chat_template()? {
        true => checkpoint.chat_template().map(Some).map_err(|error| match error {
            Error::Tokenizer { path, message } => {
                let message = format!("{}\n--raw does without it: the model goes on with the prompt as it is", message.trim_end());
                Error::Tokenizer { path, message }
            }
            other => other,
        }),
        false if placed => {
            let message = format!("{} has no chat template, and so no place for it", checkpoint.path().display());
            Err(Error::Argument { name: "system".into(), message })
        }
        false => {
            console.remark(&format!(
                "continuing the text as it is: {} has no chat template, and was not trained for conversations",
                checkpoint.path().display()
            ));
            Ok(None)
        }
    }
}

/// Messages as `template` has them, an answer being due; one under the other where there is none.
///
/// # Errors
/// Those of [`ChatTemplate::render`].
pub fn render(template: Option<&ChatTemplate>, messages: &[Message]) -> Result<String> {
    match template {
        Some(template) => template.render(messages, true),
        None => Ok(messages.iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join("\n")),
    }
}
