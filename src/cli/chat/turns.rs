//! The turns of a conversation, and which of them the model is still told.

use lowkey::checkpoint::Message;
use serde::{Deserialize, Serialize};

/// What becomes of a conversation that no longer fits into the context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OnFull {
    /// It ends, and says so.
    Stop,
    /// The oldest turns are left out; what the model is told before everything else stays.
    Shift,
}

/// What was said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turns {
    system: Option<Message>,
    messages: Vec<Message>,
    /// How many of the oldest are left out.
    forgotten: usize,
}

impl Turns {
    /// None yet, after what the model is told before everything else.
    pub fn new(system: Option<String>) -> Turns {
        Turns { system: system.map(|text| Message::new("system", text)), messages: Vec::new(), forgotten: 0 }
    }

    /// Those that [`note`](Self::note) wrote down, after what the model is told now, if anything.
    /// `None` where they are something else.
    pub fn noted(note: &str, system: Option<Message>) -> Option<Turns> {
        let turns: Turns = serde_json::from_str(note).ok()?;
        (turns.forgotten <= turns.messages.len()).then_some(Turns { system: system.or(turns.system), ..turns })
    }

    /// All of it in one string.
    pub fn note(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// What the model is told before everything else.
    pub fn system(&self) -> Option<&Message> {
        self.system.as_ref()
    }

    /// How many messages there are.
    pub fn len(&self) -> usize {
        self.messages.len()
    }

    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Takes the newest back.
    pub fn pop(&mut self) {
        self.messages.pop();
    }

    /// Leaves out the oldest question and its answer; false where there is none but the newest.
    pub fn forget_oldest(&mut self) -> bool {
        let next = self.messages.iter().enumerate().skip(self.forgotten + 1).find(|(_, message)| message.role == "user");
        let Some((next, _)) = next else { return false };
        self.forgotten = next;
        true
    }

    /// How many messages are left out.
    pub fn forgotten(&self) -> usize {
        self.forgotten
    }

    /// What the model is told.
    pub fn told(&self) -> Vec<Message> {
        self.system.iter().chain(&self.messages[self.forgotten..]).cloned().collect()
    }

    /// All that was said.
    pub fn all(&self) -> impl Iterator<Item = &Message> {
        self.system.iter().chain(&self.messages)
    }

    /// Begins anew.
    pub fn reset(&mut self) {
        self.messages.clear();
        self.forgotten = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_turns_go_and_the_system_prompt_stays() {
        let mut turns = Turns::new(Some("s".into()));
        let told = |turns: &Turns| turns.told().iter().map(|message| message.content.as_str()).collect::<Vec<_>>().join(" ");
        for (role, text) in [("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", "B"), ("user", "c")] {
            turns.push(Message::new(role, text));
        }
        assert_eq!(told(&turns), "s a A b B c");
        assert!(turns.forget_oldest() && told(&turns) == "s b B c");
        assert!(turns.forget_oldest() && told(&turns) == "s c");
        assert!(!turns.forget_oldest() && turns.forgotten() == 4);
        assert_eq!(turns.all().count(), 6);
        turns.pop();
        assert_eq!(told(&turns), "s");
        assert_eq!(Turns::noted(&turns.note(), None).as_ref(), Some(&turns));
        let other = Turns::noted(&turns.note(), Some(Message::new("system", "t"))).unwrap();
        assert!(told(&other) == "t" && other.forgotten() == 4);
        assert_eq!(Turns::noted(&turns.note().replace("\"forgotten\":4", "\"forgotten\":9"), None), None);
        turns.reset();
        assert!(told(&turns) == "s" && turns.forgotten() == 0 && !turns.forget_oldest());
    }
}
