//! The report as files: `report.json` (what `--json` prints), `rows.csv`, `continuations.csv`,
//! `needle.csv`, and `index.html`, a page that needs nothing else.

mod frontier;
mod needle_map;
mod page;

use super::Report;
use crate::{Error, Result, task};
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub use frontier::frontier;
pub use needle_map::needle_map;

/// A directory on its way to its name: it appears there complete, or not at all.
pub struct Directory {
    directory: TempDir,
    path: PathBuf,
}

impl Directory {
    /// Before the work that is to be reported: whether there is room for it.
    ///
    /// `path` must be free, or an empty directory.
    ///
    /// # Errors
    /// [`Error::Exists`] where there is something else, [`Error::Io`] where nothing can be created
    /// there.
    pub fn reserve(path: &Path) -> Result<Directory> {
        Ok(Directory { directory: task::directory(path)?, path: path.into() })
    }

    /// Writes the files and gives the directory its name.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Exists`] where the name has been taken meanwhile, [`Error::Numeric`]
    /// for numbers that cannot be drawn.
    pub fn publish(self, report: &Report) -> Result<()> {
        let write =
            |name: &str, content: &str| std::fs::write(self.directory.path().join(name), content).map_err(Error::io("write", &self.path.join(name)));
        let json = serde_json::to_string_pretty(report).map_err(|e| Error::io("write", &self.path.join("report.json"))(e.into()))?;
        write("report.json", &json)?;
        write("rows.csv", &csv(&report.rows)?)?;
        if !report.continuations.is_empty() {
            write("continuations.csv", &csv(&report.continuations)?)?;
        }
        if !report.needle.is_empty() {
            write("needle.csv", &csv(&report.needle)?)?;
        }
        write("index.html", &page::page(report)?)?;
        task::publish_directory(self.directory, &self.path)
    }
}

/// A line per row under a line of names, quoted where it has to be (RFC 4180); what is absent is
/// empty.
fn csv<T: Serialize>(rows: &[T]) -> Result<String> {
    let failed = |message: String| Error::Numeric { what: "a CSV table".into(), message };
    let mut writer = csv::Writer::from_writer(Vec::new());
    let objects = objects(rows)?;
    let head = objects.first().map(|first| first.keys().cloned().collect::<Vec<_>>());
    let cell = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    for line in head.into_iter().chain(objects.iter().map(|object| object.values().map(cell).collect())) {
        writer.write_record(line).map_err(|e| failed(e.to_string()))?;
    }
    let bytes = writer.into_inner().map_err(|e| failed(e.to_string()))?;
    String::from_utf8(bytes).map_err(|e| failed(e.to_string()))
}

/// Each row's fields by name, those of a struct within it among them, in their order.
fn objects<T: Serialize>(rows: &[T]) -> Result<Vec<Map<String, Value>>> {
    let failed = |message: String| Error::Numeric { what: "a table".into(), message };
    let object = |row: &T| match serde_json::to_value(row).map_err(|e| failed(e.to_string()))? {
        Value::Object(object) => Ok(object),
        other => Err(failed(format!("a row is no object: {other}"))),
    };
    rows.iter().map(object).collect()
}
