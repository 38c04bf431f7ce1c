//! Results as files that are whole at every moment: each is written anew beside its name and
//! renamed over it, so that whatever stops the run leaves what was measured until then.

use crate::{Error, Result, task};
use std::path::{Path, PathBuf};

/// Files of one run in a directory: `name.json`, `name.md`, and `name.svg` where there is something
/// to draw.
#[derive(Debug, Clone)]
pub struct Report {
    json: PathBuf,
    markdown: PathBuf,
    picture: PathBuf,
}

/// What is drawn of results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// The file's text.
    pub svg: String,
    /// What it shows, for those who do not see it.
    pub caption: String,
}

impl Report {
    /// Before anything is measured: whether there can be such files.
    ///
    /// The directory is made where there is none.
    ///
    /// # Errors
    /// [`Error::Exists`] where there is such a file, [`Error::Io`] where nothing can be created
    /// there.
    pub fn reserve(directory: &Path, name: &str) -> Result<Report> {
        std::fs::create_dir_all(directory).map_err(Error::io("create", directory))?;
        let [json, markdown, picture] = ["json", "md", "svg"].map(|ending| directory.join(format!("{name}.{ending}")));
        for path in [&json, &markdown, &picture] {
            // Also tells whether the directory can be written to.
            drop(task::file(path)?);
        }
        Ok(Report { json, markdown, picture })
    }

    /// Writes them anew. The picture is shown above the Markdown.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, value: &impl serde::Serialize, markdown: &str, picture: Option<&Picture>) -> Result<()> {
        let json = serde_json::to_string_pretty(value).map_err(|e| Error::io("write", &self.json)(e.into()))?;
        task::replace(&self.json, &(json + "\n"))?;
        let (Some(Picture { svg, caption }), Some(name)) = (picture, self.picture.file_name().and_then(|name| name.to_str())) else {
            return task::replace(&self.markdown, markdown);
        };
        task::replace(&self.picture, svg)?;
        task::replace(&self.markdown, format!("![{caption}]({name})\n\n{markdown}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_whole_and_never_somebody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/results");
        let report = Report::reserve(&path, "speed").unwrap();
        assert_eq!(path.read_dir().unwrap().count(), 0, "nothing yet");
        for rows in [vec![1, 2], vec![3]] {
            report.write(&rows, "| a |\n", None).unwrap();
            assert_eq!(serde_json::from_str::<Vec<i32>>(&std::fs::read_to_string(path.join("speed.json")).unwrap()).unwrap(), rows);
        }
        assert_eq!(path.read_dir().unwrap().count(), 2, "no temporary file");
        report.write(&[4], "| a |\n", Some(&Picture { svg: "<svg/>".into(), caption: "a line".into() })).unwrap();
        assert_eq!(std::fs::read_to_string(path.join("speed.svg")).unwrap(), "<svg/>");
        assert_eq!(std::fs::read_to_string(path.join("speed.md")).unwrap(), "![a line](speed.svg)\n\n| a |\n");
        assert!(matches!(Report::reserve(&path, "speed"), Err(Error::Exists { .. })));
        Report::reserve(&path, "kernels").unwrap();
        let file = path.join("speed.json");
        assert!(matches!(Report::reserve(&file, "speed"), Err(Error::Io { .. })));
    }
}
