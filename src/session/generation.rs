//! An answer, token by token.

use super::draft::Drafter;
use super::{Cancel, Session, StopStrings};
use crate::checkpoint::TextStream;
use crate::logits::Sampler;
use crate::sequence::{Context, Logits, Sequence};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::time::Instant;

/// One step of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The token. The one that ends an answer is an item like any other.
    pub id: u32,
    /// The text that became certain with it.
    ///
    /// Empty where a character or a possible stop string is still open, more than the token's own
    /// where one was. All items' texts together are the answer.
    pub text: String,
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

/// What ended an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The model's end token, or a stop string.
    Stop,
    /// The longest answer that was allowed.
    Length,
    /// The context is full.
    Context,
    /// The user.
    Cancelled,
}

/// An answer in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize)]
pub struct Summary {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of them were in the cache already.
    pub reused_tokens: usize,
    /// Tokens generated, the one that ended the answer included.
    pub tokens: usize,
    /// Tokens drafted, and how many of them came true.
    pub drafted_tokens: usize,
    /// See [`drafted_tokens`](Self::drafted_tokens).
    pub accepted_tokens: usize,
    /// Tokens per second that the rest of the prompt was read with; 0 where that has not happened.
    pub prefill_tps: f64,
    /// Tokens per second after the first, which comes with the prompt; 0 where there was no second.
    pub decode_tps: f64,
    /// Bytes of the cache that are in use.
    pub kv_bytes: u64,
    /// What ended it; `None` while it goes on, or after an error.
    pub finish: Option<Finish>,
}

/// What the model is to run next.
enum Work {
    /// The prompt.
    Read(Vec<u32>),
    /// The token that was chosen last.
    Append(u32),
}

/// An iterator over an answer's tokens.
///
/// Each item is one step of the model, done when it is asked for.
pub struct Generation<'a> {
    context: &'a mut Context,
    sampler: &'a mut Sampler,
    cancel: &'a Cancel,
    ends: &'a [u32],
    max_tokens: usize,
    stop: StopStrings,
    /// Taken when the answer ends.
    stream: Option<TextStream<'a>>,
    /// `None` when the answer has ended.
    work: Option<Work>,
    drafter: Option<Drafter>,
    /// Tokens that are next: all of them but the last are in the context already.
    ready: VecDeque<u32>,
    summary: Summary,
    prefill_seconds: f64,
    decode_seconds: f64,
}

impl<'a> Generation<'a> {
    pub(super) fn new(session: &'a mut Session, prompt: Vec<u32>) -> Result<Generation<'a>> {
        if prompt.is_empty() {
            return Err(Error::Argument { name: "prompt".into(), message: "it has no tokens".into() });
        }
        let capacity = session.context.capacity();
        if prompt.len() > capacity {
            return Err(Error::Context { needed: prompt.len(), capacity });
        }
        Ok(Generation {
            stream: Some(session.tokenizer.stream(&prompt)?),
            summary: Summary { prompt_tokens: prompt.len(), ..Summary::default() },
            drafter: Drafter::new(&prompt, session.draft).filter(|_| session.sampler.is_greedy()),
            ready: VecDeque::new(),
            work: (session.max_tokens > 0).then_some(Work::Read(prompt)),
            context: &mut session.context,
            sampler: &mut session.sampler,
            cancel: &session.cancel,
            ends: &session.ends,
            max_tokens: session.max_tokens,
            stop: session.stop.clone(),
            prefill_seconds: 0.0,
            decode_seconds: 0.0,
        })
    }

    /// The answer in numbers, as far as it has come.
    pub fn summary(&self) -> Summary {
        let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        let memory = self.context.memory();
        Summary {
            prefill_tps: rate(self.summary.prompt_tokens - self.summary.reused_tokens, self.prefill_seconds),
            decode_tps: rate(self.summary.tokens.saturating_sub(1), self.decode_seconds),
            kv_bytes: memory.kv_bytes_per_token * self.context.tokens().len() as u64 + memory.kv_fixed_bytes,
            ..self.summary
        }
    }

    /// Forgets tokens that are not to come.
    fn drop_ready(&mut self) {
        self.context.truncate(self.context.position() - self.ready.len());
        self.ready.clear();
    }

    /// Runs the model once, if that is needed, and chooses the next token.
    fn choose(&mut self, work: Work) -> Result<u32> {
        let start = Instant::now();
        match work {
            Work::Read(prompt) => {
                let mut read = self.context.read(&prompt)?;
                let id = self.sampler.sample(&mut read.logits, self.context.tokens())?;
                self.summary.reused_tokens = read.reused;
                self.prefill_seconds = start.elapsed().as_secs_f64();
                Ok(id)
            }
            Work::Append(last) => {
                let id = if let Some(id) = self.ready.pop_front() {
                    id
                } else if self.sampler.is_greedy() {
                    self.next(last)?
                } else {
                    let mut logits = self.context.forward(&[last], Logits::Last)?;
                    self.sampler.sample(&mut logits, self.context.tokens())?
                };
                self.decode_seconds += start.elapsed().as_secs_f64();
                Ok(id)
            }
        }
    }

    /// The likeliest token after `last`, and what is found out about those after it.
    fn next(&mut self, last: u32) -> Result<u32> {
        let left = self.max_tokens - self.summary.tokens;
        let Some(drafter) = &mut self.drafter else {
            // The device may begin with the token after this one, if there is to be one.
            return if left == 1 { self.context.step(last) } else { self.context.step_ahead(last) };
        };
        let draft = drafter.draft(self.context.verifiable().min(left) - 1);
        if draft.is_empty() {
            return self.context.step(last);
        }
        let next = self.context.verify(&[&[last], draft].concat())?;
        let (drafted, accepted) = (draft.len(), draft.iter().zip(&next).take_while(|(draft, next)| draft == next).count());
        self.context.truncate(self.context.position() - (drafted - accepted));
        self.ready.extend(&next[1..=accepted]);
        drafter.learn(drafted, accepted);
        self.summary.drafted_tokens += drafted;
        self.summary.accepted_tokens += accepted;
        Ok(next[0])
    }

    /// What `id` adds to the text, and whether it ends the answer.
    fn take(&mut self, id: u32) -> Result<Token> {
        self.summary.tokens += 1;
        if let Some(drafter) = &mut self.drafter {
            drafter.push(id);
        }
        let mut text = String::new();
        if self.ends.binary_search(&id).is_ok() {
            self.summary.finish = Some(Finish::Stop);
        } else {
            let piece = self.stream.as_mut().map_or(Ok(String::new()), |stream| stream.push(id))?;
            let released = self.stop.push(&piece);
            text = released.text;
            if released.stopped {
                self.summary.finish = Some(Finish::Stop);
                self.drop_ready();
                return Ok(Token { id, text });
            }
            if self.summary.tokens >= self.max_tokens {
                self.summary.finish = Some(Finish::Length);
            } else if self.ready.is_empty() && self.context.is_full() {
                self.summary.finish = Some(Finish::Context);
            } else if self.cancel.is_set() {
                self.summary.finish = Some(Finish::Cancelled);
            }
        }
        if self.summary.finish.is_some() {
            self.drop_ready();
        }
        if self.summary.finish.is_some()
            && let Some(stream) = self.stream.take()
        {
            // Nothing more will come: what was held back is text after all.
            let released = self.stop.push(&stream.finish()?);
            text += &released.text;
            text += &self.stop.finish();
        }
        Ok(Token { id, text })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        let work = self.work.take()?;
        let reading = matches!(work, Work::Read(_));
        match self.choose(work).and_then(|id| self.take(id)) {
            Ok(token) => {
                if self.summary.finish.is_none() {
                    self.work = Some(Work::Append(token.id));
                }
                Some(Ok(token))
            }
            Err(Error::Interrupted) if reading => {
                self.summary.finish = Some(Finish::Cancelled);
                None
            }
            Err(error) => Some(Err(error)),
        }
    }
}
