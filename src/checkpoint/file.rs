//! A file of a model, of which numbers are read as they are needed, or where they are.

use super::foreign;
use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// An open file.
pub(super) struct ModelFile {
    pub path: PathBuf,
    /// All of it, mapped into memory.
    pub bytes: Mmap,
    file: File,
    /// When it was last written to, as far as the system knows.
    modified: Option<SystemTime>,
}

impl ModelFile {
    pub fn open(path: &Path) -> Result<ModelFile> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        // SAFETY: the mapping is read-only and private to this struct. As with every mapped model,
        // a file that another program cuts short while it is read there ends the process; so most
        // is read by `read`, and before the rest `check` is asked. lowkey itself never writes to an
        // existing checkpoint.
        let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io("read", path))?;
        foreign::refuse_pointer(path, &bytes)?;
        let modified = file.metadata().and_then(|metadata| metadata.modified()).ok();
        Ok(ModelFile { path: path.to_path_buf(), bytes, file, modified })
    }

    /// Reads as many bytes as there is room for, from byte `start` on.
    pub fn read(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, bytes, start as u64).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.changed(),
            _ => Error::io("read", &self.path)(error),
        })
    }

    /// Checks that the file is as long and as old as when it was opened.
    pub fn check(&self) -> Result<()> {
        let now = self.file.metadata().map_err(Error::io("read", &self.path))?;
        let same = now.len() == self.bytes.len() as u64 && now.modified().ok() == self.modified;
        if same { Ok(()) } else { Err(self.changed()) }
    }

    /// Takes bytes out of this process's memory; the system keeps them as long as it has room.
    pub fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is of a file and never written to, so what is read there again is
        // read from the file again. That it is not done costs memory alone.
        #[cfg(unix)]
        let _ = unsafe { self.bytes.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        #[cfg(not(unix))]
        let _ = range;
    }

    fn changed(&self) -> Error {
        let message = "has been changed by another program since it was opened; load the model again".into();
        Error::Checkpoint { path: self.path.clone(), message }
    }
}

/// The files of a model whose weights are read where they are.
#[derive(Clone)]
pub(crate) struct OpenFiles(pub(super) Vec<Arc<ModelFile>>);

impl OpenFiles {
    /// Checks that none has been changed since it was opened.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the one that was.
    pub fn check(&self) -> Result<()> {
        self.0.iter().try_for_each(|file| file.check())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, at)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => (bytes, at) = (&mut std::mem::take(&mut bytes)[count..], at + count as u64),
        }
    }
    Ok(())
}
