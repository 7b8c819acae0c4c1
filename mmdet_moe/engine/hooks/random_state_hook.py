"""Random states and the place in the stream of samples survive a crash."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log

from mmdet_moe.registry import HOOKS

_KEY = 'random_state'


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Save the random states of every rank in checkpoints and continue with them on resume.

    mmengine saves model, optimiser, schedules and EMA, but no random state. This hook keeps those
    of Python, NumPy, torch and the current CUDA device, as tensors and numbers, so that the
    checkpoint still loads with ``weights_only=True``. On resume

    * the sampler gets the seed it had, where the config states none,
    * the sampler goes straight to the position where training stopped, on mmengine's that know how
      to (``skip_iter``) and on those that would load every image again (0.10 and before), given a
      sampler with ``skip`` (``MultiDomainSampler``) or a batch sampler with ``skip_batches``
      (``DomainBatchSampler``),
    * the random states are set back at the one right moment: after the data loader's iterator was
      made (which draws a number) and before the first image is loaded.

    Validation runs on a copy of the random states, so that neither its interval nor whether it was
    run before the crash matters to training. On CPU without worker processes, an interrupted and
    resumed run then equals an uninterrupted one bit for bit, random augmentation included.
    Worker processes draw their own seeds; with them, the order of samples still continues exactly.
    """

    # Behind whatever draws random numbers in a step, before the CheckpointHook.
    priority = 'LOW'

    def __init__(self) -> None:
        self._resumed: dict | None = None
        self._before_val: dict | None = None
        self._gathered: list[dict] | None = None

    # -- saving ----------------------------------------------------------------------------------

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        self._gathered = self._gather() if self._saves(runner, by_epoch=False) else None

    def after_train_epoch(self, runner: Any) -> None:
        if self._saves(runner, by_epoch=True):
            self._gathered = self._gather()

    def before_val(self, runner: Any) -> None:
        self._before_val = get_random_state()

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        self._gathered = self._gather()  # for the best checkpoint

    def after_val(self, runner: Any) -> None:
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        # Only the main process comes here, so the others' states were gathered before. In one
        # process they are read now, whoever asked for the checkpoint.
        world_size = get_dist_info()[1]
        ranks = [self._state()] if world_size == 1 else self._gathered
        sampler = _sampler(runner.train_dataloader)
        checkpoint[_KEY] = {'ranks': ranks, 'sampler_seed': getattr(sampler, 'seed', None)}

    def _state(self) -> dict:
        """This rank's state as training will see it next."""
        return get_random_state() if self._before_val is None else self._before_val

    def _gather(self) -> list[dict] | None:
        return all_gather_object(self._state()) if get_dist_info()[1] > 1 else None

    @staticmethod
    def _saves(runner: Any, by_epoch: bool) -> bool:
        """Whether some CheckpointHook saves at this point."""
        for hook in runner.hooks:
            if not isinstance(hook, CheckpointHook) or hook.by_epoch != by_epoch:
                continue
            start = getattr(hook, 'save_begin', 0)
            if by_epoch:
                due = hook.every_n_epochs(runner, hook.interval, start)
                last = hook.is_last_train_epoch(runner)
            else:
                due = hook.every_n_train_iters(runner, hook.interval, start)
                last = hook.is_last_train_iter(runner)
            if due or (hook.save_last and last):
                return True
        return False

    # -- resuming --------------------------------------------------------------------------------

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self._resumed = checkpoint.get(_KEY)

    def before_train(self, runner: Any) -> None:
        resumed, self._resumed = self._resumed, None
        loop = runner.train_loop
        if loop.iter == 0:
            return  # weights were loaded, training was not resumed
        restore = self._restorer(resumed)
        if resumed is not None and resumed['sampler_seed'] is not None:
            sampler = _sampler(loop.dataloader)
            if hasattr(sampler, 'seed'):
                sampler.seed = resumed['sampler_seed']
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _ResumedIterator(
                loop.dataloader_iterator, loop.iter, restore
            )
        else:
            self._restore_epoch = restore

    def before_train_epoch(self, runner: Any) -> None:
        restore = self.__dict__.pop('_restore_epoch', None)
        if restore is not None:
            restore()

    @staticmethod
    def _restorer(resumed: dict | None) -> Callable[[], None]:
        rank, world_size = get_dist_info()
        ranks = None if resumed is None else resumed['ranks']
        if ranks is None or len(ranks) != world_size:
            found = 'none' if ranks is None else f'those of {len(ranks)} processes'
            print_log(
                f'Resuming with {world_size} process(es), but the checkpoint has the random states '
                f'of {found}: random numbers do not continue where they stopped.',
                logger='current',
                level=30,
            )
            return lambda: None
        return lambda: set_random_state(ranks[rank])


class _ResumedIterator:
    """The train loop's endless iterator, put where training stopped.

    Args:
        inner: The loop's own ``_InfiniteDataloaderIterator``.
        done: The number of iterations done before.
        restore: Called once, right before the first new batch is loaded.
    """

    def __init__(self, inner: Any, done: int, restore: Callable[[], None]) -> None:
        self._inner = inner
        self._restore: Callable[[], None] | None = restore
        # A loop whose iterator has `skip_iter` calls it; one whose has not draws all the batches
        # done before and throws them away. We give it nothing instead, where we can.
        self._replay = 0 if hasattr(inner, 'skip_iter') else done
        self._skipped_batches = self._skip_batches(done)
        self._load_replay = self._replay > 0 and not self._skipped_batches and not self._skip(done)

    def _skip_batches(self, done: int) -> bool:
        batches = getattr(self._inner._dataloader, 'batch_sampler', None)
        if not hasattr(batches, 'skip_batches'):
            return False
        batches.skip_batches(done)
        # The old one may have prefetched; newer loops make it when they need it.
        lazy = hasattr(self._inner, 'skip_iter')
        self._inner._iterator = None if lazy else iter(self._inner._dataloader)
        return True

    @property
    def skip_iter(self) -> Callable[[int], None]:
        """What newer loops call to skip what was done; nothing is left to do for it where the
        batch sampler could."""
        skip = self._inner.skip_iter  # an AttributeError where mmengine is older
        return (lambda done: None) if self._skipped_batches else skip

    def _skip(self, done: int) -> bool:
        loader = self._inner._dataloader
        if loader.batch_size is None or not hasattr(loader.sampler, 'skip'):
            return False
        loader.sampler.skip(done * loader.batch_size)
        self._inner._iterator = iter(loader)  # the old one may have prefetched
        return True

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._replay > 0:
            self._replay -= 1
            return next(self._inner) if self._load_replay else None
        if self._restore is not None:
            # Making the iterator draws from torch's generator; the run before had done that.
            if getattr(self._inner, '_iterator', self) is None:
                self._inner._iterator = iter(self._inner._dataloader)
            self._restore()
            self._restore = None
        return next(self._inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == '_inner':
            raise AttributeError(name)
        return getattr(self._inner, name)


def _sampler(loader: Any) -> Any:
    """The sampler below whatever makes batches of its indices."""
    batches = getattr(loader, 'batch_sampler', None)
    return getattr(batches, 'sampler', getattr(loader, 'sampler', None))


def get_random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as tensors and numbers.

    Returns:
        ``python`` and ``numpy`` (their Mersenne Twister's key as int64 tensor, position, and the
        cached second half of a Gaussian pair), ``torch`` and ``cuda`` (uint8 tensors; None where
        CUDA is not in use).
    """
    version, key, gauss = random.getstate()
    name, numpy_key, position, has_gauss, cached = np.random.get_state(legacy=True)
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        'python': {'version': version, 'key': torch.tensor(key), 'gauss': gauss},
        'numpy': {
            'name': str(name),
            'key': torch.from_numpy(numpy_key.astype(np.int64)),
            'position': int(position),
            'has_gauss': int(has_gauss),
            'gauss': float(cached),
        },
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if in_use else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Set the states that :func:`get_random_state` returned."""
    python, numpy = state['python'], state['numpy']
    random.setstate((python['version'], tuple(python['key'].tolist()), python['gauss']))
    key = numpy['key'].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy['name'], key, numpy['position'], numpy['has_gauss'], numpy['gauss']))
    # Resuming maps tensors to the device; generators' states live on the CPU.
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
