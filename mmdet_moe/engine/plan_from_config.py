"""Plan from a training config: its datasets, embedded by a frozen backbone, to an expert plan.

    config -> datasets -> up to N images each -> embeddings (cached) -> affinity -> plan

The config may hold defaults of all this in ``planner = dict(num_experts=4, demand='images', ...)``
(the fields of :class:`PlannerOptions`), so that the command needs nothing but the config.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
import mmengine.fileio
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.utils import ProgressBar

from mmdet_moe.models.embedder import FrozenEmbedder
from mmdet_moe.models.moe_mixin import is_plan_router
from mmdet_moe.planning import (
    ExpertPlan,
    NoPlanFoundError,
    PlanError,
    PlanningProblem,
    add_newcomer,
    checks,
    plan_experts,
)
from mmdet_moe.planning.affinity import (
    Affinity,
    dataset_prototypes,
    frechet_affinity,
    load_affinity,
    match_experts,
    prototype_affinity,
)
from mmdet_moe.planning.table import plan_table, summary_line, text_table
from mmdet_moe.registry import DATASETS, MODELS
from mmdet_moe.visualization import draw_plan

DEMANDS = ('images', 'instances', 'unit')
AFFINITIES: dict[str, Callable[..., Affinity]] = {
    'prototype': prototype_affinity,
    'frechet': frechet_affinity,
}
#: Where embeddings are kept between runs.
CACHE = '~/.cache/mmdet_moe/embeddings'


@dataclass
class PlannerOptions:
    """What a plan from a config can be told; the config's ``planner = dict(...)``.

    Attributes:
        num_experts: n. Default: the ``num_experts`` of the config's PlanRouter specs.
        capacity: What an expert can hold, one number or n, in the unit of ``demand``. Default:
            the planner's rule (see :class:`~mmdet_moe.planning.PlanningProblem`).
        demand: What a dataset takes: its ``'images'``, its ``'instances'`` (annotated boxes), or 1
            (``'unit'``, the paper's).
        affinity: ``'prototype'``, ``'frechet'``, or a CSV, JSON or NPY file.
        center: Whether embeddings are seen from their grand mean for the affinity.
        max_images: Images embedded per dataset, drawn by the seed.
        seed: Of the draw, the prototypes and the planner.
        embedder: Config of the :class:`~mmdet_moe.models.embedder.FrozenEmbedder`. Default: that
            of the config's model, else EfficientNet-Lite0.
        copies: Experts per dataset, one number or ``dict(dataset=number)`` (1 where not named).
        min_load: What every expert must carry at least.
        separate: Groups of datasets no two of which may share an expert.
        together: Groups of datasets that must share.
        previous: An earlier plan to move away from as little as pays.
        move_penalty: What a move must gain in affinity to be worth it.
        held: No dataset of the earlier plan moves: those of the config that it has not join it, see
            :func:`~mmdet_moe.planning.add_newcomer`. Its datasets need not be in the config.
        expert: Of newcomers to a held plan: the name of an earlier expert, ``'new'`` (one each), or
            None: the best with room.
        exact: Prove optimality, or say that it could not be proven.
        time_limit: Safety net of the planner in seconds.
        device: Of the embedder. Default: ``cuda`` where there is one.
        cache_dir: Folder of the embeddings' cache; ``''`` keeps none.
    """

    num_experts: int | None = None
    capacity: float | Sequence[float] | None = None
    demand: str = 'images'
    affinity: str = 'prototype'
    center: bool = True
    max_images: int = 200
    seed: int = 0
    embedder: Mapping[str, Any] | None = None
    copies: int | Mapping[str, int] = 1
    min_load: float | Sequence[float] = 0.0
    separate: Sequence[Sequence[str]] = ()
    together: Sequence[Sequence[str]] = ()
    previous: str | None = None
    move_penalty: float = 0.0
    held: bool = False
    expert: str | None = None
    exact: bool = False
    time_limit: float | None = None
    device: str | None = None
    cache_dir: str = CACHE

    def __post_init__(self) -> None:
        if self.num_experts is not None:
            checks.integer(self.num_experts, 'num_experts', 1)
        checks.integer(self.max_images, 'max_images', 1)
        checks.integer(self.seed, 'seed', 0)
        if self.demand not in DEMANDS:
            raise PlanError(f'demand must be one of {", ".join(DEMANDS)}, got {self.demand!r}')
        if self.held and self.previous is None:
            raise PlanError('held=True holds the map of an earlier plan: give previous=...')
        if self.expert is not None and not self.held:
            raise PlanError(f'expert={self.expert!r} is for newcomers to a held plan: held=True')
        if self.affinity not in AFFINITIES and not Path(self.affinity).suffix:
            raise PlanError(
                f'affinity must be {" or ".join(AFFINITIES)} or a .csv, .json or .npy file, '
                f'got {self.affinity!r}'
            )

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any], **given: Any) -> PlannerOptions:
        """The config's ``planner`` dict, its model's hints, and on top what was ``given``.

        Args:
            cfg: The training config.
            **given: Options that outrank the config; None means not given.

        Raises:
            PlanError: On an option that does not exist.
        """
        options = dict(cfg.get('planner') or {})
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise PlanError(checks.unknown_name(name, known, "the config's planner: option"))
        options.update({name: value for name, value in given.items() if value is not None})
        model = cfg.get('model') or {}
        if options.get('embedder') is None and isinstance(model.get('embedder'), Mapping):
            options['embedder'] = model['embedder']
        if options.get('num_experts') is None:
            numbers = {spec.get('num_experts') for spec in _plan_specs(cfg)} - {None}
            if len(numbers) == 1:
                options['num_experts'] = numbers.pop()
        return cls(**options)


@dataclass
class PlannedDatasets:
    """A plan and what it was made from.

    Attributes:
        plan: The plan, with prototypes.
        images: Dataset name -> its number of images.
        instances: Dataset name -> its number of annotated objects.
        embedded: Dataset name -> how many of its images were embedded.
        unit: What demands and capacities count.
    """

    plan: ExpertPlan
    images: dict[str, int]
    instances: dict[str, int]
    embedded: dict[str, int]
    unit: str


def plan_from_config(
    cfg: Config, options: PlannerOptions | None = None, verbose: bool = True
) -> PlannedDatasets:
    """Plans which experts serve which of a config's training datasets.

    Args:
        cfg: A training config whose ``train_dataloader.dataset`` is a ``MultiDomainDataset``
            (perhaps wrapped).
        options: By default ``PlannerOptions.from_config(cfg)``.
        verbose: Whether to show progress on stderr.

    Returns:
        The plan and its inputs in numbers. The same config, options, images and machine give the
        same plan, in whatever order the domains are listed.

    Raises:
        PlanError: The config or an option is bad, or no map exists.
        NoPlanFoundError: The planner found no map within its limits.
    """
    init_default_scope(cfg.get('default_scope', 'mmdet_moe'))
    options = PlannerOptions.from_config(cfg) if options is None else options
    datasets = build_datasets(cfg)
    infos = {name: _infos(name, dataset) for name, dataset in datasets.items()}
    images = {name: len(found) for name, found in infos.items()}
    instances = {name: sum(n for _, n in found) for name, found in infos.items()}
    counts = {'images': images, 'instances': instances, 'unit': dict.fromkeys(images, 1)}
    demand = [float(counts[options.demand][name]) for name in infos]

    if options.held:
        return _join(
            options, infos, images, instances, dict(zip(infos, demand, strict=True)), verbose
        )
    names = tuple(infos)
    experts: int | tuple[str, ...] | None = options.num_experts
    matrix = None
    if options.affinity not in AFFINITIES:
        matrix, named = load_affinity(options.affinity, names)
        experts = _agreed_experts(options, matrix.shape[1], named)
    if experts is None:
        raise PlanError(
            "the number of experts is not known: give --num-experts, or the config's "
            'planner = dict(num_experts=...)'
        )
    problem = dict(
        datasets=names,
        experts=experts,
        demand=demand,
        capacity=_plain(options.capacity),
        min_load=_plain(options.min_load),
        copies=_copies(options.copies, names),
        separate=_plain(options.separate),
        together=_plain(options.together),
        previous=options.previous,
        move_penalty=options.move_penalty,
    )
    # Whatever is wrong with the options shall be said before the images are embedded.
    n = len(experts) if isinstance(experts, tuple) else experts
    trial = PlanningProblem(affinity=np.zeros((len(names), n)), **problem)
    if trial.capacity is not None:
        trial.check_possible(trial.capacity)

    embedder = MODELS.build({'type': 'FrozenEmbedder', **(options.embedder or {})})
    embedder.to(options.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    paths = {
        name: draw_images([path for path, _ in found], options.max_images, options.seed, name)
        for name, found in infos.items()
    }
    embeddings = embed_images(paths, embedder, options.cache_dir, verbose)
    if matrix is None:
        capacity = trial.capacity
        if capacity is not None:  # prototypes hold each dataset once, experts all its copies
            capacity = capacity * trial.demand[:, 0].sum() / (trial.demand[:, 0] @ trial.copies)
        compute = AFFINITIES[options.affinity]
        matrix = compute(
            embeddings, n, options.seed, demand=demand, capacity=capacity, center=options.center
        ).matrix
        if trial.previous is not None:
            matrix = match_experts(matrix, names, trial.experts, trial.previous, capacity)
    limits = {} if options.time_limit is None else {'time_limit': options.time_limit}
    plan = plan_experts(
        PlanningProblem(affinity=matrix, **problem),
        exact=options.exact,
        seed=options.seed,
        **limits,
    )
    plan.prototypes = dataset_prototypes(embeddings, embedder.to_dict())
    # Through the reader's checks once, prototypes and all.
    plan = ExpertPlan.from_dict(plan.to_dict())
    return PlannedDatasets(
        plan, images, instances, {k: len(v) for k, v in embeddings.items()}, options.demand
    )


def _join(
    options: PlannerOptions,
    infos: Mapping[str, list[tuple[str, int]]],
    images: dict[str, int],
    instances: dict[str, int],
    demand: Mapping[str, float],
    verbose: bool,
) -> PlannedDatasets:
    """The earlier plan and the datasets that it has not."""
    plan = ExpertPlan.load(str(options.previous))
    newcomers = [name for name in infos if name not in plan.datasets]
    if not newcomers:
        raise PlanError(f'{options.previous} has all datasets of the config: nobody joins')
    if plan.prototypes is None:
        raise PlanError(f'{options.previous} has no prototypes to compare {newcomers} with')
    embedder = MODELS.build({'type': 'FrozenEmbedder', **plan.prototypes['embedder']})
    embedder.to(options.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    paths = {
        name: draw_images([x for x, _ in infos[name]], options.max_images, options.seed, name)
        for name in newcomers
    }
    embeddings = embed_images(paths, embedder, options.cache_dir, verbose)
    prototypes = dataset_prototypes(embeddings, embedder.to_dict())
    for name in newcomers:
        plan = add_newcomer(plan, name, prototypes, demand[name], options.expert)
    return PlannedDatasets(
        plan, images, instances, {k: len(v) for k, v in embeddings.items()}, options.demand
    )


# ---------------------------------------------------------------------- the config
def plan_path(cfg: Mapping[str, Any]) -> str:
    """The plan file that the config's PlanRouters read: where a plan for it belongs.

    Raises:
        PlanError: If the config names none, or several.
    """
    model = cfg.get('model') or {}
    found = [model.get('plan'), *(spec['router'].get('plan') for spec in _plan_specs(cfg))]
    paths = sorted({path for path in found if isinstance(path, str)})
    if not paths and isinstance(cfg.get('plan'), str):
        paths = [cfg['plan']]
    if len(paths) != 1:
        what = f'names several plan files ({", ".join(paths)})' if paths else 'names no plan file'
        raise PlanError(f'the config {what}: say where to write with --out')
    return paths[0]


def _plan_specs(cfg: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    specs = (cfg.get('model') or {}).get('moe') or []
    return [spec for spec in specs if is_plan_router(spec)]


def build_datasets(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The config's training datasets by domain, without their pipelines.

    Raises:
        PlanError: If the config has no multi-domain training set, or a dataset cannot be read.
    """
    dataset = (cfg.get('train_dataloader') or {}).get('dataset')
    while isinstance(dataset, Mapping) and 'domains' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    if not isinstance(dataset, Mapping) or 'domains' not in dataset:
        raise PlanError(
            "the config's train_dataloader.dataset is no MultiDomainDataset: there are no domains "
            'to plan for (a problem without data goes to --problem)'
        )
    # No image is loaded through the pipeline, so it need not be built.
    dataset = {**dataset, 'pipeline': []}
    dataset.pop('domain_pipelines', None)
    try:
        # pycocotools tells about its index on stdout, which is for the plan.
        with contextlib.redirect_stdout(io.StringIO()):
            return dict(DATASETS.build(dataset).datasets)
    except OSError as error:
        raise PlanError(f'cannot read a dataset: {error}') from error


def _infos(name: str, dataset: Any) -> list[tuple[str, int]]:
    """Path and number of annotated objects of every image."""
    found = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        if not info.get('img_path'):
            raise PlanError(f'dataset {name!r}: image {i} has no img_path to embed it from')
        instances = [x for x in info.get('instances') or () if not x.get('ignore_flag')]
        found.append((info['img_path'], len(instances)))
    if not found:
        raise PlanError(f'dataset {name!r} has no images')
    return found


def _agreed_experts(
    options: PlannerOptions, columns: int, named: tuple[str, ...] | None
) -> int | tuple[str, ...]:
    if options.num_experts is not None and options.num_experts != columns:
        raise PlanError(
            f'affinity file {options.affinity!r} has {columns} experts, '
            f'num_experts is {options.num_experts}'
        )
    return columns if named is None else named


def _copies(copies: int | Mapping[str, int], names: Sequence[str]) -> int | list[int]:
    if not isinstance(copies, Mapping):
        return copies
    for name in copies:
        if name not in names:
            raise PlanError(checks.unknown_name(name, names, 'copies: dataset'))
    return [copies.get(name, 1) for name in names]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------- images to embeddings
def draw_images(paths: Sequence[str], most: int, seed: int, name: str) -> list[str]:
    """At most ``most`` different images, in an order and choice that depend on names alone."""
    different = sorted(set(paths))
    if len(different) <= most:
        return different
    words = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], dtype='<u4').tolist()
    chosen = np.random.default_rng([seed, *words]).choice(len(different), most, replace=False)
    return [different[i] for i in sorted(chosen)]


def embed_images(
    paths: Mapping[str, Sequence[str]],
    embedder: FrozenEmbedder,
    cache_dir: str | os.PathLike = CACHE,
    verbose: bool = True,
) -> dict[str, np.ndarray]:
    """Embeds image files, each content once and for all.

    Args:
        paths: Dataset name -> its image files.
        embedder: The embedder.
        cache_dir: Folder of the cache; ``''`` keeps none.
        verbose: Whether to show progress on stderr.

    Returns:
        Dataset name -> float32 array of shape (N_i, d).

    Raises:
        PlanError: If an image cannot be read; names the dataset and the file.
    """
    cache = EmbeddingCache(cache_dir, embedder.fingerprint()) if cache_dir else None
    known: dict[str, np.ndarray] = {} if cache is None else cache.load()
    embeddings = {}
    for name, files in paths.items():
        keys: list[str] = []
        for batch in _batches(files, embedder.batch_size, name if verbose else None):
            images: dict[str, torch.Tensor] = {}
            for file in batch:
                content = _read(name, file)
                key = hashlib.sha256(content).hexdigest()
                keys.append(key)
                if key not in known and key not in images:
                    images[key] = _decode(name, file, content)
            if images:
                found = embedder.embed(list(images.values())).cpu().numpy()
                known.update(zip(images, found, strict=True))
        # After every dataset, so that an interrupted run goes on from there.
        if cache is not None:
            cache.save(known)
        embeddings[name] = np.stack([known[key] for key in keys])
    return embeddings


class EmbeddingCache:
    """Embeddings on disk by the images' content, one file per embedder.

    The file's name is the embedder's fingerprint (weights and preprocessing), its content two plain
    arrays (``.npz``, no pickle): the images' SHA-256 and their embeddings. It is replaced
    atomically; one that cannot be read is started anew.

    Args:
        folder: Where the file is.
        fingerprint: The embedder's.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str) -> None:
        self.path = Path(folder).expanduser() / f'{fingerprint}.npz'
        self._saved = 0

    def load(self) -> dict[str, np.ndarray]:
        """SHA-256 (hexadecimal) -> embedding."""
        try:
            with np.load(self.path, allow_pickle=False) as data:
                keys, rows = data['sha256'], data['embeddings']
            if len(keys) != len(rows) or not np.isfinite(rows).all():
                raise ValueError('damaged')
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            print(f'embedding cache {self.path} is unusable ({error}): anew', file=sys.stderr)
            return {}
        self._saved = len(keys)
        return {bytes(key).hex(): row for key, row in zip(keys, rows, strict=True)}

    def save(self, known: Mapping[str, np.ndarray]) -> None:
        """Write ``known`` if there is more of it than was last read or written."""
        if len(known) <= self._saved:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keys = np.array([list(bytes.fromhex(key)) for key in known], dtype=np.uint8)
        handle, name = tempfile.mkstemp(dir=self.path.parent, suffix='.tmp')
        try:
            with os.fdopen(handle, 'wb') as file:
                np.savez(file, sha256=keys, embeddings=np.stack(list(known.values())))
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise
        self._saved = len(known)


def _batches(files: Sequence[str], size: int, name: str | None) -> Iterator[Sequence[str]]:
    """Cut into batches, with a progress bar called ``name`` (on a terminal) or a line."""
    terminal = sys.stderr.isatty()
    bar = None
    if name is not None and terminal:
        print(f'{name}: ', end='', file=sys.stderr)
        bar = ProgressBar(len(files), file=sys.stderr)
    for start in range(0, len(files), size):
        batch = files[start : start + size]
        yield batch
        if bar is not None:
            bar.update(len(batch))
    if name is not None:
        print('' if terminal else f'embedded {name}: {len(files)} images', file=sys.stderr)


def _read(name: str, file: str) -> bytes:
    try:
        return mmengine.fileio.get(file)
    except OSError as error:
        raise PlanError(f'dataset {name!r}: cannot read {file}: {error.strerror}') from error


def _decode(name: str, file: str, content: bytes) -> torch.Tensor:
    """An image file as the detectors' pipeline sees it: RGB, uint8, shape (3, H, W)."""
    try:
        image = mmcv.imfrombytes(content, flag='color', channel_order='rgb')
    except Exception as error:  # every backend has its own
        raise PlanError(f'dataset {name!r}: {file} is not an image ({error})') from error
    if image is None:
        raise PlanError(f'dataset {name!r}: {file} is not an image')
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)


# ---------------------------------------------------------------------- the command
def run(
    config: str,
    out: str | None = None,
    picture: str | None = None,
    embedder: str | None = None,
    separate: Sequence[str] | None = None,
    together: Sequence[str] | None = None,
    capacity: Sequence[float] | None = None,
    cfg_options: Sequence[str] | None = None,
    quiet: bool = False,
    **given: Any,
) -> int:
    """``tools/plan_experts.py CONFIG``: plan, print the tables, write the plan and its picture.

    Args:
        config: Path of the training config.
        out: Plan file; by default :func:`plan_path`.
        picture: Picture file; by default ``out`` with ``.png``; ``''`` for none.
        embedder: Config file with the embedder.
        separate: Groups as ``'a,b'``.
        together: Likewise.
        capacity: One number, or one per expert.
        cfg_options: ``'key=value'`` overrides of the config.
        quiet: Say only the one line.
        **given: Fields of :class:`PlannerOptions`; None means not given.

    Returns:
        The exit code: 0, 2 (bad input or no map exists) or 3 (no map found).
    """
    try:
        cfg = _read_config(config, cfg_options)
        given['capacity'] = capacity[0] if capacity and len(capacity) == 1 else capacity
        for key, groups in (('separate', separate), ('together', together)):
            given[key] = None if groups is None else [_split(group) for group in groups]
        given['embedder'] = None if embedder is None else _read_embedder(embedder)
        options = PlannerOptions.from_config(cfg, **given)
        out = plan_path(cfg) if out is None else out
        planned = plan_from_config(cfg, options, verbose=not quiet)
        if picture is None:
            picture = str(Path(out).with_suffix('.png'))
        if picture:
            draw_plan(planned.plan, picture, unit=None if planned.unit == 'unit' else planned.unit)
        # Last: nothing is written at `out` unless the exit is 0.
        planned.plan.save(out)
    except NoPlanFoundError as error:
        print(f'plan_experts.py: {_line(error)}', file=sys.stderr)
        return 3
    except (ValueError, TypeError, KeyError, OSError, ImportError, RuntimeError) as error:
        print(f'plan_experts.py: {_line(error)}', file=sys.stderr)
        return 2
    text = summary_line(planned.plan)
    if not quiet:
        text = f'{data_table(planned)}\n\n{plan_table(planned.plan)}'
    if options.exact and not planned.plan.certificate['optimal']:
        text += '  (--exact: optimality could NOT be proven within the limit)'
    print(text)
    return 0


def _read_config(path: str, overrides: Sequence[str] | None) -> Config:
    if not Path(path).is_file():
        raise PlanError(f'there is no config {path!r}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise PlanError(f'config {path!r} cannot be read: {_line(error)}') from error
    if overrides:
        wrong = [item for item in overrides if '=' not in item]
        if wrong:
            raise PlanError(f'--cfg-options: {wrong[0]!r} is not KEY=VALUE')
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--cfg-options', *overrides]).cfg_options)
    return cfg


def _read_embedder(path: str) -> dict[str, Any]:
    cfg = _read_config(path, None).to_dict()
    return cfg.get('embedder', cfg)


def _split(group: str) -> list[str]:
    return [name.strip() for name in group.split(',') if name.strip()]


def _line(error: BaseException) -> str:
    """An error as one line; a KeyError's text without its quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return ' '.join((text or type(error).__name__).split())


def data_table(planned: PlannedDatasets) -> str:
    """What the plan was made from: images, boxes and embedded images of every dataset."""
    rows = [
        (
            name,
            *(
                str(of.get(name, '-'))
                for of in (planned.images, planned.instances, planned.embedded)
            ),
        )
        for name in planned.plan.datasets
    ]
    return text_table(('dataset', 'images', 'boxes', 'embedded'), rows)
