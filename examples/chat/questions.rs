//! Where questions come from: a line editor with a history on a terminal, plain lines otherwise.

use lowkey::{Error, Result};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

/// The lines that the user types, or that somebody piped in.
pub struct Questions {
    editor: Option<DefaultEditor>,
    history: Option<PathBuf>,
}

impl Questions {
    /// Opens the editor and its history where stdin is a terminal.
    pub fn new() -> Questions {
        let mut editor = if std::io::stdin().is_terminal() { DefaultEditor::new().ok() } else { None };
        let history = directories::ProjectDirs::from("", "", "lowkey").map(|platform| platform.data_dir().join("chat-history"));
        if let (Some(editor), Some(history)) = (&mut editor, &history) {
            // The first time there is none.
            let _ = editor.load_history(history);
        }
        Questions { editor, history }
    }

    /// Whether somebody sits there.
    pub fn interactive(&self) -> bool {
        self.editor.is_some()
    }

    /// The next line; `None` at the end of all input. Ctrl-C drops the line that is being typed. Bytes that are no UTF-8 become `U+FFFD`.
    ///
    /// # Errors
    /// [`Error::Io`] where stdin cannot be read.
    pub fn next(&mut self) -> Result<Option<String>> {
        let Some(editor) = &mut self.editor else {
            let mut line = Vec::new();
            let read = std::io::stdin().lock().read_until(b'\n', &mut line);
            let read = read.map_err(|source| Error::Io { action: "read", path: "<stdin>".into(), source })?;
            return Ok((read > 0).then(|| String::from_utf8_lossy(&line).into_owned()));
        };
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    if !line.trim().is_empty() {
                        let _ = editor.add_history_entry(line.trim());
                    }
                    return Ok(Some(line));
                }
                Err(ReadlineError::Interrupted) => println!("(/quit or Ctrl-D ends the chat)"),
                Err(_) => return Ok(None),
            }
        }
    }
}

impl Drop for Questions {
    fn drop(&mut self) {
        if let (Some(editor), Some(history)) = (&mut self.editor, &self.history) {
            // A history that cannot be kept is no reason to trouble anybody.
            let _ = history.parent().map(std::fs::create_dir_all);
            let _ = editor.save_history(history);
        }
    }
}
