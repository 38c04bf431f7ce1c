//! How texts are cut into windows of several lengths.
//!
//! Short windows show many different texts, long ones what far queries make of a key: calibrated in
//! windows of 512 alone, rows lose twice as much at a depth of 4,096 as at 512, and calibrated in
//! windows of 4,096 alone they lose more at 512 (docs/results). So lengths are those of
//! [`Options::window`], twice that, and so on, and each gets as many tokens.

use super::Options;
use crate::{Error, Result};

/// The windows of `texts` that are run, no two of which have a token in common, and none of which
/// has tokens of two texts.
///
/// The longest length is the largest of which one window is no more than its share of all tokens.
/// What is left of a text after its last window is left out. A single text shorter than all lengths
/// is one window.
///
/// # Errors
/// [`Error::Argument`] where a text is shorter than `least` or than the shortest window, and where
/// no tokens are asked for.
pub(super) fn cut<'a>(texts: &'a [Vec<u32>], options: &Options, least: usize) -> Result<Vec<&'a [u32]>> {
    let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
    if options.window < least {
        return refuse("window", format!("windows of {} tokens are too short; at least {least} are needed", options.window));
    }
    if options.longest < options.window {
        return refuse("longest", format!("windows of up to {} tokens cannot be of {} and more", options.longest, options.window));
    }
    if options.tokens == Some(0) {
        return refuse("tokens", "none is too few; ask for at least one".into());
    }
    let shortest = texts.iter().map(Vec::len).min().unwrap_or(0);
    let needed = if texts.len() == 1 { least } else { options.window };
    if shortest < needed {
        let which = if texts.len() == 1 { "the text" } else { "one of the texts" };
        return refuse("calibration", format!("{which} has {shortest} tokens; at least {needed} are needed"));
    }
    if let [text] = texts
        && text.len() < options.window
    {
        return Ok(vec![text]);
    }
    let available: usize = texts.iter().map(Vec::len).sum();
    let wanted = options.tokens.unwrap_or(available).min(available);
    let longest = texts.iter().map(Vec::len).max().unwrap_or(0).min(options.longest);
    let lengths: Vec<usize> = std::iter::successors(Some(options.window), |length| length.checked_mul(2))
        .zip(1..)
        .take_while(|&(length, count)| count == 1 || length <= longest && length <= wanted / count)
        .map(|(length, _)| length)
        .collect();

    // All of the texts: the next window is of the length that has had the fewest tokens, as far as
    // the text has room.
    let mut windows: Vec<Vec<(usize, &[u32])>> = vec![Vec::new(); lengths.len()];
    let mut order = 0;
    for text in texts {
        let mut rest = &text[..];
        while let Some(index) =
            (0..lengths.len()).rev().filter(|&index| lengths[index] <= rest.len()).min_by_key(|&index| lengths[index] * windows[index].len())
        {
            let (window, after) = rest.split_at(lengths[index]);
            windows[index].push((order, window));
            (rest, order) = (after, order + 1);
        }
    }
    // Of every length the same share, spread evenly, in the order of the text.
    let whole: usize = windows.iter().zip(&lengths).map(|(windows, length)| windows.len() * length).sum();
    let mut chosen: Vec<(usize, &[u32])> = windows
        .iter()
        .flat_map(|windows| {
            let count = (windows.len() * wanted).div_ceil(whole).min(windows.len());
            (0..count).map(move |index| windows[index * windows.len() / count])
        })
        .collect();
    chosen.sort_by_key(|(order, _)| *order);
    Ok(chosen.into_iter().map(|(_, window)| window).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(texts: &[usize], options: Options) -> Vec<usize> {
        let mut next = 0;
        let texts: Vec<Vec<u32>> = texts
            .iter()
            .map(|&length| {
                next += length as u32;
                (next - length as u32..next).collect()
            })
            .collect();
        let windows = cut(&texts, &options, 10).unwrap();
        // In order, without a token twice, none over the end of a text.
        assert!(windows.windows(2).all(|pair| pair[0].last() < pair[1].first()));
        assert!(windows.iter().all(|window| texts.iter().any(|text| text.contains(&window[0]) && text.contains(window.last().unwrap()))));
        windows.into_iter().map(<[u32]>::len).collect()
    }

    fn options(window: usize, longest: usize, tokens: Option<usize>) -> Options {
        Options { window, longest, tokens, ..Options::default() }
    }

    #[test]
    fn each_length_gets_as_many_tokens() {
        for (tokens, longest) in [(64, 16), (4096, 64), (6400, 128)] {
            let found = lengths(&[tokens], options(16, longest, None));
            let by_length: Vec<usize> = (4..8).map(|bits| found.iter().filter(|&&length| length == 1 << bits).sum()).collect();
            let used: Vec<usize> = by_length.iter().copied().filter(|&tokens| tokens > 0).collect();
            assert_eq!(found.iter().max(), Some(&longest));
            assert!(used.iter().max().unwrap() - used.iter().min().unwrap() <= longest, "{by_length:?}");
            assert!(tokens - found.iter().sum::<usize>() < 16);
        }
    }

    #[test]
    fn a_part_of_a_long_text_has_the_same_mix() {
        let found = lengths(&[100_000], options(16, 128, Some(1024)));
        let by_length: Vec<usize> = (4..8).map(|bits| found.iter().filter(|&&length| length == 1 << bits).sum()).collect();
        assert_eq!(found.iter().max(), Some(&128));
        assert!(by_length.iter().all(|tokens| (256..=384).contains(tokens)), "{by_length:?}");
    }

    #[test]
    fn no_window_is_longer_than_its_lengths_share() {
        // Two lengths share 79 tokens, of which 40 are more than half.
        assert_eq!(lengths(&[79], options(20, 1000, None)), [20; 3]);
        assert_eq!(lengths(&[80], options(20, 1000, None)), [40, 20, 20]);
        assert_eq!(lengths(&[41, 41], options(20, 1000, None)), [40, 20, 20]);
        // A text without a remainder, a text with one, a single one that is short.
        assert_eq!(lengths(&[60, 25], options(20, 20, None)), [20; 4]);
        assert_eq!(lengths(&[15], options(20, 40, None)), [15]);
        assert_eq!(lengths(&[400], options(20, 20, Some(1))), [20]);
    }

    #[test]
    fn what_cannot_be_cut_is_refused_by_name() {
        let name = |lengths: &[usize], options: Options| {
            let texts: Vec<Vec<u32>> = lengths.iter().map(|&length| vec![0; length]).collect();
            match cut(&texts, &options, 10) {
                Err(Error::Argument { name, .. }) => name,
                _ => "accepted".into(),
            }
        };
        assert_eq!(name(&[100], options(9, 100, None)), "window");
        assert_eq!(name(&[100], options(20, 19, None)), "longest");
        assert_eq!(name(&[100], options(20, 20, Some(0))), "tokens");
        assert_eq!(name(&[9], options(20, 20, None)), "calibration");
        assert_eq!(name(&[100, 19], options(20, 20, None)), "calibration");
        assert_eq!(name(&[], options(20, 20, None)), "calibration");
        assert_eq!(name(&[100, 20], options(20, 20, None)), "accepted");
    }
}
