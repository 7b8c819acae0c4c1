# Emoji: leave one drawing style out; 64 px. At $EMOJI_DG/<style>/<class>/<concept>.png
#   $DG_TEST   noto, twemoji, openmoji, or fluent_flat (which holds out fluent_hc as well: the same
#              drawings in other colours)
#   $DG_TRIAL  seed of the split
# Training, validation and test share no concept in any style. Evaluated are the validation and test
# concepts of all styles, not those of training.
emoji_root = '{{$EMOJI_DG:data/emoji_dg/}}'
dg_test = '{{$DG_TEST:none}}'
dg_trial = '{{$DG_TRIAL:0}}'
num_classes = 6
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[127.5, 127.5, 127.5],
    std=[127.5, 127.5, 127.5],
    to_rgb=True,
)
pack = dict(type='PackInputs', meta_keys=('domain', 'part'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.7, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
    dict(type='RandomGrayscale', prob=0.1, keep_channels=True),
    pack,
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), pack]
dataset = dict(
    type='mmdet_moe.DGDataset',
    data_root=emoji_root,
    domains=['noto', 'twemoji', 'fluent_flat', 'fluent_hc', 'openmoji'],
    groups=[['fluent_flat', 'fluent_hc']],
    held_out=[name for name in dg_test.split(',') if name != 'none'],
    trial=int(dg_trial),
    split_by='stem',
    fractions=dict(train=0.6, val=0.2, test=0.2),
)
train_dataloader = dict(
    batch_size=16,  # of every source style
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    batch_sampler=dict(type='mmdet_moe.DomainBatchSampler'),
    dataset=dict(**dataset, sources_only=True, parts=['train'], pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=256,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, parts=['val', 'test'], pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmdet_moe.DomainAccuracy')
test_evaluator = val_evaluator
