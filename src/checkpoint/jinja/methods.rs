//! Python's methods of texts, lists and maps that templates call: those that minijinja's own
//! collection lacks or has otherwise, then that collection.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// What `value.method(args)` is.
pub(super) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let found = match value.kind() {
        ValueKind::String => of_text(value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq => of_list(value, method, args)?,
        ValueKind::Map if method == "copy" => Some(value.clone()),
        _ => None,
    };
    match found {
        Some(found) => Ok(found),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn not_found() -> Error {
    Error::new(ErrorKind::InvalidOperation, "substring not found")
}

fn not_text(value: &Value) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a text is expected, not {}", value.kind()))
}

/// Words, or what stands between separators, at most `most` times cut from the left.
fn split(text: &str, separator: Option<&str>, most: Option<i64>) -> Result<Vec<String>, Error> {
    let most = most.filter(|most| *most >= 0).map_or(usize::MAX, |most| most as usize);
    match separator {
        Some("") => Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        Some(separator) => Ok(text.splitn(most.saturating_add(1), separator).map(String::from).collect()),
        None => {
            let (mut words, mut rest) = (Vec::new(), text.trim_start());
            while !rest.is_empty() && words.len() < most {
                let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                words.push(rest[..end].into());
                rest = rest[end..].trim_start();
            }
            words.extend((!rest.is_empty()).then(|| rest.into()));
            Ok(words)
        }
    }
}

/// The same, cut from the right.
fn split_right(text: &str, separator: Option<&str>, most: Option<i64>) -> Result<Vec<String>, Error> {
    let backwards = |text: &str| text.chars().rev().collect::<String>();
    let parts = split(&backwards(text), separator.map(backwards).as_deref(), most)?;
    Ok(parts.iter().rev().map(|part| backwards(part)).collect())
}

/// Lines as Python cuts them, with their ends or without.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}']) {
        let end = if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..at + if keep { end } else { 0 }]);
        rest = &rest[at + end..];
    }
    lines.extend((!rest.is_empty()).then_some(rest));
    lines
}

/// Characters from `start` to `end`, which count from the end where they are negative.
fn part(text: &str, start: Option<i64>, end: Option<i64>) -> Option<(usize, String)> {
    let length = text.chars().count() as i64;
    let place = |at: i64| (if at < 0 { at + length } else { at }).max(0);
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)).min(length));
    (start <= end).then(|| (start as usize, text.chars().skip(start as usize).take((end - start) as usize).collect()))
}

/// Where in `text` another stands, in characters.
fn find(text: &str, args: &[Value], from_right: bool) -> Result<Option<usize>, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let Some((before, text)) = part(text, start, end) else { return Ok(None) };
    let at = if from_right { text.rfind(what) } else { text.find(what) };
    Ok(at.map(|at| before + text[..at].chars().count()))
}

/// `text` between fillings up to a width in characters.
fn pad(text: &str, args: &[Value], left_of: impl Fn(usize, usize) -> usize) -> Result<Value, Error> {
    let (width, fill): (usize, Option<char>) = from_args(args)?;
    let count = text.chars().count();
    let missing = width.min(1 << 16).saturating_sub(count);
    let (fill, left) = (fill.unwrap_or(' '), left_of(missing, width));
    let filling = |count: usize| String::from(fill).repeat(count);
    Ok(Value::from(filling(left) + text + &filling(missing - left)))
}

/// A text cut in three at a separator.
fn three(cut: Option<(&str, &str)>, separator: &str, otherwise: [&str; 3]) -> Value {
    let parts = cut.map_or(otherwise, |(before, after)| [before, separator, after]);
    Value::from(minijinja::value::Tuple::from(parts.map(Value::from)))
}

/// Whether a text begins, or ends, with one of several.
fn one_of(what: &Value, fits: impl Fn(&str) -> bool) -> Result<bool, Error> {
    let wrong = || not_text(what);
    if let Some(text) = what.as_str() {
        return Ok(fits(text));
    }
    let texts = what.try_iter().map_err(|_| wrong())?.collect::<Vec<_>>();
    texts.iter().try_fold(false, |found, text| Ok(found || fits(text.as_str().ok_or_else(wrong)?)))
}

fn titled(text: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase())
        } else {
            out.extend(c.to_uppercase())
        }
        inside = c.is_alphabetic();
    }
    out
}

fn of_text(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let truth = |holds: bool| from_args::<()>(args).map(|()| Some(Value::from(holds)));
    let all = |holds: fn(char) -> bool| truth(!text.is_empty() && text.chars().all(holds));
    Ok(Some(match method {
        "split" | "rsplit" => {
            let (separator, most) = (argument(args, 0, "sep")?, argument(args, 1, "maxsplit")?.and_then(|most| most.as_i64()));
            let separator = separator.as_ref().map(|separator| separator.as_str().ok_or_else(|| not_text(separator))).transpose()?;
            Value::from(if method == "split" { split(text, separator, most)? } else { split_right(text, separator, most)? })
        }
        "splitlines" => lines(text, argument(args, 0, "keepends")?.is_some_and(|keep| keep.is_true())).into_iter().map(Value::from).collect(),
        "removeprefix" | "removesuffix" => {
            let (what,): (&str,) = from_args(args)?;
            let left = if method == "removeprefix" { text.strip_prefix(what) } else { text.strip_suffix(what) };
            Value::from(left.unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (what,): (&str,) = from_args(args)?;
            match method {
                "partition" => three(text.split_once(what), what, [text, "", ""]),
                _ => three(text.rsplit_once(what), what, ["", "", text]),
            }
        }
        "find" | "rfind" => Value::from(find(text, args, method == "rfind")?.map_or(-1, |at| at as i64)),
        "index" | "rindex" => Value::from(find(text, args, method == "rindex")?.ok_or_else(not_found)?),
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            Value::from(part(text, start, end).map_or(0, |(_, text)| text.matches(what).count()))
        }
        "startswith" | "endswith" => {
            let (what, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let Some((_, text)) = part(text, start, end) else { return Ok(Some(Value::from(false))) };
            Value::from(one_of(what, |what| if method == "startswith" { text.starts_with(what) } else { text.ends_with(what) })?)
        }
        "ljust" => pad(text, args, |_, _| 0)?,
        "rjust" => pad(text, args, |missing, _| missing)?,
        // Of an odd number the larger part is on the left where the width is odd.
        "center" => pad(text, args, |missing, width| missing / 2 + (missing & width & 1))?,
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let missing = width.min(1 << 16).saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        "title" => Value::from(titled(text)),
        "casefold" => Value::from(text.to_lowercase().replace('ß', "ss")),
        "swapcase" => Value::from(
            text.chars().map(|c| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }).collect::<String>(),
        ),
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            Value::from(expanded(text, size.unwrap_or(8)))
        }
        "isdecimal" => return all(|c| c.is_ascii_digit()),
        "isprintable" => return truth(text.chars().all(|c| !c.is_control() && (c == ' ' || !c.is_whitespace()))),
        "isidentifier" => {
            return truth(!text.starts_with(|c: char| c.is_numeric()) && !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || c == '_'));
        }
        "istitle" => return truth(text.chars().any(char::is_alphabetic) && titled(text) == text),
        _ => return Ok(None),
    }))
}

/// An argument by its place or by its name.
fn argument(args: &[Value], place: usize, name: &str) -> Result<Option<Value>, Error> {
    let (positional, named): (&[Value], Kwargs) = from_args(args)?;
    let found = positional.get(place).cloned().or(named.get::<Option<Value>>(name)?);
    Ok(found.filter(|value| !value.is_none()))
}

fn expanded(text: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let width = size - column % size;
                out.push_str(&" ".repeat(width));
                column += width;
            }
            '\t' => {}
            c => {
                column = if c == '\n' || c == '\r' { 0 } else { column + 1 };
                out.push(c);
            }
        }
    }
    out
}

fn of_list(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    match method {
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *what);
            at.map(|at| Some(Value::from(at))).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, format!("{what} is not in list")))
        }
        "copy" => Ok(Some(value.clone())),
        _ => Ok(None),
    }
}
