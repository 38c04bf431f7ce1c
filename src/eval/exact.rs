//! Exact tokens as options and tables have them: `4 + 32`, sinks and recent ones.

use crate::kv::Exact;
use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

impl FromStr for Exact {
    type Err = Error;

    /// `4+32`: sinks, and recent tokens.
    fn from_str(text: &str) -> Result<Exact> {
        let parse = |number: &str| number.trim().parse().ok();
        let exact = text.split_once('+').and_then(|(sinks, recent)| Some(Exact { sinks: parse(sinks)?, recent: parse(recent)? }));
        exact.ok_or_else(|| Error::Argument { name: "exact".into(), message: format!("`{text}` is not SINKS+RECENT, such as 4+32, 4+0 or 0+0") })
    }
}

impl fmt::Display for Exact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} + {}", self.sinks, self.recent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let exact = Exact { sinks: 4, recent: 32 };
        assert_eq!((exact.to_string().parse::<Exact>().unwrap(), "4+32".parse::<Exact>().unwrap()), (exact, exact));
        for wrong in ["", "4", "4+", "+", "4-32", "-4+32", "4+32+1", "a+b"] {
            assert!(wrong.parse::<Exact>().unwrap_err().to_string().starts_with(&format!("exact: `{wrong}` ")), "{wrong}");
        }
    }
}
