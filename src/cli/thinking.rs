//! What a model thinks before it answers, between `<think>` and `</think>`, apart from its answer.

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Text as it comes, cut into what is thought and what is said.
#[derive(Debug, Default)]
pub struct Thinking {
    place: Place,
    /// What may become a tag.
    held: String,
}

/// Where in an answer the text is.
#[derive(Debug, Default, PartialEq, Eq)]
enum Place {
    /// Nothing but blanks has come.
    #[default]
    Before,
    Thinking,
    /// After the thinking, before the answer's first letter.
    Between,
    Answer,
}

/// What a piece of text adds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Added {
    pub thought: String,
    pub answer: String,
}

impl Thinking {
    /// For an answer to `prompt`; templates may begin the thinking themselves.
    pub fn after(prompt: &str) -> Thinking {
        let place = if prompt.trim_end().ends_with(OPEN) { Place::Thinking } else { Place::Before };
        Thinking { place, held: String::new() }
    }

    /// For text that is an answer, whatever stands in it.
    pub fn none() -> Thinking {
        Thinking { place: Place::Answer, held: String::new() }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Added {
        self.held += text;
        let mut added = Added::default();
        loop {
            match self.place {
                Place::Before => {
                    let begun = self.held.trim_start();
                    if let Some(rest) = begun.strip_prefix(OPEN) {
                        self.held = rest.into();
                        self.place = Place::Thinking;
                    } else if OPEN.starts_with(begun) {
                        return added;
                    } else {
                        self.place = Place::Answer;
                    }
                }
                Place::Thinking => match self.held.find(CLOSE) {
                    Some(at) => {
                        added.thought += &self.held[..at];
                        self.held.drain(..at + CLOSE.len());
                        self.place = Place::Between;
                    }
                    None => {
                        let open = (1..CLOSE.len()).rev().find(|&n| self.held.ends_with(&CLOSE[..n])).unwrap_or(0);
                        let rest = self.held.split_off(self.held.len() - open);
                        added.thought += &std::mem::replace(&mut self.held, rest);
                        return added;
                    }
                },
                Place::Between => {
                    self.held = self.held.trim_start().into();
                    if self.held.is_empty() {
                        return added;
                    }
                    self.place = Place::Answer;
                }
                Place::Answer => {
                    added.answer += &std::mem::take(&mut self.held);
                    return added;
                }
            }
        }
    }

    /// What was held back: no more text will come.
    pub fn finish(&mut self) -> Added {
        let held = std::mem::take(&mut self.held);
        match self.place {
            Place::Thinking => Added { thought: held, answer: String::new() },
            _ => Added { thought: String::new(), answer: held },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_text_is_cut_thoughts_are_apart() {
        for (prompt, text, thought, answer) in [
            ("", "<think>\nhm < </thin\n</think>\n\nYes. <think>", "\nhm < </thin\n", "Yes. <think>"),
            ("assistant\n<think>\n", "so</think>No", "so", "No"),
            ("", " plain <think>no</think>", "", " plain <think>no</think>"),
            ("", "<thin air", "", "<thin air"),
            ("", "\n<thi", "", "\n<thi"),
            ("", "<think>never ends </th", "never ends </th", ""),
            ("", "<think></think>", "", ""),
            ("", "", "", ""),
        ] {
            for size in 1..text.len().max(1) + 1 {
                let (mut thinking, mut found) = (Thinking::after(prompt), Added::default());
                let characters: Vec<char> = text.chars().collect();
                let pieces = characters.chunks(size).map(|piece| piece.iter().collect::<String>());
                let mut add = |added: Added| {
                    found.thought += &added.thought;
                    found.answer += &added.answer;
                };
                pieces.for_each(|piece| add(thinking.push(&piece)));
                add(thinking.finish());
                assert_eq!((&*found.thought, &*found.answer), (thought, answer), "{text:?} in {size}");
            }
        }
        assert_eq!(Thinking::none().push("<think>a").answer, "<think>a");
    }
}
