//! What an evaluation's report promises: files that parse, whatever the names in them, and nothing
//! half-written.

#![cfg(feature = "report")]

use lowkey::Error;
use lowkey::eval::report::{Directory, frontier, needle_map};
use lowkey::eval::{Label, Report, Row, continuation, needle};
use roxmltree::{Document, ParsingOptions};

/// Names that break what does not escape them.
const HOSTILE: [&str; 5] = ["</svg><script>alert(1)</script>", "a \"b\", 'c' & <d>", "line\nbreak\r\u{0}\u{7}", "=1+1", "größe ]]> <!-- %s"];

fn label(model: &str, method: &str, layout: &str) -> Label {
    Label { model: model.into(), method: method.into(), layout: layout.into(), sinks: None, recent: None }
}

fn row(model: &str, method: &str, bytes: u64, kl: Option<f64>) -> Row {
    Row {
        label: label(model, method, "f16"),
        reference: Some("models/dense".into()),
        text: "text".into(),
        window: 512,
        windows: 1,
        first_position: 0,
        last_position: 510,
        tokens: 511,
        perplexity: 12.5,
        kl_mean: kl,
        kl_stderr: kl.map(|kl| kl / 10.0),
        kl_p99: kl.map(|kl| kl * 10.0),
        kl_p999: None,
        kl_max: kl.map(|kl| kl * 12.0),
        top1_agreement: kl.map(|_| 0.75),
        kv_bytes_per_token: bytes,
        kv_fixed_bytes: 7,
    }
}

fn told(model: &str, length: usize, depth_percent: u32, accuracy: f64) -> needle::Row {
    needle::Row {
        label: label(model, "dense", "f16"),
        kind: needle::Kind::Single,
        length,
        depth_percent,
        trials: 4,
        accuracy,
        log_probability: -1.25,
    }
}

fn written(name: &str) -> continuation::Row {
    let named = || name.to_string();
    continuation::Row {
        label: Label { sinks: Some(4), recent: Some(32), ..label(name, name, name) },
        reference: named(),
        text: named(),
        prompt_tokens: 512,
        tokens: 1000,
        perplexity: 2.5,
        agreed_tokens: 70,
        distinct_4grams: Some(0.5),
        kv_bytes_per_token: 2880,
        kv_fixed_bytes: 7,
    }
}

fn hostile() -> Report {
    let rows = HOSTILE.iter().zip(1..).map(|(name, i)| Row {
        text: name.to_string(),
        label: label(name, name, name),
        ..row(name, name, 1000 * i, Some(0.01))
    });
    Report {
        rows: rows.collect(),
        continuations: HOSTILE.iter().map(|name| written(name)).collect(),
        needle: HOSTILE.iter().map(|name| told(name, 512, 50, 0.5)).collect(),
    }
}

fn texts(svg: &str) -> Vec<String> {
    let document = Document::parse(svg).unwrap();
    document
        .descendants()
        .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "text")))
        .map(|node| node.text().unwrap().trim().into())
        .collect()
}

fn count(svg: &str, tag: &str) -> usize {
    Document::parse(svg).unwrap().descendants().filter(|node| node.tag_name().name() == tag).count()
}

#[test]
fn the_frontier_has_a_point_for_each_model_at_a_distance() {
    let rows = [
        row("models/dense", "dense", 23040, Some(0.0)),
        row("models/a", "lowkey", 5760, Some(0.0004)),
        row("models/b", "lowkey", 2880, Some(0.0046)),
        row("models/c", "palu", 11520, Some(0.044)),
        row("models/d", "palu", 11520, None),
    ];
    let svg = frontier(&rows).unwrap().unwrap();
    let names = texts(&svg);
    for name in ["a", "b", "c", "lowkey f16", "palu f16", "cache bytes per token", "5000", "0.001"] {
        assert!(names.iter().any(|text| text == name), "no {name} in {names:?}");
    }
    assert!(names.iter().all(|text| text != "dense" && text != "d" && text != "dense f16"));
    let circles: Vec<[f64; 2]> = Document::parse(&svg)
        .unwrap()
        .descendants()
        .filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "circle")))
        .map(|node| ["cx", "cy"].map(|key| node.attribute(key).unwrap().parse().unwrap()))
        .collect();
    // The series in the rows' order, each from few bytes to many. Half the bytes is as far to the
    // left as a quarter to a half.
    let [b, a, c] = circles[..] else { panic!("{circles:?}") };
    assert!(((c[0] - a[0]) - (a[0] - b[0])).abs() <= 2.0 && a[0] > b[0], "{circles:?}");
    assert!(a[1] > b[1] && b[1] > c[1]);
    let decades = |kl: f64, other: f64| (kl / other).log10();
    let scale = (a[1] - b[1]) / decades(0.0046, 0.0004);
    assert!(((b[1] - c[1]) - scale * decades(0.044, 0.0046)).abs() <= 3.0, "{circles:?}");
    assert_eq!((frontier(&rows[..1]).unwrap(), frontier(&rows[4..]).unwrap(), frontier(&[]).unwrap()), (None, None, None));
    assert_eq!(count(&frontier(&rows[1..2]).unwrap().unwrap(), "circle"), 1);
}

#[test]
fn each_depth_and_reference_has_a_chart_on_one_scale() {
    let point = |reference: &str, window, model: &str, bytes, kl, exact: usize| Row {
        reference: Some(reference.into()),
        window,
        label: Label { sinks: Some(exact), recent: Some(8 * exact), ..label(model, "lowkey", "f16") },
        ..row(model, "lowkey", bytes, Some(kl))
    };
    let of = |reference: &'static str, window, kl: f64| {
        [(2000, 1.0), (4000, 0.25)].into_iter().flat_map(move |(bytes, factor)| {
            let name = format!("{bytes}");
            [point(reference, window, &name, bytes, kl * factor, 4), point(reference, window, &name, bytes, 2.0 * kl * factor, 0)]
        })
    };
    let rows: Vec<Row> = of("models/a", 4096, 0.02).chain(of("models/a", 512, 0.01)).collect();
    let names = texts(&frontier(&rows).unwrap().unwrap());
    let counted = |names: &[String], name: &str| names.iter().filter(|text| *text == name).count();
    // Beside each other, the shallow one first; what is coded throughout has no names of its own,
    // and one line in the legend.
    let place = |name: &str| names.iter().position(|text| text == name).unwrap_or_else(|| panic!("no {name} in {names:?}"));
    assert!(place("depth 512") < place("depth 4096"));
    for (name, times) in [("lowkey f16", 1), ("4 + 32 tokens exact", 1), ("no token exact", 1), ("cache bytes per token", 2), ("a, depth 512", 0)] {
        assert_eq!(counted(&names, name), times, "{name} in {names:?}");
    }

    // Four filled points of what has exact tokens; the others are rings on white.
    let svg = frontier(&rows).unwrap().unwrap();
    let document = Document::parse(&svg).unwrap();
    let number = |node: &roxmltree::Node, key: &str| node.attribute(key).unwrap().parse::<f64>().unwrap();
    let circles: Vec<_> = document.descendants().filter(|node| node.tag_name().name() == "circle").collect();
    assert_eq!(circles.len(), 4 + 2 * 4);
    let heights: Vec<f64> = circles.iter().map(|node| number(node, "cy")).collect();
    let at = |factor: f64| heights.iter().map(|cy| (heights[0] - cy) / factor).collect::<Vec<_>>();
    // By powers of two on one scale: 0.0025, 0.005, 0.01, 0.02 and 0.04 in either chart.
    let step = at(1.0).into_iter().filter(|x| *x > 4.0).fold(f64::INFINITY, f64::min);
    assert!(at(step).iter().all(|steps| (steps - steps.round()).abs() < 0.1), "{heights:?}");

    let both: Vec<Row> = rows.into_iter().chain(of("models/b", 512, 0.03)).collect();
    let names = texts(&frontier(&both).unwrap().unwrap());
    for name in ["a, depth 512", "a, depth 4096", "b, depth 512"] {
        assert_eq!(counted(&names, name), 1, "{name} in {names:?}");
    }
}

#[test]
fn no_name_is_written_over_a_line() {
    // A line that rises to the right, where names stand if nothing is in the way.
    let rows: Vec<Row> = (0..4).map(|i| row(&format!("a-longer-name-{i}"), "m", 2000 << i, Some(0.0005 * 2.5f64.powi(i)))).collect();
    let svg = frontier(&rows).unwrap().unwrap();
    let document = Document::parse(&svg).unwrap();
    let number = |node: roxmltree::Node, key: &str| node.attribute(key).unwrap().parse::<f64>().unwrap();
    let names: Vec<_> = document.descendants().filter(|node| node.text().is_some_and(|text| text.trim().starts_with("a-longer"))).collect();
    let circles: Vec<_> = document.descendants().filter(|node| node.has_tag_name(("http://www.w3.org/2000/svg", "circle"))).collect();
    let points: Vec<[f64; 2]> = circles.iter().map(|&node| [number(node, "cx"), number(node, "cy")]).collect();
    assert_eq!((names.iter().filter(|node| node.is_element()).count(), points.len()), (4, 4));
    for name in names.into_iter().filter(|node| node.is_element()) {
        let (left, middle) = (number(name, "x"), number(name, "y"));
        for i in 0..=1000 {
            let (segment, share) = ((i * 3 / 1000).min(2), f64::from(i) * 0.003);
            let [a, b] = [points[segment as usize], points[segment as usize + 1]];
            let at = |k: usize| a[k] + (b[k] - a[k]) * (share - f64::from(segment));
            let over = (left..left + 80.0).contains(&at(0)) && (at(1) - middle).abs() < 5.0;
            assert!(!over, "{} at {left}, {middle} is over the line at {}, {}", name.text().unwrap(), at(0), at(1));
        }
    }
}

#[test]
fn the_frontier_takes_any_number_of_models_and_any_distance() {
    let many: Vec<Row> = (1..200).map(|i| row(&format!("model-{i}"), &format!("m{}", i % 9), i * 131, Some(1e-9 * 1.15f64.powi(i as i32)))).collect();
    let svg = frontier(&many).unwrap().unwrap();
    assert_eq!(count(&svg, "circle"), 199);
    // A standard error larger than the mean reaches to the end of the chart and no further.
    let wide = Row { kl_stderr: Some(1.0), ..row("wide", "m", 100, Some(0.01)) };
    let svg = frontier(&[wide]).unwrap().unwrap();
    let inside = |points: &str| points.split_whitespace().all(|point| point.split(',').all(|x| (0.0..=980.0).contains(&x.parse::<f64>().unwrap())));
    let document = Document::parse(&svg).unwrap();
    assert!(document.descendants().filter_map(|node| node.attribute("points")).all(inside));
}

#[test]
fn the_needle_map_has_a_cell_for_each_answer() {
    let rows: Vec<_> =
        [512, 1024].into_iter().flat_map(|length| [0, 50, 100].map(|depth| told("m", length, depth, f64::from(depth) / 100.0))).collect();
    let svg = needle_map(&rows).unwrap();
    // And the background.
    assert_eq!(count(&svg, "rect"), 1 + 6);
    let names = texts(&svg);
    for (text, times) in [("512 tokens", 1), ("50 % deep", 1), ("0 %", 2), ("100 %", 2), ("ln p -1.25", 6)] {
        assert_eq!(names.iter().filter(|name| *name == text).count(), times, "{text} in {names:?}");
    }
}

#[test]
fn a_report_is_complete_and_parses_whatever_the_names() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("report");
    let report = hostile();
    // An empty directory may be there already.
    std::fs::create_dir(&path).unwrap();
    Directory::reserve(&path).unwrap().publish(&report).unwrap();
    let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap();

    assert_eq!(serde_json::from_str::<serde_json::Value>(&read("report.json")).unwrap(), serde_json::to_value(&report).unwrap());

    let rows = read("rows.csv");
    let mut table = csv::Reader::from_reader(rows.as_bytes());
    let head = table.headers().unwrap().clone();
    assert_eq!(head.iter().take(5).collect::<Vec<_>>(), ["model", "method", "layout", "sinks", "recent"]);
    let column = head.iter().position(|name| name == "kl_mean").unwrap();
    let lines: Vec<_> = table.records().map(Result::unwrap).collect();
    assert_eq!(lines.iter().map(|line| &line[0]).collect::<Vec<_>>(), HOSTILE);
    assert!(lines.iter().all(|line| line.len() == head.len() && line[column].parse::<f64>().unwrap() == 0.01));
    let needles = read("needle.csv");
    let mut table = csv::Reader::from_reader(needles.as_bytes());
    assert_eq!(table.records().map(|line| line.unwrap()[0].to_string()).collect::<Vec<_>>(), HOSTILE);

    let continuations = read("continuations.csv");
    let mut table = csv::Reader::from_reader(continuations.as_bytes());
    assert_eq!(table.records().map(|line| line.unwrap()[0].to_string()).collect::<Vec<_>>(), HOSTILE);
    assert_eq!(serde_json::from_str::<Report>(&read("report.json")).unwrap(), report);

    let page = read("index.html");
    let document = Document::parse_with_options(&page, ParsingOptions { allow_dtd: true, ..Default::default() }).unwrap();
    let tags = |name: &str| document.descendants().filter(|node| node.tag_name().name() == name).count();
    assert_eq!((tags("script"), tags("svg"), tags("table")), (0, 2 * HOSTILE.len(), HOSTILE.len() + 2));
    let cells: Vec<_> = document.descendants().filter(|node| node.has_tag_name("td")).filter_map(|node| node.text()).collect();
    assert!(cells.contains(&HOSTILE[0]) && cells.contains(&HOSTILE[1]) && cells.contains(&HOSTILE[4]), "{cells:?}");
    assert!(!page.contains(['\u{0}', '\u{7}', '\r']));
    assert!(!page.contains("http://") || page.matches("http://").count() == page.matches("http://www.w3.org/2000/svg").count());
    assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 1);
}

#[test]
fn each_kind_of_needle_has_maps_and_a_column() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("report");
    let kinds = [needle::Kind::MultiTurn, needle::Kind::Tracking];
    let rows = ["a", "b"].into_iter().flat_map(|model| kinds.map(|kind| needle::Row { kind, ..told(model, 512, 50, 0.5) }));
    Directory::reserve(&path)
        .unwrap()
        .publish(&Report { rows: vec![row("m", "lowkey", 5, None)], needle: rows.collect(), ..Report::default() })
        .unwrap();

    let page = std::fs::read_to_string(path.join("index.html")).unwrap();
    let document = Document::parse_with_options(&page, ParsingOptions { allow_dtd: true, ..Default::default() }).unwrap();
    let headings: Vec<_> = document.descendants().filter(|node| node.has_tag_name("h3")).collect();
    assert_eq!(headings.len(), 2);
    for (heading, kind) in headings.iter().zip(["multi-turn", "tracking"]) {
        assert!(heading.text().unwrap().starts_with(kind));
        let maps = heading.next_sibling_element().unwrap();
        let captions: Vec<_> = maps.descendants().filter(|node| node.has_tag_name("figcaption")).filter_map(|node| node.text()).collect();
        assert_eq!(captions, ["a (dense, f16)", "b (dense, f16)"]);
    }
    let needles = std::fs::read_to_string(path.join("needle.csv")).unwrap();
    let mut table = csv::Reader::from_reader(needles.as_bytes());
    let column = table.headers().unwrap().iter().position(|name| name == "kind").unwrap();
    assert_eq!(
        table.records().map(|line| line.unwrap()[column].to_string()).collect::<Vec<_>>(),
        ["multi-turn", "tracking", "multi-turn", "tracking"]
    );
}

#[test]
fn without_a_reference_or_needles_there_is_still_a_report() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("report");
    Directory::reserve(&path).unwrap().publish(&Report { rows: vec![row("m", "lowkey", 5, None)], ..Report::default() }).unwrap();
    assert!(!path.join("needle.csv").exists() && !path.join("continuations.csv").exists());
    let rows = std::fs::read_to_string(path.join("rows.csv")).unwrap();
    let mut table = csv::Reader::from_reader(rows.as_bytes());
    let column = table.headers().unwrap().iter().position(|name| name == "kl_mean").unwrap();
    let line = table.records().next().unwrap().unwrap();
    assert_eq!((&line[0], &line[column]), ("m", ""));
    assert!(!std::fs::read_to_string(path.join("index.html")).unwrap().contains("<svg"));
}

#[test]
fn nothing_is_overwritten_and_nothing_is_left_behind() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("report");
    let entries = || std::fs::read_dir(parent.path()).unwrap().count();
    drop(Directory::reserve(&path).unwrap());
    assert_eq!(entries(), 0);
    assert!(matches!(Directory::reserve(&parent.path().join("no/where")), Err(Error::Io { .. })));

    let reserved = Directory::reserve(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("notes"), "mine").unwrap();
    assert!(matches!(reserved.publish(&hostile()), Err(Error::Exists { .. })));
    assert!(matches!(Directory::reserve(&path), Err(Error::Exists { .. })));
    assert!(matches!(Directory::reserve(&path.join("notes")), Err(Error::Exists { .. })));
    assert_eq!((entries(), std::fs::read_to_string(path.join("notes")).unwrap()), (1, "mine".into()));
}
