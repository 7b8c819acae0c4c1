"""Keep the accuracies of a run for model selection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from mmdet_moe.planning.checks import write_atomically
from mmdet_moe.registry import HOOKS

RECORDS = 'dg_records.jsonl'


@HOOKS.register_module()
class DGRecordHook(Hook):
    """Write what ``DomainAccuracy`` measures to ``<work_dir>/dg_records.jsonl``.

    The first line is the run: ``dataset``, ``domains``, ``held_out``, ``groups``, ``trial`` and
    ``parts``. Each further line is one evaluation: ``step``, ``model`` (``last``, or an average
    such as ``swad``), and ``accuracy`` (%) and ``nll`` (nats) with one number per ``<domain>/<part>``. The
    file is replaced as a whole, never half written.

    A resumed run keeps the lines up to its step, and makes up for the evaluation of that very step
    where the run stopped between the checkpoint and the evaluation.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.model = 'last'

    def before_train(self, runner: Any) -> None:
        path = Path(runner.work_dir) / RECORDS
        meta = runner.val_loop.dataloader.dataset.metainfo
        keys = ('dataset', 'domains', 'held_out', 'groups', 'trial', 'parts')
        run = {key: meta[key] for key in keys}
        self.lines = [json.loads(json.dumps(run))]
        if runner.iter > 0 and path.is_file():
            found = [json.loads(line) for line in path.read_text().splitlines()]
            self.lines += [
                line for line in found[1:] if line['step'] <= runner.iter and line['model'] == 'last'
            ]
            loop = runner.train_loop
            due = runner.iter % loop.val_interval == 0 and runner.iter >= loop.val_begin
            last = runner.iter == loop.max_iters
            if (due or last) and self.lines[-1].get('step') != runner.iter:
                runner.val_loop.run()

    @contextmanager
    def evaluating(self, model: str) -> Iterator[None]:
        """Within it, evaluations are those of another model than the last step's."""
        before, self.model = self.model, model
        try:
            yield
        finally:
            self.model = before

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        line: dict[str, Any] = {'step': runner.iter, 'model': self.model}
        for what in ('accuracy', 'nll'):
            line[what] = {
                key.removeprefix('dg/').removesuffix(f'/{what}'): value
                for key, value in (metrics or {}).items()
                if key.startswith('dg/') and key.endswith(f'/{what}')
            }
        self.lines.append(line)
        if is_main_process():
            text = ''.join(json.dumps(line) + '\n' for line in self.lines)
            write_atomically(Path(runner.work_dir) / RECORDS, text)
