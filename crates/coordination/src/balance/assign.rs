//! Puts slices on workers: how many copies of each, how many slices per worker and layer, which ones,
//! and who is asked first. Never moves a slice that may stay.

use std::cmp::Ordering;

use tramontane_types::{ExpertId, LayerId, Placement, SliceHolders, WorkerId};

use super::even::even_out;
use super::flow::Table;
use super::quota::{quotas, shares};
use super::{BalanceError, Plan, hot, summary, usable_current};

/// `[num_layers][layer_slices][num_workers]`: 1 where the worker holds the slice. Slices of a layer
/// are ordered by expert, then segment.
type Holding = Vec<Vec<Vec<usize>>>;

/// Rounding noise of a share.
const SHARE_NOISE: f64 = 1e-6;

/// The placement of a plan whose capacity suffices.
pub(super) fn place(plan: &Plan<'_>) -> Result<Placement, BalanceError> {
    let num_workers = plan.workers.len();
    let replicas = plan.input.policy.replicas.get().min(num_workers);
    let offered: usize = plan.capacity.iter().sum();
    let total = offered.min(plan.copy_slices() * replicas);
    let weights = plan.weights();
    let hot = hot::wanted(plan, plan.now);
    let shares = shares(&weights, &plan.capacity, total);

    let mut held = held_now(plan);
    let copies = copies(plan, &held, total);
    drop_spare_copies(&mut held, &copies, &shares);
    let quotas = quotas(
        &shares,
        &plan.capacity,
        &held_slices(&held, num_workers),
        total,
    );
    let counts = layer_counts(plan, &held, &copies, &quotas)?;
    for layer in 0..held.len() {
        let loads = slice_loads(plan, layer);
        choose_slices(
            &mut held[layer],
            &copies[layer],
            &counts[layer],
            (&loads, &weights),
        )
        .ok_or_else(|| inconsistent(layer))?;
        if plan.input.expert_load.is_some() {
            let loads = copy_loads(plan, layer, &loads, (&held[layer], &hot));
            even_out(&mut held[layer], &loads, &weights);
        }
    }
    let mut placement = build(plan, &held, &weights);
    hot::add(&mut placement, plan, &hot, (&weights, plan.now));
    Ok(placement)
}

/// Work of one copy of each slice of a layer, once hot experts have their further copies.
fn copy_loads(
    plan: &Plan<'_>,
    layer: usize,
    loads: &[f64],
    (held, hot): (&[Vec<usize>], &[usize]),
) -> Vec<f64> {
    let copies = |slice: usize| {
        let expert = layer * plan.input.num_experts + slice / plan.cut.len();
        held[slice].iter().sum::<usize>() + hot[expert]
    };
    let load = |(slice, load): (usize, &f64)| load / copies(slice).max(1) as f64;
    loads.iter().enumerate().map(load).collect()
}

fn inconsistent(layer: usize) -> BalanceError {
    BalanceError::Inconsistent {
        detail: format!("slices of layer {layer} do not fit the quotas"),
    }
}

/// Which of our slices each worker holds completely in the current placement.
fn held_now(plan: &Plan<'_>) -> Holding {
    let num_workers = plan.workers.len();
    let layer_slices = plan.layer_slices();
    let mut held = vec![vec![vec![0; num_workers]; layer_slices]; plan.input.num_layers];
    let masks = usable_current(plan.input).map(summary::masks);
    let masks = masks.unwrap_or_default();
    let real = (1_u16 << plan.input.num_segments) - 1;
    for (worker, share) in plan.workers.iter().enumerate() {
        let Some(experts) = masks.get(&share.id) else {
            continue;
        };
        for (layer, slices) in held.iter_mut().enumerate() {
            for (index, holders) in slices.iter_mut().enumerate() {
                let (expert, part) = (index / plan.cut.len(), index % plan.cut.len());
                let expert = (LayerId(layer as u16), ExpertId(expert as u16));
                let have = u16::from(experts.get(&expert).copied().unwrap_or(0));
                let want = u16::from(plan.cut[part].mask()) & real;
                holders[worker] = usize::from(want & !have == 0);
            }
        }
    }
    held
}

fn held_slices(held: &Holding, num_workers: usize) -> Vec<usize> {
    let mut counts = vec![0; num_workers];
    for holders in held.iter().flatten() {
        for (count, holds) in counts.iter_mut().zip(holders) {
            *count += holds;
        }
    }
    counts
}

/// Copies of each slice, `[num_layers][layer_slices]`: all alike, and where memory does not suffice
/// for one more of each, one more of the most used ones.
fn copies(plan: &Plan<'_>, held: &Holding, total: usize) -> Vec<Vec<usize>> {
    let (every, extra) = (total / plan.copy_slices(), total % plan.copy_slices());
    let mut copies = vec![vec![every; plan.layer_slices()]; held.len()];
    let loads: Vec<Vec<f64>> = (0..held.len()).map(|l| slice_loads(plan, l)).collect();
    let mut order: Vec<(usize, usize)> = (0..plan.layer_slices())
        .flat_map(|slice| (0..held.len()).map(move |layer| (layer, slice)))
        .collect();
    let has_more = |(l, s): (usize, usize)| held[l][s].iter().sum::<usize>() > every;
    let first = |a: (usize, usize), b: (usize, usize)| -> Ordering {
        let by_load = loads[b.0][b.1].total_cmp(&loads[a.0][a.1]);
        by_load.then(has_more(b).cmp(&has_more(a)))
    };
    order.sort_by(|&a, &b| first(a, b));
    for (layer, slice) in order.into_iter().take(extra) {
        copies[layer][slice] += 1;
    }
    copies
}

/// Work of each slice of a layer: expert load times length.
fn slice_loads(plan: &Plan<'_>, layer: usize) -> Vec<f64> {
    let load = |index: usize| {
        let (expert, part) = (index / plan.cut.len(), index % plan.cut.len());
        let begin = plan.cut[part].begin();
        let length = plan.cut[part].end().min(plan.input.num_segments) - begin;
        let loads = plan.input.expert_load.as_ref();
        let load = loads.and_then(|l| l.get(layer * plan.input.num_experts + expert));
        f64::from(length) * f64::from(load.copied().unwrap_or(1.0))
    };
    (0..plan.layer_slices()).map(load).collect()
}

/// Takes slices with more holders than wanted from those who hold most for their share.
fn drop_spare_copies(held: &mut Holding, copies: &[Vec<usize>], shares: &[f64]) {
    let mut counts = held_slices(held, shares.len());
    for (slices, copies) in held.iter_mut().zip(copies) {
        for (holders, &copies) in slices.iter_mut().zip(copies) {
            while holders.iter().sum::<usize>() > copies {
                let full = |i: &usize| counts[*i] as f64 - shares[*i];
                let some = (0..holders.len()).filter(|&i| holders[i] > 0);
                let Some(worker) = some.max_by(|a, b| full(a).total_cmp(&full(b))) else {
                    break;
                };
                holders[worker] = 0;
                counts[worker] -= 1;
            }
        }
    }
}

/// How many slices each worker holds of each layer, `[num_layers][num_workers]`: its quota spread
/// evenly, as far as what it holds allows.
fn layer_counts(
    plan: &Plan<'_>,
    held: &Holding,
    copies: &[Vec<usize>],
    quotas: &[usize],
) -> Result<Vec<Vec<usize>>, BalanceError> {
    let wanted: Vec<usize> = copies.iter().map(|layer| layer.iter().sum()).collect();
    let total: usize = quotas.iter().sum();
    let even = |l: usize, w: usize| quotas[w] as f64 * wanted[l] as f64 / total as f64;
    let low = |l: usize, w: usize| (even(l, w) + SHARE_NOISE).floor() as usize;
    let high = |l: usize, w: usize| (even(l, w) - SHARE_NOISE).ceil() as usize;

    let column = |slices: &Vec<Vec<usize>>, w: usize| slices.iter().map(|h| h[w]).sum();
    let row = |slices| (0..quotas.len()).map(|w| column(slices, w)).collect();
    let mut kept: Vec<Vec<usize>> = held.iter().map(row).collect();
    release(&mut kept, quotas, low, even);

    let sum = |w: usize| kept.iter().map(|row| row[w]).sum::<usize>();
    let mut table = Table {
        row_lack: (0..kept.len())
            .map(|l| wanted[l].saturating_sub(kept[l].iter().sum()))
            .collect(),
        column_lack: (0..quotas.len())
            .map(|w| quotas[w].saturating_sub(sum(w)))
            .collect(),
        cells: kept.clone(),
    };
    let all = plan.layer_slices();
    table.fill(|l, w| low(l, w).min(all), |l, w| kept[l][w]);
    table.fill(|l, w| high(l, w).min(all), |l, w| kept[l][w]);
    table.fill(|_, _| all, |l, w| kept[l][w]);
    table.fill(|_, _| all, |_, _| 0);
    if table.is_complete() {
        return Ok(table.cells);
    }
    let detail = "quotas do not fit the layers".to_owned();
    Err(BalanceError::Inconsistent { detail })
}

/// Takes slices from workers above their quota: evenly over the layers, and from each worker where it
/// has most of its even share.
fn release(
    kept: &mut [Vec<usize>],
    quotas: &[usize],
    low: impl Fn(usize, usize) -> usize,
    even: impl Fn(usize, usize) -> f64,
) {
    let sum = |w: usize| kept.iter().map(|row| row[w]).sum::<usize>();
    let mut spare: Vec<usize> = (0..quotas.len())
        .map(|w| sum(w).saturating_sub(quotas[w]))
        .collect();
    let mut released = vec![0; kept.len()];
    while spare.iter().any(|&s| s > 0) {
        let mut best: Option<(usize, f64, usize, usize)> = None;
        for (layer, row) in kept.iter().enumerate() {
            for (worker, &count) in row.iter().enumerate() {
                if spare[worker] == 0 || count <= low(layer, worker) {
                    continue;
                }
                let excess = count as f64 - even(layer, worker);
                let better = best.is_none_or(|(taken, most, _, _)| {
                    released[layer] < taken || (released[layer] == taken && excess > most)
                });
                if better {
                    best = Some((released[layer], excess, layer, worker));
                }
            }
        }
        // Some layer of a worker above its quota is above its even share, so there is always one.
        let Some((_, _, layer, worker)) = best else {
            return;
        };
        kept[layer][worker] -= 1;
        released[layer] += 1;
        spare[worker] -= 1;
    }
}

/// Chooses the slices of one layer: each worker gets its count, each slice its copies on distinct
/// workers. `None` if that cannot be.
fn choose_slices(
    held: &mut Vec<Vec<usize>>,
    copies: &[usize],
    counts: &[usize],
    (loads, weights): (&[f64], &[f64]),
) -> Option<()> {
    for worker in 0..counts.len() {
        give_back(held, worker, counts, loads);
    }
    let holds = |held: &[Vec<usize>], w: usize| held.iter().map(|h| h[w]).sum::<usize>();
    let kept = held.clone();
    let mut table = Table {
        row_lack: (0..copies.len())
            .map(|s| copies[s].saturating_sub(held[s].iter().sum()))
            .collect(),
        column_lack: (0..counts.len())
            .map(|w| counts[w].saturating_sub(holds(held, w)))
            .collect(),
        cells: std::mem::take(held),
    };
    greedy(&mut table, loads, weights);
    table.fill(|_, _| 1, |s, w| kept[s][w]);
    table.fill(|_, _| 1, |_, _| 0);
    let complete = table.is_complete();
    *held = table.cells;
    complete.then_some(())
}

/// Takes slices of usual load from a worker above its count, first those that somebody below his
/// count can take.
fn give_back(held: &mut [Vec<usize>], worker: usize, counts: &[usize], loads: &[f64]) {
    let holds = |held: &[Vec<usize>], w: usize| held.iter().map(|h| h[w]).sum::<usize>();
    let usual = loads.iter().sum::<f64>() / loads.len().max(1) as f64;
    while holds(held, worker) > counts[worker] {
        let needy: Vec<usize> = (0..counts.len())
            .filter(|&w| holds(held, w) < counts[w])
            .collect();
        let key = |slice: usize| {
            let taker = needy.iter().any(|&w| held[slice][w] == 0);
            (!taker, (loads[slice] - usual).abs())
        };
        let mine = (0..held.len()).rev().filter(|&s| held[s][worker] > 0);
        let slice = mine.min_by(|&a, &b| {
            let (a, b) = (key(a), key(b));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        });
        let Some(slice) = slice else { return };
        held[slice][worker] = 0;
    }
}

/// Gives the most used slices first, each to whoever has least work for what it offers.
fn greedy(table: &mut Table, loads: &[f64], weights: &[f64]) {
    let mut work = vec![0.0; weights.len()];
    for (holders, load) in table.cells.iter().zip(loads) {
        for (work, &holds) in work.iter_mut().zip(holders) {
            *work += load * holds as f64;
        }
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|&a, &b| loads[b].total_cmp(&loads[a]));
    for slice in order {
        while table.row_lack[slice] > 0 {
            let can = |w: &usize| table.column_lack[*w] > 0 && table.cells[slice][*w] == 0;
            let busy = |w: usize| work[w] / weights[w];
            let takers = (0..weights.len()).filter(can);
            let Some(worker) = takers.min_by(|&a, &b| busy(a).total_cmp(&busy(b))) else {
                break;
            };
            table.cells[slice][worker] = 1;
            table.row_lack[slice] -= 1;
            table.column_lack[worker] -= 1;
            work[worker] += loads[slice];
        }
    }
}

/// Writes the placement down, each slice's least busy holder first.
fn build(plan: &Plan<'_>, held: &Holding, weights: &[f64]) -> Placement {
    let counts = held_slices(held, weights.len());
    let used: Vec<usize> = (0..weights.len()).filter(|&w| counts[w] > 0).collect();
    let workers: Vec<WorkerId> = used.iter().map(|&w| plan.workers[w].id.clone()).collect();
    let mut experts = Vec::with_capacity(plan.input.num_layers * plan.input.num_experts);
    let mut backup = vec![0.0; weights.len()];
    for (layer, slices) in held.iter().enumerate() {
        let loads = slice_loads(plan, layer);
        let orders = holder_orders(slices, &loads, weights, &mut backup);
        let mut parts = orders.into_iter();
        for _ in 0..plan.input.num_experts {
            let cut = plan.cut.iter().zip(&mut parts);
            let slices = cut.map(|(&range, order)| SliceHolders {
                range,
                holders: order
                    .iter()
                    .filter_map(|w| used.iter().position(|u| u == w))
                    .map(|index| index as u16)
                    .collect(),
            });
            experts.push(slices.collect());
        }
    }
    Placement {
        epoch: plan.input.epoch,
        numeric_class: plan.input.numeric_class.clone(),
        model: plan.input.model.clone(),
        num_layers: plan.input.num_layers,
        num_experts: plan.input.num_experts,
        workers,
        experts,
    }
}

/// The holders of each slice of a layer, preferred first: preference is spread like work, and so is
/// what falls to each second holder when a first one is lost.
fn holder_orders(
    slices: &[Vec<usize>],
    loads: &[f64],
    weights: &[f64],
    backup: &mut [f64],
) -> Vec<Vec<usize>> {
    let mut orders = vec![Vec::new(); slices.len()];
    let mut work = vec![0.0; weights.len()];
    let mut by_load: Vec<usize> = (0..slices.len()).collect();
    // Slices with little choice first, then the most used.
    let choice = |s: usize| slices[s].iter().sum::<usize>();
    by_load.sort_by(|&a, &b| {
        let fewer = choice(a).cmp(&choice(b));
        fewer.then(loads[b].total_cmp(&loads[a]))
    });
    for slice in by_load {
        let mut holders: Vec<usize> = (0..weights.len())
            .filter(|&w| slices[slice][w] > 0)
            .collect();
        let busy = |w: &usize| (work[*w] + loads[slice]) / weights[*w];
        holders.sort_by(|a, b| busy(a).total_cmp(&busy(b)));
        if let Some((first, rest)) = holders.split_first_mut() {
            work[*first] += loads[slice];
            rest.sort_by(|&a, &b| (backup[a] / weights[a]).total_cmp(&(backup[b] / weights[b])));
            if let Some(&second) = rest.first() {
                backup[second] += loads[slice];
            }
        }
        orders[slice] = holders;
    }
    orders
}
