//! What can be typed: questions, of one line or of several, and commands.

use std::path::Path;

/// Begins and ends a question of several lines.
pub const QUOTES: &str = r#"""""#;

/// What can be typed besides questions.
pub const HELP: &str = "/reset forgets everything, /save FILE and /load FILE keep the conversation with the model's cache, /write FILE writes it as text, /stats, /help, /quit. \"\"\" begins and ends several lines. Ctrl-C stops an answer.";

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    Nothing,
    Question(&'a str),
    Help,
    Stats,
    Reset,
    /// With the file, if it was named.
    Save(Option<&'a Path>),
    /// See [`Save`](Self::Save).
    Load(Option<&'a Path>),
    /// See [`Save`](Self::Save).
    Write(Option<&'a Path>),
    Quit,
    /// A command that there is not.
    Unknown(&'a str),
}

impl<'a> Line<'a> {
    /// Reads what was typed. What stands in [`QUOTES`] is a question, whatever it is.
    pub fn parse(typed: &'a str) -> Line<'a> {
        let typed = typed.trim();
        if let Some(quoted) = typed.strip_prefix(QUOTES) {
            let question = quoted.strip_suffix(QUOTES).unwrap_or(quoted).trim();
            return if question.is_empty() { Line::Nothing } else { Line::Question(question) };
        }
        let (word, rest) = typed.split_once(char::is_whitespace).map_or((typed, ""), |(word, rest)| (word, rest.trim()));
        let file = || Some(rest).filter(|rest| !rest.is_empty()).map(Path::new);
        match word {
            "" => Line::Nothing,
            "/help" | "/?" => Line::Help,
            "/stats" => Line::Stats,
            "/reset" | "/clear" => Line::Reset,
            "/save" => Line::Save(file()),
            "/load" => Line::Load(file()),
            "/write" => Line::Write(file()),
            "/quit" | "/exit" | "/bye" => Line::Quit,
            _ if word.starts_with('/') => Line::Unknown(word),
            _ => Line::Question(typed),
        }
    }
}

/// Whether what has been typed begins a question of several lines that has not ended.
pub fn is_open(typed: &str) -> bool {
    typed.trim().strip_prefix(QUOTES).is_some_and(|quoted| !quoted.ends_with(QUOTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_a_slash_and_questions_do_not() {
        for (typed, line) in [
            ("  \t", Line::Nothing),
            (" Why is the sea salt? ", Line::Question("Why is the sea salt?")),
            ("either/or", Line::Question("either/or")),
            ("/?", Line::Help),
            ("/stats ", Line::Stats),
            ("/clear", Line::Reset),
            ("/save", Line::Save(None)),
            ("/save  the talk.session ", Line::Save(Some(Path::new("the talk.session")))),
            ("/load a", Line::Load(Some(Path::new("a")))),
            ("/write a.txt", Line::Write(Some(Path::new("a.txt")))),
            ("/bye", Line::Quit),
            ("/etc/passwd is what?", Line::Unknown("/etc/passwd")),
        ] {
            assert_eq!(Line::parse(typed), line, "{typed}");
        }
    }

    #[test]
    fn quotes_hold_several_lines_and_no_commands() {
        for (typed, open, line) in [
            (r#"""""#, true, Line::Nothing),
            ("\"\"\"first\nsecond", true, Line::Question("first\nsecond")),
            ("\"\"\"first\nsecond\"\"\"", false, Line::Question("first\nsecond")),
            ("\"\"\"\n/quit\n\"\"\" ", false, Line::Question("/quit")),
            ("\"\"\"\n \n\"\"\"", false, Line::Nothing),
            (r#""""one line""""#, false, Line::Question("one line")),
            (r#"says """ here"#, false, Line::Question(r#"says """ here"#)),
        ] {
            assert_eq!((is_open(typed), Line::parse(typed)), (open, line), "{typed}");
        }
    }
}
