//! `tojson` as transformers defines it: Python's `json.dumps`, with four of its options.

use super::number::number;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use std::fmt::Write;

/// How JSON is written.
struct Style {
    ensure_ascii: bool,
    /// What a level is indented by; `None` for all on one line.
    indent: Option<String>,
    /// Between two of a list, and between a key and its value.
    separators: (String, String),
    sort_keys: bool,
}

/// The filter `tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let wrong = |message: &str| Error::new(ErrorKind::InvalidOperation, format!("tojson: {message}"));
    let indent = match options.get::<Option<Value>>("indent")?.filter(|value| !value.is_none()) {
        None => None,
        Some(value) => match (value.as_str(), value.as_i64()) {
            (Some(text), _) => Some(text.to_string()),
            (None, Some(width)) => Some(" ".repeat(width.clamp(0, 64) as usize)),
            (None, None) => return Err(wrong("indent is neither a number nor a text")),
        },
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")? {
        Some(pair) => <[String; 2]>::try_from(pair).map_err(|_| wrong("separators are not two texts"))?.into(),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let flag = |name: &str| options.get::<Option<bool>>(name).map(Option::unwrap_or_default);
    let style = Style { ensure_ascii: flag("ensure_ascii")?, indent, separators, sort_keys: flag("sort_keys")? };
    options.assert_all_used()?;
    let mut out = String::new();
    style.write(&value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Style {
    fn write(&self, value: &Value, level: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq => {
                let items = value.try_iter()?.collect::<Vec<_>>();
                self.list(['[', ']'], level, &items, out, |style, item, out| style.write(item, level + 1, out))?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    items.push((self.key(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    items.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.list(['{', '}'], level, &items, out, |style, (key, item), out| {
                    style.text(key, out);
                    out.push_str(&style.separators.1);
                    style.write(item, level + 1, out)
                })?;
            }
            other => return Err(Error::new(ErrorKind::BadSerialization, format!("Object of type {other} is not JSON serializable"))),
        }
        Ok(())
    }

    fn list<T>(
        &self,
        [open, close]: [char; 2],
        level: usize,
        items: &[T],
        out: &mut String,
        write: impl Fn(&Style, &T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.separators.0);
            }
            self.line(level + 1, out);
            write(self, item, out)?;
        }
        if !items.is_empty() {
            self.line(level, out);
        }
        out.push(close);
        Ok(())
    }

    fn line(&self, level: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(level));
        }
    }

    fn key(&self, key: &Value) -> Result<String, Error> {
        match key.kind() {
            ValueKind::String => Ok(key.as_str().unwrap_or_default().into()),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                let mut out = String::new();
                self.write(key, 0, &mut out)?;
                Ok(out)
            }
            other => Err(Error::new(ErrorKind::BadSerialization, format!("keys must be str, int, float, bool or None, not {other}"))),
        }
    }

    fn text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || self.ensure_ascii && c > '~' => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        // Writing to a string does not fail.
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
