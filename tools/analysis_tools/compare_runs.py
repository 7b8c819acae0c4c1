"""Compare test results of several models per domain, with their sizes and costs.

    python tools/analysis_tools/compare_runs.py \\
        gem=work_dirs/mini_uodb/seed*/test-gem dense=work_dirs/mini_uodb/seed*/test-dense \\
        --baseline dense --out-md table.md --out-json table.json

Every run is ``NAME=PATH``; a path may hold wildcards, and a name may come several times. What a
path may be: the JSON file of ``tools/test.py --out-json``, any JSON file of metrics, or the work
dir of a test or a training (its newest test result, else its last validation).

Paths of one name that cover the same domains are seeds of one model: the table gives mean ±
standard deviation (of the sample, over n - 1). Paths that cover different domains are the parts of
one answer (one dense model per domain): their parameters add up, and the mean over domains is that
of all of them together.

Parameters, active parameters (what one item takes: of each MoE layer only the experts it is sent
to) and multiply-adds are measured on the run's config: that named in the JSON, that which mmengine
left in the work dir, or ``--config NAME=FILE``.

``--layout papers`` turns the tables round: a row for each model, a column for each domain in the
order of UODB's papers (other domains after them), in percent, then the average and, where the
results or ``--small`` name small domains, the averages over small and large ones. ``--published``
adds the papers' own rows (``uodb_published.json``) to tables of an AP50::

    python tools/analysis_tools/compare_runs.py gem=work_dirs/gem dense=work_dirs/dense \\
        --metrics pascal_voc/mAP coco/bbox_mAP --layout papers --published

Exit 2 and one line if a path has no metrics or no run has what is asked for.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # to run from a clone, uninstalled

MACRO = 'macro'
#: The evaluator's averages: no domains.
AVERAGES = (MACRO, 'small', 'large')
#: Columns of UODB's papers, by domain.
PAPERS = {
    'kitti': 'KITTI',
    'voc': 'VOC',
    'widerface': 'Wider',
    'lisa': 'LISA',
    'kitchen': 'Kitchen',
    'coco': 'COCO',
    'dota': 'DOTA',
    'deeplesion': 'DeepLesion',
    'comic': 'Comic',
    'clipart': 'Clipart',
    'watercolor': 'Watercolor',
}
#: Metrics that the published figures, AP50 by VOC's rules, may stand beside.
AP50 = ('pascal_voc/mAP', 'pascal_voc/AP50', 'coco/bbox_mAP_50')
PUBLISHED = Path(__file__).with_name('uodb_published.json')


class CompareError(ValueError):
    """Input that cannot be compared; the message names it."""


# --------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """One test of one model.

    Attributes:
        path: Where it was read.
        metrics: ``'<domain>/<metric>'`` -> value.
        config: The model's config file, if known.
        small: The domains that are small, if the result says so.
    """

    path: str
    metrics: dict[str, float]
    config: str | None = None
    small: tuple[str, ...] = ()

    def domains(self, metric: str) -> list[str]:
        """The domains that have a value, in the order of the file, without the averages."""
        suffix = f'/{metric}'
        names = [key[: -len(suffix)] for key in self.metrics if key.endswith(suffix)]
        return [name for name in names if '/' not in name and name not in AVERAGES]


def read_result(path: Path) -> Result:
    """Read the metrics that a path stands for.

    Raises:
        CompareError: There are none.
    """
    if path.is_dir():
        file = _newest_result(path)
        configs = sorted(path.glob('*.py'))
        config = str(configs[0]) if len(configs) == 1 else None
    else:
        file, config = path, None
    try:
        text = file.read_text()
        if file.parent.name == 'vis_data':
            # mmengine's scalars, one JSON object a line: the last validation counts.
            lines = [json.loads(line) for line in text.splitlines()]
            lines = [line for line in lines if any(key.startswith(f'{MACRO}/') for key in line)]
        else:
            lines = [json.loads(text)]
        content = [line for line in lines if _metrics(line)]
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise CompareError(f'{file}: cannot be read as metrics ({error})') from None
    if not content:
        raise CompareError(f'{file}: no metrics "<domain>/<metric>" in it')
    stated = content[-1].get('config')
    return Result(
        str(path),
        _metrics(content[-1]),
        stated if isinstance(stated, str) else config,
        tuple(content[-1].get('small') or ()),
    )


def _newest_result(folder: Path) -> Path:
    """The metrics in a work dir."""
    if (folder / 'metrics.json').is_file():
        return folder / 'metrics.json'
    for pattern in ('*/*.json', '*/vis_data/scalars.json'):
        files = sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime)
        if files:
            return files[-1]
    raise CompareError(f'{folder}: neither a test result nor a validation in it')


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    values = content.get('metrics', content)
    return {
        key: float(value)
        for key, value in values.items()
        if '/' in key and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


# --------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """The values of one run for one domain.

    Attributes:
        values: One per seed, in the order of the paths.
        spread: Whether their deviation means something (seeds, not parts).
    """

    values: list[float]
    spread: bool = True

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Of the sample; None for a single value."""
        return statistics.stdev(self.values) if self.spread and len(self.values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {'mean': self.mean, 'std': self.std, 'values': self.values}


@dataclass
class Run:
    """All results of one name."""

    name: str
    results: list[Result]
    complexity: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def cells(self, metric: str) -> dict[str, Cell]:
        """Domain (and ``'macro'``) -> values; empty if no result has the metric."""
        values: dict[str, list[float]] = {}
        means = []
        for result in self.results:
            found = {name: result.metrics[f'{name}/{metric}'] for name in result.domains(metric)}
            # -1 and nan: the domain has no ground truth.
            found = {k: v for k, v in found.items() if math.isfinite(v) and v != -1}
            for domain, value in found.items():
                values.setdefault(domain, []).append(value)
            if found:
                means.append(statistics.fmean(found.values()))
        cells = {domain: Cell(items) for domain, items in values.items()}
        if not cells:
            return {}
        covered = [set(result.domains(metric)) for result in self.results]
        if all(domains == covered[0] for domains in covered):
            cells[MACRO] = Cell(means)
        else:
            cells[MACRO] = Cell([statistics.fmean(c.mean for c in cells.values())], spread=False)
        return cells

    def averages(self, metric: str, small: Sequence[str]) -> dict[str, Cell]:
        """The averages over all domains, the small and the large ones, as far as there are some."""
        groups = {
            MACRO: lambda name: True,
            'small': lambda name: name in small,
            'large': lambda name: name not in small,
        }
        cells = {}
        for group, belongs in groups.items() if small else [(MACRO, groups[MACRO])]:
            members = [
                Result(
                    result.path,
                    {
                        f'{name}/{metric}': result.metrics[f'{name}/{metric}']
                        for name in result.domains(metric)
                        if belongs(name)
                    },
                )
                for result in self.results
            ]
            found = Run(self.name, [result for result in members if result.metrics]).cells(metric)
            if found:
                cells[group] = found[MACRO]
        return cells

    def parts(self, metric: str) -> list[Result]:
        """One result for each set of domains: a seed of each model that the run consists of."""
        first: dict[frozenset, Result] = {}
        for result in self.results:
            first.setdefault(frozenset(result.domains(metric)), result)
        return list(first.values())


def measure(run: Run, metric: str, config: str | None, shape: Sequence[int] | None) -> None:
    """Fill in the run's size and cost, or a note why they are missing."""
    from mmengine.config import Config

    import mmdet_moe  # noqa: F401  (teaches the config reader our name)
    from mmdet_moe.engine.complexity import complexity

    parts = []
    for result in run.parts(metric):
        file = config or result.config
        if file is None or not Path(file).is_file():
            run.notes.append(f'no config for {result.path}: give --config {run.name}=FILE')
            return
        try:
            parts.append(complexity(Config.fromfile(file), shape).to_dict())
        except (OSError, ValueError, KeyError) as error:
            run.notes.append(f'{file}: {error}')
            return
    run.complexity = {
        'parameters': sum(part['parameters'] for part in parts),
        'active_parameters': statistics.fmean(part['active_parameters'] for part in parts),
        'flops': statistics.fmean(part['flops'] for part in parts),
        'shape': parts[0]['shape'],
    }


# --------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------


def row_names(columns: Iterable[Mapping[str, Cell]]) -> list[str]:
    """All domains in order of first appearance, the average last."""
    names = dict.fromkeys(name for cells in columns for name in cells if name != MACRO)
    return [*names, MACRO]


def to_markdown(runs: Sequence[Run], metrics: Sequence[str], baseline: str | None) -> str:
    """The tables: one per metric, then sizes and costs."""
    lines = []
    for metric in metrics:
        columns = {run.name: run.cells(metric) for run in runs}
        header = [metric, *columns]
        rows = [
            [
                'mean' if name == MACRO else name,
                *(_cell(columns, run, name, baseline) for run in columns),
            ]
            for name in row_names(columns.values())
        ]
        rows[-1] = [f'**{text}**' if text else '' for text in rows[-1]]
        lines += [*markdown_table(header, rows), '']
    if any(run.complexity for run in runs):
        sizes = [run.complexity or {} for run in runs]
        shapes = {tuple(size['shape']) for size in sizes if size}
        at = f' at {"x".join(map(str, shapes.pop()))}' if len(shapes) == 1 else ''
        rows = [
            ['seeds', *(str(_seeds(run, metrics[0])) for run in runs)],
            ['parameters', *(_large(size.get('parameters')) for size in sizes)],
            ['active parameters', *(_large(size.get('active_parameters')) for size in sizes)],
            [f'multiply-adds{at}', *(_large(size.get('flops')) for size in sizes)],
        ]
        lines += [*markdown_table(['', *(run.name for run in runs)], rows), '']
    lines += [f'- {run.name}: {note}' for run in runs for note in run.notes]
    return '\n'.join(lines).rstrip() + '\n'


def papers_tables(
    runs: Sequence[Run], metrics: Sequence[str], small: Sequence[str], published: bool
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Metric -> row -> column -> percent: models in rows, in the order of UODB's papers.

    Args:
        runs: The models.
        metrics: A table of each.
        small: The small domains; none: no averages over small and large ones.
        published: Whether AP50 tables begin with the rows of :data:`PUBLISHED`.
    """
    tables = {}
    for metric in metrics:
        cells = {run.name: run.cells(metric) for run in runs}
        domains = row_names(cells.values())[:-1]
        ordered = [name for name in PAPERS if name in domains]
        ordered += [name for name in domains if name not in PAPERS]
        names = {name: PAPERS.get(name, name) for name in ordered}
        names |= {MACRO: 'Avg'} | ({'small': 'Small', 'large': 'Large'} if small else {})
        rows: dict[str, dict[str, float | None]] = {}
        if published and metric in AP50:
            whole = set(domains) == set(PAPERS)  # other domains' averages are nothing beside theirs
            for name, ap50 in published_rows(small).items():
                rows[name] = {
                    column: ap50.get(key) if whole or key not in AVERAGES else None
                    for key, column in names.items()
                }
        for run in runs:
            values = {**cells[run.name], **run.averages(metric, small)}
            rows[run.name] = {
                column: None if key not in values else 100 * values[key].mean
                for key, column in names.items()
            }
        tables[metric] = rows
    return tables


def published_rows(small: Sequence[str]) -> dict[str, dict[str, float]]:
    """Name and source -> AP50 in percent of each domain, the published average, and our averages.

    Args:
        small: The small domains; averages over those of them that the row has, and over its others.
    """
    rows = {}
    for row in json.loads(PUBLISHED.read_text())['rows']:
        domains = {name: ap for name, ap in row['ap50'].items() if name != MACRO}
        groups = {
            'small': [ap for name, ap in domains.items() if name in small],
            'large': [ap for name, ap in domains.items() if name not in small],
        }
        averages = {name: sum(aps) / len(aps) for name, aps in groups.items() if aps}
        rows[f'{row["name"]} ({row["source"]})'] = {**row['ap50'], **averages}
    return rows


def papers_markdown(tables: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """:func:`papers_tables` as text."""
    lines = []
    for metric, rows in tables.items():
        header = [metric, *next(iter(rows.values()))]
        body = [
            [name, *('' if value is None else f'{value:.1f}' for value in row.values())]
            for name, row in rows.items()
        ]
        lines += [*markdown_table(header, body), '']
    return '\n'.join(lines).rstrip() + '\n'


def _cell(
    columns: Mapping[str, Mapping[str, Cell]], run: str, name: str, baseline: str | None
) -> str:
    cell = columns[run].get(name)
    if cell is None:
        return ''
    text = f'{cell.mean:.3f}' + (f' ± {cell.std:.3f}' if cell.std is not None else '')
    base = columns[baseline].get(name) if baseline and run != baseline else None
    return text if base is None else f'{text} ({cell.mean - base.mean:+.3f})'


def _seeds(run: Run, metric: str) -> int:
    return max((len(cell.values) for cell in run.cells(metric).values()), default=0)


def _large(number: float | None) -> str:
    if number is None:
        return ''
    for unit, size in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if number >= size:
            return f'{number / size:.2f} {unit}'
    return f'{number:.0f}'


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        others = [cell.strip().rjust(len(cell)) for cell in others]
        return f'| {" | ".join([first, *others])} |'

    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    return [line(header), line(rule), *(line(row) for row in rows)]


def to_json(runs: Sequence[Run], metrics: Sequence[str]) -> dict[str, Any]:
    """The tables as data."""
    return {
        'metrics': {
            metric: {
                run.name: {name: cell.to_dict() for name, cell in run.cells(metric).items()}
                for run in runs
            }
            for metric in metrics
        },
        'runs': {
            run.name: {
                'paths': [result.path for result in run.results],
                'complexity': run.complexity,
                'notes': run.notes,
            }
            for run in runs
        },
    }


def write(path: Path, text: str) -> None:
    """Write a file that is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    part.write_text(text)
    os.replace(part, path)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('runs', nargs='+', metavar='NAME=PATH', help='what to compare')
    parser.add_argument(
        '--metrics',
        nargs='+',
        default=['coco/bbox_mAP', 'coco/bbox_mAP_50'],
        metavar='METRIC',
        help='metric keys without the domain (default: coco/bbox_mAP coco/bbox_mAP_50)',
    )
    parser.add_argument('--baseline', metavar='NAME', help='run to give differences to')
    parser.add_argument(
        '--config',
        nargs='+',
        default=[],
        metavar='NAME=FILE',
        help='configs to measure size and cost on',
    )
    parser.add_argument(
        '--shape', nargs=2, type=int, metavar=('H', 'W'), help='image size for the multiply-adds'
    )
    parser.add_argument(
        '--layout',
        choices=['domains', 'papers'],
        default='domains',
        help='a row for each domain, or for each model',
    )
    parser.add_argument(
        '--small', nargs='+', metavar='DOMAIN', help='small domains; default: as the results say'
    )
    parser.add_argument(
        '--published', action='store_true', help="papers' layout: with the published AP50"
    )
    parser.add_argument('--no-complexity', action='store_true', help='leave size and cost out')
    parser.add_argument('--out-md', metavar='FILE', help='write the tables there too')
    parser.add_argument('--out-json', metavar='FILE', help='write them there as data')
    return parser.parse_args(argv)


def _named(items: Iterable[str], what: str) -> dict[str, list[str]]:
    named: dict[str, list[str]] = {}
    for item in items:
        name, sign, value = item.partition('=')
        if not (name and sign and value):
            raise CompareError(f'{item!r}: want {what}')
        named.setdefault(name, []).append(value)
    return named


def compare(args: argparse.Namespace) -> tuple[list[Run], str]:
    """The runs and their tables in Markdown.

    Raises:
        CompareError: Something cannot be compared.
    """
    runs = []
    for name, patterns in _named(args.runs, 'NAME=PATH').items():
        paths: list[str] = []
        for pattern in patterns:
            found = sorted(glob.glob(pattern))
            if not found:
                raise CompareError(f'{name}: {pattern} is not there')
            paths += found
        runs.append(Run(name, [read_result(Path(path)) for path in paths]))
    names = [run.name for run in runs]
    configs = {name: files[-1] for name, files in _named(args.config, 'NAME=FILE').items()}
    for name in [*configs, *([args.baseline] if args.baseline else [])]:
        if name not in names:
            raise CompareError(f'no run is called {name!r}; there are {names}')
    for metric in args.metrics:
        if not any(run.cells(metric) for run in runs):
            known = {k.split('/', 1)[1] for run in runs for r in run.results for k in r.metrics}
            raise CompareError(f'no run has the metric {metric!r}; they have {sorted(known)}')
    if args.layout == 'papers':
        return runs, papers_markdown(_papers(runs, args))
    if args.published:
        raise CompareError('--published goes with --layout papers')
    if not args.no_complexity:
        for run in runs:
            measure(run, args.metrics[0], configs.get(run.name), args.shape)
    return runs, to_markdown(runs, args.metrics, args.baseline)


def _papers(runs: Sequence[Run], args: argparse.Namespace) -> dict:
    small = args.small
    if small is None:
        small = list(dict.fromkeys(x for run in runs for r in run.results for x in r.small))
    known = {x for run in runs for r in run.results for m in args.metrics for x in r.domains(m)}
    unknown = [name for name in args.small or () if name not in known]
    if unknown:
        raise CompareError(
            f'--small: no run has a domain {unknown[0]!r}; they have {sorted(known)}'
        )
    return papers_tables(runs, args.metrics, small, args.published)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs, text = compare(args)
    except CompareError as error:
        print(f'compare_runs: {error}', file=sys.stderr)
        return 2
    print(text, end='')
    if args.out_md:
        write(Path(args.out_md), text)
    if args.out_json:
        report = to_json(runs, args.metrics)
        if args.layout == 'papers':
            report['papers'] = _papers(runs, args)
        data = json.dumps(report, indent=2)
        write(Path(args.out_json), data + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())
