"""The environment script: what it must not touch, and when it must do nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load_tool():
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools/setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = _load_tool()


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any step that would change something fails the test."""

    def refuse(*_: object) -> None:
        raise AssertionError('a step was run')

    monkeypatch.setattr(tool, 'set_up', refuse)


def test_a_matching_stamp_ends_the_call_at_once(
    tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'mmdet_moe' / '.mim' / 'configs').mkdir(parents=True)
    (tmp_path / 'setup.py').touch()
    monkeypatch.setattr(tool, 'ROOT', tmp_path)
    venv = tmp_path / 'venv'
    venv.mkdir()
    (venv / tool.STAMP).write_text(json.dumps({'fingerprint': tool._fingerprint()}))
    assert tool.main(['--venv', str(venv)]) == 0

    # Another recipe: not set up any more.
    (tmp_path / 'setup.py').write_text('changed')
    assert not tool.is_set_up(venv)


def test_an_environment_of_the_user_is_used_as_it_is(
    tmp_path: Path, no_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').symlink_to(sys.executable)
    monkeypatch.setattr(tool, '_IMPORTS', 'import json')
    assert tool.main(['--venv', str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bin']


def test_an_environment_of_the_user_that_lacks_something_is_named_and_left_alone(
    tmp_path: Path,
    no_steps: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').symlink_to(sys.executable)
    monkeypatch.setattr(tool, '_IMPORTS', 'import no_such_module')
    assert tool.main(['--venv', str(tmp_path)]) == 1
    assert 'no_such_module' in capsys.readouterr().err


def test_a_folder_that_is_no_environment_is_refused(
    tmp_path: Path, no_steps: None, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / 'thesis.tex').touch()
    assert tool.main(['--venv', str(tmp_path)]) == 1
    assert 'no Python environment' in capsys.readouterr().err


def test_the_wheel_folder_names_torch_and_python_and_honours_the_cache_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
    python = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    expected = Path(f'/somewhere/mmdet-moe/wheels/torch2.11.0-{python}')
    assert tool.wheel_folder('2.11.0', cuda=False) == expected
    assert tool.wheel_folder('2.11.0', cuda=True) == Path(f'{expected}-cuda')


def test_a_long_step_says_how_long_it_takes_and_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(tool, 'HEARTBEAT', 0.0)
    code = "import time; print('[3/7] c++ nms.cpp', flush=True); time.sleep(1.5)"
    tool.Runner(tmp_path / 'log').run([sys.executable, '-c', code], 'building mmcv')
    lines = capsys.readouterr().out.splitlines()
    assert 'setup: building mmcv: 0:01 so far, 3 of 7 files compiled' in lines
    assert lines[-1].startswith('setup: building mmcv: done in 0:0')


def test_a_failed_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    code = "print('no space left'); raise SystemExit(1)"
    with pytest.raises(tool.SetupError, match='no space left'):
        tool.Runner(tmp_path / 'log').run([sys.executable, '-c', code], 'building mmcv')


def test_an_interrupted_step_ends_everything_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A parent that ends at once on the signal, and a child that takes a second to obey it.
    child = f"""
import signal, sys, time
def slow(*_):
    time.sleep(1)
    open({str(tmp_path / 'last words')!r}, 'w').close()
    sys.exit()
signal.signal(signal.SIGTERM, slow)
open({str(tmp_path / 'started')!r}, 'w').close()
time.sleep(60)
"""
    parent = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {child!r}])'

    def interrupt(*_: object) -> None:
        while not (tmp_path / 'started').exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    runner = tool.Runner(tmp_path / 'log')
    monkeypatch.setattr(runner, '_watch', interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.run([sys.executable, '-c', parent], 'building')
    assert (tmp_path / 'last words').exists()
