"""The attention of this package under the name "world2vlm", for every model of transformers.

    model = load_model("Qwen/Qwen2.5-VL-7B-Instruct", torch.bfloat16, "cuda", "world2vlm")

transformers asks a mask function once per forward pass and hands its result to every layer's
attention function. Ours hands on which keys are padding, as segment ids, because a kernel needs no
B x 1 x S x S matrix. Keywords of the model's forward reach the attention, too:

    prefix            `Segments`, or their ids, int [B, S]: 0 prefix, k question k, -1 padding; no
                      attention_mask
    text_cu_seqlens   int32 [N + 1]: where each of N packed rows begins; a row sees only itself
    text_max_seqlen   the number of tokens of the longest packed row

The vision tower receives them as well and would take a plain `cu_seqlens` for that of its pictures:
hence "text_". The model has rotated q and k before it calls us.
"""

import torch
import torch.nn.functional as F

from kernels.attention import Segments, attention
from kernels.rows import recurrent


def padding_mask(
    batch_size, q_length, kv_length, q_offset=0, attention_mask=None, device="cpu", **kwargs
):
    """The attention_mask of every layer, as Segments of [B, keys]; None: no padding.

    Padding is segment -1; the other keys, 0, are seen by all behind them. A static cache has room
    for more keys than were written: the segments end at the last one, and `forward` cuts the keys
    there.
    """
    written = int(q_offset) + q_length
    if isinstance(attention_mask, Segments):  # transformers' generate has asked before
        return attention_mask
    if attention_mask is not None:
        return Segments(attention_mask[:, :written].int() - 1)
    if written >= kv_length:
        return None
    return Segments(torch.zeros(batch_size, written, device=device))


def forward(module, query, key, value, attention_mask, scaling=None, is_causal=None, **options):
    """query [B, H, S, D], key and value [B, Hk, Sk, D] -> ([B, S, H, D], None)."""
    prefix, window = options.get("prefix"), options.get("sliding_window")
    if options.get("dropout") or window is not None:
        raise ValueError(f"world2vlm has no dropout and no sliding window ({window}): use sdpa")
    if "cu_seqlens" in options:
        raise ValueError("the vision tower took cu_seqlens for its own: pass text_cu_seqlens")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As SDPA does. q and k leave a norm (Qwen3-VL) or the rotation in float32, v its layer in
        # bfloat16.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if attention_mask is not None:
        if not isinstance(attention_mask, Segments) or prefix is not None:
            raise ValueError(
                "world2vlm attention takes a 2-D padding mask or prefix=segments (with -1 for "
                "padding), not both and no 4-D mask: choose one, or use sdpa"
            )
        prefix, written = attention_mask, attention_mask.ids.shape[1]
        key, value = key[:, :, :written], value[:, :, :written]
    causal = module.is_causal if is_causal is None else is_causal
    if causal:
        cu_seqlens, max_seqlen = options.get("text_cu_seqlens"), options.get("text_max_seqlen")
    else:  # the vision tower, whose windows transformers names so
        cu_seqlens, max_seqlen = options.get("cu_seq_lens_q"), options.get("max_length_q")
        prefix = None
    where = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "prefix": prefix}
    o = attention(query, key, value, causal=causal, scale=scaling, **where)
    return o.transpose(1, 2).contiguous(), None


def register():
    """Make attn_implementation="world2vlm" known to transformers, by its public interfaces."""
    # Imported here: the kernels themselves need nothing but torch.
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in ("world2vlm", "world2vlm_flash"):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, padding_mask)


class PatchEmbedding(torch.nn.Conv3d):
    """A convolution whose stride is its window, as one matrix product.

    Several times faster than as a Conv3d, on CPUs and, in bfloat16, on GPUs.
    """

    def forward(self, patches):  # [P, channels, frames, rows, columns] -> [P, width]
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def prepare(model, attention: str):
    """What a loaded Qwen-VL model needs to be fast, in place; weights and outputs stay as they are.

    The patch embedding becomes a matrix product, and the tower calls our attention once per layer,
    with cu_seqlens, not once per window: so transformers does for names that hold "flash".
    """
    model.model.visual.patch_embed.proj.__class__ = PatchEmbedding
    if attention == "world2vlm":
        model.model.visual.config._attn_implementation = "world2vlm_flash"


def load_model(base: str, dtype, device: str, attention: str):
    """A Qwen-VL checkpoint, by folder or hub id, with this attention; "meta": its shapes alone.

    Weights come from safetensors only, code of its own is never run. ValueError: it is not whole.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    register()
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if hasattr(config, "auto_map"):
        raise ValueError("its configuration names code of its own")
    if recurrent(config):
        print(f"{base} has layers with a state: its questions go one by one, as padded rows")
        attention = "sdpa"
    how = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    if device == "meta":
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(config, **how)
    else:
        how |= {"use_safetensors": True, "output_loading_info": True}
        model, report = AutoModelForImageTextToText.from_pretrained(base, **how)
        wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        wrong += [name for name, w in model.named_parameters() if not w.isfinite().all()]
        if wrong:
            raise ValueError(f"missing, unexpected or not finite: {', '.join(wrong[:3])}")
    prepare(model, attention)
    return model.to(device)
