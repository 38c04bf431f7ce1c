//! The file of a saved session, `NAME.session`: stores of numbers by name, checked as a whole.
//!
//! It is a safetensors file. Its `__metadata__` has one entry, `lowkey_session`: a JSON object that
//! begins with the version of the format and says of every store what it holds. A store is written
//! as it is, or [*packed*](super::packing): then its tensor is bytes (`U8`). The last tensor,
//! `checksum`, is the SHA-256 of all that stands before it in the file.

use super::packing::{pack, unpack};
use crate::{Error, Result};
use bytemuck::{AnyBitPattern, NoUninit};
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

/// The key of the metadata.
const KEY: &str = "lowkey_session";
const CHECKSUM: &str = "checksum";
/// Bytes of a checksum.
const DIGEST: usize = 32;
/// The safetensors format's own bound on the header.
const MOST_HEADER: u64 = 100_000_000;

/// The version that is written and read by this release.
pub(super) const FORMAT: u64 = 1;

/// Numbers that a store can hold.
pub(super) trait Number: NoUninit + AnyBitPattern + Send + Sync {
    /// What safetensors call them.
    const TYPE: &str;
}

impl Number for half::f16 {
    const TYPE: &str = "F16";
}
impl Number for f32 {
    const TYPE: &str = "F32";
}
impl Number for u32 {
    const TYPE: &str = "U32";
}
impl Number for i32 {
    const TYPE: &str = "I32";
}
impl Number for i64 {
    const TYPE: &str = "I64";
}

/// What the header says of a store.
#[derive(Debug, Serialize, Deserialize)]
struct StoreHead {
    name: String,
    /// The type of its numbers, and `[rows, numbers of a row]`.
    dtype: String,
    shape: [usize; 2],
    packed: bool,
}

impl StoreHead {
    /// Bytes of a number; none for a type that is not known.
    fn number(&self) -> usize {
        match self.dtype.as_str() {
            "F16" => 2,
            "F32" | "U32" | "I32" => 4,
            "I64" => 8,
            _ => 0,
        }
    }

    /// Bytes of its numbers, and of a row; `None` for a type that is not known.
    fn size(&self) -> Option<[usize; 2]> {
        let each = Some(self.number()).filter(|each| *each > 0)?;
        let row = self.shape[1].checked_mul(each)?;
        Some([row.checked_mul(self.shape[0])?, row])
    }

    /// What is `stored` of it; `None` where that is something else.
    fn numbers(&self, stored: &[u8]) -> Option<Numbers> {
        let [bytes, row] = self.size()?;
        let bytes = match self.packed {
            true => unpack(stored, bytes, row, self.number())?,
            false => (stored.len() == bytes).then(|| stored.to_vec())?,
        };
        Some(Numbers { dtype: self.dtype.clone(), bytes })
    }
}

/// The header's object: what a program keeps, `H`, and the stores.
#[derive(Serialize, Deserialize)]
struct Head<H> {
    format: u64,
    #[serde(flatten)]
    own: H,
    stores: Vec<StoreHead>,
}

/// Stores on their way into a file.
#[derive(Default)]
pub(super) struct Writer<'a> {
    stores: Vec<(StoreHead, &'a [u8])>,
}

impl<'a> Writer<'a> {
    /// Adds numbers in `rows` rows; none where there are no numbers.
    pub fn add<T: Number>(&mut self, name: impl Into<String>, rows: usize, numbers: &'a [T]) {
        if numbers.is_empty() {
            return;
        }
        let shape = [rows, numbers.len() / rows.max(1)];
        let head = StoreHead { name: name.into(), dtype: T::TYPE.into(), shape, packed: false };
        self.stores.push((head, bytemuck::cast_slice(numbers)));
    }

    /// All of the file, with `own` in its header.
    ///
    /// # Errors
    /// [`Error::Session`] where that cannot be written as JSON.
    pub fn finish<H: Serialize>(self, own: H, path: &Path) -> Result<Vec<u8>> {
        let written: Vec<(StoreHead, std::borrow::Cow<[u8]>)> = self
            .stores
            .into_par_iter()
            .map(|(head, bytes)| match pack(bytes, head.shape[0], head.number()) {
                Some(packed) => (StoreHead { packed: true, ..head }, packed.into()),
                None => (head, bytes.into()),
            })
            .collect();
        let (stores, parts): (Vec<_>, Vec<_>) = written.into_iter().unzip();
        let failed = |error: serde_json::Error| Error::Session { path: path.into(), message: format!("cannot be written: {error}") };
        let head = Head { format: FORMAT, own, stores };
        let text = serde_json::to_string(&head).map_err(failed)?;
        let (mut entries, mut at) = (Map::from_iter([("__metadata__".to_string(), json!({ KEY: text }))]), 0);
        let mut entry = |name: &str, dtype: &str, shape: &[usize], bytes: usize| {
            entries.insert(name.into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes] }));
            at += bytes;
        };
        for (head, bytes) in head.stores.iter().zip(&parts) {
            match head.packed {
                true => entry(&head.name, "U8", &[bytes.len()], bytes.len()),
                false => entry(&head.name, &head.dtype, &head.shape, bytes.len()),
            }
        }
        entry(CHECKSUM, "U8", &[DIGEST], DIGEST);
        let mut header = serde_json::to_vec(&entries).map_err(failed)?;
        // Tensors begin at a multiple of eight, as other readers want it.
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = Vec::with_capacity(8 + header.len() + parts.iter().map(|part| part.len()).sum::<usize>() + DIGEST);
        file.extend_from_slice(&(header.len() as u64).to_le_bytes());
        file.extend_from_slice(&header);
        parts.iter().for_each(|part| file.extend_from_slice(part));
        let checksum = Sha256::digest(&file);
        file.extend_from_slice(&checksum);
        Ok(file)
    }
}

/// A file that has been read, and is not yet known to be whole.
pub(super) struct Container<'a, H> {
    path: &'a Path,
    bytes: &'a [u8],
    /// What the program keeps in the header.
    pub own: H,
    stores: Vec<StoreHead>,
    /// Where tensors stand in the file.
    places: BTreeMap<String, Range<usize>>,
}

impl<'a, H: DeserializeOwned + Sync> Container<'a, H> {
    /// Reads the header of `bytes`, all of the file at `path`.
    ///
    /// # Errors
    /// [`Error::Session`] where it is no such file, of another version, or damaged.
    pub fn open(path: &'a Path, bytes: &'a [u8]) -> Result<Container<'a, H>> {
        Container::parse(path, bytes, bytes.len())
    }

    /// The header of the file at `path`, which nobody has verified, and the numbers of one store,
    /// without reading the rest.
    ///
    /// # Errors
    /// As [`open`](Self::open), and those of reading.
    pub fn peek<T: Number>(path: &Path, name: &str) -> Result<(H, Vec<T>)> {
        let io = || Error::io("read", path);
        let mut file = File::open(path).map_err(io())?;
        let length = file.metadata().map_err(io())?.len();
        let mut bytes = vec![0; 8];
        file.read_exact(&mut bytes).map_err(io())?;
        let header = bytes.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let header = header.min(MOST_HEADER).min(length.saturating_sub(8));
        (&file).take(header).read_to_end(&mut bytes).map_err(io())?;
        let container: Container<H> = Container::parse(path, &bytes, usize::try_from(length).unwrap_or(usize::MAX))?;
        let Some(head) = container.stores.iter().find(|head| head.name == name) else { return Ok((container.own, Vec::new())) };
        let place = container.places.get(name).ok_or_else(|| container.damaged(head))?;
        let mut stored = Vec::new();
        file.seek(SeekFrom::Start(place.start as u64)).map_err(io())?;
        file.take(place.len() as u64).read_to_end(&mut stored).map_err(io())?;
        let numbers = head.numbers(&stored).filter(|numbers| numbers.dtype == T::TYPE).ok_or_else(|| container.damaged(head))?;
        Ok((container.own, bytemuck::pod_collect_to_vec(&numbers.bytes)))
    }

    /// `bytes`: the beginning of a file of `length` bytes, with its header.
    fn parse(path: &'a Path, bytes: &'a [u8], length: usize) -> Result<Container<'a, H>> {
        let bad = |message: String| Error::Session { path: path.into(), message };
        let none = || bad("is no session that lowkey has saved".into());
        let (header, rest) = bytes.split_first_chunk::<8>().ok_or_else(none)?;
        let header = u64::from_le_bytes(*header);
        if header > MOST_HEADER {
            return Err(none());
        }
        if header > rest.len() as u64 {
            return Err(bad("is cut short; save it again".into()));
        }
        let (header, start) = (&rest[..header as usize], 8 + header as usize);
        let entries: Map<String, Value> = serde_json::from_slice(header).map_err(|_| none())?;
        let text = entries.get("__metadata__").and_then(|metadata| metadata[KEY].as_str()).ok_or_else(none)?;
        let damaged = |error: serde_json::Error| bad(format!("is damaged: its header cannot be read: {error}"));
        // The version comes first: a later format may well differ in everything else.
        let value: Value = serde_json::from_str(text).map_err(damaged)?;
        match value["format"].as_u64() {
            Some(FORMAT) => {}
            Some(format) => return Err(bad(format!("is of format {format}, and this release reads {FORMAT}; save it again with this release"))),
            None => return Err(bad("is damaged: its header has no version".into())),
        }
        let Head { format: _, own, stores } = Head::<H>::deserialize(value).map_err(damaged)?;
        let (mut places, data) = (BTreeMap::new(), length.saturating_sub(start));
        for (name, entry) in entries.into_iter().filter(|(name, _)| name != "__metadata__") {
            let offset = |index: usize| entry["data_offsets"][index].as_u64().and_then(|offset| usize::try_from(offset).ok());
            let range = offset(0).zip(offset(1)).filter(|(from, to)| from <= to);
            let (from, to) = range.ok_or_else(|| bad(format!("is damaged: {name} stands nowhere")))?;
            if to > data {
                return Err(bad(format!("is cut short: {name} ends {} bytes behind its end; save it again", to - data)));
            }
            places.insert(name, start + from..start + to);
        }
        Ok(Container { path, bytes, own, stores, places })
    }

    fn damaged(&self, head: &StoreHead) -> Error {
        self.bad(format!("is damaged: {} is not what its header says", head.name))
    }

    fn bad(&self, message: String) -> Error {
        Error::Session { path: self.path.into(), message }
    }

    /// Checks every byte of the file.
    ///
    /// # Errors
    /// [`Error::Session`] where one is another than was written.
    pub fn verify(&self) -> Result<()> {
        let last = self.bytes.len().saturating_sub(DIGEST);
        let there = self.places.get(CHECKSUM) == Some(&(last..self.bytes.len()));
        if there && Sha256::digest(&self.bytes[..last])[..] == self.bytes[last..] {
            return Ok(());
        }
        Err(self.bad("is damaged: its checksum is another; save it again".into()))
    }

    /// Takes all stores out, which may be `most` bytes.
    ///
    /// # Errors
    /// [`Error::Session`] where they are more, or one is not what the header says.
    pub fn stores(&self, most: u64) -> Result<Stores<'a>> {
        let mut left = most;
        for head in &self.stores {
            let bytes = head.size().and_then(|[bytes, _]| u64::try_from(bytes).ok());
            left = bytes.and_then(|bytes| left.checked_sub(bytes)).ok_or_else(|| {
                self.bad(format!("holds more than a session of this model and context can ({most} bytes); open it with a larger --context"))
            })?;
        }
        let take = |head: &StoreHead| -> Result<(String, Numbers)> {
            let place = self.places.get(&head.name).ok_or_else(|| self.damaged(head))?;
            let numbers = head.numbers(&self.bytes[place.clone()]).ok_or_else(|| self.damaged(head))?;
            Ok((head.name.clone(), numbers))
        };
        let stores: BTreeMap<String, Numbers> = self.stores.par_iter().map(take).collect::<Result<_>>()?;
        if stores.len() != self.stores.len() || self.places.len() != stores.len() + 1 {
            return Err(self.bad("is damaged: a store is there twice, or not in its header".into()));
        }
        Ok(Stores { path: self.path, stores })
    }
}

/// A store's numbers.
struct Numbers {
    dtype: String,
    bytes: Vec<u8>,
}

/// Stores on their way out of a file.
pub(super) struct Stores<'a> {
    path: &'a Path,
    stores: BTreeMap<String, Numbers>,
}

impl Stores<'_> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.stores.len()
    }

    /// The numbers of one; none where it is not there.
    ///
    /// # Errors
    /// [`Error::Session`] where they are of another type.
    pub fn take<T: Number>(&mut self, name: &str) -> Result<Vec<T>> {
        let Some(Numbers { dtype, bytes }) = self.stores.remove(name) else { return Ok(Vec::new()) };
        if dtype != T::TYPE {
            return Err(Error::Session { path: self.path.into(), message: format!("has {name} in {dtype}, where {} belongs", T::TYPE) });
        }
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// Ends it.
    ///
    /// # Errors
    /// [`Error::Session`] where something is left that nobody has taken.
    pub fn finish(self) -> Result<()> {
        match self.stores.keys().next() {
            None => Ok(()),
            Some(name) => Err(Error::Session { path: self.path.into(), message: format!("has a store {name:?}, which this release does not know") }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(note: &str) -> Vec<u8> {
        let numbers: Vec<u32> = (0..400).collect();
        let noise: Vec<u32> = (0..100u32).map(|i| i.wrapping_mul(0x9e37_79b9).rotate_left(i)).collect();
        let mut writer = Writer::default();
        writer.add("a", 100, &numbers);
        writer.add("b", 10, &noise);
        writer.add::<u32>("nothing", 7, &[]);
        writer.add("c", 1, &[1.5f32]);
        writer.finish(json!({ "note": note }), Path::new("x")).unwrap()
    }

    /// What the header keeps, and the three stores.
    type Read = (Value, Vec<u32>, Vec<u32>, Vec<f32>);

    fn read(bytes: &[u8], most: u64) -> Result<Read> {
        let container: Container<Value> = Container::open(Path::new("x"), bytes)?;
        container.verify()?;
        let mut stores = container.stores(most)?;
        let found = (container.own.clone(), stores.take("a")?, stores.take("b")?, stores.take("c")?);
        assert!(stores.take::<u32>("nothing")?.is_empty());
        stores.finish()?;
        Ok(found)
    }

    #[test]
    fn stores_come_back_as_they_were() {
        let file = file("hello");
        let (own, a, b, c) = read(&file, 1 << 20).unwrap();
        assert_eq!((own["note"].as_str(), a, c), (Some("hello"), (0..400).collect(), vec![1.5]));
        assert_eq!(b.len(), 100);
        // Others can read it, too.
        let (_, header) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(header.tensors().len(), 4);
    }

    /// Wherever a byte is flipped or the file is cut, it is refused; and nothing panics.
    #[test]
    fn any_damage_is_refused() {
        let file = file("hello");
        for at in 0..file.len() {
            for bit in [0, 5] {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                assert!(matches!(read(&damaged, 1 << 20), Err(Error::Session { .. })), "byte {at}");
            }
            assert!(matches!(read(&file[..at], 1 << 20), Err(Error::Session { .. })), "cut at {at}");
        }
        assert!(matches!(read(&file, 400), Err(Error::Session { message, .. }) if message.contains("more than")));
        let text = String::from_utf8_lossy(&file).into_owned();
        assert!(text.contains(r#"\"format\":1"#));
    }
}
