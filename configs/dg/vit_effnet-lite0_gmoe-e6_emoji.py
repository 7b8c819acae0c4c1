# GMoE: one of 6 experts per token in blocks 3 and 5, each as wide as the dense FFN.
_base_ = ['./vit_effnet-lite0_dense_emoji.py', '../_base_/vit_moe.py']
model = dict(moe=[dict(blocks='last_two', **_base_.gmoe)])
