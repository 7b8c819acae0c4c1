# Five small real domains (blood cells, circuit boards, aerial infrared, hand-drawn diagrams, ground
# thermal) with label spaces that do not overlap. 320 px. Where they lie:
#   $MINI_UODB/<domain>/{train,val}.json and the images in $MINI_UODB/<domain>/{train,val}/
# A domain named by $MINI_UODB_HELD_OUT is left out of everything: a newcomer for later.
data_root = '{{$MINI_UODB:data/mini_uodb/}}'
held_out = '{{$MINI_UODB_HELD_OUT:none}}'
label_space = dict(
    domains=dict(
        bccd=['RBC', 'WBC', 'Platelets'],
        deeppcb=['open', 'short', 'mousebite', 'spur', 'copper', 'pin-hole'],
        hituav=['Person', 'Car', 'Bicycle', 'OtherVehicle'],
        hdbpmn=[
            'data_object',
            'data_store',
            'end_event',
            'event_gateway',
            'exclusive_gateway',
            'intermediate_event',
            'lane',
            'parallel_gateway',
            'pool',
            'start_event',
            'subprocess',
            'task',
            'text_annotation',
        ],
        cheetah=['cheetah', 'human'],
    )
)
label_space['domains'].pop(held_out, None)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
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
    name: [
        dict(type='CocoMetric', ann_file=f'{data_root}{name}/val.json', metric='bbox'),
        dict(type='VOCMetric', iou_thrs=0.5, metric='mAP', eval_mode='11points'),
    ]
    for name in label_space['domains']
}
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    # Shares .25, .21, .21, .21, .14 (by size .30, .20, .20, .20, .09).
    sampler=dict(type='MultiDomainSampler', weights='sqrt'),
    dataset=dict(
        type='MultiDomainDataset',
        label_space=label_space,
        domains=train_domains,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=4,
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
    small=['cheetah'],  # 90 training images; the others have 200 and more
)
test_evaluator = val_evaluator
