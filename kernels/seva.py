"""
The network of Stable Virtual Camera (arXiv 2503.14489): a U-Net that sees all frames of a scene.

It reads the noisy latents of T frames, the noise level as a time step, one token about the given
pictures, and the ray through every pixel of every frame (kernels/rays.py), and estimates the noise.
Frames meet in two ways. In the middle, and on the way up at a quarter and at half of the size,
every token attends to all tokens of its scene; elsewhere it attends to those of its own frame.
Behind each of these blocks another one lets every pixel attend to itself in all frames
(`temporal_attention`, the fused kernel of this folder).

Names of modules are those of the published weights, so a file of them loads as it is. One thing is
computed otherwise: the context has one token, so a softmax over it is 1 whatever the query, and
cross-attention is a linear map of that token (`Attention.to_one`). The weights of its queries and
keys, 4 % of the 1.26 billion, stay for the file's sake and are not used.

Shapes: B scenes of T frames share one batch axis (b t); C channels, h w latent size, s = h * w
tokens per frame, D width of the context.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from kernels.temporal import temporal_attention


@dataclass
class SevaConfig:
    """The network's shape; the defaults are the released model's."""

    in_channels: int = 11  # 4 latent, 1 "is this frame given?", 6 Plücker
    model_channels: int = 320
    out_channels: int = 4
    num_frames: int = 21
    num_res_blocks: int = 2
    attention_resolutions: list[int] = field(default_factory=lambda: [4, 2, 1])
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    num_head_channels: int = 64
    transformer_depth: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    context_dim: int = 1024
    dense_in_channels: int = 6
    dropout: float = 0.0
    unflatten_names: list[str] = field(  # levels whose blocks attend across frames
        default_factory=lambda: ["middle_ds8", "output_ds4", "output_ds2"]
    )


def timestep_embedding(t: torch.Tensor, width: int) -> torch.Tensor:
    """t [N] -> float32 [N, width]: cosines, then sines, of geometrically spaced frequencies."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


class ResBlock(nn.Module):
    """Two convolutions with a skip. The camera map scales and shifts what the first one reads."""

    def __init__(self, channels: int, out_channels: int, emb_channels: int, cfg: SevaConfig):
        super().__init__()
        first = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), first)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.dense_emb_layers = nn.Sequential(nn.Conv2d(cfg.dense_in_channels, 2 * channels, 1))
        second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        norm, drop = nn.GroupNorm(32, out_channels), nn.Dropout(cfg.dropout)
        self.out_layers = nn.Sequential(norm, nn.SiLU(), drop, second)
        self.skip_connection = nn.Identity()
        if channels != out_channels:
            self.skip_connection = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        norm, silu, conv = self.in_layers
        if dense.shape[-2:] != x.shape[-2:]:
            dense = F.interpolate(dense, x.shape[-2:], mode="bilinear", align_corners=True)
        scale, shift = self.dense_emb_layers(dense).chunk(2, 1)
        h = conv(silu(norm(x)) * (1 + scale) + shift)
        h = h + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """The weights of an attention. Which tokens meet is up to the block."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def within(self, x: torch.Tensor) -> torch.Tensor:
        """x [n,s,C]: every token attends to all tokens of its row."""
        maps = (self.to_q, self.to_k, self.to_v)
        q, k, v = (rearrange(to(x), "n s (h d) -> n h s d", d=self.head_width) for to in maps)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(mixed, "n h s d -> n s (h d)"))

    def through_time(self, x: torch.Tensor, num_frames: int) -> torch.Tensor:
        """x [b t,s,C]: every pixel attends to itself in all frames of its scene."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out(temporal_attention(q, k, v, num_frames, head_width=self.head_width))

    def to_one(self, context: torch.Tensor) -> torch.Tensor:
        """context [n,1,D]: attention to one token, whatever the query."""
        return self.to_out(self.to_v(context))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        inner = 4 * width
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class SpaceBlock(nn.Module):
    """x [n,s,C], context [n,1,D]: attention within each row, the context, a feed-forward net."""

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__()
        self.attn1 = Attention(width, width, head_width)
        self.attn2 = Attention(width, context_width, head_width)
        self.ff = FeedForward(width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)  # of attn2's queries: loaded, not used
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1.within(self.norm1(x))
        x = x + self.attn2.to_one(context)
        return x + self.ff(self.norm3(x))


class TimeBlock(SpaceBlock):
    """x [b t,s,C]: a feed-forward net, attention through time, the context, a feed-forward net.

    The last net has no residual: the layer around the block adds x.
    """

    def __init__(self, width: int, context_width: int, head_width: int):
        super().__init__(width, context_width, head_width)
        self.norm_in = nn.LayerNorm(width)
        self.ff_in = FeedForward(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor, num_frames: int) -> torch.Tensor:
        x = x + self.ff_in(self.norm_in(x))
        x = x + self.attn1.through_time(self.norm1(x), num_frames)
        x = x + self.attn2.to_one(context)
        return self.ff(self.norm3(x))


class MultiviewTransformer(nn.Module):
    """Pairs of blocks: attention within a frame (`across`: within the scene), then through time."""

    def __init__(self, width: int, depth: int, cfg: SevaConfig, across: bool):
        super().__init__()
        self.across = across
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.proj_out = nn.Linear(width, width)
        shape = (width, cfg.context_dim, cfg.num_head_channels)
        self.transformer_blocks = nn.ModuleList(SpaceBlock(*shape) for _ in range(depth))
        self.time_mix_blocks = nn.ModuleList(TimeBlock(*shape) for _ in range(depth))

    def forward(self, x: torch.Tensor, context: torch.Tensor, num_frames: int) -> torch.Tensor:
        """x [b t,C,h,w], context [b t,1,D]."""
        skip, T, h = x, num_frames, x.shape[-2]
        x = self.proj_in(rearrange(self.norm(x), "n c h w -> n (h w) c"))
        first = context[::T]  # [b,1,D]: blocks that see several frames take the first one's
        for space, time_mix in zip(self.transformer_blocks, self.time_mix_blocks, strict=True):
            if self.across:
                x = space(rearrange(x, "(b t) s c -> b (t s) c", t=T), first)
                x = rearrange(x, "b (t s) c -> (b t) s c", t=T)
            else:
                x = space(x, context)
            x = x + time_mix(x, first.repeat_interleave(T, 0), T)
        return skip + rearrange(self.proj_out(x), "n (h w) c -> n c h w", h=h)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Stage(nn.Sequential):
    """Layers of one resolution, each given what its kind needs."""

    def forward(self, x, emb, context, dense, num_frames):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb, dense)
            elif isinstance(layer, MultiviewTransformer):
                x = layer(x, context, num_frames)
            else:
                x = layer(x)
        return x


class Seva(nn.Module):
    """Noisy latents, time step, context and camera map -> the network's estimate of the noise."""

    def __init__(self, cfg: SevaConfig):
        super().__init__()
        self.cfg = cfg
        width, last = cfg.model_channels, len(cfg.channel_mult) - 1
        wider, last_map = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)
        self.time_embed = nn.Sequential(wider, nn.SiLU(), last_map)
        # The way down: residual blocks per level, then half the size. Each output is a skip.
        stem = nn.Conv2d(cfg.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage(stem)])
        channels, skips = width, [width]
        for level, factor in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(self.stage(channels, factor * width, level, "input"))
                channels = factor * width
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage(Downsample(channels)))
                skips.append(channels)
        middle = self.stage(channels, channels, last, "middle")
        self.middle_block = middle.append(ResBlock(channels, channels, 4 * width, cfg))
        # The way up: one block per skip, which is concatenated to its input.
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(last + 1)):
            for i in range(cfg.num_res_blocks + 1):
                wide = cfg.channel_mult[level] * width
                block = self.stage(channels + skips.pop(), wide, level, "output")
                if level > 0 and i == cfg.num_res_blocks:
                    block.append(Upsample(wide))
                self.output_blocks.append(block)
                channels = wide
        final = nn.Conv2d(channels, cfg.out_channels, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), final)

    def stage(self, channels: int, out_channels: int, level: int, side: str) -> Stage:
        """A residual block and, at the levels that have one, a transformer."""
        cfg, shrunk = self.cfg, 2**level
        stage = Stage(ResBlock(channels, out_channels, 4 * cfg.model_channels, cfg))
        if shrunk in cfg.attention_resolutions or side == "middle":
            across = f"{side}_ds{shrunk}" in cfg.unflatten_names
            depth = cfg.transformer_depth[level]
            stage.append(MultiviewTransformer(out_channels, depth, cfg, across))
        return stage

    def forward(self, x, t, y, dense_y, num_frames: int | None = None) -> torch.Tensor:
        """x [b t,11,h,w], t [b t] in 0..999, context y [b t,1,D], rays dense_y [b t,6,h,w]
        -> the noise in x, [b t,4,h,w], in x's type, whatever that of the weights. h and w are
        multiples of 8.
        """
        if y.shape[1] != 1:
            raise ValueError(f"the context has one token, got y {tuple(y.shape)}")
        T, asked, dtype = num_frames or self.cfg.num_frames, x.dtype, self.out[0].weight.dtype
        x, y, dense_y = x.to(dtype), y.to(dtype), dense_y.to(dtype)
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(x.dtype))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, y, dense_y, T)
            skips.append(x)
        x = self.middle_block(x, emb, y, dense_y, T)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], 1), emb, y, dense_y, T)
        return self.out(x).to(asked)
