# Emoji: leave one drawing style out; 64 px. At $EMOJI_DG/<style>/<class>/<concept>.png
#   $DG_TEST   noto, twemoji, openmoji, or fluent_flat (which holds out fluent_hc as well: the same
#              drawings in other colours)
#   $DG_TRIAL  seed of the split
# Training, validation and test share no concept in any style. Evaluated are the validation and test
# concepts of all styles, not those of training. Augmented as in dg.py.
_base_ = 'dg.py'
num_classes = 6
data_preprocessor = dict(num_classes=num_classes, mean=[127.5] * 3, std=[127.5] * 3)
dataset = dict(
    data_root='{{$EMOJI_DG:data/emoji_dg/}}',
    name=None,
    domains=['noto', 'twemoji', 'fluent_flat', 'fluent_hc', 'openmoji'],
    groups=[['fluent_flat', 'fluent_hc']],
    split_by='stem',
    fractions=dict(train=0.6, val=0.2, test=0.2),
    serialize_data=False,  # no worker processes to share it with
)
in_process = dict(num_workers=0, persistent_workers=False)
train_pipeline = [
    {**step, 'scale': 64} if step['type'] == 'RandomResizedCrop' else step
    for step in _base_.train_pipeline
]
test_pipeline = [
    {**step, 'scale': (64, 64)} if step['type'] == 'Resize' else step
    for step in _base_.test_pipeline
]
train_dataloader = dict(
    **in_process,
    batch_size=8,  # of every source style
    dataset=dict(**dataset, pipeline=train_pipeline),
)
val_dataloader = dict(
    **in_process,
    batch_size=256,
    dataset=dict(**dataset, parts=['val', 'test'], pipeline=test_pipeline),
)
test_dataloader = val_dataloader
