"""Table of CLIP's text tower, with the names of Hugging Face's `CLIPTextModelWithProjection`.

The vision half of a CLIPModel, its temperature and the position_ids buffer are read past: the text
tower has no such part.
"""

from retex_jax.convert.engine import TRANSPOSE, Rule, Table

_TEXT = "text_model."
_LAYER = f"{_TEXT}encoder.layers.{{i}}."


def _norm(torch: str, flax: str) -> tuple[Rule, Rule]:
    return Rule(f"{torch}.weight", f"{flax}/scale"), Rule(f"{torch}.bias", f"{flax}/bias")


def _dense(torch: str, flax: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{torch}.weight", f"{flax}/kernel", TRANSPOSE),
        Rule(f"{torch}.bias", f"{flax}/bias"),
    )


CLIP_TEXT = Table(
    name="CLIP text tower",
    rules=(
        Rule(f"{_TEXT}embeddings.token_embedding.weight", "token_embedding/embedding"),
        Rule(f"{_TEXT}embeddings.position_embedding.weight", "position_embedding/embedding"),
        *_dense(f"{_LAYER}self_attn.q_proj", "blocks_{i}/attention/query"),
        *_dense(f"{_LAYER}self_attn.k_proj", "blocks_{i}/attention/key"),
        *_dense(f"{_LAYER}self_attn.v_proj", "blocks_{i}/attention/value"),
        *_dense(f"{_LAYER}self_attn.out_proj", "blocks_{i}/attention/out"),
        *_norm(f"{_LAYER}layer_norm1", "blocks_{i}/norm1"),
        *_norm(f"{_LAYER}layer_norm2", "blocks_{i}/norm2"),
        *_dense(f"{_LAYER}mlp.fc1", "blocks_{i}/mlp/fc1"),
        *_dense(f"{_LAYER}mlp.fc2", "blocks_{i}/mlp/fc2"),
        *_norm(f"{_TEXT}final_layer_norm", "final_norm"),
        Rule("text_projection.weight", "projection/kernel", TRANSPOSE),
    ),
    ignore=(
        r"vision_model\..*",
        r"visual_projection\.weight",
        r"logit_scale",
        r"text_model\.embeddings\.position_ids",
    ),
)
"""Hugging Face's CLIPTextModelWithProjection <-> ClipText; a CLIPModel's vision half is ignored."""
