"""The attention of this package under the name "world2vlm", for every model of transformers.

    register()                                                                     # once a process
    model = AutoModelForImageTextToText.from_pretrained(..., attn_implementation="world2vlm")
    windows_in_one_launch(model)                                                   # the vision tower, see there

Masks. transformers asks a mask function once a forward pass and hands its result to every layer's attention function. Ours hands on the
2-D padding mask as it is, because a kernel needs to know which keys are padding, not a B x 1 x S x S matrix. Whoever shares a prefix passes
`prefix=segments` (int [B, S]: 0 prefix, k question k, -1 padding) to the model's forward, without an attention_mask: keyword arguments
reach the attention function. Whoever packs rows behind one another passes `documents=starts` (int32 [N + 1]) and `longest=` their longest
length too: each attends within itself. Rotary encodings were applied by the model before it calls us.
"""
import torch
import torch.nn.functional as F

from kernels.attention import attention


def padding_mask(batch_size, q_length, kv_length, q_offset=0, attention_mask=None, device="cpu", **kwargs):
    """What transformers' models pass on as attention_mask: bool [B, keys], False for padding; None where every key counts.

    A static cache has room for more keys than were written: the mask ends at the last written one, and `forward` cuts the keys there.
    """
    written = int(q_offset) + q_length
    if attention_mask is None and written >= kv_length:
        return None
    if attention_mask is None:
        return torch.ones(batch_size, written, dtype=torch.bool, device=device)
    return attention_mask[:, :written].bool()


def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, prefix=None, documents=None,
            longest=None, cu_seq_lens_q=None, max_length_q=None, sliding_window=None, **kwargs):
    """transformers' attention function: query [B, H, S, D], key and value [B, Hk, Sk, D] -> ([B, S, H, D], None)."""
    if dropout or sliding_window is not None:
        raise ValueError(f"world2vlm attention has no dropout ({dropout}) and no sliding window ({sliding_window}): use sdpa")
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA does: q and k leave a norm (Qwen3-VL) or the rotation in float32, v its layer in bfloat16
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if attention_mask is not None:
        if attention_mask.ndim != 2 or prefix is not None:
            raise ValueError("world2vlm attention takes a 2-D padding mask or prefix=segments (with -1 for padding), not both and no "
                             "4-D mask: choose one, or use sdpa")
        key, value = key[:, :, :attention_mask.shape[1]], value[:, :, :attention_mask.shape[1]]
        prefix = attention_mask.to(torch.int32) - 1                          # padding is -1; the rest, 0, is seen by all behind it
    if module.is_causal if is_causal is None else is_causal:
        o = attention(query, key, value, causal=True, scale=scaling, cu_seqlens=documents, max_seqlen=longest, prefix=prefix)
    else:                                                                    # the vision tower, which a model's keywords reach too
        o = attention(query, key, value, causal=False, scale=scaling, cu_seqlens=cu_seq_lens_q, max_seqlen=max_length_q)
    return o.transpose(1, 2).contiguous(), None


def register():
    """Make attn_implementation="world2vlm" known to transformers, through its public interfaces."""
    from transformers import AttentionInterface, AttentionMaskInterface  # here: the kernels themselves need nothing but torch
    for name in ("world2vlm", "world2vlm_flash"):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, padding_mask)


class PatchEmbedding(torch.nn.Conv3d):
    """A convolution whose stride is its window is one matrix product: several times faster than as a Conv3d, on CPUs and, in bfloat16, on GPUs."""

    def forward(self, patches):  # [P, channels, frames, rows, columns] -> [P, width]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def patches_in_one_product(model):
    """Turn the vision tower's patch embedding into a matrix product, in place; its weights stay as they are."""
    model.model.visual.patch_embed.proj.__class__ = PatchEmbedding


def windows_in_one_launch(model):
    """Let the vision tower call us once a layer with cu_seqlens; otherwise it calls once a window in a Python loop.

    transformers passes cu_seqlens to implementations whose name holds "flash", so the tower's configuration gets our second name.
    """
    model.model.visual.config._attn_implementation = "world2vlm_flash"
