//! Chat templates: the Jinja program that comes with a model and turns a conversation into its
//! prompt, run by minijinja as transformers runs it by Jinja2.

use super::Checkpoint;
use super::tokenizer::special_token;
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

const NAME: &str = "chat_template";

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
    bos: String,
    eos: String,
}

impl Checkpoint {
    /// The chat template that comes with the checkpoint.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where there is none (the model was not trained for conversations), or
    /// where it is no valid Jinja.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        let settings = self.tokenizer_config()?;
        let file = self.path.join("chat_template.jinja");
        let source = if self.gguf.is_none() && file.is_file() {
            std::fs::read_to_string(&file).map_err(Error::io("read", &file))?
        } else {
            template_source(&settings).ok_or_else(|| Error::Tokenizer {
                path: self.path.clone(),
                message: "there is no chat template: this model continues texts and was not trained for conversations; give it a plain prompt".into(),
            })?
        };
        let invalid = |e: minijinja::Error| Error::Tokenizer { path: self.path.clone(), message: format!("the chat template is not valid: {e:#}") };
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(invalid)?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.add_filter("tojson", to_json);
        let token = |key: &str| special_token(&settings, key).unwrap_or_default();
        environment.add_template_owned(NAME, source).map_err(invalid)?;
        Ok(ChatTemplate { environment, path: self.path.clone(), bos: token("bos_token"), eos: token("eos_token") })
    }
}

/// A template as a string, or the one called `default` of a list.
fn template_source(settings: &serde_json::Value) -> Option<String> {
    let value = settings.get("chat_template")?;
    if let Some(list) = value.as_array() {
        let default = list.iter().find(|entry| entry["name"] == "default").or(list.first())?;
        return default["template"].as_str().map(String::from);
    }
    value.as_str().map(String::from)
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
        let context = context! {
            messages => Serde(messages),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            tools => (),
            documents => (),
        };
        self.environment.get_template(NAME).and_then(|template| template.render(context)).map_err(error)
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: a space after commas and
/// colons, and no escaping for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let invalid = |e: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string());
    let json = serde_json::to_value(&value).map_err(invalid)?;
    let mut out = Vec::new();
    let width = " ".repeat(indent.unwrap_or(0).min(16));
    let result = match indent {
        Some(_) => serde::Serialize::serialize(
            &json,
            &mut serde_json::Serializer::with_formatter(&mut out, serde_json::ser::PrettyFormatter::with_indent(width.as_bytes())),
        ),
        None => serde::Serialize::serialize(&json, &mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
    };
    result.map_err(invalid)?;
    Ok(Value::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// JSON on one line with a space after commas and colons.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// The directives of C's `strftime` that templates use, in English and UTC; others stay as they
/// are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] =
        ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        let directive = if c == '%' { rest.next() } else { None };
        match directive {
            None => out.push(c),
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
        }
    }
    out
}

/// Year, month and day of a number of days since 1970-01-01: years are counted off, then months.
fn civil(mut days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // Four hundred years are a whole number of days.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    while days >= 365 + leap(year) as u64 {
        days -= 365 + leap(year) as u64;
        year += 1;
    }
    let lengths = [31, 28 + leap(year) as u64, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y", 0), "01 Jan 1970");
        assert_eq!(strftime("%A, %Y-%m-%d %H:%M:%S", 951_826_594), "Tuesday, 2000-02-29 12:16:34");
        assert_eq!(strftime("%B %d, %y%% %q%", 1_735_603_200), "December 31, 24% %q%");
    }
}
