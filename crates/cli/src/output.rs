//! The only place that writes to standard output and standard error: data to the first, the rest to the second.

use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{Table, presets};
use serde::Serialize;

/// How a read command prints its answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns for a person.
    #[default]
    Table,
    /// Stable JSON for a program.
    Json,
    /// The same as YAML.
    Yaml,
}

impl Format {
    /// Whether a program reads it.
    pub(crate) const fn is_data(self) -> bool {
        matches!(self, Self::Json | Self::Yaml)
    }
}

/// A line of data.
///
/// # Errors
/// When standard output is closed.
pub(crate) fn line(text: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// Text without a line end, flushed at once (streamed answers).
///
/// # Errors
/// When standard output is closed.
pub(crate) fn fragment(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A line for the person at the terminal.
pub(crate) fn note(text: &str) {
    // A closed standard error is no reason to stop.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// A value as indented JSON.
///
/// # Errors
/// When standard output is closed.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(line(&text)?)
}

/// A value for a program, in the format that it asked for.
///
/// # Errors
/// When standard output is closed.
pub(crate) fn data(format: Format, value: &impl Serialize) -> anyhow::Result<()> {
    match format {
        Format::Yaml => Ok(fragment(&yaml(value)?)?),
        Format::Json | Format::Table => json(value),
    }
}

/// One value of many that follow each other: a line of JSON, or a document of YAML.
///
/// # Errors
/// When standard output is closed.
pub(crate) fn item(format: Format, value: &impl Serialize) -> anyhow::Result<()> {
    let text = match format {
        Format::Yaml => format!("---\n{}", yaml(value)?),
        Format::Json | Format::Table => format!("{}\n", serde_json::to_string(value)?),
    };
    Ok(fragment(&text)?)
}

/// Ends with a line end.
fn yaml(value: &impl Serialize) -> anyhow::Result<String> {
    let text = serde_saphyr::to_string(value)?;
    Ok(format!("{}\n", text.trim_end_matches('\n')))
}

/// Rows under a header, without borders.
///
/// # Errors
/// When standard output is closed.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    line(&table_text(header, rows))
}

/// The same as text.
pub(crate) fn table_text(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(header.iter().copied());
    for row in rows {
        table.add_row(row);
    }
    table.to_string()
}

/// Whether a person looks at standard output.
pub(crate) fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_says_what_json_says() {
        let value = json!({
            "id": "w-1", "ready": true, "slices": 3, "rate": 1.5, "none": null,
            "roles": ["attention", "experts"], "text": "a: b # c", "number": "007",
            "nested": { "empty": [], "map": {} },
        });
        assert_eq!(
            yaml(&value).unwrap(),
            "id: w-1\nready: true\nslices: 3\nrate: 1.5\nnone: null\n\
             roles:\n- attention\n- experts\ntext: \"a: b # c\"\nnumber: \"007\"\n\
             nested:\n  empty: []\n  map: {}\n"
        );
    }
}
