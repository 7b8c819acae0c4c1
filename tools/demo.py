"""The main job from end to end on generated data: ``make demo``.

Six generated domains (``make_domains.py``) -> an expert map (``plan_experts.py``) -> GEM-RetinaNet
trained on all of them (``train.py``) -> tested per domain (``test.py``) -> a table and pictures.
Each step is one command of this repository, printed before it runs. A step whose inputs have not
changed since it was last done is skipped; an interrupted training goes on from its checkpoint.

Everything is left in one folder::

    work_dirs/demo/data/           the domains
    work_dirs/demo/plan.json       the expert map (and its table and picture)
    work_dirs/demo/gem/            training: logs, checkpoint
    work_dirs/demo/results.json    the table as data
    work_dirs/demo/pictures/       per domain: truth left, detections right
    work_dirs/demo/demo.log        the full output of all steps

Exit 0 if the model has learned: AP50 of at least 0.5 on average and 0.3 on every domain. Exit 1,
saying what is missing, otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = 'configs/gem/gem-retinanet_effnet-lite0_demo.py'
#: What the table must reach.
MEAN_AP50, LEAST_AP50 = 0.5, 0.3
#: Images shown per domain (an even number), how much enlarged, and which detections.
SHOWN, ENLARGED, SHOWN_SCORE = 4, 3, 0.4


class StepError(RuntimeError):
    """A step failed; the message says which and where its output is."""


def _write_json(path: Path, content: object) -> None:
    part = path.with_name(f'{path.name}.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    os.replace(part, path)


class Steps:
    """Runs steps in order and remembers, across calls, which are done.

    A step's key covers the keys of all steps before it, so that one that runs again makes all
    later ones run again.

    Args:
        out: Folder that holds the memory (``steps.json``) and the log (``demo.log``).
        inputs: Anything that all steps depend on.
        env: Environment variables for all commands.
    """

    def __init__(self, out: Path, inputs: str, env: dict[str, str]) -> None:
        self.memory = out / 'steps.json'
        self.log = out / 'demo.log'
        self.env = {**os.environ, **env}
        self.key = hashlib.sha256(inputs.encode()).hexdigest()
        try:
            self.done: dict[str, str] = json.loads(self.memory.read_text())
        except (OSError, ValueError):
            self.done = {}

    def _remember(self, name: str) -> None:
        self.done[name] = self.key
        _write_json(self.memory, self.done)

    def step(
        self,
        name: str,
        what: str,
        action: Callable[[bool], None],
        inputs: str,
        outputs: list[Path],
    ) -> None:
        """Do one step, unless it is done.

        Args:
            name: Its name in the memory.
            what: What the user reads.
            action: Does it. The argument says whether the same step was begun before and broke off.
            inputs: What it depends on besides all steps before it.
            outputs: Files that exist when it is done.
        """
        self.key = hashlib.sha256(f'{self.key} {name} {inputs}'.encode()).hexdigest()
        if self.done.get(name) == self.key and all(path.exists() for path in outputs):
            print(f'== {what}: done already', flush=True)
            return
        print(f'== {what}', flush=True)
        start = time.monotonic()
        begun_before = self.done.get(f'{name} begun') == self.key
        self._remember(f'{name} begun')
        action(begun_before)
        missing = [str(path) for path in outputs if not path.exists()]
        if missing:
            raise StepError(f'{what}: ended without writing {", ".join(missing)} (see {self.log})')
        self._remember(name)
        print(f'   {time.monotonic() - start:.0f} s', flush=True)

    def run(
        self, *arguments: str, show: Callable[[str], str | None], env: dict[str, str] | None = None
    ) -> None:
        """Run one of our tools.

        Args:
            *arguments: The tool and its arguments.
            show: Turns a line of its output into what the user sees of it, None for nothing.
            env: Environment variables for this command.

        Raises:
            StepError: If it fails, with the end of its output.
        """
        spoken = ' '.join([*(f'{k}={v}' for k, v in (env or {}).items()), 'python', *arguments])
        print(f'   $ {spoken}', flush=True)
        tail: list[str] = []
        with self.log.open('a') as log:
            log.write(f'\n$ {spoken}\n')
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**self.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    log.write(line)
                    log.flush()
                    tail = [*tail[-24:], line]
                    shown = show(line.rstrip('\n'))
                    if shown is not None:
                        print(f'   {shown}', flush=True)
                process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            raise StepError(
                f'{arguments[0]} failed with exit code {process.returncode}. The end of '
                f'{self.log}:\n{"".join(tail)}'
            )


def everything(line: str) -> str:
    """Show a tool's output as it is."""
    return line


def progress(line: str) -> str | None:
    """Show what mmengine's log says about progress: iteration, loss, time left."""
    match = re.search(r'(Iter|Epoch)\((\w+)\)\s*(?:\[\d+\])?\s*\[\s*(\d+)/(\d+)\s*\](.*)', line)
    if not match:
        return None
    _, phase, at, of, rest = match.groups()
    facts = [f'{phase} {at}/{of}']
    for name in ('eta', 'loss'):
        found = re.search(rf'\b{name}: (\S+)', rest)
        if found:
            facts.append(f'{name} {found[1]}')
    return '  '.join(facts)


def source_digest() -> str:
    """Hash of all code and configs the demo's result depends on."""
    digest = hashlib.sha256()
    files = [*(ROOT / 'mmdet_moe').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')]
    files += [*(ROOT / 'tools').glob('*.py'), ROOT / 'requirements' / 'pinned.txt']
    for path in sorted(files):
        if '.mim' not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def devices() -> dict[str, str]:
    """Environment that hides a GPU from torch where mmcv has no operators for it."""
    import torch

    if torch.cuda.is_available():
        from mmcv.ops import get_compiling_cuda_version

        if get_compiling_cuda_version() == 'not available':
            print('   the GPU stays idle: mmcv was built without CUDA operators')
            return {'CUDA_VISIBLE_DEVICES': ''}
    return {}


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a training, None if there is none."""
    try:
        path = Path((folder / 'last_checkpoint').read_text().strip())
    except OSError:
        return None
    path = path if path.is_absolute() else ROOT / path
    return path if path.is_file() else None


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics that mmengine's newest test run left below ``folder``."""
    files = sorted(folder.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    if not files:
        raise StepError(f'no metrics below {folder}')
    return json.loads(files[-1].read_text())


# --------------------------------------------------------------------------------------------------
# Table and pictures
# --------------------------------------------------------------------------------------------------


def make_table(metrics: dict[str, float], domains: dict, plan: dict) -> tuple[list[dict], str]:
    """Rows as data and as text, one per domain and one for the mean.

    Args:
        metrics: ``'<domain>/coco/bbox_mAP_50'`` and so on.
        domains: Of ``domains.json``: name -> sizes and classes.
        plan: The plan file's content.
    """
    rows = []
    for name, made in domains.items():
        rows.append(
            {
                'domain': name,
                'train': made['train'],
                'classes': len(made['classes']),
                'experts': ' '.join(plan['assignment'][name]),
                'AP': metrics[f'{name}/coco/bbox_mAP'],
                'AP50': metrics[f'{name}/coco/bbox_mAP_50'],
            }
        )
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in ('AP', 'AP50')}
    rows.append({'domain': 'mean', 'train': '', 'classes': '', 'experts': '', **mean})
    line = '{domain:<12}{train:>6}{classes:>9}  {experts:<10}{AP:>7}{AP50:>7}'
    text = [line.format(**{key: key for key in rows[0]})]
    for row in rows:
        text.append(line.format(**{**row, 'AP': f'{row["AP"]:.3f}', 'AP50': f'{row["AP50"]:.3f}'}))
    text[-1:] = ['-' * len(text[0]), text[-1]]
    return rows, '\n'.join(text)


def verdict(rows: list[dict]) -> str | None:
    """What the table misses of the demo's promise, None if it keeps it."""
    *domains, mean = rows
    missed = [
        f'{row["domain"]} {row["AP50"]:.3f} < {LEAST_AP50}'
        for row in domains
        if not row['AP50'] >= LEAST_AP50
    ]
    if not mean['AP50'] >= MEAN_AP50:
        missed.append(f'mean {mean["AP50"]:.3f} < {MEAN_AP50}')
    return 'AP50 too low: ' + ', '.join(missed) if missed else None


def draw_pictures(config: Path, checkpoint: Path, out: Path) -> None:
    """One picture per domain: validation images in pairs, the truth left, the detections right.

    Args:
        config: Of the model and its data.
        checkpoint: Of the trained model.
        out: Folder for ``<domain>.png``.
    """
    import mmcv
    import numpy as np
    import torch
    from mmdet.apis import init_detector
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    from mmdet_moe.registry import DATASETS

    cfg = Config.fromfile(config)
    model = init_detector(cfg, str(checkpoint), device='cpu')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    visualizer = DetLocalVisualizer(name=str(out))
    visualizer.dataset_meta = dataset.metainfo
    wanted: dict[str, list[int]] = {}
    for index in range(len(dataset)):
        shown = wanted.setdefault(dataset.domain_of(index), [])
        if len(shown) < SHOWN:
            shown.append(index)
    out.mkdir(parents=True, exist_ok=True)
    for domain, indices in wanted.items():
        pairs = []
        for index in indices:
            data = dataset[index]
            with torch.no_grad():
                (found,) = model.test_step(
                    {'inputs': [data['inputs']], 'data_samples': [data['data_samples']]}
                )
            truth = dataset.get_data_info(index)['instances']
            # The images are small: only enlarged can the class names be read.
            pair = DetDataSample(
                gt_instances=InstanceData(
                    bboxes=ENLARGED * torch.tensor([one['bbox'] for one in truth]).float(),
                    labels=torch.tensor([one['bbox_label'] for one in truth]),
                ),
                pred_instances=InstanceData(
                    bboxes=ENLARGED * found.pred_instances.bboxes,
                    labels=found.pred_instances.labels,
                    scores=found.pred_instances.scores,
                ),
            )
            image = mmcv.imread(found.img_path, channel_order='rgb')
            image = mmcv.imrescale(image, float(ENLARGED))
            visualizer.add_datasample(domain, image, pair, pred_score_thr=SHOWN_SCORE)
            pairs.append(visualizer.get_image())
        rows = [np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, len(pairs) - 1, 2)]
        # imwrite wants BGR.
        mmcv.imwrite(np.concatenate(rows)[..., ::-1], str(out / f'{domain}.png'))


# --------------------------------------------------------------------------------------------------
# The job
# --------------------------------------------------------------------------------------------------


def run_demo(out: Path, seed: int) -> int:
    """All steps; the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    data, plan, gem, test = out / 'data', out / 'plan.json', out / 'gem', out / 'test'
    env = {
        'MMDET_MOE_DEMO_DATA': f'{data}/',
        'MMDET_MOE_DEMO_PLAN': str(plan),
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', str(os.cpu_count() or 1)),
        **devices(),
    }
    os.environ.update(env)
    steps = Steps(out, f'{source_digest()} {sys.version_info[:2]}', env)

    steps.step(
        'domains',
        '1/5 make domains: six looks, six label spaces',
        lambda _: steps.run(
            *('tools/make_domains.py', '--out', str(data), '--seed', str(seed), '--overwrite'),
            show=everything,
        ),
        f'{seed}',
        [data / 'domains.json'],
    )
    steps.step(
        'plan',
        '2/5 plan: which expert serves which domain',
        lambda _: steps.run('tools/plan_experts.py', CONFIG, '--out', str(plan), show=everything),
        '',
        [plan],
    )

    def train(begun_before: bool) -> None:
        if not begun_before:
            shutil.rmtree(gem, ignore_errors=True)
        resume = ['--resume'] if last_checkpoint(gem) else []
        arguments = ['tools/train.py', CONFIG, '--work-dir', str(gem), *resume]
        steps.run(*arguments, '--cfg-options', f'randomness.seed={seed}', show=progress)

    steps.step(
        'train', '3/5 train: one GEM-RetinaNet on all domains', train, '', [gem / 'last_checkpoint']
    )
    checkpoint = last_checkpoint(gem)
    if checkpoint is None:
        raise StepError(f'training left no checkpoint in {gem}')

    def evaluate(_: bool) -> None:
        shutil.rmtree(test, ignore_errors=True)
        steps.run(
            *('tools/test.py', CONFIG, str(checkpoint), '--work-dir', str(test)), show=progress
        )
        domains = json.loads((data / 'domains.json').read_text())['domains']
        rows, text = make_table(read_metrics(test), domains, json.loads(plan.read_text()))
        (out / 'results.txt').write_text(text + '\n')
        _write_json(out / 'results.json', rows)

    steps.step('test', '4/5 test, each domain by itself', evaluate, '', [out / 'results.json'])
    pictures = [out / 'pictures' / f'{row["domain"]}.png' for row in _read_rows(out)[:-1]]
    steps.step(
        'pictures',
        '5/5 pictures: truth left, detections right',
        lambda _: draw_pictures(ROOT / CONFIG, checkpoint, out / 'pictures'),
        '',
        pictures,
    )

    print('\n' + (out / 'results.txt').read_text())
    print(f'plan      {plan}\npictures  {out / "pictures"}\nmodel     {checkpoint}')
    missed = verdict(_read_rows(out))
    if missed:
        print(f'demo: {missed}', file=sys.stderr)
        return 1
    return 0


def _read_rows(out: Path) -> list[dict]:
    return json.loads((out / 'results.json').read_text())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', default='work_dirs/demo', help='default: work_dirs/demo')
    parser.add_argument('--seed', type=int, default=0, help='of data and training (default: 0)')
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start = time.monotonic()
    try:
        code = run_demo((Path.cwd() / args.out).resolve(), args.seed)
    except StepError as error:
        print(f'demo: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\ndemo: interrupted; the same command goes on from here', file=sys.stderr)
        return 130
    print(f'demo: {time.monotonic() - start:.0f} s')
    return code


if __name__ == '__main__':
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
