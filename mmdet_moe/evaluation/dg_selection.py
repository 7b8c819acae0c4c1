"""DomainBed's model selection and result table, from the records of runs.

A run holds out a *unit*: a domain, or a group of domains that belong together. Its records are
accuracies per (domain, part) and step. What is reported of a run is the accuracy on the held-out
unit's ``test`` part, or on its ``train`` part where there is none (the 80 % of DomainBed, which
nobody trained on); of a unit of several domains, their mean. Which step, and which of several draws
of hyper-parameters, is what the *selection* says (arXiv 2007.01434, section 3):

* ``training-domain``: the step and draw with the highest mean accuracy on the sources' ``val``;
* ``oracle``: the draw with the highest accuracy on the held-out unit's ``val`` at the last step;
  no early stopping;
* ``leave-one-out``: the step and draw with the highest mean, over the other units, of the accuracy
  on that unit of the run that holds out that unit besides (on its ``train`` part; on ``val`` where
  there is a ``test`` part, for then ``train`` is not disjoint).

Of equals the first counts: draw before draw, step before step.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet_moe.planning.checks import PlanError, unknown_name

SELECTIONS = ('training-domain', 'leave-one-out', 'oracle')
AVERAGE = 'Avg'


@dataclass(frozen=True)
class Run:
    """The records of one training.

    Attributes:
        dataset: Name of the data set.
        algorithm: Name of the algorithm, the table's row.
        held_out: The held-out units; two in the extra runs of leave-one-out.
        trial: Number of the trial.
        draw: Number of the draw of hyper-parameters.
        domains: All domains.
        parts: The parts that a domain is cut into.
        lines: The evaluations, as ``DGRecordHook`` writes them.
    """

    dataset: str
    algorithm: str
    held_out: tuple[tuple[str, ...], ...]
    trial: int
    draw: int
    domains: tuple[str, ...]
    parts: tuple[str, ...]
    lines: tuple[Mapping[str, Any], ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The domains trained on."""
        out = {domain for unit in self.held_out for domain in unit}
        return tuple(domain for domain in self.domains if domain not in out)

    @property
    def reported_part(self) -> str:
        """The part that accuracy is reported on."""
        return 'test' if 'test' in self.parts else 'train'

    @property
    def left_out_part(self) -> str:
        """The part that leave-one-out selects on."""
        return 'val' if 'test' in self.parts else 'train'

    def of(self, model: str) -> list[Mapping[str, Any]]:
        """The evaluations of one model (``last``, ``swad``), by step."""
        return sorted((x for x in self.lines if x['model'] == model), key=lambda x: x['step'])


def read_run(
    path: Path, algorithm: str, held_out: Sequence[Sequence[str]], draw: int, dataset: str = ''
) -> Run:
    """The run whose records are at ``path``.

    Raises:
        ValueError: There are no records, or they are of a run that holds out something else.
    """
    try:
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f'{path}: no records of a run ({error})') from None
    units = tuple(map(tuple, held_out))
    if {d for unit in units for d in unit} != set(head['held_out']):
        raise ValueError(f'{path}: the run holds out {head["held_out"]}, not {units}')
    return Run(
        dataset or head['dataset'],
        algorithm,
        units,
        head['trial'],
        draw,
        tuple(head['domains']),
        tuple(head['parts']),
        tuple(lines),
    )


def accuracy(line: Mapping[str, Any], domains: Sequence[str], part: str) -> float:
    """Mean accuracy of one evaluation over domains, in %."""
    return statistics.fmean(line['accuracy'][f'{domain}/{part}'] for domain in domains)


@dataclass(frozen=True)
class Choice:
    """What a selection takes: of which draw, at which step, and the accuracies there, in %."""

    draw: int
    step: int
    selected_by: float
    accuracy: float


def select(
    selection: str,
    runs: Sequence[Run],
    pairs: Sequence[Run] = (),
    model: str = 'last',
    units: Sequence[Sequence[str]] = (),
) -> Choice | None:
    """Choose among the draws and steps of one algorithm, held-out unit and trial.

    Args:
        selection: One of ``SELECTIONS``.
        runs: One per draw, all holding out the same unit alone.
        pairs: The runs that hold out this unit and one more, for leave-one-out.
        model: Which evaluations count: ``last``, ``swad``.
        units: All units of the data set, for leave-one-out: each but the held-out one must have
            its run.

    Returns:
        The choice, None where records that it takes are missing.

    Raises:
        ValueError: An unknown selection.
    """
    if selection not in SELECTIONS:
        raise PlanError(unknown_name(selection, SELECTIONS, 'selection'))
    choices = []
    for run in sorted(runs, key=lambda run: run.draw):
        (unit,) = run.held_out
        lines = run.of(model)
        for line in lines[-1:] if selection == 'oracle' else lines:
            if selection == 'training-domain':
                value = accuracy(line, run.sources, 'val')
            elif selection == 'oracle':
                value = accuracy(line, unit, 'val')
            else:
                others = [tuple(other) for other in units if tuple(other) != unit]
                values = [
                    accuracy(line_of_pair, other, run.left_out_part)
                    for other in others
                    for pair in pairs
                    if pair.draw == run.draw and set(pair.held_out) == {unit, other}
                    for line_of_pair in pair.of(model)
                    if line_of_pair['step'] == line['step']
                ]
                if not others or len(values) != len(others):
                    continue
                value = statistics.fmean(values)
            reported = accuracy(line, unit, run.reported_part)
            choices.append(Choice(run.draw, line['step'], value, reported))
    return max(choices, key=lambda choice: choice.selected_by, default=None)


@dataclass(frozen=True)
class Cell:
    """A number of the table: the values of the trials."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error: the sample's standard deviation (over n - 1) by sqrt n."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values) / math.sqrt(len(self.values))

    def __str__(self) -> str:
        error = '' if self.error is None else f' ± {self.error:.1f}'
        return f'{self.mean:.1f}{error}'


@dataclass(frozen=True)
class Block:
    """One table: a selection's accuracies, algorithms by columns; None where runs are missing."""

    dataset: str
    selection: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Cell | None]]


def results_table(
    runs: Sequence[Run],
    units: Mapping[str, Sequence[Sequence[str]]],
    selections: Sequence[str] = ('training-domain', 'oracle'),
) -> tuple[list[Block], list[dict[str, Any]]]:
    """The tables of some runs: per data set and selection, and over data sets.

    Args:
        runs: All runs, in the order of the rows.
        units: The held-out units of each data set, in the order of its columns.
        selections: The selections, each a block.

    Returns:
        The blocks, and what was chosen: one entry per row, data set, unit, trial and selection.
    """
    blocks, chosen = [], []
    rows = list(dict.fromkeys((run.algorithm, line['model']) for run in runs for line in run.lines))
    order = list(dict.fromkeys(run.algorithm for run in runs))
    rows.sort(key=lambda row: (order.index(row[0]), row[1] != 'last'))
    for selection in selections:
        averages: dict[str, dict[str, Cell | None]] = {}
        for dataset, held in units.items():
            block = Block(dataset, selection, (*map(name_of, held), AVERAGE), {})
            blocks.append(block)
            for algorithm, model in rows:
                title = algorithm if model == 'last' else f'{algorithm} + {model.upper()}'
                mine = [r for r in runs if (r.dataset, r.algorithm) == (dataset, algorithm)]
                trials = sorted({run.trial for run in mine})
                found: dict[tuple[int, str], float] = {}
                for trial in trials:
                    for unit in map(tuple, held):
                        here = [r for r in mine if r.trial == trial and unit in r.held_out]
                        choice = select(
                            selection,
                            [r for r in here if len(r.held_out) == 1],
                            [r for r in here if len(r.held_out) == 2],
                            model,
                            held,
                        )
                        if choice is not None:
                            found[trial, name_of(unit)] = choice.accuracy
                            chosen.append(
                                dict(
                                    selection=selection,
                                    dataset=dataset,
                                    algorithm=title,
                                    held_out=name_of(unit),
                                    trial=trial,
                                    **vars(choice),
                                )
                            )
                block.rows[title] = _row(block.columns[:-1], trials, found)
                averages.setdefault(title, {})[dataset] = block.rows[title][AVERAGE]
        if len(units) > 1:
            over = Block('all', selection, (*units, AVERAGE), {})
            for title, cells in averages.items():
                complete = all(cell is not None for cell in cells.values())
                means = tuple(cell.mean for cell in cells.values() if cell is not None)
                mean = Cell((statistics.fmean(means),)) if complete else None
                over.rows[title] = {**cells, AVERAGE: mean}
            blocks.append(over)
    return blocks, chosen


def name_of(unit: Sequence[str]) -> str:
    """A unit as a column is called."""
    return '+'.join(unit)


def _row(
    columns: Sequence[str], trials: Sequence[int], found: Mapping[tuple[int, str], float]
) -> dict[str, Cell | None]:
    """Cells over the trials; the average is each trial's over its columns."""
    row: dict[str, Cell | None] = {}
    for column in columns:
        values = tuple(found[trial, column] for trial in trials if (trial, column) in found)
        row[column] = Cell(values) if values else None
    complete = [t for t in trials if all((t, column) in found for column in columns)]
    row[AVERAGE] = (
        Cell(tuple(statistics.fmean(found[t, column] for column in columns) for t in complete))
        if complete
        else None
    )
    return row


def to_markdown(blocks: Sequence[Block]) -> str:
    """The tables as Markdown."""
    parts = []
    for block in blocks:
        grid = _grid(block)
        lines = [f'| {" | ".join(row)} |' for row in grid]
        lines.insert(1, '|' + '---|' * len(grid[0]))
        parts.append(f'**{block.dataset}**, {block.selection} selection\n\n' + '\n'.join(lines))
    return '\n\n'.join(parts) + '\n'


def to_text(blocks: Sequence[Block]) -> str:
    """The tables as text with aligned columns."""
    parts = []
    for block in blocks:
        grid = _grid(block)
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines = [
            '  '.join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in grid
        ]
        parts.append(f'{block.dataset}, {block.selection} selection\n' + '\n'.join(lines))
    return '\n\n'.join(parts) + '\n'


def to_dict(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """The tables for a JSON file."""
    return [
        dict(
            dataset=block.dataset,
            selection=block.selection,
            columns=list(block.columns),
            rows={
                title: {
                    column: None
                    if cell is None
                    else dict(mean=cell.mean, error=cell.error, values=list(cell.values))
                    for column, cell in cells.items()
                }
                for title, cells in block.rows.items()
            },
        )
        for block in blocks
    ]


def _grid(block: Block) -> list[list[str]]:
    rows = [
        [title, *('–' if cells[c] is None else str(cells[c]) for c in block.columns)]
        for title, cells in block.rows.items()
    ]
    return [['Algorithm', *block.columns], *rows]
