# Emoji: five drawing styles (domains) x six classes, the same concepts in every style; 32 px. At
#   $EMOJI_DG/<style>/<class>/<concept>.png
# Training and validation share no concept. The style is in the metainfo, for the analysis.
data_root = '{{$EMOJI_DG:data/emoji_dg/}}'
data_preprocessor = dict(
    num_classes=6, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True
)
pack = dict(type='PackInputs', meta_keys=('sample_idx', 'img_path', 'domain', 'domain_label'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=32),
    dict(type='RandomCrop', crop_size=32, padding=4, pad_val=255),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    pack,
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=32), pack]
dataset = dict(
    type='mmdet_moe.DomainImageFolder',
    data_root=data_root,
    fractions=dict(train=0.8, val=0.2),
)
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,  # mmpretrain's tool says True otherwise, which needs workers
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**dataset, split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='val', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
