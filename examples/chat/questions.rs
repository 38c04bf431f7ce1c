//! Where questions come from: a line editor with a history on a terminal, plain lines otherwise.

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

    /// The next line; `None` at the end of all input. Ctrl-C drops the line that is being typed.
    pub fn next(&mut self) -> Option<String> {
        let Some(editor) = &mut self.editor else {
            let mut line = String::new();
            let read = std::io::stdin().lock().read_line(&mut line).unwrap_or(0);
            return (read > 0).then_some(line);
        };
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    if !line.trim().is_empty() {
                        let _ = editor.add_history_entry(line.trim());
                    }
                    return Some(line);
                }
                Err(ReadlineError::Interrupted) => println!("(/quit or Ctrl-D ends the chat)"),
                Err(_) => return None,
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
