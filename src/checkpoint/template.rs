//! Chat templates: the Jinja program that comes with a model and turns a conversation into its
//! prompt, run by minijinja as transformers runs it by Jinja2.

use super::special::named_tokens;
use super::{Checkpoint, foreign, jinja};
use crate::{Error, Result};
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A checkpoint's chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
    /// What `bos_token` and its like are.
    special: Vec<(String, String)>,
}

impl Checkpoint {
    /// Whether the checkpoint comes with a chat template, sound or not.
    ///
    /// Without one it was not trained for conversations.
    ///
    /// # Errors
    /// As [`chat_template`](Self::chat_template), but for what is wrong with the template itself.
    pub fn has_chat_template(&self) -> Result<bool> {
        self.template_source().map(|source| source.is_some())
    }

    /// The chat template that comes with the checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where there is none (the model was not trained for conversations), or
    /// where it is no valid Jinja.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let error = |message: String| Error::Tokenizer { path: self.path.clone(), message };
        let source = self.template_source()?.ok_or_else(|| {
            error("there is no chat template: this model continues texts and was not trained for conversations; give it a plain prompt".into())
        })?;
        let environment = jinja::environment(&source).map_err(|e| error(format!("the chat template is not valid: {e:#}")))?;
        Ok(ChatTemplate { environment, path: self.path.clone(), special: named_tokens(&self.tokenizer_config()?) })
    }

    /// A file's template, else that of the tokenizer's settings: a text, or the one called
    /// `default` of several.
    fn template_source(&self) -> Result<Option<String>> {
        let file = self.path.join("chat_template.jinja");
        if self.gguf.is_none() && file.is_file() {
            let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
            foreign::refuse_pointer(&file, text.as_bytes())?;
            return Ok(Some(text));
        }
        let settings = self.tokenizer_config()?;
        let Some(value) = settings.get("chat_template").filter(|value| !value.is_null()) else { return Ok(None) };
        if let Some(text) = value.as_str() {
            return Ok(Some(text.into()));
        }
        let list = value.as_array().map_or(&[][..], Vec::as_slice);
        let names: Vec<&str> = list.iter().filter_map(|entry| entry["name"].as_str()).collect();
        let default = list.iter().find(|entry| entry["name"] == "default").and_then(|entry| entry["template"].as_str());
        default.map(|text| Some(text.into())).ok_or_else(|| Error::Tokenizer {
            path: self.path.clone(),
            message: format!("its chat_template is neither a text nor a list with one called default (it has: {})", names.join(", ")),
        })
    }
}

impl ChatTemplate {
    /// The conversation as the model's prompt.
    ///
    /// With `add_generation_prompt` up to where its answer begins. Special tokens are part of the
    /// text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the template refuses the conversation (many insist on turns that
    /// alternate) or fails.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let error = |e: minijinja::Error| Error::Tokenizer {
            path: self.path.clone(),
            message: format!("the chat template cannot render this conversation: {e:#}"),
        };
        let special = Value::from_pairs(self.special.iter().map(|(name, token)| (name.as_str(), token.as_str())));
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            tools => (),
            documents => (),
            ..special
        };
        self.environment.get_template(jinja::NAME).and_then(|template| template.render(context)).map_err(error)
    }
}
