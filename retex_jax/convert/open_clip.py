"""Tables for CLIP checkpoints with the names of OpenCLIP (and of OpenAI's first release).

There one weight `in_proj` holds query, key and value, both projections are stored as (in, out), and the
text tower's names have no prefix. The towers' options, such as the activation, are not in the tensors.
"""

from collections.abc import Iterator

from retex_jax.convert.engine import CONV, TRANSPOSE, Rule, Table, split

_FUSED = ("query", "key", "value")


def _dense(torch: str, flax: str) -> Iterator[Rule]:
    yield Rule(f"{torch}.weight", f"{flax}/kernel", TRANSPOSE)
    yield Rule(f"{torch}.bias", f"{flax}/bias")


def _norm(torch: str, flax: str) -> Iterator[Rule]:
    yield Rule(f"{torch}.weight", f"{flax}/scale")
    yield Rule(f"{torch}.bias", f"{flax}/bias")


def _blocks(torch: str, flax: str) -> Iterator[Rule]:
    torch, flax = f"{torch}transformer.resblocks.{{i}}.", f"{flax}blocks_{{i}}/"
    yield from _norm(f"{torch}ln_1", f"{flax}norm1")
    for name, kind, transform in (
        ("weight", "kernel", split(3, 0, TRANSPOSE)),
        ("bias", "bias", split(3, 0)),
    ):
        members = tuple(f"{flax}attention/{part}/{kind}" for part in _FUSED)
        yield Rule(f"{torch}attn.in_proj_{name}", members, transform)
    yield from _dense(f"{torch}attn.out_proj", f"{flax}attention/out")
    yield from _norm(f"{torch}ln_2", f"{flax}norm2")
    yield from _dense(f"{torch}mlp.c_fc", f"{flax}mlp/fc1")
    yield from _dense(f"{torch}mlp.c_proj", f"{flax}mlp/fc2")


def _vision(flax: str) -> Iterator[Rule]:
    yield Rule("visual.conv1.weight", f"{flax}patch_embed/kernel", CONV)
    yield Rule("visual.class_embedding", f"{flax}cls_token")
    yield Rule("visual.positional_embedding", f"{flax}position_embedding/embedding")
    yield from _norm("visual.ln_pre", f"{flax}pre_norm")
    yield from _blocks("visual.", flax)
    yield from _norm("visual.ln_post", f"{flax}final_norm")
    yield Rule("visual.proj", f"{flax}projection/kernel")


def _text(flax: str) -> Iterator[Rule]:
    yield Rule("token_embedding.weight", f"{flax}token_embedding/embedding")
    yield Rule("positional_embedding", f"{flax}position_embedding/embedding")
    yield from _blocks("", flax)
    yield from _norm("ln_final", f"{flax}final_norm")
    yield Rule("text_projection", f"{flax}projection/kernel")


# The causal mask is a buffer; the other three are numbers of OpenAI's first release.
_BUFFERS = (r"attn_mask", r"input_resolution", r"context_length", r"vocab_size")

OPEN_CLIP = Table(
    name="OpenCLIP",
    rules=(*_vision("vision/"), *_text("text/"), Rule("logit_scale", "logit_scale")),
    ignore=_BUFFERS,
    prefixes=("module.",),
)
"""OpenCLIP's CLIP <-> Clip."""

OPEN_CLIP_VISION = Table(
    name="OpenCLIP vision tower",
    rules=tuple(_vision("")),
    ignore=tuple(
        rf"(module\.)?{name}"
        for name in (
            *_BUFFERS,
            r"token_embedding\.weight",
            r"positional_embedding",
            r"transformer\..*",
            r"ln_final\..*",
            r"text_projection",
            r"logit_scale",
        )
    ),
    prefixes=("module.",),
)
"""OpenCLIP's CLIP <-> ViT; the text half is read past."""
