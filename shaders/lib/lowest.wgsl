// The least finite f32: below every score, and what a masked one is. An infinity would make
// `inf - inf` where a whole split is masked.
const LOWEST: f32 = -3.4028234e38;
