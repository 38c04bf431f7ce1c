//! Jinja as transformers runs it: Jinja2's sandbox with what its chat templates are given besides,
//! by minijinja.
//!
//! What the two render is held together by tests/data/templates.json.

mod generation;
mod json;
mod methods;
mod number;
mod strftime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value, escape_formatter};
use minijinja_contrib::filters;

/// The name that a template has in its environment, and in errors.
pub(super) const NAME: &str = "chat_template";

/// An environment with the template `source` as [`NAME`].
///
/// # Errors
/// Where it is no valid Jinja.
pub(super) fn environment(source: &str) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(methods::call);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(Error::new(ErrorKind::InvalidOperation, message)) });
    environment.add_function("strftime_now", |format: String| strftime::strftime(&format, &jiff::Zoned::now()));
    environment.add_filter("tojson", json::to_json);
    environment.add_filter("striptags", filters::striptags);
    environment.add_filter("wordcount", word_count);
    environment.add_filter("center", |state: &mut State, text: Value, width: Option<usize>| {
        methods::call(state, &text, "center", &[Value::from(width.unwrap_or(80))])
    });
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment
        .add_test("sequence", |value: &Value| matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Iterable));
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Number => out.write_str(&number::number(value)).map_err(Error::from),
        _ => escape_formatter(out, state, value),
    });
    environment.add_template_owned(NAME, generation::without(&lines(source)))?;
    Ok(environment)
}

fn word_count(text: String) -> usize {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
}

/// For HTML, as Jinja2's `markupsafe` does it.
fn escape(text: String) -> Value {
    let escaped = [('&', "&amp;"), ('<', "&lt;"), ('>', "&gt;"), ('"', "&#34;"), ('\'', "&#39;")];
    Value::from(escaped.iter().fold(text, |text, (from, to)| text.replace(*from, to)))
}

/// Line ends as Jinja2 has them, wherever the file is from.
fn lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}
