"""From a problem to a plan: relax, round, repair, polish, certify."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mmdet_moe.planning import checks, solver
from mmdet_moe.planning.certificate import gaps, moves_of, worth_of
from mmdet_moe.planning.errors import InfeasibleError, NoPlanFoundError, PlanError
from mmdet_moe.planning.instance import Instance, canonical
from mmdet_moe.planning.plan import LOAD_TOLERANCE, ExpertPlan, exact_loads
from mmdet_moe.planning.polish import TOLERANCE, WHOLE_COLUMNS, Polished, polish
from mmdet_moe.planning.printed import printed_rounding
from mmdet_moe.planning.problem import PlanningProblem
from mmdet_moe.planning.relaxation import Relaxation, relax
from mmdet_moe.planning.repair import construct, improve, repair
from mmdet_moe.planning.rounding import hierarchical_rounding
from mmdet_moe.planning.solver import Clock

#: The safety net of :func:`plan_experts`, in seconds; the limits that matter are in nodes.
TIME_LIMIT = 120.0
#: Kicks of the local search: many where one takes milliseconds and the integer programme cannot
#: be solved whole, few where it can or where each takes long. By number of columns.
KICKS = ((WHOLE_COLUMNS, 100), (20_000, 300), (100_000, 20))
#: Among equal maps the one with fewest moves is found by a penalty of this share of the spread,
#: and maps are equal if their scaled worths are this close (the rounding of a float sum).
TIE_PENALTY = 1e-5
TOLERANCE_OF_TIES = 1e-12
ROUNDINGS = ('hierarchical', 'printed')


def plan_experts(
    problem: PlanningProblem,
    *,
    time_limit: float = TIME_LIMIT,
    exact: bool = False,
    seed: int = 0,
    rounding: str = 'hierarchical',
    progress: Callable[[str], None] | None = None,
) -> ExpertPlan:
    """Plans which experts serve which dataset.

    The LP relaxation (:mod:`~mmdet_moe.planning.relaxation`) is rounded bit by bit
    (:mod:`~mmdet_moe.planning.rounding`), repaired to strict capacity
    (:mod:`~mmdet_moe.planning.repair`) and polished by an integer programme
    (:mod:`~mmdet_moe.planning.polish`). The map does not depend on the order in which names are
    listed, and the same problem, seed, versions and machine give the same plan but for ``seconds``
    wherever ``certificate['stopped']`` is not ``'time'``.

    Args:
        problem: The problem.
        time_limit: Seconds after which the best map known is returned; a safety net.
        exact: Lift the limits on nodes and columns, to prove optimality within ``time_limit``;
            ``certificate['optimal']`` says whether it was proven.
        seed: Random seed of the integer programmes.
        rounding: ``'hierarchical'``, or ``'printed'`` for the paper's Algorithm 1 as printed with
            its fallback and no polish, the baseline.
        progress: Called with one line about each step.

    Returns:
        The plan with its certificate; strictly within every limit.

    Raises:
        PlanError: If an argument is bad.
        InfeasibleError: If no map exists, which is proven.
        NoPlanFoundError: If no map was found within the limits, and none proven impossible.

    Example:
        >>> problem = PlanningProblem(['a', 'b', 'c'], 2, [[1, 0], [1, 0], [0, 1]], capacity=2)
        >>> plan = plan_experts(problem)
        >>> plan.assignment, plan.certificate['optimal']
        ({'a': {'e0': 1.0}, 'b': {'e0': 1.0}, 'c': {'e1': 1.0}}, True)
    """
    limit = checks.scalar(time_limit, 'time_limit')
    if limit <= 0:
        raise PlanError(f'time_limit must be positive, got {checks.number(limit)}')
    seed = checks.integer(seed, 'seed', 0)
    if rounding not in ROUNDINGS:
        raise PlanError(f'rounding must be one of {", ".join(ROUNDINGS)}, got {rounding!r}')
    if exact and rounding == 'printed':
        raise PlanError("exact=True needs rounding='hierarchical'; 'printed' is not polished")
    clock = Clock(limit)
    say = progress or (lambda text: None)
    if problem.capacity is not None:
        problem.check_possible(problem.capacity)
        return _plan(problem, problem.capacity, clock, exact, seed, rounding, say)
    for capacity, last in default_capacities(problem):
        try:
            problem.check_possible(capacity)
            # Within the limits first: a proof that a capacity is too tight may take all the time.
            plan = _plan(problem, capacity, clock, False, seed, rounding, say)
            if exact and not plan.certificate['optimal'] and clock.left() > 0:
                plan = _plan(problem, capacity, clock, True, seed, rounding, say)
            return plan
        except (InfeasibleError, NoPlanFoundError) as error:
            if last or clock.left() <= 0:
                raise
            say(f'capacity {checks.number(capacity[0])}: {error}')
    raise AssertionError('default_capacities ends with last=True')


def default_capacities(problem: PlanningProblem) -> Iterator[tuple[np.ndarray, bool]]:
    """The capacities to try where none are given, each with whether it is the last.

    Where every demand is the same s: s * ceil(sum r / n), and no other. Otherwise
    max(even share, largest demand) x 1.10, 1.15, 1.20 ..., where the even share is the total demand
    over n (with demands per pair, each dataset's mean over the experts) and the largest demand is
    that of one dataset, or of datasets kept together, on one expert. Ends where a single expert
    could hold everything: then capacity is not what stands in the way.
    """
    m, n = problem.demand.shape
    same = float(problem.demand.flat[0])
    if (problem.demand == same).all() and same > 0:
        yield np.full(n, same * math.ceil(int(problem.copies.sum()) / n)), True
        return
    share = math.fsum((problem.demand * problem.copies[:, None]).ravel()) / n / n
    index = {name: i for i, name in enumerate(problem.datasets)}
    largest = max(
        float(problem.demand[[index[name] for name in members]].sum(axis=0).max())
        for members in problem.merged()
    )
    base = max(share, largest)
    most = math.fsum(problem.demand.max(axis=1))
    step = 0
    while True:
        capacity = base * (1.10 + 0.05 * step)
        yield np.full(n, capacity), capacity >= most
        if capacity >= most:
            return
        step += 1


def _plan(
    problem: PlanningProblem,
    capacity: np.ndarray,
    clock: Clock,
    exact: bool,
    seed: int,
    rounding: str,
    say: Callable[[str], None],
) -> ExpertPlan:
    instance = canonical(problem, capacity)
    m, n = instance.shape
    say(f'relaxation of {m} rows x {n} experts')
    relaxation = relax(instance, clock)
    if rounding == 'printed':
        result, method = _printed(instance, relaxation, clock)
    else:
        chosen, near, method = _rounded(instance, relaxation, seed, clock, say)
        result = polish(
            instance,
            relaxation,
            chosen,
            exact=exact,
            clock=clock,
            seed=seed,
            near=near,
            progress=say,
        )
        if result.chosen is not None and (
            chosen is None or instance.value(result.chosen) > instance.value(chosen)
        ):
            method += '+milp'
    if result.infeasible:
        raise InfeasibleError(
            'LP-feasible, but no map exists: every 0/1 map breaks a limit (proven by the '
            'integer programme)'
        )
    if result.chosen is None:
        why = 'the time limit' if result.stopped == 'time' else 'the node limit'
        raise NoPlanFoundError(
            f'no map found within {why}, and none proven impossible; more capacity, a longer '
            '--time-limit or --exact may help'
        )
    result.chosen = _fewest_moves(problem, capacity, instance, result.chosen, seed, clock, say)
    return _certified(problem, capacity, instance, relaxation, result, method, seed, clock)


def _fewest_moves(
    problem: PlanningProblem,
    capacity: np.ndarray,
    instance: Instance,
    chosen: np.ndarray,
    seed: int,
    clock: Clock,
    say: Callable[[str], None],
) -> np.ndarray:
    """Where moves cost nothing, the map of equal worth that keeps most datasets where they were.

    Plans once more with a penalty far below any difference that matters, and takes that map only
    if it is worth as much.
    """
    if problem.move_penalty or not moves_of(problem, _by_name(problem, instance, chosen)):
        return chosen
    say('among equal maps, the one with fewest moves')
    penalised = replace(problem, move_penalty=TIE_PENALTY * instance.spread)
    other = canonical(penalised, capacity)
    relaxation = relax(other, clock)
    start, near, _ = _rounded(other, relaxation, seed, clock, say)
    found = polish(other, relaxation, start, exact=False, clock=clock, seed=seed, near=near).chosen
    if found is None or instance.value(found) < instance.value(chosen) - TOLERANCE_OF_TIES:
        return chosen
    return found if other.value(found) > other.value(chosen) else chosen


def _rounded(
    instance: Instance,
    relaxation: Relaxation,
    seed: int,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[np.ndarray | None, np.ndarray, str]:
    """A strict map from the relaxation, or None; the map that repair left; and the method."""
    chosen = hierarchical_rounding(relaxation.x, instance.worth, instance.demand, instance.copies)
    method = f'lp({relaxation.method})+hierarchical'
    near = chosen
    if not instance.is_strict(chosen):
        say('repair to strict capacity')
        near, strict = repair(instance, chosen, clock=clock)
        method += '+repair'
        if not strict:
            say('construction, largest demand first')
            built = construct(instance, relaxation.reduced)
            if built is None:
                return None, near, method
            near, strict = repair(instance, built, clock=clock)
            if not strict:
                return None, near, method
            method = f'lp({relaxation.method})+construct'
    if relaxation.bound - instance.value(near) <= TOLERANCE:
        return near, near, method
    columns = int(instance.allowed.sum())
    kicks = next((count for most, count in KICKS if columns <= most), 0)
    say(f'local search with {kicks} kicks')
    better = improve(instance, near, relaxation.reduced, relaxation.bound, kicks, seed, clock)
    if instance.value(better) > instance.value(near):
        return better, better, method + '+search'
    return near, near, method


def _printed(instance: Instance, relaxation: Relaxation, clock: Clock) -> tuple[Polished, str]:
    chosen = printed_rounding(
        relaxation.x, instance.worth, instance.demand, instance.capacity, instance.copies
    )
    method = f'lp({relaxation.method})+printed'
    if not instance.is_strict(chosen):
        method += '+repair'
        for i in np.flatnonzero(chosen.sum(axis=1) < instance.copies).tolist():
            points = np.where(chosen[i] | ~instance.allowed[i], -np.inf, relaxation.reduced[i])
            missing = int(instance.copies[i] - chosen[i].sum())
            chosen[i, np.argsort(-points, kind='stable')[:missing]] = True
        chosen, strict = repair(instance, chosen, clock=clock)
        if not strict:
            return Polished(None, relaxation.bound, False, 'nodes'), method
    proven = relaxation.bound - instance.value(chosen) <= TOLERANCE
    return Polished(chosen, relaxation.bound, False, 'optimal' if proven else 'nodes'), method


def _by_name(problem: PlanningProblem, instance: Instance, chosen: np.ndarray) -> np.ndarray:
    """A map (rows, experts) of the instance as one of the problem's datasets and experts."""
    rows = {name: i for i, members in enumerate(instance.rows) for name in members}
    column = {expert: j for j, expert in enumerate(instance.experts)}
    order = [rows[name] for name in problem.datasets]
    return chosen[np.ix_(order, [column[expert] for expert in problem.experts])]


def _certified(
    problem: PlanningProblem,
    capacity: np.ndarray,
    instance: Instance,
    relaxation: Relaxation,
    result: Polished,
    method: str,
    seed: int,
    clock: Clock,
) -> ExpertPlan:
    assert result.chosen is not None
    rows = {name: i for i, members in enumerate(instance.rows) for name in members}
    column = {expert: j for j, expert in enumerate(instance.experts)}
    experts = [column[expert] for expert in problem.experts]
    chosen = _by_name(problem, instance, result.chosen)
    value, cost = worth_of(problem, chosen)
    loads = exact_loads(chosen, problem.demand)
    _recheck(problem, capacity, chosen, loads)
    optimal = result.stopped == 'optimal'
    lp_bound = max(instance.unscaled(relaxation.bound), value)
    upper_bound = value if optimal else min(lp_bound, instance.unscaled(result.bound))
    upper_bound = max(upper_bound, value)
    gap, gap_to_spread = gaps(problem, upper_bound, value)
    certificate: dict[str, Any] = {
        'upper_bound': upper_bound,
        'lp_bound': lp_bound,
        'value': value,
        'gap': gap,
        'gap_to_spread': gap_to_spread,
        'loads': loads.tolist(),
        'duals': [float(relaxation.price[j] * instance.spread) + 0.0 for j in experts],
        'method': method,
        'optimal': optimal,
        'stopped': result.stopped,
        'moves': moves_of(problem, chosen),
        'move_cost': cost,
        'seed': seed,
        'solver': solver.solver_name(),
        'seconds': round(clock.spent(), 3),
    }
    x = relaxation.x
    fractional: dict[str, dict[str, float]] = {}
    for name in problem.datasets:
        i = rows[name]
        part = slice(x.indptr[i], x.indptr[i + 1])
        fractional[name] = {
            instance.experts[j]: value
            for j, value in zip(x.indices[part].tolist(), x.data[part].tolist(), strict=True)
        }
    assignment = {
        name: {
            problem.experts[j]: 1.0 / int(problem.copies[i])
            for j in np.flatnonzero(chosen[i]).tolist()
        }
        for i, name in enumerate(problem.datasets)
    }
    return ExpertPlan(
        datasets=problem.datasets,
        experts=problem.experts,
        assignment=assignment,
        fractional=fractional,
        affinity=problem.affinity,
        demand=problem.demand,
        capacity=capacity,
        copies=problem.copies,
        certificate=certificate,
        prototypes=None,
        fingerprint=problem.fingerprint(),
    )


def _recheck(
    problem: PlanningProblem, capacity: np.ndarray, chosen: np.ndarray, loads: np.ndarray
) -> None:
    """The promise, checked once more on the user's own arrays before a plan leaves."""
    if (loads > capacity * (1 + LOAD_TOLERANCE)).any():
        raise RuntimeError(
            'a planned map exceeds a capacity: a defect of the planner, please report'
        )
    if (loads < problem.min_load * (1 - LOAD_TOLERANCE)).any():
        raise RuntimeError(
            'a planned map is below min_load: a defect of the planner, please report'
        )
    if (chosen.sum(axis=1) != problem.copies).any():
        raise RuntimeError('a planned map is incomplete: a defect of the planner, please report')
