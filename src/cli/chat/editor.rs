//! The terminal that questions are typed on: a line editor, with the questions of earlier chats.

use super::line::is_open;
use crate::cli::console::Console;
use lowkey::{Error, Result};
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};
use std::path::PathBuf;

/// Questions that are remembered.
const HISTORY: usize = 1000;

/// A line editor and where its history is kept.
pub struct Editor {
    editor: DefaultEditor,
    history: Option<PathBuf>,
}

impl Editor {
    /// Opens the terminal and the history.
    ///
    /// # Errors
    /// [`Error::Io`] where the terminal cannot be had.
    pub fn open() -> Result<Editor> {
        let mut editor = Config::builder()
            .max_history_size(HISTORY)
            .and_then(|config| DefaultEditor::with_config(config.build()))
            .map_err(|error| failed(error, "open"))?;
        let history = directories::ProjectDirs::from("", "", "lowkey").map(|platform| platform.data_dir().join("chat-history"));
        if let Some(history) = &history {
            // The first time there is none, and one that cannot be kept is no reason to trouble
            // anybody.
            let _ = editor.load_history(history);
            let _ = history.parent().map(std::fs::create_dir_all);
        }
        Ok(Editor { editor, history })
    }

    /// What is typed next; `None` after Ctrl-D. Ctrl-C drops what is being typed.
    ///
    /// It has several lines where it begins with quotes.
    ///
    /// # Errors
    /// [`Error::Io`] where the terminal is gone.
    pub fn next(&mut self, console: &Console) -> Result<Option<String>> {
        let mut typed = String::new();
        loop {
            let prompt = if typed.is_empty() { ">>> " } else { "... " };
            match console.wait(|| self.editor.readline(prompt)) {
                Ok(line) => typed += &line,
                Err(ReadlineError::Interrupted) => {
                    typed.clear();
                    console.remark("(/quit or Ctrl-D ends the chat)");
                    continue;
                }
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(failed(error, "read")),
            }
            if !is_open(&typed) {
                break;
            }
            typed += "\n";
        }
        if !typed.trim().is_empty() {
            let _ = self.editor.add_history_entry(typed.trim());
            if let Some(history) = &self.history {
                let _ = self.editor.append_history(history);
            }
        }
        Ok(Some(typed))
    }
}

fn failed(error: ReadlineError, action: &'static str) -> Error {
    let source = match error {
        ReadlineError::Io(source) => source,
        other => std::io::Error::other(other),
    };
    Error::Io { action, path: "<terminal>".into(), source }
}
