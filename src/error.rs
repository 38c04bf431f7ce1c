//! One error for the whole crate: what failed, on which file, tensor or setting, and what to do
//! about it.

use std::path::{Path, PathBuf};

/// `std::result::Result` with lowkey's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, each with the thing it went wrong on.
///
/// Nothing that a user can feed in panics.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused: a missing file, a full disk, no permission.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `create`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// A checkpoint's file is damaged, incomplete or contradicts itself.
    #[error("{}: {message}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        message: String,
    },

    /// One tensor of a checkpoint is missing, has the wrong shape or type, or holds numbers that
    /// are not finite.
    #[error("{}: tensor {name}: {message}", path.display())]
    Tensor {
        /// The file that holds, or should hold, the tensor.
        path: PathBuf,
        /// The tensor's name.
        name: String,
        /// What is wrong with it.
        message: String,
    },

    /// The checkpoint is sound, but nothing here knows how to run it.
    #[error("{}: {message}", path.display())]
    Unsupported {
        /// The checkpoint.
        path: PathBuf,
        /// What it asks for, and what is supported.
        message: String,
    },

    /// A saved session is damaged, of another version, or of another model or cache.
    #[error("{}: {message}", path.display())]
    Session {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        message: String,
    },

    /// The tokenizer or chat template is missing or does not work.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file, or the checkpoint that lacks it.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },

    /// An option or argument has a value that cannot be used.
    #[error("{name}: {message}")]
    Argument {
        /// The option as the user knows it.
        name: String,
        /// What is wrong with the value, and what would be accepted.
        message: String,
    },

    /// The output is already there. Nothing is ever overwritten.
    #[error("{} already exists; remove it or choose another name", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },

    /// The sequence would outgrow its cache.
    #[error("{needed} tokens do not fit into a context of {capacity}; ask for a larger one with --context, or shorten the text")]
    Context {
        /// Tokens that would have to be cached.
        needed: usize,
        /// Tokens that the cache has room for.
        capacity: usize,
    },

    /// No graphics adapter can run the kernels. The CPU is never chosen silently.
    #[error(
        "no usable GPU: {reason}. Install a Vulkan, Metal or DX12 driver (on Debian and Ubuntu: apt install mesa-vulkan-drivers), or run on the processor with --device cpu"
    )]
    NoAdapter {
        /// What was found, and why it will not do.
        reason: String,
    },

    /// The graphics driver refused something.
    #[error("GPU: {what}: {message}")]
    Gpu {
        /// What was being done.
        what: String,
        /// The driver's words.
        message: String,
    },

    /// A buffer did not fit into the device's memory.
    #[error("out of GPU memory: {what} needs {bytes} bytes; choose a smaller --context, a stronger compression, or --device cpu")]
    OutOfMemory {
        /// The buffer.
        what: String,
        /// Its size.
        bytes: u64,
    },

    /// The device went away: a driver reset, a time-out, an unplugged card.
    #[error("the GPU was lost: {message}. The sequence on it is gone; start again")]
    DeviceLost {
        /// The driver's words.
        message: String,
    },

    /// A download failed or did not match its checksum.
    #[error("cannot fetch {name}: {message}")]
    Fetch {
        /// The model's name.
        name: String,
        /// What happened, and what to do.
        message: String,
    },

    /// The arithmetic went wrong: a matrix that is not finite, a factorisation that does not
    /// converge.
    #[error("{what}: {message}")]
    Numeric {
        /// The computation.
        what: String,
        /// What happened.
        message: String,
    },

    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// A stable, snake_case word for scripts: the `kind` of `--json` errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Io { .. } => "io",
            Error::Checkpoint { .. } => "checkpoint",
            Error::Tensor { .. } => "tensor",
            Error::Unsupported { .. } => "unsupported",
            Error::Session { .. } => "session",
            Error::Tokenizer { .. } => "tokenizer",
            Error::Argument { .. } => "argument",
            Error::Exists { .. } => "exists",
            Error::Context { .. } => "context",
            Error::NoAdapter { .. } => "no_adapter",
            Error::Gpu { .. } => "gpu",
            Error::OutOfMemory { .. } => "out_of_memory",
            Error::DeviceLost { .. } => "device_lost",
            Error::Fetch { .. } => "fetch",
            Error::Numeric { .. } => "numeric",
            Error::Interrupted => "interrupted",
        }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }
}
