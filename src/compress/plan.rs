//! What is asked for: a method with its options, and what stays exact beside its rows.

use super::method::{Layout, LowKey, Method};
use crate::Result;
use crate::checkpoint::Config;
use crate::kv::Exact;

/// A method with its options, and what all methods share.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Whose bases.
    pub method: Method,
    /// What stays exact beside the rows.
    pub exact: Exact,
}

impl Plan {
    /// `method`, with as many tokens exact as is usual.
    pub fn new(method: Method) -> Plan {
        Plan { method, exact: Exact::default() }
    }

    /// Whether the options are possible ones for a model of this shape.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] with the option and what it may be.
    pub fn check(&self, config: &Config) -> Result<()> {
        self.method.check(config)
    }

    /// The longest context whose positions the rows are made for, if they are made for any.
    pub fn context(&self) -> Option<usize> {
        match self.method {
            Method::LowKey(LowKey { layout: Layout::Fast { context, .. }, .. }) => Some(context),
            _ => None,
        }
    }
}
