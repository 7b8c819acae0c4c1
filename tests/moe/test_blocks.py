"""What a pattern of sparse and dense blocks says, and what is refused."""

import pytest

from mmdet_moe.moe import sparse_blocks


@pytest.mark.parametrize(
    ('blocks', 'depth', 'expected'),
    [
        ('[SF]*6', 12, [1, 3, 5, 7, 9, 11]),
        ('[S,F]*6', 12, [1, 3, 5, 7, 9, 11]),
        ('[ S F ] * 6', 12, [1, 3, 5, 7, 9, 11]),
        ("'FFFFFS'*2", 12, [6, 12]),
        ('FFFFFS*2', 12, [6, 12]),
        ('FFFFFS FFFFFS', 12, [6, 12]),
        ('FFFFFFFF SF SF', 12, [9, 11]),
        ('FFFFFFFFSFSF', 12, [9, 11]),
        ('F*8 SF*2', 12, [9, 11]),  # a star repeats the word before it
        ('[FFS]*4', 12, [3, 6, 9, 12]),
        ('[F]*1[S]*1 S', 3, [2, 3]),
        ('S', 1, [1]),
        ('last_two', 12, [9, 11]),
        ('last_two', 6, [3, 5]),
        ('last_two', 5, [2, 4]),
        ('every_two', 12, [1, 3, 5, 7, 9, 11]),
        ('every_two', 5, [2, 4]),
        ([9, 11], 12, [9, 11]),
        ((12, 1), 12, [1, 12]),
    ],
)
def test_blocks_are_counted_from_1(blocks, depth, expected):
    assert sparse_blocks(blocks, depth) == expected


@pytest.mark.parametrize(
    ('blocks', 'message'),
    [
        ('[SF]*5', 'is a pattern of 10 blocks, the model has 12'),
        ('', 'is a pattern of 0 blocks, the model has 12'),
        ('[SG]*6', "'G' is neither; a pattern has S .sparse. and F .dense."),
        ('sf', "'s' is neither"),
        ('[SF*6', r"'\[' is neither"),
        ('SF]*6', r"'\]' is neither"),
        ('*6', r"'\*' is neither"),
        ('[]*6', 'nothing is in a bracket'),
        ('every_three', "'e' is neither.*'last_two', 'every_two'"),
        ('F*12', 'no block is sparse'),
        ([], 'no block is sparse'),
        ([0, 3], r'0 is not one of the blocks 1 to 12 .the first block is 1.'),
        ([13], '13 is not one of the blocks 1 to 12'),
        (['S'], "'S' is not one of"),
        ([True], 'True is not one of'),
        ([3, 3], 'names a block twice'),
    ],
)
def test_what_is_no_pattern_is_refused_in_one_line(blocks, message):
    with pytest.raises(ValueError, match=message) as error:
        sparse_blocks(blocks, 12)
    assert '\n' not in str(error.value)


def test_the_last_two_need_four_blocks():
    with pytest.raises(ValueError, match='needs a model of 4 blocks or more, it has 3'):
        sparse_blocks('last_two', 3)
