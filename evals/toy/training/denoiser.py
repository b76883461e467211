"""The transformer as it is trained: the host's model, with three exact or unbiased savings in its attention.

1. Of the 512 text rows most are equal (zeros before the text projection): training feeds `SHORT_TEXT_ROWS` of them and
   adds log(multiplicity) to the equal rows' logits, which is the same softmax.
2. A clip may be trained on some of its latent frames and on every second row and column of tokens, all at their true
   rotary positions: a sample of the keys, so that early stages see the full-size geometry at a fraction of its cost.
3. Attention is computed in bf16 products over slices of queries, whose scores stay in the cache (2.6 times as fast as
   SDPA with its backward pass, on a CPU with bf16 instructions).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffusers_accel.evals.toy.render import BACKGROUNDS, COLORS, MOTIONS, SHAPES
from diffusers_accel.evals.toy.training.models import TEXT_DIM, TEXT_ROWS
from diffusers_accel.kernels.cpu_workers import run_all

SHORT_TEXT_ROWS = 20
OBJECT_FEATURES = 12  # that the probe asks of an object: place (3), colour (3), shape (4), how far it has turned (2)
# What the probe asks of a text row: whose it is (nobody's, the first object's, the second's), the background, and colour,
# shape and motion of both objects, each with one more class for an object that is not there.
CAPTION_CLASSES = (3, len(BACKGROUNDS), *(2 * (len(COLORS) + 1, len(SHAPES) + 1, len(MOTIONS) + 1)))
SLICE = 256  # queries of one slice


def text_bias(rows: torch.Tensor) -> torch.Tensor:
    """Logit bias `[B, 1, 1, SHORT_TEXT_ROWS]` that makes the zero rows weigh as `TEXT_ROWS` rows; rows: real rows `[B]`."""
    if int(rows.max()) >= SHORT_TEXT_ROWS:
        raise ValueError(f"expected fewer than {SHORT_TEXT_ROWS} text rows, found {int(rows.max())}")
    real = torch.arange(SHORT_TEXT_ROWS, device=rows.device)[None] < rows[:, None]
    weight = (TEXT_ROWS - rows).float() / (SHORT_TEXT_ROWS - rows).float()
    return torch.where(real, 0.0, weight.log()[:, None])[:, None, None]


class GridRope(torch.nn.Module):
    """The host's rotary embedding at chosen places: `frames`, `rows`, `columns` are true token indices, int64 `[B, n]`."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope = rope
        self.frames = self.rows = self.columns = torch.zeros(1, 1, dtype=torch.long)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places, split = (self.frames, self.rows, self.columns), (self.rope.t_dim, self.rope.h_dim, self.rope.w_dim)
        grid = [len(self.frames), *(p.shape[1] for p in places)]

        def at_places(table: torch.Tensor) -> torch.Tensor:
            parts = []
            for axis, (part, place) in enumerate(zip(table.split(split, dim=1), places, strict=True)):
                shape = [len(place), 1, 1, 1, part.shape[1]]
                shape[1 + axis] = place.shape[1]
                parts.append(part[place].view(shape).expand(*grid, -1))
            return torch.cat(parts, dim=-1).flatten(1, 3)[:, :, None]

        cos, sin = self.rope.freqs_cos, self.rope.freqs_sin
        assert isinstance(cos, torch.Tensor) and isinstance(sin, torch.Tensor)
        return at_places(cos), at_places(sin)


class TrainingProcessor:
    """Wan's attention with a logit bias for the text rows and sliced products for the video's tokens."""

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.norm_q(attn.to_q(hidden_states).float()).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(source).float()).unflatten(2, (attn.heads, -1))
        v = attn.to_v(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        q, k = (x.transpose(1, 2).to(v.dtype) for x in (q, k))
        if encoder_hidden_states is None:
            function = attend if q.device.type == "cpu" else scaled_dot_product_attention
            out = function(*(x.flatten(0, 1).contiguous() for x in (q, k, v))).unflatten(0, (-1, attn.heads))
        else:
            scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1]) + self.bias
            out = scores.softmax(-1).to(v.dtype) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[B, S, H, D]`, pairs interleaved as in the host."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)


def _in_parts(function: Callable[..., None], *tensors: torch.Tensor) -> None:
    """`function` on every CPU thread, each with its share of the tensors' first dimension."""
    parts = zip(*(x.tensor_split(torch.get_num_threads()) for x in tensors), strict=True)
    run_all([functools.partial(function, *part) for part in parts])


@torch.library.custom_op("diffusers_accel_shapes::attend", mutates_args=())
def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of `[N, S, D]` (N: batch x heads) in slices of queries that stay in the cache."""
    out = torch.empty_like(q)
    _in_parts(_attend, q * q.shape[-1] ** -0.5, k, v, out)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    for n in range(q.shape[0]):
        keys = k[n].t()
        for c in range(0, q.shape[1], SLICE):
            torch.mm(torch.softmax(q[n, c : c + SLICE] @ keys, -1), v[n], out=out[n, c : c + SLICE])


@attend.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("diffusers_accel_shapes::attend_backward", mutates_args=())
def attend_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scale, grad_q = q.shape[-1] ** -0.5, torch.empty_like(q)
    grad_k, grad_v = torch.zeros(k.shape, dtype=torch.float32), torch.zeros(v.shape, dtype=torch.float32)
    _in_parts(_attend_backward, grad.contiguous(), q * scale, k, v, grad_q, grad_k, grad_v)
    return grad_q * scale, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _attend_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *out: torch.Tensor) -> None:
    grad_q, grad_k, grad_v = out
    for n in range(q.shape[0]):
        for c in range(0, q.shape[1], SLICE):
            part, part_grad = q[n, c : c + SLICE], grad[n, c : c + SLICE]
            weights = torch.softmax(part @ k[n].t(), -1)
            grad_v[n] += weights.t() @ part_grad
            grad_scores = torch._softmax_backward_data(part_grad @ v[n].t(), weights, -1, q.dtype)
            torch.mm(grad_scores, k[n], out=grad_q[n, c : c + SLICE])
            grad_k[n] += grad_scores.t() @ part


@attend_backward.register_fake
def _(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _attend_gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attend_backward(grad, *ctx.saved_tensors)


attend.register_autograd(_attend_gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Probe(torch.nn.Module):
    """A training aid: every token has to tell its own place after the third block, and the objects after the fourth; every
    text row has to tell the caption's objects, and which of them it belongs to.

    Rotary embeddings are relative, and noise holds no landmark: that a token lies near the left edge or the first frame shows
    only in how much noise its neighbourhood averages out. And "moves left" is a product of three signs: of the motion, of
    the time and of the place; two colours have to find their two objects. The loss of the video teaches all this too slowly
    for an hour; asked for it directly, the model learns to place its tokens in some dozen steps. A text encoder taught by the
    video alone never learns whose colour a colour is: its rows read the same in either half of a caption. The probe itself
    is not kept.
    """

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.own, self.object = torch.nn.Linear(width, 3), torch.nn.Linear(width, 2 * OBJECT_FEATURES)
        self.text = torch.nn.Linear(TEXT_DIM, sum(CAPTION_CLASSES))
        self.hidden: dict[str, torch.Tensor] = {}
        for name, layer in (("own", 2), ("object", 3)):
            block = transformer.blocks[min(layer, len(transformer.blocks) - 1)]
            block.register_forward_hook(functools.partial(self._see, name))

    def _see(self, name: str, block: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        self.hidden[name] = output

    def loss(
        self, rope: GridRope, grid: tuple[int, int, int], objects: torch.Tensor, captioned: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared errors of the places last seen, in units of half an axis, and of the objects.

        objects: [B, frames, 2, OBJECT_FEATURES], what `object` is to tell in each frame, NaN for what does not count;
        captioned: [B], 1 for clips with a caption, the others' objects do not count.
        """
        places = (rope.frames, rope.rows, rope.columns)
        axes = [2 * p / (n - 1) - 1 for p, n in zip(places, grid, strict=True)]
        sizes = [p.shape[1] for p in axes]
        shapes = ((-1, sizes[0], 1, 1), (-1, 1, sizes[1], 1), (-1, 1, 1, sizes[2]))
        own = torch.stack([x.view(s).expand(-1, *sizes) for x, s in zip(axes, shapes, strict=True)], dim=-1)
        own_error = (self.own(self._seen("own")) - own.flatten(1, 3)).square().mean()
        told = self.object(self._seen("object")).unflatten(1, (sizes[0], -1))
        asked = objects.flatten(2)[:, :, None]
        object_error = (told - asked.nan_to_num()).square().masked_fill(asked.isnan(), 0).mean((1, 2)).sum(-1)
        return own_error + (object_error * captioned).mean() / 3

    def text_loss(self, rows: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of what text rows `[B, n, TEXT_DIM]` tell of their captions.

        answers: int64 `[B, n, len(CAPTION_CLASSES)]`, -1 where a row need not tell.
        """
        told = self.text(rows.float()).split(CAPTION_CLASSES, dim=-1)
        losses = [
            torch.nn.functional.cross_entropy(t.flatten(0, 1), a.flatten(), ignore_index=-1)
            for t, a in zip(told, answers.unbind(-1), strict=True)
        ]
        return torch.stack(losses).mean()

    def _seen(self, name: str) -> torch.Tensor:
        hidden = self.hidden[name].float()
        return torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])


def prepare_for_training(transformer: Any) -> None:
    """Give a stock transformer the training forms of its attention and rotary embedding; its weights stay as they are."""
    transformer.rope = GridRope(transformer.rope)
    transformer.set_attn_processor(TrainingProcessor())


def set_inputs(
    transformer: Any, text_rows: torch.Tensor, frames: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> None:
    """Say, before a forward call, how many text rows are real `[B]`, and which token indices are given, each `[B, n]`."""
    transformer.rope.frames, transformer.rope.rows, transformer.rope.columns = frames, rows, columns
    transformer.blocks[0].attn2.processor.bias = text_bias(text_rows)
