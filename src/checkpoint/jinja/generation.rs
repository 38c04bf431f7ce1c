//! `{% generation %}` around what a model says, by which transformers finds the tokens to train on.
//! When a model is asked it means nothing but a scope of its own, which `{% with %}` is too.

/// `source` with `with` in the place of `generation`.
pub(super) fn without(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        out.push_str(&rest[..start]);
        rest = &rest[start..];
        let length = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map_or(rest.len(), |end| end + 2),
            Some(b'{') => 2 + code(&rest[2..], "}}"),
            Some(b'%') => 2 + code(&rest[2..], "%}"),
            _ => 1,
        };
        let (tag, after) = rest.split_at(length);
        rest = after;
        match statement(tag) {
            Some((before, "generation", end)) => out.extend([before, "with", end]),
            Some((before, "endgeneration", end)) => out.extend([before, "endwith", end]),
            Some((_, "raw", _)) => {
                let raw = raw(rest);
                out.extend([tag, &rest[..raw]]);
                rest = &rest[raw..];
            }
            _ => out.push_str(tag),
        }
    }
    out + rest
}

/// How long code is up to and with `end`, which may stand in its strings.
fn code(text: &str, end: &str) -> usize {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in text.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if text[at..].starts_with(end) => return at + end.len(),
            None if c == '"' || c == '\'' => quote = Some(c),
            None => {}
        }
    }
    text.len()
}

/// A statement of one word: what stands before that, the word, and what stands after it.
fn statement(tag: &str) -> Option<(&str, &str, &str)> {
    let inside = tag.strip_prefix("{%")?.strip_suffix("%}")?;
    let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
    let start = tag.find(word)?;
    Some((&tag[..start], word, &tag[start + word.len()..]))
}

/// How long what is taken as it is goes on, with its end.
fn raw(text: &str) -> usize {
    let mut from = 0;
    while let Some(start) = text[from..].find("{%") {
        let start = from + start;
        let length = text[start..].find("%}").map_or(text.len() - start, |end| end + 2);
        if statement(&text[start..start + length]).is_some_and(|(_, word, _)| word == "endraw") {
            return start + length;
        }
        from = start + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_replaced_and_nothing_else_is() {
        for (source, expected) in [
            ("{% generation %}a{% endgeneration %}", "{% with %}a{% endwith %}"),
            ("{%-generation-%}a{%+ endgeneration+%}", "{%-with-%}a{%+ endwith+%}"),
            ("{{ '{% generation %}' }}{# {% generation %} #}", "{{ '{% generation %}' }}{# {% generation %} #}"),
            ("{% raw %}{% generation %}{%- endraw %}{% generation %}", "{% raw %}{% generation %}{%- endraw %}{% with %}"),
            ("{% set x = '%}' %}{ {% generation %", "{% set x = '%}' %}{ {% generation %"),
            ("{{ \"\\\"}}\" }}{% set generation = 1 %}{% raw %}{%", "{{ \"\\\"}}\" }}{% set generation = 1 %}{% raw %}{%"),
            ("{%%}{é", "{%%}{é"),
        ] {
            assert_eq!(without(source), expected);
        }
    }
}
