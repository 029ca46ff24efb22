//! What a worker says about itself. Never trusts a stored record: decoding checks every field.

use std::ops::Range;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tramontane_types::{Epoch, Placement, SEGMENTS_PER_EXPERT, WorkerId};

use super::measured::Measured;
use crate::Error;
use crate::backoff::random;
use crate::store::{Entry, check_key, keys};

/// Version of the record's JSON. Readers skip other versions; new optional fields do not change it.
pub const RECORD_SCHEMA: u32 = 1;
/// The same of a record with a [`Part`]: a planner that knows no parts would give its worker any slice, so it must not see it.
pub const RECORD_SCHEMA_OF_PARTS: u32 = 2;
/// Largest record; a real one has about 600 bytes, and one per expert of the model.
pub const RECORD_BYTES_MAX: usize = 16 * 1024;
/// Longest text field.
pub const RECORD_TEXT_BYTES_MAX: usize = 512;
/// Most layers and most experts per layer of a model.
pub const MODEL_DIMENSION_MAX: usize = 4096;

/// Most experts of a model, all layers together: the placement of more does not fit the store.
pub const MODEL_EXPERTS_MAX: usize = 32 * 1024;

/// One worker, as it registers itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerRecord {
    /// [`RECORD_SCHEMA`], or [`RECORD_SCHEMA_OF_PARTS`].
    pub schema: u32,
    /// Unique in the cluster; the last part of the key.
    pub id: WorkerId,
    /// `host:port` of its gRPC server, as others reach it.
    pub address: String,
    /// Its Unix socket for workers of the same host, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<HostSocket>,
    /// What it may be used for.
    pub roles: Roles,
    /// Memory that it offers for expert weights.
    pub capacity_bytes: u64,
    /// Memory that one expert segment takes in its weight format.
    pub segment_bytes: u64,
    /// Decides the bits of its results, such as `cpu-q8`.
    pub numeric_class: String,
    /// The model that it reads.
    pub model: ModelFacts,
    /// Where it is in its life.
    pub state: WorkerState,
    /// Highest placement epoch, pending or published, whose slices it has all loaded; 0 for none.
    pub loaded: Epoch,
    /// Differs between two processes of the same id.
    pub incarnation: u64,
    /// Unix time of the process's start in milliseconds.
    pub started_ms: u64,
    /// Version of the program.
    pub version: String,
    /// How busy it is.
    #[serde(default)]
    pub load: WorkerLoad,
    /// What it has measured of itself.
    #[serde(default)]
    pub measured: Measured,
    /// Sequences that it runs at once; 0 where it does not say.
    #[serde(default)]
    pub sequences_max: u32,
    /// What it can do in its group; everything where it does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
}

/// What a worker can do in a group whose attention and experts are of two numeric classes, `<attention>+<experts>`, or
/// `<attention>+<experts>@<layers>` where the experts of the first layers are of the attention's class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Whether it can attend.
    pub attention: bool,
    /// The first layer whose experts it can hold.
    pub first_layer: usize,
    /// The one behind the last such layer.
    pub end_layer: usize,
}

impl Part {
    /// Whether a group of this class has such a part: all workers of one class agree on the layers.
    fn is_of(self, class: &str, num_layers: usize) -> bool {
        let Some((_, experts)) = class.split_once('+') else {
            return false;
        };
        let border = experts.split_once('@').map_or(Ok(0), |(_, n)| n.parse());
        let layers = border.map(|border: usize| match self.attention {
            true => (0, border),
            false => (border, num_layers),
        });
        layers == Ok((self.first_layer, self.end_layer)) && self.end_layer <= num_layers
    }

    /// The roles that it can have.
    #[must_use]
    pub const fn roles(self) -> Roles {
        Roles {
            attention: self.attention,
            experts: self.first_layer < self.end_layer,
        }
    }
}

/// A Unix socket for expert calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostSocket {
    /// The host that it is on; equal for processes that may be able to reach each other without a network.
    pub host: String,
    /// Where it is in the file system, absolute.
    pub path: String,
}

/// What a worker may be used for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roles {
    /// Keeps sequences and their KV cache.
    pub attention: bool,
    /// Holds and computes expert slices.
    pub experts: bool,
}

/// The model that a worker reads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Equal for equal weights.
    pub fingerprint: String,
    /// As clients name it.
    pub name: String,
    /// Layers.
    pub num_layers: usize,
    /// Experts per layer; 1 for a dense model.
    pub num_experts: usize,
    /// Non-empty segments per expert, `1..=8`.
    pub num_segments: u8,
}

/// Where a worker is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Up, holds nothing that is published yet; may be given slices.
    #[default]
    Joining,
    /// Serves.
    Ready,
    /// Finishes what it has and takes no new sequences; gets no slices in new placements.
    Draining,
    /// About to end.
    Leaving,
}

impl WorkerState {
    /// Whether new placements may count on it.
    #[must_use]
    pub const fn is_staying(self) -> bool {
        matches!(self, Self::Joining | Self::Ready)
    }
}

/// How busy a worker is; refreshed every few seconds, so a hint only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WorkerLoad {
    /// Sequences in the running batch.
    pub running: u32,
    /// Sequences that wait for a place in it.
    pub waiting: u32,
    /// KV pages that nobody uses.
    pub kv_pages_free: u32,
}

impl WorkerRecord {
    /// The schema of a record with this part.
    #[must_use]
    pub const fn schema_of(part: Option<Part>) -> u32 {
        match part {
            None => RECORD_SCHEMA,
            Some(_) => RECORD_SCHEMA_OF_PARTS,
        }
    }

    /// A number for [`WorkerRecord::incarnation`].
    #[must_use]
    pub fn new_incarnation() -> u64 {
        random()
    }

    /// Key of the record.
    #[must_use]
    pub fn key(&self) -> String {
        format!("{}{}", keys::WORKERS, self.id)
    }

    /// Expert segments that fit into its memory.
    #[must_use]
    pub const fn capacity_segments(&self) -> u64 {
        match self.capacity_bytes.checked_div(self.segment_bytes) {
            Some(segments) => segments,
            None => 0,
        }
    }

    /// The layers whose experts it can hold.
    #[must_use]
    pub fn expert_layers(&self) -> Range<usize> {
        let all = 0..self.model.num_layers;
        self.part
            .map_or(all, |part| part.first_layer..part.end_layer)
    }

    /// Whether it can hold all that a placement gives it.
    #[must_use]
    pub fn can_hold(&self, placement: &Placement) -> bool {
        let layers = self.expert_layers();
        let mut slices = placement.slices_of(&self.id);
        self.part.is_none() || slices.all(|slice| layers.contains(&usize::from(slice.layer.0)))
    }

    /// The roles that it can have.
    #[must_use]
    pub fn possible_roles(&self) -> Roles {
        let all = Roles {
            attention: true,
            experts: true,
        };
        self.part.map_or(all, Part::roles)
    }

    /// Checks every field against its limit.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field and what it holds.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |rule: String| {
            Err(Error::invalid(
                format!("record of worker {}", self.id),
                rule,
            ))
        };
        let schema = Self::schema_of(self.part);
        if self.schema != schema {
            return refuse(format!("schema {}, expected {schema}", self.schema));
        }
        if self.id.as_str().is_empty() || self.id.as_str().contains('/') {
            return refuse("id must not be empty or hold a slash".to_owned());
        }
        check_key(&self.key())?;
        let model = &self.model;
        let mut texts = vec![
            &self.address,
            &self.numeric_class,
            &self.version,
            &model.fingerprint,
            &model.name,
        ];
        texts.extend(self.socket.iter().flat_map(|s| [&s.host, &s.path]));
        if let Some(long) = texts.iter().find(|text| text.len() > RECORD_TEXT_BYTES_MAX) {
            return refuse(format!(
                "text of {} bytes, at most {RECORD_TEXT_BYTES_MAX}",
                long.len()
            ));
        }
        let (host, port) = self.address.rsplit_once(':').unwrap_or_default();
        if host.is_empty() || port.parse::<u16>().is_err() {
            return refuse(format!("address {:?}, expected host:port", self.address));
        }
        let dimensions = 1..=MODEL_DIMENSION_MAX;
        let (layers, experts) = (model.num_layers, model.num_experts);
        let is_real = dimensions.contains(&layers) && dimensions.contains(&experts);
        if !is_real || layers * experts > MODEL_EXPERTS_MAX {
            return refuse(format!("model of {layers} layers with {experts} experts"));
        }
        if !(1..=SEGMENTS_PER_EXPERT).contains(&model.num_segments) {
            return refuse(format!("{} segments per expert", model.num_segments));
        }
        if self.roles.experts && self.segment_bytes == 0 {
            return refuse("segments of 0 bytes".to_owned());
        }
        let class = &self.numeric_class;
        let is_of_class = match self.part {
            Some(part) => part.is_of(class, layers),
            None => !class.contains('+'),
        };
        if !is_of_class {
            let part = self.part;
            return refuse(format!("{part:?} of {layers} layers in a group of {class}"));
        }
        self.measured.validate(model).or_else(refuse)
    }

    pub(super) fn encode(&self) -> Result<Bytes, Error> {
        let what = || format!("record of worker {}", self.id);
        let text = serde_json::to_vec(self).map_err(|e| Error::invalid(what(), e.to_string()))?;
        check_size(what(), text.len())?;
        Ok(Bytes::from(text))
    }

    /// Reads a record from the store.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(entry: &Entry) -> Result<Self, Error> {
        check_size(entry.key.clone(), entry.value.len())?;
        let record: Self = serde_json::from_slice(&entry.value)
            .map_err(|e| Error::invalid(entry.key.clone(), e.to_string()))?;
        record.validate()?;
        if record.key() != entry.key {
            return Err(Error::invalid(
                entry.key.clone(),
                format!("record of worker {}", record.id),
            ));
        }
        Ok(record)
    }
}

fn check_size(what: String, size: usize) -> Result<(), Error> {
    if size > RECORD_BYTES_MAX {
        let max = RECORD_BYTES_MAX;
        return Err(Error::TooLarge { what, size, max });
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::measured::ExpertLoad;
    use super::*;
    use crate::store::Revision;

    pub(crate) fn record(id: &str) -> WorkerRecord {
        WorkerRecord {
            schema: RECORD_SCHEMA,
            id: WorkerId::new(id),
            address: "10.0.0.1:7000".to_owned(),
            socket: Some(HostSocket {
                host: "5ca1ab1e".to_owned(),
                path: "/tmp/w.sock".to_owned(),
            }),
            roles: Roles {
                attention: true,
                experts: true,
            },
            capacity_bytes: 64_000,
            segment_bytes: 1000,
            numeric_class: "cpu-q8".to_owned(),
            model: ModelFacts {
                fingerprint: "f1".to_owned(),
                name: "tiny".to_owned(),
                num_layers: 2,
                num_experts: 4,
                num_segments: 8,
            },
            state: WorkerState::Joining,
            loaded: Epoch(0),
            incarnation: 1,
            started_ms: 1,
            version: "0.1.0".to_owned(),
            load: WorkerLoad::default(),
            measured: Measured::default(),
            sequences_max: 0,
            part: None,
        }
    }

    fn entry(record: &WorkerRecord, edit: impl Fn(&mut serde_json::Value)) -> Entry {
        let mut value = serde_json::to_value(record).unwrap();
        edit(&mut value);
        Entry {
            key: record.key(),
            value: Bytes::from(value.to_string()),
            revision: Revision(1),
        }
    }

    #[test]
    fn a_record_survives_the_way_through_the_store() {
        let record = record("a");
        let stored = entry(&record, |value| value["new_field"] = "later version".into());
        assert_eq!(WorkerRecord::decode(&stored).unwrap(), record);
        assert_eq!(record.capacity_segments(), 64);
        // A program of before has measured nothing.
        let older = entry(&record, |value| {
            value.as_object_mut().unwrap().remove("measured").unwrap();
        });
        assert_eq!(WorkerRecord::decode(&older).unwrap(), record);
    }

    /// What is meddled with in `tests/fuzz` is a good record to begin with.
    #[test]
    fn the_record_of_the_corpus_is_a_record() {
        let stored = Entry {
            key: "workers/w".to_owned(),
            value: Bytes::from_static(include_bytes!(
                "../../../../tests/fuzz/corpus/store_value/worker"
            )),
            revision: Revision(1),
        };
        let record = WorkerRecord::decode(&stored).unwrap();
        assert!(record.measured.expert_load.is_some() && record.socket.is_some());
    }

    #[test]
    fn hostile_records_are_refused() {
        type Edit = fn(&mut serde_json::Value);
        let edits: [(&str, Edit); 24] = [
            ("path", |v| v["socket"]["path"] = "p".repeat(600).into()),
            ("schema", |v| v["schema"] = 3.into()),
            ("another id", |v| v["id"] = "b".into()),
            ("slash", |v| v["id"] = "a/b".into()),
            ("address", |v| v["address"] = "nowhere".into()),
            ("long", |v| v["version"] = "v".repeat(600).into()),
            ("layers", |v| v["model"]["num_layers"] = u64::MAX.into()),
            ("experts", |v| {
                v["model"]["num_layers"] = 4096.into();
                v["model"]["num_experts"] = 4096.into();
            }),
            ("segments", |v| v["model"]["num_segments"] = 9.into()),
            ("no bytes", |v| v["segment_bytes"] = 0.into()),
            ("part", |v| v["part"]["end_layer"] = 2.into()),
            ("turned part", |v| v["part"]["first_layer"] = 2.into()),
            ("other half", |v| v["part"]["attention"] = false.into()),
            ("no part", |v| {
                v["schema"] = 1.into();
                v["part"] = serde_json::Value::Null;
            }),
            ("older schema", |v| v["schema"] = 1.into()),
            ("one class", |v| v["numeric_class"] = "cpu-q8".into()),
            ("no layers", |v| v["numeric_class"] = "a+b@x".into()),
            ("state", |v| v["state"] = "flying".into()),
            ("speed", |v| v["measured"]["segment_ns"] = 0.into()),
            ("negative", |v| v["measured"]["segment_ns"] = (-1).into()),
            ("link", |v| v["measured"]["link_us"] = u64::MAX.into()),
            ("rows", |v| v["measured"]["expert_load"]["rows"] = 0.into()),
            ("top k", |v| {
                v["measured"]["expert_load"]["top_k"] = 5.into();
            }),
            ("levels", |v| {
                v["measured"]["expert_load"]["levels"] = "GGGGGGG\u{e9}".into();
            }),
        ];
        let mut measured = record("a");
        measured.schema = RECORD_SCHEMA_OF_PARTS;
        measured.numeric_class = "a+b@1".to_owned();
        measured.part = Some(Part {
            attention: true,
            first_layer: 0,
            end_layer: 1,
        });
        measured.measured = Measured {
            segment_ns: Some(1),
            link_us: Some(1),
            expert_load: ExpertLoad::of(&[9.0; 8], 4, 2),
        };
        assert!(WorkerRecord::decode(&entry(&measured, |_| {})).is_ok());
        for (name, edit) in edits {
            let stored = entry(&measured, edit);
            assert!(WorkerRecord::decode(&stored).is_err(), "{name}");
        }
        let mut huge = entry(&record("a"), |_| {});
        huge.value = Bytes::from(vec![b' '; RECORD_BYTES_MAX + 1]);
        let error = WorkerRecord::decode(&huge).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
}
