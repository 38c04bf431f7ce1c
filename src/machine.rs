//! What the machine that runs this has.

/// Bytes of main memory that programs can have without others losing theirs; `None` where the
/// system does not say.
pub fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    Some(system.available_memory()).filter(|bytes| *bytes > 0)
}
