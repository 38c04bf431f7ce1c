//! What calibration has on disk while it runs: the residual streams of all tokens, which are larger
//! than memory for a large model, and the statistics of every layer that is done.
//!
//! A directory that is named keeps both when the run ends early, and the same run goes on there.
//! Its file of streams has one matrix `[hidden_size, tokens]` of f32 for each *state*: what enters
//! each attention and each MLP, and two gradients in turns, so that the one that a layer begins
//! with is whole until that layer's statistics are.

use super::file::{Named, Reader, serialize};
use crate::{Error, Result, task};
use nalgebra::DMatrix;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Statistics on the way.
pub(super) struct Work {
    directory: PathBuf,
    /// Where nobody asked for it to be kept.
    temporary: Option<TempDir>,
    streams: File,
    hidden: usize,
    tokens: usize,
}

impl Work {
    /// What the streams take.
    pub fn bytes(hidden: usize, tokens: usize, states: usize) -> u64 {
        (states * tokens * hidden * size_of::<f32>()) as u64
    }

    /// Opens the directory `key` in `place`, as an earlier run of the same left it, or a new one; a
    /// temporary one where there is no place, or another process is at the same there.
    pub fn open(place: Option<&Path>, key: &str, [hidden, tokens, states]: [usize; 3]) -> Result<Work> {
        let work = match place {
            Some(place) => Self::claim(place.join(key), None, [hidden, tokens])?,
            None => None,
        };
        let work = match work {
            Some(work) => work,
            None => Self::temporary([hidden, tokens])?,
        };
        let (path, length) = (work.path("streams"), Self::bytes(hidden, tokens, states));
        if work.streams.metadata().map_err(Error::io("read", &path))?.len() != length {
            work.clear()?;
            work.streams.set_len(length).map_err(Error::io("write", &path))?;
        }
        Ok(work)
    }

    fn temporary(shape: [usize; 2]) -> Result<Work> {
        let temporary = tempfile::tempdir().map_err(Error::io("create", &std::env::temp_dir()))?;
        let directory = temporary.path().to_path_buf();
        let taken = || Error::io("lock", &directory)(std::io::ErrorKind::ResourceBusy.into());
        Self::claim(directory.clone(), Some(temporary), shape)?.ok_or_else(taken)
    }

    /// `None` where another process is at it.
    fn claim(directory: PathBuf, temporary: Option<TempDir>, [hidden, tokens]: [usize; 2]) -> Result<Option<Work>> {
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        let path = directory.join("streams");
        let streams = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(Error::io("create", &path))?;
        match streams.try_lock() {
            Ok(()) => {}
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
            Err(TryLockError::WouldBlock) => return Ok(None),
        }
        Ok(Some(Work { directory, temporary, streams, hidden, tokens }))
    }

    /// Reads a window of `count` tokens from token `first` on, `[hidden_size, count]`.
    pub fn read(&self, state: usize, first: usize, count: usize) -> Result<DMatrix<f32>> {
        let mut x = DMatrix::zeros(self.hidden, count);
        let done = self.seek(state, first).and_then(|mut file| file.read_exact(bytemuck::cast_slice_mut(x.as_mut_slice())));
        done.map_err(Error::io("read", &self.path("streams")))?;
        Ok(x)
    }

    /// Writes a window from token `first` on.
    pub fn write(&self, state: usize, first: usize, x: &DMatrix<f32>) -> Result<()> {
        let done = self.seek(state, first).and_then(|mut file| file.write_all(bytemuck::cast_slice(x.as_slice())));
        done.map_err(Error::io("write", &self.path("streams")))
    }

    fn seek(&self, state: usize, token: usize) -> std::io::Result<&File> {
        let mut file = &self.streams;
        file.seek(SeekFrom::Start(((state * self.tokens + token) * self.hidden * size_of::<f32>()) as u64))?;
        Ok(file)
    }

    /// Whether the part of this name is done.
    pub fn has(&self, part: &str) -> bool {
        self.path(part).is_file()
    }

    /// Keeps a part: from now on it is done.
    pub fn keep(&self, part: &str, tensors: Vec<Named<'_>>) -> Result<()> {
        let path = self.path(part);
        let mut file = task::file(&path)?;
        file.write_all(&serialize(tensors, HashMap::new())?).map_err(Error::io("write", &path))?;
        task::publish_file(file, &path)
    }

    /// Reads a part.
    pub fn part<T>(&self, part: &str, read: impl FnOnce(&Reader) -> Result<T>) -> Result<T> {
        let path = self.path(part);
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| Error::Checkpoint { path: path.clone(), message: format!("is damaged ({e}); remove it") })?;
        read(&Reader { path: &path, file: &file })
    }

    /// Removes all of it.
    pub fn finish(mut self) -> Result<()> {
        match self.temporary.take() {
            Some(temporary) => temporary.close().map_err(Error::io("remove", &self.directory)),
            None => fs::remove_dir_all(&self.directory).map_err(Error::io("remove", &self.directory)),
        }
    }

    /// The parts that are done, and what else is beside the streams.
    fn parts(&self) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&self.directory).map_err(Error::io("read", &self.directory))?;
        let mut paths = entries.map(|entry| Ok(entry.map_err(Error::io("read", &self.directory))?.path())).collect::<Result<Vec<_>>>()?;
        paths.retain(|path| *path != self.path("streams"));
        Ok(paths)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Removes parts that no streams belong to.
    fn clear(&self) -> Result<()> {
        self.parts()?.iter().try_for_each(|path| fs::remove_file(path).map_err(Error::io("remove", path)))
    }
}

impl Drop for Work {
    /// Leaves nothing where nothing is done.
    fn drop(&mut self) {
        if self.temporary.is_none() && self.parts().is_ok_and(|parts| parts.is_empty()) {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}
