"""Two gloo processes record one validation: every image once, the numbers of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

# Three images on two ranks: rank 1 gets image 0 once more, which must not count.
SCRIPT = """
import sys
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from expert_runs import classifier_config
from pathlib import Path

torch.set_num_threads(1)
torch.distributed.init_process_group('gloo')  # mmengine's own call asks for a GPU
config = classifier_config(
    Path(sys.argv[1]), launcher='pytorch', custom_hooks=[dict(type='mmdet_moe.ExpertRecordHook')],
    model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None))
for key in ('val_dataloader', 'test_dataloader'):
    config[key].update(batch_size=1)
    config[key]['dataset']['indices'] = [0, 5, 10]
Runner._log_env = lambda *args: None
runner = Runner.from_cfg(Config(config))
torch.manual_seed(0)
runner.model.module.init_weights()
runner.val_loop.run()
"""


def validate(folder: Path, ranks: int) -> dict:
    """The record of a validation in ``ranks`` processes."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    path = [str(HERE.parents[1]), str(HERE.parent), os.environ.get('PYTHONPATH', '')]
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(path),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(port),
        'WORLD_SIZE': str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', SCRIPT, str(folder)],
            env={**environment, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output[-3000:]
    return json.loads((folder / 'expert_record' / 'val.json').read_text())


def test_two_processes_record_what_one_does(tmp_path):
    one, two = validate(tmp_path / 'one', 1), validate(tmp_path / 'two', 2)
    # Rank 0 has images 0 and 2, rank 1 has image 1.
    names = [Path(path).parent.name for path in one['images']['path']]
    assert names == ['blue', 'green', 'red']
    assert [Path(path).parent.name for path in two['images']['path']] == ['blue', 'red', 'green']
    assert two['objects']['image'] == [0, 1, 2] and two['objects']['label'] == [0, 2, 1]
    ours, theirs = (record['statistics']['backbone.layer3'] for record in (one, two))
    assert ours['items'] == theirs['items'] == 3
    assert theirs['importance'] == pytest.approx(ours['importance'], abs=1e-4)
    assert theirs['pairs'] == ours['pairs']
    assert theirs['class']['count'] == ours['class']['count']
