//! A directory of saved prefixes: what many prompts begin with is read once.
//!
//! Any number of processes may use one at a time. A prefix is a [saved session](super::saved) whose
//! name says what it was saved with and, as a digest, what its tokens are; it appears under that
//! name whole. Its time of last change is that of its last use. Where all together are larger than
//! they may be, those go first that were used longest ago; a process that has just opened one
//! reads it to its end.

use super::container::{Container, FORMAT};
use super::saved::Head;
use super::{Prompt, Session};
use crate::kv::CacheMethod;
use crate::sequence::Sequence;
use crate::{Error, Result, task};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// What the names of prefixes end with, after the dot.
const EXTENSION: &str = "session";
/// A file that was on its way longer ago than this was left by a process that has ended.
const ABANDONED: Duration = Duration::from_secs(3600);

/// A directory of prefixes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixCache {
    directory: PathBuf,
    most_bytes: u64,
}

/// What a prompt began with.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Begun {
    /// Tokens that had been saved, or were there already.
    pub reused: usize,
    /// Tokens that were read after them.
    pub read: usize,
    /// What that took.
    pub seconds: f64,
}

impl PrefixCache {
    /// The prefixes in `directory`, which is made where there is none; all files together may have
    /// `most_bytes`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(directory: impl Into<PathBuf>, most_bytes: u64) -> Result<PrefixCache> {
        let directory = directory.into();
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        Ok(PrefixCache { directory, most_bytes })
    }

    /// Has `session` read the first `shared` tokens of `prompt`, those that other prompts begin
    /// with too: from the longest saved prefix on, and saved for the next time.
    ///
    /// The prompt's last token is not among them, as its logits are needed: of a prompt that has
    /// been saved whole [`Session::generate`] reads that one.
    ///
    /// # Errors
    /// As [`restore`](Self::restore), [`save`](Self::save) and [`Session::read`].
    pub fn begin(&self, session: &mut Session, prompt: &[u32], shared: usize) -> Result<Begun> {
        let shared = shared.min(prompt.len().saturating_sub(1));
        let reused = self.restore(session, prompt)?;
        let start = Instant::now();
        if reused < shared {
            session.read(Prompt::Tokens(&prompt[..shared]))?;
            let seconds = start.elapsed().as_secs_f64();
            self.save(session)?;
            return Ok(Begun { reused, read: shared - reused, seconds });
        }
        Ok(Begun { reused, read: 0, seconds: 0.0 })
    }

    /// Has `session` begin with the longest saved prefix of `prompt`, where that is longer than
    /// what the session has of it already; returns how many tokens of `prompt` its cache then
    /// holds.
    ///
    /// A prefix that is damaged, or gone by the time it is read, is as if it were not there.
    ///
    /// # Errors
    /// Those of reading the directory, and the device's.
    pub fn restore(&self, session: &mut Session, prompt: &[u32]) -> Result<usize> {
        // The last token is read for its logits.
        let prompt = &prompt[..prompt.len().saturating_sub(1)];
        let (key, own) = (key(session)?, common(session.tokens(), prompt));
        let mut found = Vec::new();
        for (path, ..) in self.files()? {
            let ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&key));
            let Some((tokens, kept_from)) = ours.then(|| peek(&path).ok()).flatten() else { continue };
            let common = common(&tokens, prompt);
            // One that does not fit is as good for others as before.
            let fits = tokens.len() <= session.capacity();
            if fits && common > own && (common == tokens.len() || common >= kept_from) {
                found.push((common, path));
            }
        }
        found.sort_by_key(|(common, _)| std::cmp::Reverse(*common));
        for (common, path) in found {
            match session.restore(&path) {
                Ok(_) => {
                    touch(&path);
                    session.context.truncate(common);
                    return Ok(common);
                }
                Err(Error::Session { message, .. }) => {
                    log::warn!("{} {message}; it is removed", path.display());
                    let _ = fs::remove_file(&path);
                }
                Err(Error::Io { .. } | Error::Context { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(own)
    }

    /// Saves what `session` holds, unless that has been, and removes what was used longest ago
    /// beyond the directory's size.
    ///
    /// # Errors
    /// As [`Session::save`], and those of reading the directory.
    pub fn save(&self, session: &mut Session) -> Result<()> {
        let digest = session.tokens().iter().fold(Sha256::new(), |sha, token| sha.chain_update(token.to_le_bytes()));
        let path = self.directory.join(format!("{}-{}.{EXTENSION}", key(session)?, short(digest)));
        match path.is_file() {
            true => touch(&path),
            false => _ = session.save(&path, "")?,
        }
        self.evict()
    }

    /// Removes what was used longest ago, until the rest is as small as it is to be.
    fn evict(&self) -> Result<()> {
        task::sweep(&self.directory, ABANDONED);
        let mut files = self.files()?;
        files.sort_by_key(|(_, _, used)| *used);
        let mut all: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (path, bytes, _) in files {
            if all <= self.most_bytes {
                break;
            }
            // Another process may have done so, or be reading it.
            let _ = fs::remove_file(path);
            all -= bytes;
        }
        Ok(())
    }

    /// All prefixes with their bytes and when they were last used. Other files are left alone.
    fn files(&self) -> Result<Vec<(PathBuf, u64, SystemTime)>> {
        let entries = fs::read_dir(&self.directory).map_err(Error::io("read", &self.directory))?;
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry.map_err(Error::io("read", &self.directory))?;
            let path = entry.path();
            if !is_prefix(&path) {
                continue;
            }
            // One that is gone meanwhile is none.
            let Ok(metadata) = entry.metadata() else { continue };
            files.push((path, metadata.len(), metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH)));
        }
        Ok(files)
    }
}

/// Whether a file has the name of a prefix: two digests.
fn is_prefix(path: &Path) -> bool {
    let name = path.file_stem().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let digest = |part: &str| part.len() == 16 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    path.extension().is_some_and(|extension| extension == EXTENSION) && name.split_once('-').is_some_and(|(a, b)| digest(a) && digest(b))
}

/// How many tokens two texts have in common.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn short(digest: Sha256) -> String {
    format!("{:x}", digest.finalize())[..16].into()
}

/// A digest of what a session's cache depends on, its tokens apart.
fn key(session: &Session) -> Result<String> {
    let origin = session.origin()?;
    let rows = origin.rows.as_ref().map_or("", |rows| &rows.digest);
    // What an eviction has room for depends on the whole context.
    let capacity = matches!(session.method, CacheMethod::Evict(_)).then(|| session.capacity());
    Ok(short(Sha256::new_with_prefix(format!("{FORMAT} {} {rows} {:?} {capacity:?}", origin.model.fingerprint, session.method))))
}

/// It has just been used.
fn touch(path: &Path) {
    let _ = File::options().append(true).open(path).and_then(|file| file.set_modified(SystemTime::now()));
}

/// The tokens of a prefix, and from where on it can be cut, without reading the rest.
fn peek(path: &Path) -> Result<(Vec<u32>, usize)> {
    let (head, tokens) = Container::<Head>::peek(path, "tokens")?;
    Ok((tokens, head.cache.kept_from))
}
