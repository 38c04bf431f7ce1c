//! The house as it is built is the house as it is drawn: which room may know which, held against
//! the `use` lines, and no circle of files within a room.
//!
//! docs/architecture.md says what each room is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Rooms from the ground up, and the rooms that each may know: all of them stand before it.
const ROOMS: [(&str, &str); 23] = [
    ("error", ""),
    ("machine", ""),
    ("task", ""),
    ("chart", ""),
    ("linalg", ""),
    ("logits", "linalg"),
    ("kv", "linalg"),
    ("pull", "task"),
    ("checkpoint", "kv pull"),
    ("local", "pull checkpoint"),
    ("sequence", "task logits kv"),
    ("gpu", "task"),
    ("kernels", "kv gpu"),
    ("cache", "kv gpu kernels"),
    ("cpu", "task linalg logits kv checkpoint sequence"),
    ("decoder", "task linalg kv checkpoint sequence gpu kernels cache"),
    ("calibrate", "task linalg logits kv checkpoint sequence cpu"),
    ("compress", "machine task linalg kv checkpoint calibrate"),
    ("session", "task logits kv checkpoint sequence"),
    ("eval", "task chart linalg logits kv checkpoint sequence"),
    ("bench", "task chart linalg kv checkpoint sequence gpu kernels decoder compress"),
    ("model", "machine task kv checkpoint sequence gpu cpu decoder compress session bench"),
    ("lib", "error machine checkpoint model session"),
];

/// A source file: its room, its name in it, and its text up to the tests, without comments.
struct Source {
    room: String,
    file: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut found, mut left) = (Vec::new(), vec![root.clone()]);
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
                continue;
            }
            let inside = path.strip_prefix(&root).unwrap().with_extension("").to_str().unwrap().replace('\\', "/");
            let (room, file) = inside.split_once('/').unwrap_or((&inside, "mod"));
            let text = fs::read_to_string(&path).unwrap();
            let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
            let text = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
            found.push(Source { room: room.into(), file: file.into(), text });
        }
    }
    found
}

/// What follows `prefix` in `text`: paths, where those in braces are one each.
fn paths(text: &str, prefix: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(prefix) {
        if text[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':') {
            continue;
        }
        let rest = &text[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            found.push(rest.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).next().unwrap().to_string());
            continue;
        };
        let (mut depth, mut one) = (0, String::new());
        for c in group.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => found.push(std::mem::take(&mut one)),
                _ => {
                    depth += i32::from(c == '{') - i32::from(c == '}');
                    one.push(c);
                }
            }
        }
        found.push(one);
    }
    found.into_iter().map(|path| path.trim().to_string()).filter(|path| !path.is_empty()).collect()
}

fn first(path: &str) -> &str {
    path.split("::").next().unwrap()
}

#[test]
fn rooms_know_only_what_stands_below_them() {
    let order: Vec<&str> = ROOMS.iter().map(|(room, _)| *room).collect();
    for (index, (room, known)) in ROOMS.iter().enumerate().filter(|(_, (room, _))| *room != "lib") {
        assert!(known.split_whitespace().all(|known| order[..index].contains(&known)), "{room} stands on what stands above it");
    }
    let mut unused: BTreeSet<(&str, &str)> =
        ROOMS.iter().flat_map(|(room, known)| known.split_whitespace().map(move |known| (*room, known))).collect();
    for Source { room, file, text } in sources().iter().filter(|source| !["main", "cli"].contains(&source.room.as_str())) {
        let Some((name, known)) = ROOMS.iter().find(|(name, _)| name == room) else { panic!("src/{room} is in no room of the table") };
        for path in paths(text, "crate::") {
            let other = first(&path);
            // Errors are everybody's.
            if other == room || ["Error", "Result", "error"].contains(&other) {
                continue;
            }
            assert!(known.split_whitespace().any(|known| known == other), "src/{room}/{file}.rs knows {other}, which {room} is not to know: {path}");
            unused.retain(|edge| *edge != (*name, other));
        }
    }
    unused.retain(|(room, _)| *room != "lib");
    assert!(unused.is_empty(), "nothing needs these edges: {unused:?}");
}

#[test]
fn no_files_of_a_room_stand_in_a_circle() {
    let sources = sources();
    let rooms: BTreeSet<&str> = sources.iter().map(|source| source.room.as_str()).collect();
    for room in rooms {
        let files: Vec<&Source> = sources.iter().filter(|source| source.room == room).collect();
        let names: BTreeSet<&str> = files.iter().map(|source| source.file.as_str()).collect();
        let mut knows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for source in files.iter().filter(|source| !source.file.ends_with("mod")) {
            // In a room within a room, names are those of its own files first.
            let inner = source.file.rsplit_once('/').map_or(String::new(), |(inner, _)| format!("{inner}/"));
            for path in paths(&source.text, "super::").into_iter().chain(paths(&source.text, &format!("crate::{room}::"))) {
                let candidates = [format!("{inner}{}", first(&path)), first(&path).to_string()];
                if let Some(known) = candidates.iter().find_map(|name| names.get(name.as_str())).filter(|known| **known != source.file) {
                    knows.entry(&source.file).or_default().insert(known);
                }
            }
        }
        // What knows nothing that is left stands on the ground; what never gets there is in a
        // circle.
        let mut left = knows.clone();
        while let Some(ground) = left.iter().find(|(_, known)| known.iter().all(|known| !left.contains_key(known))).map(|(file, _)| *file) {
            left.remove(ground);
        }
        assert!(left.is_empty(), "a circle in src/{room}, among {:?}", left.keys());
    }
}

#[test]
fn paths_are_found_as_they_are_written() {
    let text = "use crate::{Error, rows::{A, B}};\nuse crate::gpu::{Device, pad};\nfn f(x: &crate::cpu::Model, y: mycrate::z) {}";
    assert_eq!(paths(text, "crate::"), ["Error", "rows::{A, B}", "gpu::", "cpu::Model"]);
}

/// Source files of the crate, its shaders, tests and examples.
fn texts(directories: &[&str]) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut left: Vec<_> = directories.iter().map(|name| root.join(name)).collect();
    let mut found = Vec::new();
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                left.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs" || extension == "wgsl") {
                found.push((path.strip_prefix(root).unwrap().display().to_string(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found
}

#[test]
fn comments_are_narrow() {
    for (name, text) in texts(&["src", "shaders", "tests", "examples"]) {
        for (number, line) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//")) {
            // A row of a table is one line.
            let is_row = line.trim_start().trim_start_matches(['/', '!']).trim_start().starts_with('|');
            assert!(is_row || line.chars().count() <= 100, "{name}:{}: a comment over 100 columns", number + 1);
        }
    }
}

/// A file that is longer than 400 lines says why in its first lines.
#[test]
fn files_are_short() {
    for (name, text) in texts(&["src"]) {
        let says_why = text.lines().take(20).any(|line| line.starts_with("//!") && line.contains("In one file"));
        assert!(says_why || text.lines().count() <= 400, "{name} has {} lines", text.lines().count());
    }
}
