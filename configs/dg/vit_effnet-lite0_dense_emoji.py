# The dense network of the small experiments here: leave one drawing style of emoji out.
_base_ = [
    '../_base_/models/vit_effnet-lite0_emoji.py',
    '../_base_/datasets/dg_emoji.py',
    '../_base_/schedules/dg_emoji.py',
]
