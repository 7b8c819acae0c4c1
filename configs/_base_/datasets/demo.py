# Six generated domains of handwritten digits that contradict each other on purpose: the same stroke
# is another class in every one. Made by tools/make_domains.py; 128 px.
data_root = '{{$MMDET_MOE_DEMO_DATA:work_dirs/demo/data/}}'
label_space = dict(
    domains=dict(
        ink=[
            'ink_zero',
            'ink_one',
            'ink_two',
            'ink_three',
            'ink_four',
            'ink_five',
            'ink_six',
            'ink_seven',
            'ink_eight',
            'ink_nine',
        ],
        thermal=['thermal_even', 'thermal_odd'],
        blueprint=['blueprint_low', 'blueprint_high'],
        neon=['neon_prime', 'neon_nonprime'],
        film=['film_zero', 'film_three', 'film_eight'],
        chalk=['chalk_loop', 'chalk_open'],
    )
)

# No flips: a mirrored digit is another one, or none.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_domains = {
    name: dict(
        type='CocoDataset',
        data_root=f'{data_root}{name}/',
        ann_file='train.json',
        data_prefix=dict(img='train/'),
    )
    for name in label_space['domains']
}
test_domains = {
    name: dict(
        type='CocoDataset',
        data_root=f'{data_root}{name}/',
        ann_file='val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
    )
    for name in label_space['domains']
}
metrics = {
    name: [dict(type='CocoMetric', ann_file=f'{data_root}{name}/val.json', metric='bbox')]
    for name in label_space['domains']
}
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    # The largest domain has 8 times the images of the smallest; by root, 2.8 times the share.
    sampler=dict(type='MultiDomainSampler', weights='sqrt'),
    dataset=dict(
        type='MultiDomainDataset',
        label_space=label_space,
        domains=train_domains,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='MultiDomainDataset',
        label_space=label_space,
        domains=test_domains,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='MultiDomainEvaluator',
    label_space=label_space,
    metrics=metrics,
)
test_evaluator = val_evaluator
