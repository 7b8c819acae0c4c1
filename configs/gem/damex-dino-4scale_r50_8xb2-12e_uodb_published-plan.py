# DAMEX on UODB as published: its router is taught the authors' table of datasets and experts.
_base_ = './damex-dino-4scale_r50_8xb2-12e_uodb.py'
plan = '{{fileDirname}}/plans/damex_uodb.json'
model = dict(plan=plan)
