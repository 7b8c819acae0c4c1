# A data set of domain generalisation, cut and augmented as in DomainBed (arXiv 2007.01434). Which,
# and what is held out, say
#   $DG_DATASET  PACS, VLCS, OfficeHome, TerraIncognita, DomainNet, SVIRO, WILDSCamelyon, WILDSFMoW
#   $DG_ROOT     the folder that holds them
#   $DG_TEST     the domains held out, with commas between them
#   $DG_TRIAL    the seed of the 80/20 split
import importlib

dg_dataset = '{{$DG_DATASET:PACS}}'
dg_root = '{{$DG_ROOT:data/}}'
dg_test = '{{$DG_TEST:none}}'
dg_trial = '{{$DG_TRIAL:0}}'
num_classes = importlib.import_module('mmdet_moe.datasets.dg_catalog').info_of(dg_dataset).num_classes
data_preprocessor = dict(
    num_classes=num_classes,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
pack = dict(type='PackInputs', meta_keys=('domain', 'part'))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, crop_ratio_range=(0.7, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
    dict(type='RandomGrayscale', prob=0.1, keep_channels=True),
    pack,
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(224, 224)), pack]
dataset = dict(
    type='mmdet_moe.DGDataset',
    data_root=dg_root,
    name=dg_dataset,
    held_out=[name for name in dg_test.split(',') if name != 'none'],
    trial=int(dg_trial),
)
train_dataloader = dict(
    batch_size=32,  # of every source domain
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    batch_sampler=dict(type='mmdet_moe.DomainBatchSampler'),
    dataset=dict(**dataset, sources_only=True, parts=['train'], pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, parts=['train', 'val'], pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='mmdet_moe.DomainAccuracy')
test_evaluator = val_evaluator
