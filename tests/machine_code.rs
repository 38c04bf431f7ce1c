//! What Mesa's compiler makes of the kernels that run most, on an AMD card that need not be there:
//! registers, spills, waves and loads in flight.
//!
//! `MACHINE_CODE=folder cargo test --test machine_code` leaves the table and every kernel's
//! assembly in a folder.

mod radv;

use lowkey::kernels::{Hot, hot_variants};
use radv::{Code, Radv, assembly};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What no hot kernel may have any of.
const NONE: [&str; 3] = ["Spilled VGPRs", "Spilled SGPRs", "Scratch size"];

/// For how many waves a SIMD has room.
const ROOM: &str = "Subgroups per SIMD";

/// How many that must be at least. A wave of 64 lanes counts as two of 32, and 32 of these are the
/// most; with fewer than a quarter of them nothing runs while memory is waited for.
const WAVES: u64 = 8;

/// The folder for what a process that compiles has to say: the driver reads its environment once,
/// so that process is another one.
const INTO: &str = "MACHINE_CODE_INTO";

/// How a process ends whose test has failed.
const FAILED: i32 = 101;

#[test]
fn hot_kernels_leave_room_for_waves() {
    if let Some(into) = std::env::var_os(INTO) {
        return compile(Path::new(&into));
    }
    let manifests = radv::manifests();
    if manifests.is_empty() {
        return skip("Mesa's RADV is not installed");
    }
    let temporary = tempfile::tempdir().unwrap();
    let into = std::env::var_os("MACHINE_CODE").map_or(temporary.path().into(), PathBuf::from);
    let table = into.join("table.md");
    std::fs::create_dir_all(&into).unwrap();
    std::fs::write(&table, "").unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["hot_kernels_leave_room_for_waves", "--exact", "--nocapture"]).env(INTO, &into);
    radv::environment(&mut command, &manifests);
    let output = command.output().unwrap();
    let (text, said) = (std::fs::read_to_string(table).unwrap(), String::from_utf8_lossy(&output.stderr));
    // An RADV that does not know the family ends the process.
    if text.is_empty() && output.status.code() != Some(FAILED) {
        return skip(&format!("RADV makes no null device here: {}", said.trim()));
    }
    println!("{text}");
    assert!(output.status.success(), "{said}");
}

/// Says so past the harness, which keeps to itself what a test prints.
fn skip(reason: &str) {
    std::io::stderr().write_all(format!("skipped, {reason}\n").as_bytes()).unwrap();
}

/// Writes `table.md` and the assembly of every kernel, then judges.
fn compile(into: &Path) {
    let table = into.join("table.md");
    let radv = match Radv::open() {
        Ok(radv) => radv,
        Err(reason) => return eprintln!("{reason}"),
    };
    std::fs::write(&table, format!("{}\n", radv.driver)).unwrap();
    let compiled = |hot: Hot| (radv.compile(&hot.spec), hot);
    let all: Vec<(Code, Hot)> = hot_variants(radv.subgroups).into_iter().map(compiled).collect();
    std::fs::write(table, markdown(&radv, &all)).unwrap();
    for (code, hot) in &all {
        std::fs::write(into.join(hot.name.replace(", ", "-").replace(' ', "-") + ".s"), &code.assembly).unwrap();
    }
    let faults: Vec<String> = all.iter().flat_map(|(code, hot)| faults(hot, code)).collect();
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn faults(Hot { name, .. }: &Hot, code: &Code) -> Vec<String> {
    let waves = code.number(ROOM);
    let few = (waves < WAVES).then(|| format!("{name}: room for {waves} waves, not for {WAVES}"));
    let spills = NONE.into_iter().filter(|what| code.number(what) > 0).map(|what| format!("{name}: {what} {}", code.number(what)));
    spills.chain(few).collect()
}

fn markdown(radv: &Radv, all: &[(Code, Hot)]) -> String {
    let mut table = format!("{}:\n\n", radv.driver);
    let columns = "| kernel | VGPRs | SGPRs | LDS, bytes | lanes of a wave | waves per SIMD | spills, scratch | instructions | latency | loads in flight | in inner loops |";
    writeln!(table, "{columns}\n{}|", "|---".repeat(11)).unwrap();
    for (code, Hot { name, .. }) in all {
        let number = |name| code.number(name);
        let numbers = ["VGPRs", "SGPRs", "LDS size"].map(number).into_iter().chain([code.wave.into(), number(ROOM), NONE.map(number).iter().sum()]);
        let numbers = numbers.chain(["Instructions", "Latency"].map(number)).map(|number| number.to_string());
        let (most, loops) = assembly::in_flight(&code.assembly);
        let loops = loops.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let cells = numbers.chain([most.to_string(), loops]).collect::<Vec<_>>().join(" | ");
        writeln!(table, "| {name} | {cells} |").unwrap();
    }
    table
}
