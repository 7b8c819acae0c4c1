# Rotated or Colored MNIST, or the same made of scikit-learn's digits (8 x 8 pixels, no files):
#   $DG_DATASET  RotatedDigits, ColoredDigits, RotatedMNIST, ColoredMNIST
# and the rest as in dg.py. No augmentation, as in DomainBed.
_base_ = 'dg.py'
dg_dataset = '{{$DG_DATASET:RotatedDigits}}'
num_classes = 2 if dg_dataset.startswith('Colored') else 10
data_preprocessor = dict(
    _delete_=True, num_classes=num_classes, mean=[0.0] * 3, std=[255.0] * 3, to_rgb=True
)
pipeline = [dict(type='PackInputs', meta_keys=('domain', 'part'))]
train_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(name=dg_dataset, pipeline=pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    batch_size=256,
    dataset=dict(name=dg_dataset, pipeline=pipeline),
)
test_dataloader = val_dataloader
