//! How many loads a kernel keeps in flight, read from its machine code.
//!
//! A load of a buffer is in flight from where it is issued to the `s_waitcnt vmcnt(n)` that leaves
//! fewer: loads come back in order, and that one waits until at most `n` of them are out. Bandwidth
//! is what is in flight over the latency of memory, so a loop that waits for each load alone is
//! slow however wide the device.

use std::collections::VecDeque;
use std::ops::Range;

/// Loads in flight at one time, and their bytes by lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loads {
    pub count: usize,
    pub bytes: usize,
}

impl std::fmt::Display for Loads {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ({} B)", self.count, self.bytes)
    }
}

/// The most loads in flight anywhere, and in each innermost loop that loads, in the order of the
/// text: there a kernel spends its time. The text is followed from top to bottom past its branches,
/// a loop twice, since what one round leaves in flight the next one has too.
pub fn in_flight(assembly: &str) -> (Loads, Vec<Loads>) {
    let lines: Vec<&str> = assembly.lines().map(|line| line.split(';').next().unwrap_or_default().trim()).collect();
    let loops = loops(&lines);
    let within = |span: &Range<usize>| walk(lines[span.clone()].iter().chain(&lines[span.clone()]));
    let holds = |outer: &Range<usize>, inner: &Range<usize>| outer.start < inner.start && inner.end <= outer.end;
    let innermost = loops.iter().filter(|outer| !loops.iter().any(|inner| holds(outer, inner)));
    let most = loops.iter().map(within).chain([walk(lines.iter())]).max().unwrap_or_default();
    (most, innermost.map(within).filter(|loads| loads.count > 0).collect())
}

/// The loops: from a label to the last branch back to it.
fn loops(lines: &[&str]) -> Vec<Range<usize>> {
    let end = |label: &str, start: usize| {
        let back =
            |line: &&str| line.split_once(' ').is_some_and(|(name, to)| name.starts_with("s_") && name.contains("branch") && to.trim() == label);
        lines[start..].iter().rposition(back).map(|last| start..start + last + 1)
    };
    lines.iter().enumerate().filter_map(|(start, line)| end(line.strip_suffix(':')?, start)).collect()
}

fn walk<'a>(lines: impl Iterator<Item = &'a &'a str>) -> Loads {
    let (mut flying, mut most) = (VecDeque::new(), Loads::default());
    for line in lines {
        let name = line.split(' ').next().unwrap_or_default();
        if ["buffer_load_", "global_load_", "flat_load_"].iter().any(|load| name.starts_with(load)) {
            flying.push_back(bytes(name));
            most = most.max(Loads { count: flying.len(), bytes: flying.iter().sum() });
        } else if let Some((_, left)) = line.split_once("vmcnt(") {
            let left: usize = left.split(')').next().and_then(|left| left.parse().ok()).unwrap_or_else(|| panic!("{line}: how many?"));
            flying.drain(..flying.len().saturating_sub(left));
        }
    }
    most
}

/// `buffer_load_b128`: 16.
fn bytes(load: &str) -> usize {
    let bits = load.rsplit('_').next().and_then(|width| width.get(1..)?.parse::<usize>().ok());
    bits.unwrap_or_else(|| panic!("{load}: how wide?")) / 8
}

#[test]
fn loads_are_in_flight_until_they_are_waited_for() {
    // Two rounds of three loads, of which the last stays out; an outer loop of loops, one of which
    // waits for each load; code without a loop.
    let assembly = "
BB0:
	s_load_b128 s[16:19], s[2:3], 0x20                          ; f4080401 f8000020
	s_buffer_load_b256 s[16:23], s[16:19], s14                  ; f42c0408 1c000000
	s_cbranch_scc0 BB7                                          ; bfa10208
BB1:
	s_mov_b32 s3, 0                                             ; b0038000
BB2:
	buffer_load_b128 v[8:11], v7, s[24:27], 0 offen             ; e05c0000 80460807
	buffer_load_b64 v[20:21], v16, s[20:23], 0 offen            ; e0540000 80451410
	s_waitcnt vmcnt(1) lgkmcnt(0)                               ; bf8917f7
	global_load_u8 v2, v1, s[0:1]                               ; dc420000 02000001
	s_waitcnt lgkmcnt(0)                                        ; bf89fc07
	s_cbranch_scc1 BB2                                          ; bfa2000f
BB3:
	s_waitcnt vmcnt(0)                                          ; bf8903f7
	s_branch BB5                                                ; bfa00001
BB4:
	s_cbranch_execz BB4                                         ; bfa5001f
BB5:
	buffer_load_b32 v5, v5, s[32:35], 0 offen                   ; e0500000 80480505
	s_waitcnt vmcnt(0)                                          ; bf8903f7
	s_cbranch_scc0 BB5                                          ; bfa1000d
BB6:
	buffer_store_b32 v2, off, s[20:23], s10                     ; e0680000 0a050280
	s_cbranch_scc0 BB1                                          ; bfa1000d
BB7:
	buffer_load_b96 v[0:2], v5, s[32:35], 0 offen               ; e0500000 80480505
	s_endpgm                                                    ; bfb00000
";
    let [most, slow] = [Loads { count: 4, bytes: 33 }, Loads { count: 1, bytes: 4 }];
    assert_eq!(in_flight(assembly), (most, vec![most, slow]));
    assert_eq!(in_flight("\ts_endpgm"), Default::default());
}
