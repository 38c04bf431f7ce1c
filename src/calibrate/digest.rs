//! Digests that tie statistics to the model and the text they were gathered from.

use crate::checkpoint::Checkpoint;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::fs::File;

/// SHA-256 of the checkpoint's weights file, or of all of them in order, in hexadecimal.
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

/// SHA-256, in hexadecimal, of a text; of several, that of their digests, one after the other.
pub fn text_digest<T: AsRef<str>>(texts: &[T]) -> String {
    match texts {
        [text] => hexadecimal(Sha256::new_with_prefix(text.as_ref())),
        texts => hexadecimal(texts.iter().fold(Sha256::new(), |sha, text| sha.chain_update(Sha256::digest(text.as_ref())))),
    }
}

fn hexadecimal(sha: Sha256) -> String {
    sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::text_digest;

    #[test]
    fn the_standards_own_example() {
        assert_eq!(text_digest(&["abc"]), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn several_texts_are_not_one_text_cut_elsewhere() {
        let digests = [text_digest(&["ab", "c"]), text_digest(&["a", "bc"]), text_digest(&["abc"]), text_digest(&["c", "ab"])];
        assert!((0..4).all(|i| (0..i).all(|j| digests[i] != digests[j])), "{digests:?}");
    }
}
