// Which row each column of attention is. Plain columns come first: tokens' exact rows, the sinks
// and then those from `near` on, and those beside, in slots behind the ring. After them come coded
// columns: consecutive tokens, or (LISTED) those of a list.
//
// Wants `params.sinks` and `params.ring`: slots of either; `params.start`: the first coded token,
// or (LISTED) the last there is.
//
// LISTED    LIST entries for each key/value head, or none where all heads read the same
#if LISTED
@group(0) @binding(9) var<storage, read> list: array<u32>; // tokens; past the last, none
const APART = LIST > 0u; // whether key/value heads read different columns
#else
const APART = false;
#endif

// The plain columns of a block of tokens.
struct Plain {
    fixed: u32, // columns of sinks
    exact: u32, // columns of tokens' rows
    base: u32,  // where in the ring the first of them stands that is no sink
}

// The slot of a plain column. The ring comes round once at the most. Without branches, so that
// several loads can be under way.
fn plain_slot(plain: Plain, column: u32) -> u32 {
    let at = plain.base + column - plain.fixed;
    let exact = params.sinks + select(at, at - params.ring, at >= params.ring);
    return select(select(exact, params.sinks + params.ring + column - plain.exact, column >= plain.exact), column, column < plain.fixed);
}

// The token of a coded column.
fn coded_token(kv: u32, column: u32) -> u32 {
#if LISTED
    return list[kv * LIST + column];
#else
    return params.start + column;
#endif
}

// The token whose row a coded column reads: where there is none, the last.
fn coded_row(kv: u32, column: u32) -> u32 {
#if LISTED
    return min(coded_token(kv, column), params.start);
#else
    return coded_token(kv, column);
#endif
}
