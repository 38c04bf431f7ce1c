// Where exact rows stand: the first tokens in slots of their own, those after them in a ring.
//
// Wants `step.sinks` and `step.ring`: the number of either.

fn slot(position: u32) -> u32 {
    if position < step.sinks {
        return position;
    }
    return step.sinks + (position - step.sinks) % step.ring;
}
