//! What is no model that lowkey reads, named for what it is: weights that another package has
//! quantised, adapters, pointers of Git LFS, directories that hold other files.

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Ends of names by which other packages' quantised weights are known.
const QUANTISED: [(&str, &str); 15] = [
    ("qweight", "GPTQ or AWQ"),
    ("qzeros", "GPTQ or AWQ"),
    ("g_idx", "GPTQ"),
    ("scales", "MLX"),
    ("biases", "MLX"),
    ("absmax", "bitsandbytes"),
    ("quant_map", "bitsandbytes"),
    ("nested_absmax", "bitsandbytes"),
    ("nested_quant_map", "bitsandbytes"),
    ("SCB", "bitsandbytes"),
    ("weight_scale", "compressed-tensors or FP8"),
    ("weight_scale_inv", "FP8"),
    ("input_scale", "compressed-tensors or FP8"),
    ("weight_packed", "compressed-tensors"),
    ("weight_shape", "compressed-tensors"),
];

/// What a tensor of another package is, and what to do, by its name.
pub(super) fn tensor(name: &str) -> Option<String> {
    if name.contains(".lora_") || name.ends_with(".loraA") || name.ends_with(".loraB") {
        return Some(format!("it is part of a LoRA adapter. {MERGE}"));
    }
    if name.contains(".quant_state.bitsandbytes") {
        return Some(quantised("bitsandbytes"));
    }
    let (_, last) = name.rsplit_once('.')?;
    let (_, package) = QUANTISED.into_iter().find(|(end, _)| *end == last)?;
    Some(quantised(package))
}

/// What to do with an adapter.
pub(super) const MERGE: &str = "Merge it into its model first (peft: merge_and_unload, then save_pretrained), and give the merged model";

/// What to do with weights that another package has quantised.
pub(super) fn quantised(package: &str) -> String {
    format!("weights quantised by {package} are not supported; take the float checkpoint that they were made of, or a GGUF of it")
}

/// The file that [Git LFS](https://git-lfs.com) leaves in the place of one that it has not fetched.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// Refuses a file that is a pointer of Git LFS.
///
/// # Errors
/// [`Error::Checkpoint`] that says how to get the file itself.
pub(super) fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    if !bytes.starts_with(POINTER) {
        return Ok(());
    }
    let message =
        "is a Git LFS pointer, and not the file that it stands for; run `git lfs pull` where it was cloned, or fetch the model with `lowkey pull`";
    Err(Error::Checkpoint { path: path.into(), message: message.into() })
}

/// What a directory without a `config.json` is, where its files tell.
pub(super) fn directory(path: &Path) -> Option<Error> {
    let entries = path.read_dir().into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let ends = |end: &str| names.iter().filter(|name| name.ends_with(end)).map(String::as_str).collect::<Vec<_>>();
    let unsupported = |message: String| Some(Error::Unsupported { path: path.into(), message });
    let ggufs = ends(".gguf");
    if let Some(first) = ggufs.first() {
        let model: PathBuf = path.join(first);
        return unsupported(format!("is a directory of GGUF files ({}); name the file itself: {}", ggufs.join(", "), model.display()));
    }
    if names.iter().any(|name| name == ADAPTER_CONFIG) {
        return Some(adapter(path));
    }
    let params = names.iter().any(|name| name == "params.json");
    if params && names.iter().any(|name| name.starts_with("consolidated.")) {
        return unsupported(
            "holds a model in the format of its makers (params.json and consolidated weights); take its Hugging Face form, with config.json".into(),
        );
    }
    None
}

/// What a file is that is neither a GGUF nor an adapter file of `compress`, where its name tells.
pub(super) fn file(path: &Path) -> Option<&'static str> {
    let extension = path.extension()?.to_str()?.to_lowercase();
    match extension.as_str() {
        "safetensors" => Some("is a file of weights alone; name the directory that it is in, with config.json and tokenizer.json"),
        "bin" | "pt" | "pth" | "ckpt" => {
            Some("is a file of pickled weights, which lowkey does not open; take the model's safetensors, or a GGUF of it")
        }
        "npz" | "h5" | "msgpack" | "onnx" => Some("is a file of another package's weights; take the model's safetensors, or a GGUF of it"),
        _ => None,
    }
}

/// peft's file beside an adapter's tensors.
pub(super) const ADAPTER_CONFIG: &str = "adapter_config.json";

/// A directory that peft has written.
pub(super) fn adapter(path: &Path) -> Error {
    let base = super::read_json(&path.join(ADAPTER_CONFIG)).ok().and_then(|json| json["base_model_name_or_path"].as_str().map(String::from));
    let of = base.map_or(String::new(), |base| format!(" for {base}"));
    Error::Unsupported { path: path.into(), message: format!("is a LoRA adapter{of}, and no model. {MERGE}") }
}

/// What stands in a directory in the place of safetensors, where its files tell.
pub(super) fn weights(path: &Path) -> Option<&'static str> {
    let kinds = [
        ("pytorch_model.bin", "pickled weights"),
        ("pytorch_model.bin.index.json", "pickled weights"),
        ("weights.npz", "MLX's weights"),
        ("tf_model.h5", "TensorFlow's weights"),
        ("flax_model.msgpack", "Flax's weights"),
    ];
    kinds.into_iter().find(|(name, _)| path.join(name).is_file()).map(|(_, kind)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_known_by_their_tensors() {
        let says = |name: &str| tensor(name).unwrap_or_default();
        let layer = "model.layers.0.self_attn.q_proj";
        for (end, words) in [
            ("lora_A.weight", "LoRA"),
            ("lora_magnitude_vector", "LoRA"),
            ("qweight", "GPTQ or AWQ"),
            ("scales", "MLX"),
            ("weight.absmax", "bitsandbytes"),
            ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
            ("weight_scale_inv", "FP8"),
        ] {
            assert!(says(&format!("{layer}.{end}")).contains(words), "{end}");
        }
        assert_eq!(says(&format!("{layer}.weight")) + &says(&format!("{layer}.bias")) + &says("rows.0.mean"), "");
    }
}
