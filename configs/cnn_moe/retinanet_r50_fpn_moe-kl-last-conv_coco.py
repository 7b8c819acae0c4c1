# Experts of the last stacked convolution only, conv4 of each subnet in the paper. For the output
# convolutions: r'bbox_head\.(cls|reg)_subnet\.output'.
_base_ = './retinanet_r50_fpn_moe-kl_coco.py'
model = dict(moe=[{**_base_.model.moe[0], 'targets': r'bbox_head\.(cls|reg)_subnet\.convs\.3'}])
