"""A family small enough to reckon by hand, with every kind of line that a map can have, and its PyTorch twin.

Tokens are embedded (padded vocabulary), pass layers with a fused projection, and are pooled and classified, or read
off the embedding again. `Toy` here is what a family's class is in `jaxdl.models`, `TOY` what its file defines.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxdl.pretrained.entries import Ignored, Tied, dense, embedding, entry, expand, fused, joined, norm
from jaxdl.pretrained.family import Family
from jaxdl.pretrained.matching import Names
from jaxdl.pretrained.transforms import pad_columns, reshape

PARTS = ("query", "key", "value")


class ToyLayer(nn.Module):
    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, _=None):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query, key, value = (nn.Dense(self.width, name=name, **dtypes)(x) for name in PARTS)
        y = nn.Dense(self.width, name="output", **dtypes)(jnp.tanh(query * key + value))
        return nn.LayerNorm(epsilon=1e-5, name="norm", **dtypes)(x + y), None


class ToyStack(nn.Module):
    n_layers: int
    width: int
    is_scanned: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        fields = (self.width, self.dtype, self.param_dtype)
        if self.is_scanned:
            layers = nn.scan(ToyLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.n_layers)
            return layers(*fields, name="layers")(x, None)[0]
        for i in range(self.n_layers):
            x, _ = ToyLayer(*fields, name=f"layer_{i}")(x)
        return x


class Toy(nn.Module):
    """`head`: None gives hidden states, "classes" the logits of a row, "words" those of each token."""

    vocab_size: int = 5
    width: int = 4
    n_layers: int = 2
    head: str | None = "classes"
    n_outputs: int = 3
    is_scanned: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = nn.Embed(8, self.width, name="embed", **dtypes)
        start = self.param("class_token", nn.initializers.normal(), (self.width,), self.param_dtype)
        x = embed(tokens) + start.reshape(1, 1, -1).astype(self.dtype)
        x = ToyStack(self.n_layers, self.width, self.is_scanned, name="encoder", **dtypes)(x)
        if self.head is None:
            return x
        if self.head == "words":
            bias = self.param("word_bias", nn.initializers.zeros, (8,), self.param_dtype)
            return (embed.attend(x) + bias.reshape(1, 1, -1).astype(self.dtype))[..., : self.vocab_size]
        x = jnp.tanh(nn.Dense(self.width, name="pooler", **dtypes)(x.mean(1)))
        both = nn.Dense(2 * self.n_outputs, use_bias=False, name="gates", **dtypes)(x)
        gate, up = jnp.split(both, 2, axis=-1)
        return nn.Dense(self.n_outputs, name="head", **dtypes)(nn.sigmoid(gate) * up)


def entries(model):
    layer = [
        fused("toy.h.{i}.attn.weight", [f"encoder/layer_{{i}}/{part}/kernel" for part in PARTS], axis=1),
        fused("toy.h.{i}.attn.bias", [f"encoder/layer_{{i}}/{part}/bias" for part in PARTS], axis=0),
        *dense("toy.h.{i}.proj", "encoder/layer_{i}/output"),
        *norm("toy.h.{i}.ln", "encoder/layer_{i}/norm"),
    ]
    lines = [
        *embedding("toy.words", "embed", n_rows=model.vocab_size),
        entry("toy.cls", "class_token", reshape(1, 1, -1)),
        *expand(layer, i=range(model.n_layers)),
        *dense("toy.pooler.dense", "pooler", optional=True),
        Ignored("*.position_ids"),
    ]
    if model.head == "words":
        lines += [Tied("lm_head.weight", "toy.words.weight"), entry("lm_head.bias", "word_bias", pad_columns(5))]
    if model.head == "classes":
        gates = joined(["gate.weight", "up.weight"], "gates/kernel", GATES, axis=1)
        lines += [gates, *dense("classifier", "head")]
    return lines


GATES = dense("x", "x")[0].transform
HEADS = {"ToyModel": None, "ToyForClassification": "classes", "ToyForWords": "words"}


def to_model(config, *, n_outputs=None, **overrides):
    fields = {"vocab_size": config["vocab_size"], "width": config["hidden_size"], "n_layers": config["n_layers"]}
    fields["n_outputs"] = config.get("num_labels", 3) if n_outputs is None else n_outputs
    return Toy(**{**fields, "head": HEADS[config["architectures"][0]], **overrides})


def to_config(model):
    architecture = next(name for name, head in HEADS.items() if head == model.head)
    sizes = {"vocab_size": model.vocab_size, "hidden_size": model.width, "n_layers": model.n_layers}
    return {"model_type": "toy", "architectures": [architecture], "num_labels": model.n_outputs, **sizes}


def inputs(rng, model):
    tokens = rng.integers(0, model.vocab_size, (3, 7))
    return {"tokens": tokens.astype(np.int32)}, {"tokens": tokens}


TOY = Family(
    name="toy",
    model_types=("toy",),
    modules=(Toy,),
    architectures={"ToyModel": "none", "ToyForClassification": "classes", "ToyForWords": "words"},
    to_model=to_model,
    to_config=to_config,
    entries=entries,
    inputs=inputs,
    names=Names("toy.", (("ln.gamma", "ln.weight"), ("ln.beta", "ln.bias"))),
    bare="ToyModel",
    their_outputs=lambda out, _: {"logits": out},
)


def tensors_of(n_layers=2, width=4, vocab_size=5, n_outputs=3, head="classes", dtype=np.float32):
    """Random tensors under the names of a file of `Toy`, none of them zero."""
    rng = np.random.default_rng(0)
    shapes = {"toy.words.weight": (vocab_size, width), "toy.cls": (1, 1, width)}
    for i in range(n_layers):
        shapes |= {f"toy.h.{i}.attn.weight": (width, 3 * width), f"toy.h.{i}.attn.bias": (3 * width,)}
        shapes |= {f"toy.h.{i}.proj.weight": (width, width), f"toy.h.{i}.proj.bias": (width,)}
        shapes |= {f"toy.h.{i}.ln.weight": (width,), f"toy.h.{i}.ln.bias": (width,)}
    if head == "classes":
        shapes |= {"toy.pooler.dense.weight": (width, width), "toy.pooler.dense.bias": (width,)}
        shapes |= {"gate.weight": (n_outputs, width), "up.weight": (n_outputs, width)}
        shapes |= {"classifier.weight": (n_outputs, n_outputs), "classifier.bias": (n_outputs,)}
    if head == "words":
        shapes |= {"lm_head.bias": (vocab_size,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def make_twin(tensors, head="classes"):
    """The PyTorch module that means the same as `Toy`, with these weights."""
    import torch

    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in tensors.items():
                parts = name.split(".")
                module = self
                for part in parts[:-1]:
                    if part not in dict(module.named_children()):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_parameter(parts[-1], torch.nn.Parameter(torch.tensor(value)))

        def forward(self, tokens):
            p, linear = dict(self.named_parameters()), torch.nn.functional.linear
            x = p["toy.words.weight"][tokens] + p["toy.cls"]
            for i in range(2):
                layer = f"toy.h.{i}."
                q, k, v = (x @ p[layer + "attn.weight"] + p[layer + "attn.bias"]).chunk(3, -1)
                y = linear(torch.tanh(q * k + v), p[layer + "proj.weight"], p[layer + "proj.bias"])
                x = torch.nn.functional.layer_norm(x + y, (4,), p[layer + "ln.weight"], p[layer + "ln.bias"])
            if head == "words":
                return linear(x, p["toy.words.weight"], p["lm_head.bias"])
            x = torch.tanh(linear(x.mean(1), p["toy.pooler.dense.weight"], p["toy.pooler.dense.bias"]))
            x = torch.sigmoid(linear(x, p["gate.weight"])) * linear(x, p["up.weight"])
            return linear(x, p["classifier.weight"], p["classifier.bias"])

    return Twin()
