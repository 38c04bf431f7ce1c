//! `strftime_now`: Python's `datetime.now().strftime(format)`, which is glibc's in the C locale, of
//! the local time.

use jiff::Zoned;
use jiff::fmt::strtime::{BrokenDownTime, Config};
use std::iter::Peekable;
use std::str::Chars;

/// The time as `format` says. A directive that there is not stays as it is.
pub(super) fn strftime(format: &str, time: &Zoned) -> String {
    let mut out = String::new();
    let mut rest = format.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '%' => out += &directive(&mut rest, time),
            c => out.push(c),
        }
    }
    out
}

/// What the directive makes of the time whose `%` has been taken.
fn directive(rest: &mut Peekable<Chars>, time: &Zoned) -> String {
    let mut flags = String::from("%");
    while let Some(c) = rest.next_if(|c| "-_0^#".contains(*c) || c.is_ascii_digit()) {
        flags.push(c);
    }
    // Other locales' eras and digits, which C's has not.
    let modifier = rest.next_if(|c| "EO".contains(*c));
    let Some(c) = rest.next() else { return flags + &modifier.map_or(String::new(), String::from) };
    match c {
        // Python's own.
        'f' => format!("{:06}", time.subsec_nanosecond() / 1000),
        // The time has no zone that Python would know of.
        'z' | 'Z' => String::new(),
        'c' => strftime("%a %b %e %H:%M:%S %Y", time),
        'x' => strftime("%m/%d/%y", time),
        'X' => strftime("%H:%M:%S", time),
        'r' => strftime("%I:%M:%S %p", time),
        'D' => strftime("%m/%d/%y", time),
        '%' => "%".into(),
        'A' | 'a' | 'B' | 'b' | 'h' | 'C' | 'd' | 'e' | 'F' | 'G' | 'g' | 'H' | 'I' | 'j' | 'k' | 'l' | 'M' | 'm' | 'n' | 'P' | 'p' | 'R' | 'S'
        | 's' | 'T' | 't' | 'U' | 'u' | 'V' | 'W' | 'w' | 'Y' | 'y' => {
            let config = Config::new().lenient(true);
            let known = format!("{flags}{c}");
            BrokenDownTime::from(time).to_string_with_config(&config, &known).unwrap_or(known)
        }
        other => flags + &modifier.map_or(String::new(), String::from) + &String::from(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Python makes of the same.
    #[test]
    fn dates_are_pythons() {
        let cases: Vec<serde_json::Value> = serde_json::from_str(include_str!("../../../tests/data/strftime.json")).unwrap();
        let wrong: Vec<String> = cases
            .iter()
            .filter_map(|case| {
                let [time, format, expected] = ["time", "format", "text"].map(|key| case[key].as_str().unwrap());
                let time = time.parse::<jiff::civil::DateTime>().unwrap().to_zoned(jiff::tz::TimeZone::UTC).unwrap();
                let found = strftime(format, &time);
                (found != expected).then(|| format!("{format}: {found:?}, and Python says {expected:?}"))
            })
            .collect();
        assert!(cases.len() > 100 && wrong.is_empty(), "{wrong:#?}");
    }
}
