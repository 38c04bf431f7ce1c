//! The report's page: the pictures and the tables, in one file that is valid HTML and well-formed
//! XML at once.

use super::{frontier, needle_map, objects};
use crate::Result;
use crate::chart::{distinct, plain};
use crate::eval::{Report, Row, needle};
use serde::Serialize;
use serde_json::Value;

const STYLE: &str =
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1, h2, h3 { line-height: 1.2; font-weight: 600 } h2 { margin-top: 2.5rem }
figure { margin: 1rem 0; overflow-x: auto } figcaption, .note { color: #555; font-size: 0.9rem }
.maps { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.table { overflow-x: auto } table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
th { border-bottom: 2px solid #888 } .number { text-align: right }";

/// The whole page.
///
/// # Errors
/// [`crate::Error::Numeric`] for numbers that cannot be drawn.
pub fn page(report: &Report) -> Result<String> {
    let mut body = String::from("<h1>How close the compressed models are</h1>\n");
    for text in distinct(report.rows.iter().map(|row| &row.text)) {
        let rows: Vec<Row> = report.rows.iter().filter(|row| &row.text == text).cloned().collect();
        body += &format!("<h2>On {}</h2>\n", escape(text));
        body += &match frontier(&rows)? {
            Some(svg) => figure(
                &svg,
                "KL divergence against cache size, both logarithmic: further down and to the left is better. Bars are standard errors over windows. Dashed lines have other tokens exact beside their coded rows, or none.",
            ),
            None => "<p class=\"note\">There is no compressed model here whose distance from a reference could be drawn.</p>\n".into(),
        };
        body += &table(&rows)?;
    }
    if !report.continuations.is_empty() {
        body += "<h2>Long greedy continuations</h2>\n<p class=\"note\">Perplexity is the reference's, of what each model wrote; a low one beside few distinct 4-grams is a loop. Agreed tokens are those before the first that the reference would not have written.</p>\n";
        body += &table(&report.continuations)?;
    }
    if !report.needle.is_empty() {
        body += "<h2>Facts found in long texts</h2>\n<p class=\"note\">By the length of the text and how deep in it stands what is asked for; ln p is the mean log-probability of the right answer.</p>\n";
        for kind in distinct(report.needle.iter().map(|row| row.kind)) {
            let rows = report.needle.iter().filter(|row| row.kind == kind);
            body += &maps(kind, &rows.cloned().collect::<Vec<_>>())?;
        }
        body += &table(&report.needle)?;
    }
    Ok(format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <title>lowkey: evaluation</title>\n<style>\n{STYLE}\n</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    ))
}

/// A map for each model that was asked questions of this kind.
fn maps(kind: needle::Kind, rows: &[needle::Row]) -> Result<String> {
    let mut maps = format!("<h3>{}: {}</h3>\n<div class=\"maps\">\n", kind.name(), kind.about());
    for label in distinct(rows.iter().map(|row| &row.label)) {
        let its: Vec<needle::Row> = rows.iter().filter(|row| row.label == *label).cloned().collect();
        let exact = label.exact().map_or(String::new(), |exact| format!(", {exact} exact"));
        maps += &figure(&needle_map(&its)?, &format!("{} ({}, {}{exact})", label.model, label.method, label.layout));
    }
    Ok(maps + "</div>\n")
}

fn figure(svg: &str, caption: &str) -> String {
    format!("<figure>\n{svg}<figcaption>{}</figcaption>\n</figure>\n", escape(caption))
}

/// A column for each of the rows' fields.
fn table<T: Serialize>(rows: &[T]) -> Result<String> {
    let cell = |tag: &str, value: &Value, text: &str| {
        let class = if value.is_string() { "" } else { " class=\"number\"" };
        format!("<{tag}{class}>{}</{tag}>", escape(text))
    };
    let line = |cells: String| format!("<tr>{cells}</tr>\n");
    let objects = objects(rows)?;
    let head = objects.first().map(|first| line(first.iter().map(|(name, value)| cell("th", value, &name.replace('_', " "))).collect()));
    let lines = objects.iter().map(|object| line(object.values().map(|value| cell("td", value, &shown(value))).collect()));
    Ok(format!("<div class=\"table\"><table>\n{}{}</table></div>\n", head.unwrap_or_default(), lines.collect::<String>()))
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "–".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => match number.as_f64() {
            Some(x) if x != 0.0 && x.abs() < 1e-3 => format!("{x:.3e}"),
            Some(x) => format!("{x:.4}"),
            None => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// Text as HTML, in content and attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in plain(text).chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c => out.push(c),
        }
    }
    out
}
