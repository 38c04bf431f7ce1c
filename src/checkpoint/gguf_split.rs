//! GGUF in several files, as llama.cpp splits it: the first has the metadata and is the one that is
//! named, and all have tensors.

use super::file::ModelFile;
use super::gguf::{self, Header, Metadata, Value};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// A GGUF of one file or several, open.
pub(super) struct Parts {
    /// In their order.
    pub files: Vec<ModelFile>,
    /// The first one's metadata, and the tensors of all, each with the index of its file.
    pub header: Header,
}

/// Opens the file at `path`, and the parts that belong to it.
///
/// # Errors
/// [`Error::Unsupported`] for a part that is not the first, which it names, and for a first one
/// whose name does not tell the others'; [`Error::Io`] for one that is missing;
/// [`Error::Checkpoint`] for one of something else.
pub(super) fn open(path: &Path) -> Result<Parts> {
    let first = ModelFile::open(path)?;
    let mut header = gguf::read_header(path, &first.bytes)?;
    let (number, count) = place(path, &header.metadata)?;
    let mut files = vec![first];
    if number > 0 {
        let first = sibling(path, 0, count).map_or(String::new(), |first| format!(" ({})", first.display()));
        let message = format!("is part {} of {count} of a split GGUF; name the first one{first}, and all are read", number + 1);
        return Err(Error::Unsupported { path: path.into(), message });
    }
    for index in 1..count {
        let name = sibling(path, index, count).ok_or_else(|| Error::Unsupported {
            path: path.into(),
            message: format!(
                "is the first of {count} parts of a split GGUF, whose names it does not tell; it should end with -00001-of-{count:05}.gguf"
            ),
        })?;
        let file = ModelFile::open(&name)?;
        let part = gguf::read_header(&name, &file.bytes)?;
        let found = place(&name, &part.metadata)?;
        if found != (index, count) {
            let message = format!("is part {} of {}, where {} has part {} of {count}", found.0 + 1, found.1, path.display(), index + 1);
            return Err(Error::Checkpoint { path: name, message });
        }
        header.tensors.extend(part.tensors.into_iter().map(|(name, mut stored)| {
            stored.file = index;
            (name, stored)
        }));
        files.push(file);
    }
    match header.metadata.get("split.tensors.count") {
        Some(Value::Integer(expected)) if count > 1 && *expected != header.tensors.len() as i64 => {
            let message = format!("says that its {count} parts have {expected} tensors, and they have {}", header.tensors.len());
            Err(Error::Checkpoint { path: path.into(), message })
        }
        _ => Ok(Parts { files, header }),
    }
}

/// Which part it is, from 0 on, and of how many.
fn place(path: &Path, metadata: &Metadata) -> Result<(usize, usize)> {
    let number = |key: &str, default: i64| match metadata.get(key) {
        None => Ok(default),
        Some(Value::Integer(n)) if (0..1 << 16).contains(n) => Ok(*n),
        Some(other) => Err(Error::Checkpoint { path: path.into(), message: format!("metadata {key} is {other}; a number of parts is expected") }),
    };
    let count = number("split.count", 1)?.max(1);
    Ok((number("split.no", 0)? as usize, count as usize))
}

/// The path of another part.
fn sibling(path: &Path, index: usize, count: usize) -> Option<PathBuf> {
    let stem = path.file_stem()?.to_str()?;
    // `-00001-of-00003`, whichever it is.
    let (base, place) = stem.split_at_checked(stem.len().checked_sub(15)?)?;
    let (_, of) = place.split_once("-of-")?;
    (of.parse() == Ok(count)).then(|| path.with_file_name(format!("{base}-{:05}-of-{count:05}.gguf", index + 1)))
}
