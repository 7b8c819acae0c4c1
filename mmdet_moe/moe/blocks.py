"""Which blocks of a transformer are sparse, said in the papers' way: a string over S and F.

S is a block whose FFN is a MoE layer, F a dense one (SF-MoE's "fusion" block, arXiv 2206.04046).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: GMoE's names. Both put the sparse blocks of every pair S F first, counted from the end.
NAMES = ('last_two', 'every_two')
#: A bracket or a word of letters, and how often.
_PART = re.compile(
    r"""\s*(?: \[(?P<bracket>[^][]*)\] | '(?P<quote>[^']*)' | (?P<word>\w+) )
    (?: \s*\*\s*(?P<times>\d+) )?""",
    re.VERBOSE,
)


def sparse_blocks(blocks: str | Sequence[int], depth: int) -> list[int]:
    """The numbers of the sparse blocks, counted from 1, in order.

    Args:
        blocks: One of

            * a pattern with a letter for each block: S sparse, F dense. ``*n`` repeats the bracket
              or the word before it; spaces and commas beside words mean nothing:
              ``'[SF]*6'``, ``'FFFFFS*2'``, ``'FFFFFFFF SF SF'``, ``"'FFFFFS'*2"``;
            * 'last_two': ``F...F SF SF``, of 12 blocks the 9th and the 11th (GMoE);
            * 'every_two': ``SF SF ... SF``, of 12 blocks 1, 3, ..., 11;
            * a list of block numbers, the first block is 1.
        depth: Number of blocks of the model.

    Raises:
        ValueError: A letter that is neither S nor F, another length than ``depth``, a block that
            the model has not, none at all.

    Example:
        >>> sparse_blocks('[SF]*2', 4), sparse_blocks('last_two', 12), sparse_blocks([2], 4)
        ([1, 3], [9, 11], [2])
    """
    if isinstance(blocks, str):
        found = _named(blocks, depth) if blocks in NAMES else _of_pattern(blocks, depth)
    else:
        found = _of_numbers(blocks, depth)
    if not found:
        raise ValueError(f'blocks={blocks!r} says that no block is sparse; leave moe out for that')
    return found


def _named(name: str, depth: int) -> list[int]:
    every = list(range(depth - 1, 0, -2))[::-1]
    if name == 'every_two':
        return every
    if len(every) < 2:
        raise ValueError(f"blocks='last_two' needs a model of 4 blocks or more, it has {depth}")
    return every[-2:]


def _of_pattern(pattern: str, depth: int) -> list[int]:
    letters, end = '', 0
    text = pattern.replace(',', ' ').rstrip()
    while end < len(text):
        part = _PART.match(text, end)
        if part is None:
            raise _no_pattern(pattern, text[end:].lstrip()[:1])
        word = next(g for g in part.group('bracket', 'quote', 'word') if g is not None)
        word = ''.join(word.split())
        wrong = word.strip('SF')
        if wrong or not word:
            raise _no_pattern(pattern, wrong[:1])
        letters += word * int(part['times'] or 1)
        end = part.end()
    if len(letters) != depth:
        raise ValueError(
            f'blocks={pattern!r} is a pattern of {len(letters)} blocks, the model has {depth}'
        )
    return [i for i, letter in enumerate(letters, 1) if letter == 'S']


def _no_pattern(pattern: str, culprit: str) -> ValueError:
    what = f'{culprit!r} is neither' if culprit else 'nothing is in a bracket'
    return ValueError(
        f'blocks={pattern!r}: {what}; a pattern has S (sparse) and F (dense), such as '
        f"'[SF]*6', or is one of {NAMES}, or a list of block numbers from 1"
    )


def _of_numbers(numbers: Sequence[int], depth: int) -> list[int]:
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= depth:
            raise ValueError(
                f'blocks={list(numbers)!r}: {number!r} is not one of the blocks 1 to {depth} '
                f'(the first block is 1)'
            )
    if len(set(numbers)) != len(numbers):
        raise ValueError(f'blocks={list(numbers)!r} names a block twice')
    return sorted(numbers)
