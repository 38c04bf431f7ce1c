//! WGSL sources and the preprocessor that makes every variant from one file.
//!
//! Three directives, each alone on its line: `#include "lib/x.wgsl"` (once each), `#if NAME` …
//! `#else` … `#endif` (nesting; `NAME` or `!NAME`), and constants, which are written before the
//! file as `const NAME: u32 = …;` so that no number stands both in Rust and in WGSL.

use std::collections::BTreeMap;

/// Bytes of immediates a kernel may take.
pub(super) const IMMEDIATE_BYTES: u32 = 64;

/// Every shader by its path under `shaders/`. Those under `lib/` are only included.
pub const SOURCES: &[(&str, &str)] = &[
    ("argmax.wgsl", include_str!("../../shaders/argmax.wgsl")),
    ("blocks.wgsl", include_str!("../../shaders/blocks.wgsl")),
    ("chunkkv.wgsl", include_str!("../../shaders/chunkkv.wgsl")),
    ("evict.wgsl", include_str!("../../shaders/evict.wgsl")),
    ("experts.wgsl", include_str!("../../shaders/experts.wgsl")),
    ("route.wgsl", include_str!("../../shaders/route.wgsl")),
    ("accumulate.wgsl", include_str!("../../shaders/accumulate.wgsl")),
    ("embed.wgsl", include_str!("../../shaders/embed.wgsl")),
    ("energy.wgsl", include_str!("../../shaders/energy.wgsl")),
    ("move_rows.wgsl", include_str!("../../shaders/move_rows.wgsl")),
    ("flash.wgsl", include_str!("../../shaders/flash.wgsl")),
    ("gather.wgsl", include_str!("../../shaders/gather.wgsl")),
    ("gram.wgsl", include_str!("../../shaders/gram.wgsl")),
    ("landmark.wgsl", include_str!("../../shaders/landmark.wgsl")),
    ("matmul.wgsl", include_str!("../../shaders/matmul.wgsl")),
    ("matvec.wgsl", include_str!("../../shaders/matvec.wgsl")),
    ("matvec_int8.wgsl", include_str!("../../shaders/matvec_int8.wgsl")),
    ("merge.wgsl", include_str!("../../shaders/merge.wgsl")),
    ("norm.wgsl", include_str!("../../shaders/norm.wgsl")),
    ("pack.wgsl", include_str!("../../shaders/pack.wgsl")),
    ("prepare.wgsl", include_str!("../../shaders/prepare.wgsl")),
    ("project.wgsl", include_str!("../../shaders/project.wgsl")),
    ("rebuild.wgsl", include_str!("../../shaders/rebuild.wgsl")),
    ("repeat.wgsl", include_str!("../../shaders/repeat.wgsl")),
    ("roofline.wgsl", include_str!("../../shaders/roofline.wgsl")),
    ("score.wgsl", include_str!("../../shaders/score.wgsl")),
    ("shadowkv.wgsl", include_str!("../../shaders/shadowkv.wgsl")),
    ("sketch.wgsl", include_str!("../../shaders/sketch.wgsl")),
    ("stripe.wgsl", include_str!("../../shaders/stripe.wgsl")),
    ("survey.wgsl", include_str!("../../shaders/survey.wgsl")),
    ("values.wgsl", include_str!("../../shaders/values.wgsl")),
    ("lib/activation.wgsl", include_str!("../../shaders/lib/activation.wgsl")),
    ("lib/columns.wgsl", include_str!("../../shaders/lib/columns.wgsl")),
    ("lib/finish.wgsl", include_str!("../../shaders/lib/finish.wgsl")),
    ("lib/half.wgsl", include_str!("../../shaders/lib/half.wgsl")),
    ("lib/highest.wgsl", include_str!("../../shaders/lib/highest.wgsl")),
    ("lib/lowest.wgsl", include_str!("../../shaders/lib/lowest.wgsl")),
    ("lib/mask.wgsl", include_str!("../../shaders/lib/mask.wgsl")),
    ("lib/moves.wgsl", include_str!("../../shaders/lib/moves.wgsl")),
    ("lib/nth.wgsl", include_str!("../../shaders/lib/nth.wgsl")),
    ("lib/product.wgsl", include_str!("../../shaders/lib/product.wgsl")),
    ("lib/reduce.wgsl", include_str!("../../shaders/lib/reduce.wgsl")),
    ("lib/ring.wgsl", include_str!("../../shaders/lib/ring.wgsl")),
    ("lib/rope.wgsl", include_str!("../../shaders/lib/rope.wgsl")),
    ("lib/rows.wgsl", include_str!("../../shaders/lib/rows.wgsl")),
    ("lib/trellis.wgsl", include_str!("../../shaders/lib/trellis.wgsl")),
    ("lib/unpack.wgsl", include_str!("../../shaders/lib/unpack.wgsl")),
    ("lib/weights.wgsl", include_str!("../../shaders/lib/weights.wgsl")),
];

/// One variant's text, with its includes and conditions resolved.
///
/// First the `enable` line, then constants, then the file.
///
/// # Errors
/// A sentence that names the line: an unknown file, an `#if` without `#endif`. Sources are fixed at
/// compile time, so a test that makes every variant keeps this from users.
pub fn preprocess(name: &str, flags: &[&str], constants: &BTreeMap<&'static str, u32>) -> Result<String, String> {
    let mut text = String::new();
    if flags.contains(&"F16") {
        text.push_str("enable f16;\n");
    }
    for (name, value) in constants {
        text.push_str(&format!("const {name}: u32 = {value}u;\n"));
    }
    include(name, flags, &mut Vec::new(), &mut text)?;
    Ok(text)
}

fn include(name: &str, flags: &[&str], seen: &mut Vec<String>, text: &mut String) -> Result<(), String> {
    if seen.iter().any(|s| s == name) {
        return Ok(());
    }
    seen.push(name.to_owned());
    let source = SOURCES.iter().find(|(n, _)| *n == name).ok_or_else(|| format!("no shader {name}"))?.1;
    // One entry per open `#if`: whether its current branch is kept.
    let mut open: Vec<bool> = Vec::new();
    for (number, line) in source.lines().enumerate() {
        let fault = |what: &str| format!("shaders/{name}:{}: {what}", number + 1);
        let mut words = line.split_whitespace();
        match words.next() {
            Some("#if") => {
                let flag = words.next().ok_or_else(|| fault("#if without a name"))?;
                open.push(match flag.strip_prefix('!') {
                    Some(flag) => !flags.contains(&flag),
                    None => flags.contains(&flag),
                });
            }
            Some("#else") => {
                let last = open.last_mut().ok_or_else(|| fault("#else without #if"))?;
                *last = !*last;
            }
            Some("#endif") => {
                open.pop().ok_or_else(|| fault("#endif without #if"))?;
            }
            _ if open.contains(&false) => {}
            Some("#include") => {
                let file = words.next().and_then(|w| w.strip_prefix('"')?.strip_suffix('"')).ok_or_else(|| fault("#include takes \"file\""))?;
                include(file, flags, seen, text)?;
            }
            Some(word) if word.starts_with('#') => return Err(fault(&format!("unknown directive {word}"))),
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    if open.is_empty() { Ok(()) } else { Err(format!("shaders/{name}: #if without #endif")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_files_are_refused() {
        assert!(preprocess("nonsense.wgsl", &[], &BTreeMap::new()).unwrap_err().contains("nonsense"));
    }

    #[test]
    fn constants_and_conditions() {
        let constants = BTreeMap::from([("WIDTH", 7)]);
        let with = preprocess("lib/half.wgsl", &["F16"], &constants).unwrap();
        let without = preprocess("lib/half.wgsl", &[], &constants).unwrap();
        assert!(with.starts_with("enable f16;\nconst WIDTH: u32 = 7u;\n"));
        assert!(!without.contains("f16>") && without.contains("unpack2x16float"));
        assert!(!with.contains('#') && !without.contains('#'));
    }
}
