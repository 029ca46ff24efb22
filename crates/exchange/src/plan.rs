//! Decides which worker computes which rows of which expert slice. Pure: no clock, no network, no state.

use std::fmt;

use bytes::Bytes;
use tramontane_compute::RoutedRows;
use tramontane_types::{ExpertId, LayerId, ModelGeometry, Placement, SegmentRange, WorkerId};

use crate::{CallLimits, Error, Job};

/// What planning looks at.
pub struct View<'a> {
    /// The newest placement; without one nobody can be asked.
    pub placement: Option<&'a Placement>,
    /// The planning worker.
    pub me: &'a WorkerId,
    /// Segments of an expert of the layer that are loaded here.
    pub held: &'a dyn Fn(ExpertId) -> u8,
    /// Whether a worker may be asked now.
    pub usable: &'a dyn Fn(&WorkerId) -> bool,
    /// Turns the choice among several holders; never changes a bit of the result.
    pub turn: usize,
    /// Non-empty segments of each expert.
    pub num_segments: u8,
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View")
            .field("me", self.me)
            .field("turn", &self.turn)
            .finish_non_exhaustive()
    }
}

/// Who computes what. Row ids count rows of the step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Jobs for our own experts, expert-major.
    pub local: Vec<Job>,
    /// Jobs for others, expert-major for each of them; workers in the order of the placement.
    pub remote: Vec<(WorkerId, Vec<Job>)>,
    /// Jobs that nobody can be asked for now.
    pub homeless: Vec<Job>,
}

/// Where a part of an expert is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Home {
    Local,
    Remote(u16),
    Nowhere,
}

/// All experts that the rows chose, whole, ascending; rows ascending.
///
/// # Errors
/// When the lengths do not fit the geometry, or an expert does not exist.
pub fn wants(
    layer: LayerId,
    routed: &RoutedRows,
    geometry: &ModelGeometry,
    limits: &CallLimits,
) -> Result<Vec<Job>, Error> {
    let num_choices = routed.num_rows * geometry.top_k;
    let lengths = [
        (
            "bytes of rows",
            routed.num_rows * limits.row_bytes,
            routed.rows.len(),
        ),
        ("experts", num_choices, routed.topk_ids.len()),
        ("weights", num_choices, routed.topk_weights.len()),
    ];
    for (what, expected, got) in lengths {
        if expected != got {
            return Err(Error::Routing {
                layer,
                what,
                expected,
                got,
            });
        }
    }
    let mut rows_of = vec![Vec::new(); geometry.num_experts];
    for (choice, expert) in routed.topk_ids.iter().enumerate() {
        let Some(rows) = rows_of.get_mut(usize::from(expert.0)) else {
            return Err(Error::NoExpert {
                layer,
                row: choice / geometry.top_k,
                num_experts: geometry.num_experts,
                got: usize::from(expert.0),
            });
        };
        // A step has far fewer than 2^32 rows: its rows are in memory.
        rows.push((choice / geometry.top_k) as u32);
    }
    let mut wants = Vec::new();
    for (expert, row_ids) in rows_of.into_iter().enumerate() {
        if !row_ids.is_empty() {
            // In range: it was a `u16` before.
            let expert = ExpertId(expert as u16);
            wants.push(Job {
                expert,
                range: SegmentRange::WHOLE,
                row_ids,
            });
        }
    }
    Ok(wants)
}

/// Divides `wants` among the holders: ourselves first, then a usable holder, turn by turn.
///
/// Neighbouring slices of one expert that land on the same worker become one job.
#[must_use]
pub fn plan(view: &View<'_>, layer: LayerId, wants: &[Job]) -> Plan {
    let num_workers = view.placement.map_or(0, |p| p.workers.len());
    let mut of_worker = vec![Vec::new(); num_workers];
    let mut plan = Plan::default();
    for want in wants {
        for (home, range) in homes(view, layer, want) {
            let jobs = match home {
                Home::Local => &mut plan.local,
                Home::Remote(worker) => &mut of_worker[usize::from(worker)],
                Home::Nowhere => &mut plan.homeless,
            };
            jobs.push(Job {
                range,
                ..want.clone()
            });
        }
    }
    let workers = view.placement.map_or(&[][..], |p| &p.workers);
    for (worker, jobs) in workers.iter().zip(of_worker) {
        if !jobs.is_empty() {
            plan.remote.push((worker.clone(), jobs));
        }
    }
    plan
}

/// Cuts the range of one want where its home changes; leaves out what lies behind the last column.
fn homes(view: &View<'_>, layer: LayerId, want: &Job) -> Vec<(Home, SegmentRange)> {
    let slices = view
        .placement
        .map_or(&[][..], |p| p.slices(layer, want.expert));
    let held = (view.held)(want.expert);
    let mut home_of = [Home::Nowhere; SegmentRange::WHOLE.end() as usize];
    for slice in slices {
        let home = home(view, layer, want.expert, slice.range, &slice.holders, held);
        let segments = usize::from(slice.range.begin())..usize::from(slice.range.end());
        home_of[segments].fill(home);
    }
    let mut parts: Vec<(Home, SegmentRange)> = Vec::new();
    for segment in want.range.begin()..want.range.end().min(view.num_segments) {
        let home = home_of[usize::from(segment)];
        let begin = match parts.last() {
            Some(&(last, range)) if last == home => range.begin(),
            _ => segment,
        };
        let Ok(range) = SegmentRange::new(begin, segment + 1) else {
            continue;
        };
        if begin != segment {
            parts.pop();
        }
        parts.push((home, range));
    }
    parts
}

fn home(
    view: &View<'_>,
    layer: LayerId,
    expert: ExpertId,
    range: SegmentRange,
    holders: &[u16],
    held: u8,
) -> Home {
    let named = |&holder: &u16| {
        view.placement?
            .worker(holder)
            .map(|worker| (holder, worker))
    };
    let is_me = |holder: &u16| named(holder).is_some_and(|(_, worker)| worker == view.me);
    // What lies behind the last column needs not be held.
    let needed = range.mask() & low_bits(view.num_segments);
    if holders.iter().any(is_me) && held & needed == needed {
        return Home::Local;
    }
    let up = |holder: &u16| {
        named(holder).is_some_and(|(_, worker)| worker != view.me && (view.usable)(worker))
    };
    let num_up = holders.iter().filter(|h| up(h)).count();
    if num_up == 0 {
        return Home::Nowhere;
    }
    let turn = view
        .turn
        .wrapping_add(usize::from(layer.0) + usize::from(expert.0));
    let chosen = holders.iter().filter(|h| up(h)).nth(turn % num_up);
    chosen.map_or(Home::Nowhere, |&holder| Home::Remote(holder))
}

const fn low_bits(count: u8) -> u8 {
    if count >= 8 {
        u8::MAX
    } else {
        (1 << count) - 1
    }
}

/// Cuts one worker's jobs into calls that keep within `limits`: by rows, ascending.
#[must_use]
pub fn frames(
    jobs: Vec<Job>,
    num_rows: usize,
    num_segments: u8,
    limits: &CallLimits,
) -> Vec<Frame> {
    let mut vectors = vec![0; num_rows];
    for job in &jobs {
        for &row in &job.row_ids {
            vectors[row as usize] += job.range.num_nodes(num_segments);
        }
    }
    let rows: Vec<u32> = (0..num_rows as u32)
        .filter(|&row| vectors[row as usize] > 0)
        .collect();
    let total: usize = vectors.iter().sum();
    if rows.len() <= limits.rows_max && total <= limits.vectors_max {
        return vec![Frame { rows, jobs }];
    }
    let mut frames = Vec::new();
    let (mut begin, mut used) = (0, 0);
    for end in 0..=rows.len() {
        let next = rows
            .get(end)
            .map_or(usize::MAX, |&row| vectors[row as usize]);
        let full = end - begin >= limits.rows_max || next > limits.vectors_max - used;
        if full && end > begin {
            frames.push(cut(&jobs, &rows[begin..end]));
            (begin, used) = (end, 0);
        }
        used += next.min(limits.vectors_max);
    }
    frames
}

/// The part of `jobs` that concerns `rows`, which are consecutive among the worker's rows.
fn cut(jobs: &[Job], rows: &[u32]) -> Frame {
    let (first, last) = (
        rows.first().copied().unwrap_or(0),
        rows.last().copied().unwrap_or(0),
    );
    let mut part = Vec::new();
    for job in jobs {
        let begin = job.row_ids.partition_point(|&row| row < first);
        let end = job.row_ids.partition_point(|&row| row <= last);
        if begin < end {
            part.push(Job {
                row_ids: job.row_ids[begin..end].to_vec(),
                ..*job
            });
        }
    }
    Frame {
        rows: rows.to_vec(),
        jobs: part,
    }
}

/// Whether `me` is a holder of every slice.
#[must_use]
pub fn gives_all(placement: &Placement, me: &WorkerId) -> bool {
    let index = placement.workers.iter().position(|worker| worker == me);
    let Some(index) = index.and_then(|index| u16::try_from(index).ok()) else {
        return false;
    };
    let mut slices = placement.experts.iter().flatten();
    slices.all(|slice| slice.holders.contains(&index))
}

/// What one call carries: unique rows of the step, ascending, and jobs over them in the step's numbering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The rows to send, each once.
    pub rows: Vec<u32>,
    /// The jobs.
    pub jobs: Vec<Job>,
}

impl Frame {
    /// The bytes to send, and the jobs in the numbering of the sent rows. `step_rows` holds all rows of
    /// the step, `[num_rows * row_bytes]`; when all of them go, nothing is copied.
    #[must_use]
    pub fn pack(&self, step_rows: &Bytes, row_bytes: usize) -> (Bytes, Vec<Job>) {
        if self.rows.len() * row_bytes == step_rows.len() {
            return (step_rows.clone(), self.jobs.clone());
        }
        let mut bytes = Vec::with_capacity(self.rows.len() * row_bytes);
        for &row in &self.rows {
            let begin = row as usize * row_bytes;
            bytes.extend_from_slice(&step_rows[begin..begin + row_bytes]);
        }
        let sent_as = |row: &u32| self.rows.partition_point(|r| r < row) as u32;
        let jobs = self.jobs.iter().map(|job| Job {
            row_ids: job.row_ids.iter().map(sent_as).collect(),
            ..*job
        });
        (bytes.into(), jobs.collect())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tramontane_types::{Epoch, SliceHolders};

    use super::*;

    const SEGMENTS: u8 = 8;

    #[test]
    fn a_worker_has_the_whole_model_when_it_holds_every_slice() {
        let whole = placement(&[&[(0, 4, &[1, 0]), (4, 8, &[0])], &[(0, 8, &[0, 2])]]);
        let has_all = |index: usize| gives_all(&whole, &whole.workers[index]);
        assert!(has_all(0));
        assert!(!has_all(1) && !has_all(2));
        assert!(!gives_all(&whole, &WorkerId::new("nobody")));
    }

    fn limits(rows_max: usize, vectors_max: usize) -> CallLimits {
        CallLimits {
            rows_max,
            vectors_max,
            row_bytes: 4,
            vector_bytes: 4,
        }
    }

    fn placement(experts: &[&[(u8, u8, &[u16])]]) -> Placement {
        let slice = |&(begin, end, holders): &(u8, u8, &[u16])| SliceHolders {
            range: SegmentRange::new(begin, end).unwrap(),
            holders: holders.to_vec(),
        };
        let placement = Placement {
            epoch: Epoch(1),
            numeric_class: String::new(),
            model: String::new(),
            num_layers: 1,
            num_experts: experts.len(),
            workers: ["a", "b", "c"].map(WorkerId::new).to_vec(),
            experts: experts
                .iter()
                .map(|s| s.iter().map(slice).collect())
                .collect(),
        };
        placement.validate().unwrap();
        placement
    }

    fn want(expert: u16, begin: u8, end: u8) -> Job {
        let range = SegmentRange::new(begin, end).unwrap();
        Job {
            expert: ExpertId(expert),
            range,
            row_ids: vec![0, 2],
        }
    }

    /// One line per worker: `a: 0[0..8]`; `-` has no home.
    fn show(placement: &Placement, me: &str, down: &str, turn: usize, wants: &[Job]) -> String {
        let me = WorkerId::new(me);
        let view = View {
            placement: Some(placement),
            me: &me,
            held: &|expert| if expert.0 == 9 { 0 } else { 0xff },
            usable: &|worker| !down.contains(worker.as_str()),
            turn,
            num_segments: SEGMENTS,
        };
        let plan = plan(&view, LayerId(0), wants);
        let line = |name: &str, jobs: &[Job]| {
            let jobs: Vec<_> = jobs
                .iter()
                .map(|j| format!("{}[{}]", j.expert, j.range))
                .collect();
            if jobs.is_empty() {
                String::new()
            } else {
                format!("{name}: {}\n", jobs.join(" "))
            }
        };
        let remote: String = plan
            .remote
            .iter()
            .map(|(w, jobs)| line(w.as_str(), jobs))
            .collect();
        line("me", &plan.local) + &remote + &line("-", &plan.homeless)
    }

    #[test]
    fn ours_first_then_turn_by_turn_among_those_that_are_up() {
        let p = placement(&[
            &[(0, 8, &[0, 1])],
            &[(0, 8, &[1, 2])],
            &[(0, 4, &[2]), (4, 8, &[1])],
        ]);
        let wants = [want(0, 0, 8), want(1, 0, 8), want(2, 0, 8)];
        assert_eq!(
            show(&p, "a", "", 0, &wants),
            "me: 0[0..8]\nb: 2[4..8]\nc: 1[0..8] 2[0..4]\n"
        );
        assert_eq!(
            show(&p, "a", "", 1, &wants),
            "me: 0[0..8]\nb: 1[0..8] 2[4..8]\nc: 2[0..4]\n"
        );
        assert_eq!(
            show(&p, "a", "c", 0, &wants),
            "me: 0[0..8]\nb: 1[0..8] 2[4..8]\n-: 2[0..4]\n"
        );
        assert_eq!(
            show(&p, "x", "bc", 7, &wants),
            "a: 0[0..8]\n-: 1[0..8] 2[0..8]\n"
        );
    }

    #[test]
    fn neighbouring_slices_of_one_holder_are_one_job_and_parts_stay_parts() {
        let p = placement(&[&[(0, 2, &[1]), (2, 4, &[1]), (4, 6, &[2]), (6, 8, &[1])]]);
        assert_eq!(
            show(&p, "a", "", 0, &[want(0, 0, 8)]),
            "b: 0[0..4] 0[6..8]\nc: 0[4..6]\n"
        );
        assert_eq!(
            show(&p, "a", "", 0, &[want(0, 3, 5)]),
            "b: 0[3..4]\nc: 0[4..5]\n"
        );
    }

    #[test]
    fn what_we_should_hold_but_do_not_is_asked_of_others() {
        let mut experts: Vec<&[(u8, u8, &[u16])]> = vec![&[(0, 8, &[0])]; 9];
        experts.push(&[(0, 8, &[0, 2])]);
        let p = placement(&experts);
        assert_eq!(show(&p, "a", "", 0, &[want(9, 0, 8)]), "c: 9[0..8]\n");
        assert_eq!(show(&p, "a", "c", 0, &[want(9, 0, 8)]), "-: 9[0..8]\n");
    }

    #[test]
    fn a_dense_model_wants_its_one_expert_and_bad_routing_is_named() {
        let mut geometry = ModelGeometry {
            hidden: 1,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 2,
            ff: 32,
            num_experts: 1,
            top_k: 1,
            vocab: 1,
            rope_theta: 1e4,
            rms_eps: 1e-5,
            sliding_window: None,
            max_positions: 1,
        };
        let mut routed = RoutedRows {
            num_rows: 3,
            rows: vec![0; 12],
            topk_ids: vec![ExpertId(0); 3],
            topk_weights: vec![1.0; 3],
        };
        let wanted = |routed: &RoutedRows, geometry: &ModelGeometry| {
            wants(LayerId(0), routed, geometry, &limits(9, 99)).map_err(|e| e.to_string())
        };
        let jobs = wanted(&routed, &geometry).unwrap();
        assert_eq!((jobs.len(), &jobs[0].row_ids[..]), (1, &[0, 1, 2][..]));
        routed.topk_ids[1] = ExpertId(1);
        let text = "layer 0: row 1 chose expert 1, expected less than 1";
        assert_eq!(wanted(&routed, &geometry), Err(text.to_owned()));
        routed.rows.pop();
        let text = "layer 0: routed bytes of rows: expected 12, got 11";
        assert_eq!(wanted(&routed, &geometry), Err(text.to_owned()));
        (routed.rows, geometry.top_k) = (vec![0; 12], 2);
        let text = "layer 0: routed experts: expected 6, got 3";
        assert_eq!(wanted(&routed, &geometry), Err(text.to_owned()));
    }

    #[test]
    fn a_call_carries_each_row_once_and_counts_them_anew() {
        let jobs = vec![
            want(0, 0, 8),
            Job {
                row_ids: vec![2, 3],
                ..want(1, 0, 8)
            },
        ];
        let frames = frames(jobs, 5, SEGMENTS, &limits(9, 99));
        assert_eq!(frames.len(), 1);
        let rows: Bytes = (0..20).collect::<Vec<u8>>().into();
        let (bytes, jobs) = frames[0].pack(&rows, 4);
        assert_eq!(bytes, [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15][..]);
        assert_eq!(jobs[0].row_ids, [0, 1]);
        assert_eq!(jobs[1].row_ids, [1, 2]);
    }

    proptest! {
        #[test]
        fn frames_keep_their_limits_and_lose_nothing(
            jobs in proptest::collection::vec(
                (0_u8..8, 1_u8..8, proptest::collection::btree_set(0_u32..40, 1..30)), 1..6),
            rows_max in 1_usize..20,
            vectors_max in 48_usize..60,
        ) {
            let job = |(expert, (begin, len, rows)): (usize, (u8, u8, std::collections::BTreeSet<u32>))| Job {
                expert: ExpertId(expert as u16),
                range: SegmentRange::new(begin, (begin + len).min(8)).unwrap(),
                row_ids: rows.into_iter().collect(),
            };
            let jobs: Vec<Job> = jobs.into_iter().enumerate().map(job).collect();
            let frames = frames(jobs.clone(), 40, SEGMENTS, &limits(rows_max, vectors_max));
            let mut seen: Vec<Vec<u32>> = vec![Vec::new(); jobs.len()];
            for frame in &frames {
                let vectors = |job: &Job| job.row_ids.len() * job.range.num_nodes(SEGMENTS);
                prop_assert!(!frame.jobs.is_empty() && frame.rows.len() <= rows_max);
                prop_assert!(frame.jobs.iter().map(vectors).sum::<usize>() <= vectors_max);
                for job in &frame.jobs {
                    prop_assert!(job.row_ids.iter().all(|row| frame.rows.contains(row)));
                    seen[usize::from(job.expert.0)].extend(&job.row_ids);
                }
            }
            let rows: Vec<_> = jobs.iter().map(|job| job.row_ids.clone()).collect();
            prop_assert_eq!(seen, rows);
        }
    }
}
