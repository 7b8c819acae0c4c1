"""The examples of docs/moe.md run, in the order of the page."""

import re
from pathlib import Path

from mmdet_moe.moe import ROUTERS


def test_the_examples_of_the_page_run(capsys):
    page = (Path(__file__).parents[2] / 'docs' / 'moe.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(blocks) == 2
    namespace = {'__name__': 'docs'}
    try:
        for block in blocks:
            exec(compile(block, 'docs/moe.md', 'exec'), namespace)
    finally:
        ROUTERS.classes.pop('SigmoidRouter', None)
    assert capsys.readouterr().out.startswith("tensor([2, 1])\n{'loss_moe_sparsity'")
