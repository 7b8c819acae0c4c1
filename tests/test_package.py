"""What holds for the package as a whole: how it is packaged, and who may import whom."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'mmdet_moe'

#: Folder -> what its modules may import of this package, besides itself and ``structures``.
STOREYS = {
    'planning': set(),
    'moe': {'planning'},
    'structures': set(),
}
TOP_STOREY = ('models', 'datasets', 'evaluation', 'engine', 'visualization')
#: Folder -> third-party packages it may not import, not even inside a function.
FORBIDDEN = {
    'planning': {'torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain'},
    'moe': {'mmengine', 'mmcv', 'mmdet', 'mmpretrain'},
    'structures': {'torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain'},
}


def _imports(path: Path) -> Iterator[str]:
    """Full dotted name of everything a module imports, relative imports resolved."""
    here = ('mmdet_moe', *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = '.'.join(here[: len(here) - node.level + 1]) + '.' if node.level else ''
            base = f'{above}{node.module or ""}'.strip('.')
            yield from (f'{base}.{alias.name}' for alias in node.names)


def _modules(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob('*.py'))


def _run(code: str, *, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize('folder', STOREYS)
def test_imports_only_point_down(folder: str) -> None:
    allowed = STOREYS[folder] | {folder, 'version', 'structures'}
    for path in _modules(folder):
        for name in _imports(path):
            if name.split('.')[0] == 'mmdet_moe':
                part = name.split('.')[1]
                assert part in allowed, f'{path.relative_to(ROOT)} imports {name}'


@pytest.mark.parametrize('folder', FORBIDDEN)
def test_lower_storeys_never_import_the_libraries_above_them(folder: str) -> None:
    for path in _modules(folder):
        for name in _imports(path):
            assert name.split('.')[0] not in FORBIDDEN[folder], f'{path.relative_to(ROOT)}: {name}'


def test_nothing_in_the_package_imports_tools_tests_or_benchmarks() -> None:
    for path in sorted(PACKAGE.rglob('*.py')):
        if '.mim' not in path.parts:
            for name in _imports(path):
                assert name.split('.')[0] not in {'tools', 'tests', 'benchmarks'}, path


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('mmdet_moe', 'torch mmengine mmcv mmdet mmpretrain'),
        ('mmdet_moe.planning', 'torch mmengine mmcv mmdet mmpretrain'),
        ('mmdet_moe.structures', 'torch mmengine mmcv mmdet mmpretrain'),
        ('mmdet_moe.moe', 'mmengine mmcv mmdet mmpretrain'),
    ],
)
def test_a_lower_storey_imports_where_the_libraries_above_it_do_not_exist(
    module: str, absent: str, tmp_path: Path
) -> None:
    # `sys.modules[name] = None` makes `import name` raise, also for what our imports import.
    code = f"""
import sys
for name in {absent!r}.split():
    sys.modules[name] = None
import {module}
"""
    _run(code, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_importing_the_package_does_not_load_torch_or_mmengine(tmp_path: Path) -> None:
    code = "import sys, mmdet_moe; print({'torch', 'mmengine', 'numpy'} & set(sys.modules))"
    assert _run(code, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip() == 'set()'


# --------------------------------------------------------------------------------------------------
# Packaging
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what packaging sees, so that building leaves no trace in the real checkout."""
    copy = tmp_path_factory.mktemp('checkout') / 'mmdet-moe'
    copy.mkdir()
    skip = shutil.ignore_patterns('__pycache__', '.mim', '*.egg-info')
    for name in ('mmdet_moe', 'configs', 'tools', 'requirements'):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ('setup.py', 'MANIFEST.in', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, copy)
    shutil.copy(ROOT / 'model-index.yml', copy)
    # A config of known content, so that this test does not depend on those shipped.
    (copy / 'configs' / 'probe').mkdir()
    (copy / 'configs' / 'probe' / 'probe.py').write_text("model = dict(type='Probe')\n")
    return copy


def _pip(*args: str, cwd: Path) -> None:
    command = [sys.executable, '-m', 'pip', *args, '-q', '--no-deps', '--no-index']
    result = subprocess.run(
        [*command, '--no-build-isolation'], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


_READ_PROBE = """
import mmdet_moe
from mmengine.config import Config
from pathlib import Path
Path('child.py').write_text("_base_ = 'mmdet_moe::probe/probe.py'")
config = Config.fromfile('child.py')
print(config.model.type, config.model._scope_)
"""


@pytest.fixture(scope='module')
def installed(checkout: Path) -> Path:
    """The unpacked wheel."""
    _pip('wheel', '.', '-w', 'dist', cwd=checkout)
    (wheel,) = (checkout / 'dist').glob('mmdet_moe-*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(checkout.parent / 'site')
    return checkout.parent / 'site'


def test_a_wheel_ships_configs_and_tools_but_no_tests(installed: Path, checkout: Path) -> None:
    mim = installed / 'mmdet_moe' / '.mim'
    assert (mim / 'model-index.yml').read_text().startswith('#')
    assert 'Import' in (mim / 'model-index.yml').read_text()
    for folder in ('configs', 'tools'):
        sources = {p.relative_to(checkout) for p in (checkout / folder).rglob('*.py')}
        assert sources == {p.relative_to(mim) for p in (mim / folder).rglob('*.py')}
    assert not (installed / 'tests').exists()
    assert not (checkout / 'mmdet_moe' / '.mim').exists(), 'a wheel must not touch the sources'


def test_base_configs_of_an_installed_package_resolve_by_name(
    installed: Path, tmp_path: Path
) -> None:
    assert _run(_READ_PROBE, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == 'Probe mmdet_moe'


def test_base_configs_resolve_when_mmengine_was_imported_first(
    installed: Path, tmp_path: Path
) -> None:
    code = 'import mmengine.config\n' + _READ_PROBE
    assert _run(code, cwd=tmp_path, PYTHONPATH=str(installed)).strip() == 'Probe mmdet_moe'


def test_an_editable_install_links_to_the_checkout_so_that_edits_count(
    checkout: Path, installed: Path, tmp_path: Path
) -> None:
    _pip('install', '--target', str(tmp_path / 'site'), '-e', '.', cwd=checkout)
    mim = checkout / 'mmdet_moe' / '.mim'
    assert mim.joinpath('configs').resolve() == (checkout / 'configs').resolve()
    (checkout / 'configs' / 'probe' / 'probe.py').write_text("model = dict(type='Edited')\n")
    printed = _run(_READ_PROBE, cwd=tmp_path, PYTHONPATH=f'{checkout}:{tmp_path / "site"}')
    assert printed.strip() == 'Edited mmdet_moe'


def test_pinned_packages_satisfy_the_loose_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def read(name: str) -> list[Requirement]:
        lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
        lines = [line.split('#')[0].strip() for line in lines]
        return [Requirement(line) for line in lines if line]

    pins: dict[str, list[str]] = {}
    for requirement in read('pinned') + read('pinned_mm'):
        (pin,) = requirement.specifier
        assert pin.operator == '==', requirement
        pins.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    for requirement in read('runtime') + read('mm') + read('tests'):
        versions = pins[canonicalize_name(requirement.name)]
        for version in versions:
            assert requirement.specifier.contains(version), f'{requirement} against {version}'


@pytest.mark.parametrize(
    'page', ['README.md', *sorted(f'docs/{p.name}' for p in (ROOT / 'docs').glob('*.md'))]
)
def test_links_between_pages_and_to_code_lead_somewhere(page: str) -> None:
    path = ROOT / page
    links = re.findall(r'\]\(([^)#\s]*)(#[^)\s]+)?[^)]*\)', path.read_text())
    for link, anchor in links:
        if '://' in link:
            continue
        target = path.parent / link if link else path
        assert target.exists(), f'{page} links to {link}'
        if anchor and target.suffix == '.md':
            text = re.sub(r'\]\([^)]*\)', ']', target.read_text())  # titles may hold links
            titles = re.findall(r'^#+ (.*)$', text, flags=re.M)
            # GitHub's anchors: lower case, without punctuation, hyphens for spaces.
            anchors = {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}
            assert anchor[1:] in anchors, f'{page} links to {link}{anchor}'
