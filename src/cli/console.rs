//! Where commands speak and listen: results on stdout, everything else on stderr, texts from files
//! or stdin.

use super::Global;
use super::device::{DeviceArgs, ignored};
use super::progress::Bar;
use lowkey::gpu::ShaderChecks;
use lowkey::session::Cancel;
use lowkey::{Engine, Error, Result};
use serde::Serialize;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// What every command is given.
pub struct Console {
    global: Global,
    cancel: Cancel,
    /// What has been remarked on.
    remarks: Mutex<Vec<String>>,
}

/// The name that errors about stdout bear.
pub fn stdout_path() -> &'static Path {
    Path::new("<stdout>")
}

impl Console {
    /// A console that heeds the options that all commands share.
    pub fn new(global: Global) -> Console {
        Console { global, cancel: Cancel::default(), remarks: Mutex::default() }
    }

    /// Makes Ctrl-C set [`cancel`](Self::cancel); a second one ends the process at once.
    pub fn catch_interrupts(&self) -> Result<()> {
        let cancel = self.cancel.clone();
        let handler = move || {
            if cancel.is_set() {
                std::process::exit(1);
            }
            cancel.set();
        };
        ctrlc::set_handler(handler).map_err(|e| Error::Io { action: "handle", path: PathBuf::from("Ctrl-C"), source: std::io::Error::other(e) })
    }

    /// Whether the result is to be JSON.
    pub fn json(&self) -> bool {
        self.global.json
    }

    /// Set when the user wants to stop.
    pub fn cancel(&self) -> &Cancel {
        &self.cancel
    }

    /// The result: `value` as JSON, or what `text` makes of it.
    pub fn result<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        if self.global.json {
            let json = serde_json::to_string_pretty(value).map_err(|e| stdout_error(e.into()))?;
            self.write(&format!("{json}\n"))
        } else {
            self.write(&text(value))
        }
    }

    /// Writes to stdout as it is, at once.
    pub fn write(&self, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(stdout_error)
    }

    /// A remark on stderr, which results in JSON hold as well.
    pub fn remark(&self, text: &str) {
        self.remarks.lock().unwrap_or_else(PoisonError::into_inner).push(text.into());
        self.note(text);
    }

    /// All remarks until now.
    pub fn remarks(&self) -> Vec<String> {
        self.remarks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A line on stderr that is no part of the result.
    pub fn note(&self, text: &str) {
        if !self.global.quiet {
            // A remark that cannot be made is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// What a model thinks, on stderr, as it comes: stdout has its answer alone.
    pub fn think(&self, text: &str) {
        if self.global.quiet || self.global.json || text.is_empty() {
            return;
        }
        let mut stderr = std::io::stderr();
        let dimmed = stderr.is_terminal();
        let _ = if dimmed { write!(stderr, "\x1b[2m{text}\x1b[0m") } else { write!(stderr, "{text}") };
    }

    /// Whether there is somebody to ask: on a terminal, and not where the result is to be JSON.
    pub fn converses(&self) -> bool {
        !self.global.json && std::io::stdin().is_terminal()
    }

    /// Asks on stderr, and reads the answer from stdin: whether it was yes.
    ///
    /// # Errors
    /// [`Error::Io`] where stdin cannot be read.
    pub fn ask(&self, question: &str) -> Result<bool> {
        let mut answer = String::new();
        // Where the question cannot be shown, nobody says yes to it.
        let _ = write!(std::io::stderr(), "{question} [y/N] ");
        let read = self.wait(|| std::io::stdin().read_line(&mut answer));
        read.map_err(|source| Error::Io { action: "read", path: "<stdin>".into(), source })?;
        Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
    }

    /// Waits for the user. Meanwhile nothing runs that Ctrl-C could stop but the program.
    pub fn wait<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.cancel.set();
        let heard = wait();
        self.cancel.clear();
        heard
    }

    /// What went wrong: JSON on stdout, or a line on stderr.
    pub fn error(&self, kind: &str, message: &str) {
        let written = if self.global.json {
            self.write(&format!("{}\n", serde_json::json!({ "error": { "kind": kind, "message": message } })))
        } else {
            writeln!(std::io::stderr(), "error: {message}").map_err(stdout_error)
        };
        // The exit code still tells.
        drop(written);
    }

    /// Opens the device that the user asked for. A software renderer is not what most want: it says
    /// so.
    pub fn engine(&self) -> Result<Engine> {
        self.engine_with(ShaderChecks::default())
    }

    /// The same, with so many checks in its kernels.
    pub fn engine_with(&self, checks: ShaderChecks) -> Result<Engine> {
        let engine = self.device().open_with(checks)?;
        if let Some(remark) = self.device().remark(&engine) {
            self.remark(&remark);
        }
        if let Some(remark) = ignored(&engine) {
            self.remark(&remark);
        }
        Ok(engine)
    }

    /// The device that the user asked for.
    pub fn device(&self) -> &DeviceArgs {
        &self.global.device
    }

    /// A progress bar on stderr, where that is a terminal.
    pub fn bar(&self) -> Bar {
        Bar::new(self.global.quiet, self.cancel.clone())
    }
}

/// A text file's content, without the mark that may stand before it; `-` is stdin.
///
/// In UTF-8, or in the UTF-16 that its byte-order mark tells of.
///
/// # Errors
/// [`Error::Io`] where it cannot be read, or is neither.
pub fn read_text(path: &Path) -> Result<String> {
    let failed = |source| Error::Io { action: "read", path: path.into(), source };
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
    } else {
        std::fs::read(path)
    };
    let bytes = bytes.map_err(failed)?;
    let text = match &bytes[..] {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        _ => String::from_utf8(bytes).ok(),
    };
    let text = text.ok_or_else(|| failed(std::io::Error::new(ErrorKind::InvalidData, "the text is not UTF-8; save it as that")))?;
    Ok(without_mark(&text).into())
}

/// `text` without the byte-order mark that editors put before it.
pub fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn utf16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let (units, rest) = bytes.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|pair| unit(*pair)).collect();
    String::from_utf16(&units).ok().filter(|_| rest.is_empty())
}

fn stdout_error(source: std::io::Error) -> Error {
    Error::Io { action: "write", path: stdout_path().into(), source }
}
