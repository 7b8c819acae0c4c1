# The Universal Object Detection Benchmark (Wang et al. 2019): 11 datasets. Its own download is
# dead: take every dataset from its owner and convert it (docs/uodb.md). What comes out:
#   $UODB/<domain>/{train,test}.json and the images in $UODB/<domain>/{train,test}/
# Splits: KITTI, WiderFace and DOTA train/val; VOC 07+12 trainval / 07 test; LISA (superclasses),
# Kitchen (GMU), Comic, Clipart and Watercolor train/test; COCO 2014 valminusminival / minival;
# DeepLesion trainval/test.
#
# Variables only: configs that use them replace the dataloaders of the mmdet config they inherit.
uodb_root = '{{$UODB:data/uodb/}}'
voc = [
    'aeroplane',
    'bicycle',
    'bird',
    'boat',
    'bottle',
    'bus',
    'car',
    'cat',
    'chair',
    'cow',
    'diningtable',
    'dog',
    'horse',
    'motorbike',
    'person',
    'pottedplant',
    'sheep',
    'sofa',
    'train',
    'tvmonitor',
]
art = ['bicycle', 'bird', 'car', 'cat', 'dog', 'person']
label_space = dict(
    domains=dict(
        kitti=['car', 'pedestrian', 'cyclist'],
        voc=voc,
        widerface=['face'],
        lisa=['stop', 'speedLimit', 'warning', 'noTurn'],
        kitchen=[
            'coca_cola_glass_bottle',
            'coffee_mate_french_vanilla',
            'honey_bunches_of_oats_honey_roasted',
            'hunts_sauce',
            'mahatma_rice',
            'nature_valley_soft_baked_oatmeal_squares_cinnamon_brown_sugar',
            'nature_valley_sweet_and_salty_nut_almond',
            'palmolive_orange',
            'pop_secret_light_butter',
            'pringles_bbq',
            'red_bull',
        ],
        coco=[
            'person',
            'bicycle',
            'car',
            'motorcycle',
            'airplane',
            'bus',
            'train',
            'truck',
            'boat',
            'traffic light',
            'fire hydrant',
            'stop sign',
            'parking meter',
            'bench',
            'bird',
            'cat',
            'dog',
            'horse',
            'sheep',
            'cow',
            'elephant',
            'bear',
            'zebra',
            'giraffe',
            'backpack',
            'umbrella',
            'handbag',
            'tie',
            'suitcase',
            'frisbee',
            'skis',
            'snowboard',
            'sports ball',
            'kite',
            'baseball bat',
            'baseball glove',
            'skateboard',
            'surfboard',
            'tennis racket',
            'bottle',
            'wine glass',
            'cup',
            'fork',
            'knife',
            'spoon',
            'bowl',
            'banana',
            'apple',
            'sandwich',
            'orange',
            'broccoli',
            'carrot',
            'hot dog',
            'pizza',
            'donut',
            'cake',
            'chair',
            'couch',
            'potted plant',
            'bed',
            'dining table',
            'toilet',
            'tv',
            'laptop',
            'mouse',
            'remote',
            'keyboard',
            'cell phone',
            'microwave',
            'oven',
            'toaster',
            'sink',
            'refrigerator',
            'book',
            'clock',
            'vase',
            'scissors',
            'teddy bear',
            'hair drier',
            'toothbrush',
        ],
        dota=[
            'plane',
            'ship',
            'storage-tank',
            'baseball-diamond',
            'tennis-court',
            'basketball-court',
            'ground-track-field',
            'harbor',
            'bridge',
            'large-vehicle',
            'small-vehicle',
            'helicopter',
            'roundabout',
            'soccer-ball-field',
            'swimming-pool',
        ],
        deeplesion=['lesion'],
        comic=art,
        clipart=voc,
        watercolor=art,
    ),
    # VOC's names of COCO's classes.
    synonyms=dict(
        aeroplane='airplane',
        diningtable='dining table',
        motorbike='motorcycle',
        pottedplant='potted plant',
        sofa='couch',
        tvmonitor='tv',
    ),
)
# How large a domain's images are: the shorter side that the benchmark's authors used (and at most
# the longer, px).
sizes = dict(
    kitti=(576, 2000),
    voc=(600, 1333),
    widerface=(800, 1333),
    lisa=(800, 1333),
    kitchen=(800, 1333),
    coco=(800, 1333),
    dota=(600, 1333),
    deeplesion=(512, 1333),
    comic=(600, 1333),
    clipart=(600, 1333),
    watercolor=(600, 1333),
)
# DINO's augmentation, in these sizes: 60 to 100 % of the shorter side, half of the time of a crop.
_scales = {
    name: [(round(short * (0.6 + 0.04 * step)), long) for step in range(11)]
    for name, (short, long) in sizes.items()
}
train_pipelines = {
    name: [
        dict(type='LoadImageFromFile', color_type='color_ignore_orientation'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='RandomFlip', prob=0.5),
        dict(
            type='RandomChoice',
            transforms=[
                [dict(type='RandomChoiceResize', scales=_scales[name], keep_ratio=True)],
                [
                    dict(
                        type='RandomChoiceResize',
                        scales=[(round(short * part), 4200) for part in (0.5, 0.625, 0.75)],
                        keep_ratio=True,
                    ),
                    dict(
                        type='RandomCrop',
                        crop_type='absolute_range',
                        crop_size=(round(short * 0.48), round(short * 0.75)),
                        allow_negative_crop=True,
                    ),
                    dict(type='RandomChoiceResize', scales=_scales[name], keep_ratio=True),
                ],
            ],
        ),
        dict(type='PackDetInputs'),
    ]
    for name, (short, long) in sizes.items()
}
test_pipelines = {
    name: [
        dict(type='LoadImageFromFile', color_type='color_ignore_orientation'),
        dict(type='Resize', scale=(long, short), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(
            type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
        ),
    ]
    for name, (short, long) in sizes.items()
}
train_domains = {
    name: dict(
        type='CocoDataset',
        data_root=f'{uodb_root}{name}/',
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=False),
    )
    for name in label_space['domains']
}
test_domains = {
    name: dict(
        type='CocoDataset',
        data_root=f'{uodb_root}{name}/',
        ann_file='test.json',
        data_prefix=dict(img='test/'),
        test_mode=True,
    )
    for name in label_space['domains']
}
# By root of the number of images; batches are mixed. Weights of your own: dict(kitti=1.0, ...).
train_sampler = dict(type='MultiDomainSampler', weights='sqrt')
# COCO's AP and AP50, and the AP50 of VOC 2007 (11 points), which the benchmark reports of all sets:
# pascal_voc/mAP.
metrics = {
    name: [
        dict(type='CocoMetric', ann_file=f'{uodb_root}{name}/test.json', metric='bbox'),
        dict(type='VOCMetric', iou_thrs=0.5, metric='mAP', eval_mode='11points'),
    ]
    for name in label_space['domains']
}
# At most 1000 training images each; the others have thousands.
small_domains = ['comic', 'clipart', 'watercolor']
del voc, art, _scales
