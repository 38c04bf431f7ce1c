//! Constants of kernels that were measured on an adapter, in a file for each adapter and driver.
//!
//! The file holds only what differs from the built-in [`Tuning`]. Opening a device reads it, where
//! it is told of a directory; a file that cannot be used is left where it is, and the device says
//! why ([`Origin::Ignored`]).

use super::{Tier, Tuning};
use crate::task;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// What a measurement holds for: kernels of one tier, on one adapter with one version of its
/// driver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// The adapter's name.
    pub name: String,
    /// Its vendor's number.
    pub vendor: u32,
    /// The vendor's number for it.
    pub device: u32,
    /// The driver's name.
    pub driver: String,
    /// The driver's version.
    pub driver_version: String,
    /// Vulkan, Metal or Dx12.
    pub backend: String,
    /// What its kernels may use.
    pub tier: String,
}

impl Adapter {
    pub(super) fn of(info: &wgpu::AdapterInfo, tier: Tier) -> Adapter {
        Adapter {
            name: info.name.clone(),
            vendor: info.vendor,
            device: info.device,
            driver: info.driver.clone(),
            driver_version: info.driver_info.clone(),
            backend: format!("{:?}", info.backend),
            tier: tier.name().into(),
        }
    }

    /// The file of this adapter in `directory`: its name for people, and a digest of all that the
    /// measurement holds for.
    pub fn file(&self, directory: &Path) -> PathBuf {
        const LONGEST: usize = 40;
        let letter = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        let words: String = self.name.chars().take(LONGEST).map(letter).collect();
        let words = words.split('-').filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-");
        let all = format!("{self:?}");
        let digest: String = Sha256::digest(all).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        directory.join(format!("{words}-{digest}.json"))
    }
}

/// A constant that beats the built-in one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// The field of [`Tuning`].
    pub name: String,
    /// Its value.
    pub value: Value,
    /// How many times as fast the kernels are that it concerns.
    pub times: f64,
}

/// What was measured on an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// [`Tuned::FORMAT`].
    pub format: u32,
    /// Where it was measured.
    pub adapter: Adapter,
    /// The version of lowkey that measured.
    pub lowkey: String,
    /// When, in seconds since 1970.
    pub measured: u64,
    /// The shape of the model that was measured.
    pub shape: String,
    /// What is chosen otherwise than built in; the last ones were measured beside the first.
    pub choices: Vec<Choice>,
    /// Constants for which there was no time.
    pub unmeasured: Vec<String>,
}

impl Tuned {
    /// The format of the file, and of what its constants mean to the kernels: another one is not
    /// read.
    pub const FORMAT: u32 = 2;

    /// `own` with these choices.
    ///
    /// # Errors
    /// Which of them cannot be made, and why.
    pub fn over(&self, own: &Tuning) -> std::result::Result<Tuning, String> {
        self.choices.iter().try_fold(*own, |tuning, choice| tuning.with(&choice.name, &choice.value))
    }

    /// Writes it for its adapter into `directory`, which is made where there is none, in the place
    /// of what was measured before.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
        let path = self.adapter.file(directory);
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::io("write", &path)(e.into()))?;
        task::replace(&path, &(json + "\n"))?;
        Ok(path)
    }
}

/// Where a device's tuning is from.
#[derive(Debug, Clone, PartialEq)]
pub enum Origin {
    /// Built in: nothing was measured on this adapter, or nobody asked for it.
    BuiltIn,
    /// Measured on this adapter, with this driver.
    Tuned(Tuned),
    /// Built in, since the file of what was measured cannot be used.
    Ignored {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
}

/// The tuning of `adapter`, whose own is `own`.
pub(super) fn read(directory: &Path, adapter: &Adapter, own: &Tuning) -> (Tuning, Origin) {
    let path = adapter.file(directory);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return (*own, Origin::BuiltIn),
        Err(error) => return ignored(own, path, &format!("cannot be read: {error}")),
    };
    match parse(&text, adapter).and_then(|tuned| Ok((tuned.over(own)?, tuned))) {
        Ok((tuning, tuned)) => (tuning, Origin::Tuned(tuned)),
        Err(reason) => ignored(own, path, &reason),
    }
}

fn ignored(own: &Tuning, path: PathBuf, reason: &str) -> (Tuning, Origin) {
    let reason = format!("{reason}. Built-in kernel choices are used; `lowkey tune` measures anew, `lowkey tune --reset` removes the file");
    (*own, Origin::Ignored { path, reason })
}

/// What a file says, where it is about `adapter`.
fn parse(text: &str, adapter: &Adapter) -> std::result::Result<Tuned, String> {
    let damaged = |error: serde_json::Error| format!("is damaged: {error}");
    let value: Value = serde_json::from_str(text).map_err(damaged)?;
    match value.get("format").and_then(Value::as_u64) {
        Some(format) if format == u64::from(Tuned::FORMAT) => {}
        Some(format) => return Err(format!("is of format {format}, and this lowkey reads {}", Tuned::FORMAT)),
        None => return Err("is damaged: it has no format".into()),
    }
    let tuned: Tuned = serde_json::from_value(value).map_err(damaged)?;
    if tuned.adapter != *adapter {
        return Err(format!("is about {} ({} {})", tuned.adapter.name, tuned.adapter.driver, tuned.adapter.driver_version));
    }
    Ok(tuned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn adapter() -> Adapter {
        Adapter {
            name: "Some GPU (TM) 7".into(),
            vendor: 1,
            device: 2,
            driver: "driver".into(),
            driver_version: "1.0".into(),
            backend: "Vulkan".into(),
            tier: "f16".into(),
        }
    }

    fn tuned() -> Tuned {
        let choices = vec![Choice { name: "keys".into(), value: json!(256), times: 1.2 }];
        Tuned { format: Tuned::FORMAT, adapter: adapter(), lowkey: "0".into(), measured: 1, shape: "15m".into(), choices, unmeasured: vec![] }
    }

    #[test]
    fn a_file_is_for_one_adapter_and_driver() {
        let directory = tempfile::tempdir().unwrap();
        let (inside, own) = (directory.path().join("new"), Tuning::of(false));
        assert_eq!(read(&inside, &adapter(), &own), (own, Origin::BuiltIn));
        let path = tuned().write(&inside).unwrap();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("some-gpu-tm-7-"), "{path:?}");
        assert_eq!(read(&inside, &adapter(), &own), (Tuning { keys: 256, ..own }, Origin::Tuned(tuned())));
        let others = [
            Adapter { name: "Another".into(), ..adapter() },
            Adapter { vendor: 2, ..adapter() },
            Adapter { device: 3, ..adapter() },
            Adapter { driver: "another".into(), ..adapter() },
            Adapter { driver_version: "1.1".into(), ..adapter() },
            Adapter { backend: "Metal".into(), ..adapter() },
            Adapter { tier: "baseline".into(), ..adapter() },
        ];
        for other in others {
            assert_eq!(read(&inside, &other, &own), (own, Origin::BuiltIn), "{other:?}");
        }
        // Written once more it is the newer one.
        let newer = Tuned { measured: 2, choices: vec![], ..tuned() };
        newer.write(&inside).unwrap();
        assert_eq!(read(&inside, &adapter(), &own), (own, Origin::Tuned(newer)));
        assert_eq!(inside.read_dir().unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_used_is_ignored_and_says_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let (path, own) = (adapter().file(directory.path()), Tuning::of(true));
        let value = serde_json::to_value(tuned()).unwrap();
        let with = |pointer: &str, new: Value| {
            let mut value = value.clone();
            *value.pointer_mut(pointer).unwrap() = new;
            value.to_string()
        };
        let whole = value.to_string();
        for (text, why) in [
            (whole[..whole.len() / 2].to_string(), "damaged"),
            (String::new(), "damaged"),
            ("[]".into(), "no format"),
            (with("/format", json!(1)), "format 1, and this lowkey reads 2"),
            (with("/adapter/driver_version", json!("0.9")), "is about Some GPU (TM) 7 (driver 0.9)"),
            (with("/choices/0/name", json!("kees")), "no constant \"kees\""),
            (with("/choices/0/value", json!(100)), "no multiple"),
            (with("/choices", json!(7)), "damaged"),
        ] {
            std::fs::write(&path, &text).unwrap();
            let (tuning, Origin::Ignored { path: named, reason }) = read(directory.path(), &adapter(), &own) else { panic!("{text} was read") };
            assert!(tuning == own && named == path && reason.contains(why) && reason.contains("lowkey tune"), "{reason}");
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(read(directory.path(), &adapter(), &own).1, Origin::Ignored { reason, .. } if reason.contains("cannot be read")));
    }
}
