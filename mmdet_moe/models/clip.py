"""CLIP's image transformer in mmpretrain's ``VisionTransformer``: names of the weights.

Axes: d channels, h hidden channels, p patch size, N tokens, o channels of the joint embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

#: mmpretrain's name by the name within a block, in OpenCLIP's (and OpenAI's) and in timm's naming.
OPENCLIP_BLOCK = {
    'ln_1.': 'ln1.',
    'attn.in_proj_': 'attn.qkv.',
    'attn.out_proj.': 'attn.proj.',
    'ln_2.': 'ln2.',
    'mlp.c_fc.': 'ffn.layers.0.0.',
    'mlp.c_proj.': 'ffn.layers.1.',
}
TIMM_BLOCK = {
    'norm1.': 'ln1.',
    'attn.qkv.': 'attn.qkv.',
    'attn.proj.': 'attn.proj.',
    'norm2.': 'ln2.',
    'mlp.fc1.': 'ffn.layers.0.0.',
    'mlp.fc2.': 'ffn.layers.1.',
}
#: The same of what stands around the blocks.
OPENCLIP_REST = {
    'class_embedding': 'cls_token',
    'positional_embedding': 'pos_embed',
    'conv1.weight': 'patch_embed.projection.weight',
    'ln_pre.weight': 'pre_norm.weight',
    'ln_pre.bias': 'pre_norm.bias',
    'ln_post.weight': 'ln1.weight',
    'ln_post.bias': 'ln1.bias',
}
TIMM_REST = {
    'cls_token': 'cls_token',
    'pos_embed': 'pos_embed',
    'patch_embed.proj.weight': 'patch_embed.projection.weight',
    'norm_pre.weight': 'pre_norm.weight',
    'norm_pre.bias': 'pre_norm.bias',
    'norm.weight': 'ln1.weight',
    'norm.bias': 'ln1.bias',
}
#: What of a whole OpenCLIP model is not the image transformer.
TEXT_TOWER = re.compile(
    r'(transformer\.|text\.|token_embedding\.|ln_final\.)|'
    r'(positional_embedding|text_projection|logit_scale|logit_bias|attn_mask|input_resolution|'
    r'context_length|vocab_size)$'
)


def clip_to_mmpretrain(state_dict: Mapping[str, Tensor], neck: bool = False) -> dict[str, Tensor]:
    """The weights of ``ImageClassifier(backbone=VisionTransformer(pre_norm=True))`` from CLIP's.

    Takes OpenCLIP's and OpenAI's naming, of a whole model (``visual.transformer.resblocks.0...``)
    or of the image transformer alone, and timm's (``blocks.0.attn.qkv.weight``). Not in the
    weights are the activation (OpenAI's models have QuickGELU, OpenCLIP's LAION models mostly GELU)
    and the norms' eps: 1e-5, which mmpretrain must be told (its default is 1e-6).

    Args:
        state_dict: CLIP's.
        neck: Convert the projection into the joint embedding, too, as the weight (o, d) and the
            zero bias of a ``LinearNeck(in_channels=d, out_channels=o, norm_cfg=None)``. By default
            it is left out: the classifier then sees the normed class token (d).

    Returns:
        Keys begin with ``backbone.`` and ``neck.``; float16 becomes float32.

    Raises:
        ValueError: Keys are unknown or missing; all are listed. Or it is neither naming.
    """
    given = {key.removeprefix('module.'): value for key, value in state_dict.items()}
    if any(key.startswith('visual.') for key in given):
        text = {key for key in given if TEXT_TOWER.match(key)}
        given = {key: value for key, value in given.items() if key not in text}
        given = {key.removeprefix('visual.'): value for key, value in given.items()}
    if any(re.match(r'transformer\.resblocks\.\d+\.', key) for key in given):
        prefix, block, rest, last = 'transformer.resblocks.', OPENCLIP_BLOCK, OPENCLIP_REST, 'proj'
    elif any(re.match(r'blocks\.\d+\.', key) for key in given):
        prefix, block, rest, last = 'blocks.', TIMM_BLOCK, TIMM_REST, 'head.weight'
    else:
        raise ValueError(
            f'neither OpenCLIP (transformer.resblocks.0...) nor timm (blocks.0...); the keys begin '
            f'like {list(given)[:4]}'
        )
    found: dict[str, Tensor] = {}
    projection = given.pop(last, None)
    unknown = []
    for key, value in given.items():
        name = rest.get(key) or _in_block(key, prefix, block)
        if name is None:
            unknown.append(key)
            continue
        found[f'backbone.{name}'] = value.float() if value.is_floating_point() else value
    missing = [f'{n} ({theirs})' for theirs, n in rest.items() if f'backbone.{n}' not in found]
    numbers = {int(k.split('.')[2]) for k in found if k.startswith('backbone.layers.')}
    for i in range(max(numbers, default=-1) + 1):
        for theirs, ours in block.items():
            for part in ('weight', 'bias'):
                if f'backbone.layers.{i}.{ours}{part}' not in found:
                    missing.append(f'layers.{i}.{ours}{part} ({prefix}{i}.{theirs}{part})')
    if neck and projection is None:
        missing.append(f'neck.fc.weight ({last})')
    if unknown or missing:
        parts = [f'unknown keys {unknown}'] if unknown else []
        parts += [f'missing: {missing}'] if missing else []
        raise ValueError(f'these are not the weights of CLIP: {"; ".join(parts)}')
    width = found['backbone.ln1.weight'].numel()
    found['backbone.cls_token'] = found['backbone.cls_token'].reshape(1, 1, width)
    found['backbone.pos_embed'] = found['backbone.pos_embed'].reshape(1, -1, width)
    if neck:
        assert projection is not None
        weight = projection.float() if last == 'head.weight' else projection.float().t()
        found['neck.fc.weight'] = weight.contiguous()
        found['neck.fc.bias'] = weight.new_zeros(weight.shape[0])
    return found


def _in_block(key: str, prefix: str, block: Mapping[str, str]) -> str | None:
    """mmpretrain's name of a block's parameter; None where it has none."""
    match = re.fullmatch(re.escape(prefix) + r'(\d+)\.(.+?)(weight|bias)', key)
    if match is None or match[2] not in block:
        return None
    return f'layers.{match[1]}.{block[match[2]]}{match[3]}'
