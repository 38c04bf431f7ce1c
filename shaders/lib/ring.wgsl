// Where exact rows stand: the first tokens in slots of their own, those after them in a ring.
//
// Wants `params.sinks` and `params.ring`: the number of either.

fn slot(position: u32) -> u32 {
    if position < params.sinks {
        return position;
    }
    return params.sinks + (position - params.sinks) % params.ring;
}
