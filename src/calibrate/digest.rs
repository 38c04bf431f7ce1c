//! Digests that tie statistics to the model and the text they were gathered from.

use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;

/// SHA-256, in hexadecimal, of the checkpoint's weights file, or of all of them one after the other.
///
/// # Errors
/// [`Error::Io`] where one cannot be read.
pub fn source_digest(checkpoint: &Checkpoint) -> Result<String> {
    let mut sha = Sha256::new();
    for path in checkpoint.weight_files() {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        std::io::copy(&mut file, &mut sha).map_err(Error::io("read", path))?;
    }
    Ok(hexadecimal(sha))
}

/// SHA-256, in hexadecimal, of a text.
pub fn text_digest(text: &str) -> String {
    hexadecimal(Sha256::new_with_prefix(text))
}

fn hexadecimal(sha: Sha256) -> String {
    sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_standards_own_example() {
        assert_eq!(super::text_digest("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
