//! A terminal that a command runs on, and the hands of who sits there.

use super::lowkey;
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A command on a terminal of its own.
pub struct Terminal {
    child: Child,
    keys: File,
    shown: Arc<Mutex<String>>,
    /// How much of it has been looked at.
    seen: usize,
}

impl Terminal {
    /// Starts `lowkey` with what `more` adds to it.
    pub fn start(more: impl FnOnce(&mut Command) -> &mut Command) -> Terminal {
        let size = Winsize { ws_row: 40, ws_col: 500, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).unwrap();
        let mut command = lowkey();
        more(command.env("TERM", "xterm"));
        let side = || File::from(pty.slave.try_clone().unwrap());
        let child = command.stdin(side()).stdout(side()).stderr(side()).spawn().unwrap();
        drop(command);
        drop(pty.slave);
        let keys = File::from(pty.master);
        let (mut screen, shown) = (keys.try_clone().unwrap(), Arc::new(Mutex::new(String::new())));
        let sink = shown.clone();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            // It ends with an error when the command has gone.
            while let Ok(count @ 1..) = screen.read(&mut piece) {
                *sink.lock().unwrap() += &String::from_utf8_lossy(&piece[..count]);
            }
        });
        Terminal { child, keys, shown, seen: 0 }
    }

    /// Presses keys: `\r` is Enter, `\x03` Ctrl-C, `\x04` Ctrl-D.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until this is shown, after what was waited for before.
    pub fn expect(&mut self, text: &str) {
        let start = Instant::now();
        loop {
            let shown = self.shown.lock().unwrap().clone();
            if let Some(place) = shown[self.seen..].find(text) {
                self.seen += place + text.len();
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no {text:?} after byte {} of {shown:?}", self.seen);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends the signal that a terminal makes of Ctrl-C while a command works.
    pub fn interrupt(&self) {
        let killed = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        assert!(killed.unwrap().success());
    }

    /// Waits for the command's end: its exit code.
    pub fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}
