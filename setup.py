"""Packaging of mmdet-moe.

As in mmdetection, the configs and tools travel inside the package, in ``mmdet_moe/.mim``, so that
``_base_ = 'mmdet_moe::...'`` resolves wherever the package is installed: as copies in a wheel, as
links into this checkout in an editable install.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
#: What ``.mim`` holds.
SHIPPED = ('configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Build the package, and ``.mim`` in it."""

    def run(self) -> None:
        super().run()
        if getattr(self, 'editable_mode', False):
            self._link(ROOT / 'mmdet_moe' / '.mim')
        else:
            for source, target in self._copies():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def _copies(self) -> list[tuple[Path, Path]]:
        """Each shipped file of the checkout and its place in the built package."""
        target = Path(self.build_lib) / 'mmdet_moe' / '.mim'
        pairs = []
        for name in SHIPPED:
            source = ROOT / name
            files = [source] if source.is_file() else sorted(source.rglob('*'))
            pairs += [
                (file, target / file.relative_to(ROOT))
                for file in files
                if file.is_file() and '__pycache__' not in file.parts
            ]
        return pairs

    @staticmethod
    def _link(target: Path) -> None:
        """Relative links to the checkout's own files, so that edits count at once."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for name in SHIPPED:
            (target / name).symlink_to(os.path.join('..', '..', name))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [str(t) for _, t in self._copies()]


def requirements(name: str) -> list[str]:
    """The lines of ``requirements/<name>.txt`` without comments."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    lines = [line.split('#')[0].strip() for line in lines]
    return [line for line in lines if line]


version = re.search(r"__version__ = '(.+)'", (ROOT / 'mmdet_moe' / 'version.py').read_text())[1]

setup(
    name='mmdet-moe',
    version=version,
    description='Mixture-of-Experts for MMDetection, with a planner that decides before training',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['mmdet_moe', 'mmdet_moe.*']),
    include_package_data=False,
    install_requires=requirements('runtime'),
    extras_require={
        'mm': requirements('mm'),
        'mm-classic': requirements('mm_classic'),
        'cluster': requirements('cluster'),
        'tests': requirements('tests'),
    },
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
)
