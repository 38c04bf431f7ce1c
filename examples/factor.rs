//! How long the factors of one layer take: 4096 wide, 32 heads of 128, keys in groups of 4 heads
//! and values over all of them, as in Llama 2 7B.
//!
//! Run it with `cargo run --release --example factor`.

use lowkey::linalg::{Eigen, tr_product};
use nalgebra::DMatrix;
use std::time::Instant;

fn main() -> lowkey::Result<()> {
    let (width, group) = (4096, 512);
    let mut random = lowkey::linalg::Random::new(1);
    // The second moment of what random weights make of white inputs, later columns weaker.
    let weight = DMatrix::from_fn(width, width, |_, j| random.gaussian() / (1.0 + j as f64).sqrt());
    let moment = tr_product(weight.as_view(), weight.as_view());

    let start = Instant::now();
    for first in (0..width).step_by(group) {
        Eigen::of("keys", &moment.view((first, first), (group, group)).into_owned())?;
    }
    let keys = start.elapsed().as_secs_f64();
    Eigen::of("values", &moment)?;
    let all = start.elapsed().as_secs_f64();
    println!(
        "keys {keys:.2} s, values {:.2} s, together {all:.2} s on {} cores",
        all - keys,
        std::thread::available_parallelism().map_or(1, |n| n.get())
    );
    Ok(())
}
