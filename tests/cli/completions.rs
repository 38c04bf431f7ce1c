//! `lowkey completions`.

use super::*;

#[test]
fn every_shell_completes_every_command() {
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(commands.len() >= 11 && commands.contains(&"chat"), "{commands:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&["completions", shell]);
        assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
        let script = String::from_utf8(output.stdout).unwrap();
        for word in commands.iter().copied().chain(["max-tokens", "calibration-window"]) {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
        assert_eq!(done(&["completions", shell])["script"], script);
    }
    let (kind, message, code) = failed(&["completions", "tcsh"]);
    assert_eq!((kind.as_str(), code), ("usage", 2));
    assert!(message.contains("elvish"), "{message}");
}

#[test]
fn bash_takes_its_script() {
    let Ok(mut shell) = Command::new("bash").args(["--norc", "-n"]).stdin(Stdio::piped()).spawn() else { return };
    std::io::Write::write_all(&mut shell.stdin.take().unwrap(), &run(&["completions", "bash"]).stdout).unwrap();
    assert!(shell.wait().unwrap().success());
}
