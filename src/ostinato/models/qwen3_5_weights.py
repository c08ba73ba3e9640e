"""The tensors of Qwen3.5's relatives: their names in each format, and the order of rows that the ops read.

Sources: transformers' modeling files; llama.cpp's converter (conversion/qwen.py), read for facts. What it changes:

- every norm weight has the one of a zero-centred norm added, but for the delta rule's gated norm;
- ``ssm_a`` is -exp(A_log), ``ssm_dt.bias`` is dt_bias, ``ssm_conv1d`` has lost its middle dimension;
- in ``qwen35`` and ``qwen35moe`` the value heads are *tiled*: head v of key head k is number v · Hk + k rather than
  k · (Hv / Hk) + v, in every tensor that has value heads, the columns of ``ssm_out`` included. The ops take that order
  as it is;
- experts are three tensors of three dimensions (or two, with gate and up in one).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ostinato.errors import CheckpointError
from ostinato.layers.linear import as_tensor
from ostinato.layers.moe import ExpertStack
from ostinato.models.interface import WeightSource
from ostinato.quant.blocks import BlockWeight

_LOG = logging.getLogger(__name__)
_Weight = BlockWeight | torch.Tensor

_GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_GGUF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_qkvz.weight": "ssm_in.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_ba.weight": "ssm_ba.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def gguf_name(name: str, post_norm: str = "post_attention_norm") -> str:
    """The GGUF name of a Hugging Face tensor name of this family. post_norm: that of the norm before the MLP."""
    stem = name.removesuffix(".weight")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.weight"
    _, _, index, rest = name.split(".", 3)
    if rest == "post_attention_layernorm.weight":
        return f"blk.{index}.{post_norm}.weight"
    return f"blk.{index}.{_GGUF_LAYER[rest]}"


@dataclass(frozen=True)
class DeltaSizes:
    """Heads of a delta net layer and their sizes. conv_width: tokens that the convolution sees."""

    num_k_heads: int
    num_v_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    @property
    def conv_channels(self) -> int:
        return 2 * self.num_k_heads * self.key_dim + self.num_v_heads * self.value_dim


class HFWeights:
    """Reads by Hugging Face's names from a Hugging Face checkpoint, multimodal ones included.

    shapes: every tensor of the model, experts as one tensor each of gate over up and of down.
    """

    def __init__(self, source: WeightSource, shapes: Mapping[str, tuple[int, ...]], *, zero_centred: bool) -> None:
        self.source = source
        self._shapes = shapes
        self._one = float(zero_centred)
        nested = "model.language_model.embed_tokens.weight" in source
        self._prefix = "model.language_model." if nested else "model."
        self._missing_is_an_error()
        skipped = source.ignore(r"model\.visual\..*", r"(model\.)?mtp\..*")
        if skipped:
            _LOG.info("skipping %d tensors for images and for multi-token prediction: the text model runs", skipped)
        source.ignore(r".*rotary_emb\.inv_freq", *([] if "lm_head.weight" in shapes else [r"lm_head\.weight"]))

    def read(self, name: str) -> _Weight:
        """The tensor ``name`` of the model in the checkpoint's own type."""
        return self.source.read(self._named(name), self._shapes[name])

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight in float32, the one of a zero-centred norm added."""
        return as_tensor(self.read(name)).float() + self._one

    def squeezed(self, name: str) -> torch.Tensor:
        """A tensor of floats without dimensions of size one."""
        return as_tensor(self.read(name)).reshape([n for n in self._shapes[name] if n != 1] or [1])

    def a_log(self, name: str) -> torch.Tensor:
        """Logarithms of the delta rule's decay rates, float32 [Hv]."""
        return as_tensor(self.read(name)).float()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has the tensor under its plain name."""
        return self._named(name) in self.source

    def fill(self, gate_up: ExpertStack, down: ExpertStack, prefix: str, num_experts: int, width: int) -> None:
        """Put the experts of the layer ``prefix`` into their stacks; width: rows of a gate."""
        if self.has(f"{prefix}mlp.experts.gate_up_proj"):
            gate_up.put(self.read(f"{prefix}mlp.experts.gate_up_proj"), expert=0, count=num_experts)
            down.put(self.read(f"{prefix}mlp.experts.down_proj"), expert=0, count=num_experts)
            return
        hidden = self._shapes[f"{prefix}mlp.experts.down_proj"][1]
        for expert in range(num_experts):
            stem = f"{self._named(prefix)}mlp.experts.{expert}."
            gate_up.put(self.source.read(f"{stem}gate_proj.weight", (width, hidden)), expert=expert)
            gate_up.put(self.source.read(f"{stem}up_proj.weight", (width, hidden)), expert=expert, row=width)
            down.put(self.source.read(f"{stem}down_proj.weight", (hidden, width)), expert=expert)

    def _named(self, name: str) -> str:
        return self._prefix + name.removeprefix("model.") if name.startswith("model.") else name

    def _missing_is_an_error(self) -> None:
        def names() -> Iterator[str]:
            for name, shape in self._shapes.items():
                if name.endswith(_EXPERTS) and not self.has(name):
                    stem = self._named(name).rsplit(".", 1)[0]
                    projections = ("down_proj",) if name.endswith("down_proj") else ("gate_proj", "up_proj")
                    yield from (f"{stem}.{e}.{p}.weight" for e in range(shape[0]) for p in projections)
                else:
                    yield self._named(name)

        self.source.require(names())


class GGUFWeights:
    """Reads by Hugging Face's names from a GGUF file; value heads stay in the file's order."""

    def __init__(
        self, source: WeightSource, shapes: Mapping[str, tuple[int, ...]], *, post_norm: str, num_layers: int
    ) -> None:
        self.source = source
        self._shapes = shapes
        self._post_norm = post_norm
        source.require(self._names())
        skipped = source.ignore(rf"blk\.(?:{'|'.join(str(i) for i in range(num_layers, num_layers + 16))})\..*")
        if skipped:
            _LOG.info("skipping %d tensors for multi-token prediction", skipped)

    def read(self, name: str) -> _Weight:
        """The tensor ``name`` of the model in the file's own type."""
        return self.source.read(gguf_name(name, self._post_norm), self._shapes[name])

    def norm(self, name: str) -> torch.Tensor:
        """A norm's weight in float32; the file has the one of zero-centred norms added."""
        return as_tensor(self.read(name)).float()

    def squeezed(self, name: str) -> torch.Tensor:
        """A tensor of floats without dimensions of size one, which the file may lack."""
        shape = [n for n in self._shapes[name] if n != 1] or [1]
        values = as_tensor(self.source.read(gguf_name(name, self._post_norm)))
        if values.numel() != torch.Size(shape).numel():
            raise CheckpointError(
                f"tensor {gguf_name(name, self._post_norm)} has shape {list(values.shape)}, "
                f"but its configuration asks for {shape}"
            )
        return values.reshape(shape)

    def a_log(self, name: str) -> torch.Tensor:
        """Logarithms of the delta rule's decay rates, float32 [Hv]; the file has -exp of them."""
        return (-as_tensor(self.read(name)).float()).log()

    def has(self, name: str) -> bool:
        """Whether the file has the tensor under its plain name."""
        return gguf_name(name, self._post_norm) in self.source

    def fill(self, gate_up: ExpertStack, down: ExpertStack, prefix: str, num_experts: int, width: int) -> None:
        """Put the experts of the layer ``prefix`` into their stacks; width: rows of a gate."""
        name = f"{prefix}mlp.experts.gate_up_proj"
        if self.has(name):
            gate_up.put(self.read(name), expert=0, count=num_experts)
        else:
            shape = (num_experts, width, self._shapes[name][2])
            for row, half in ((0, "gate"), (width, "up")):
                weight = self.source.read(self._half(name, half), shape)
                gate_up.put(weight, expert=0, count=num_experts, row=row)
        down.put(self.read(f"{prefix}mlp.experts.down_proj"), expert=0, count=num_experts)

    def _half(self, name: str, half: str) -> str:
        return gguf_name(name).replace("gate_up_exps", f"{half}_exps")

    def _names(self) -> Iterator[str]:
        for name in self._shapes:
            if name.endswith("experts.gate_up_proj") and not self.has(name):
                yield from (self._half(name, "gate"), self._half(name, "up"))
            else:
                yield gguf_name(name, self._post_norm)


Weights = HFWeights | GGUFWeights


def query_and_gate(weight: _Weight, num_heads: int, head_dim: int) -> tuple[_Weight, _Weight]:
    """The rows of q_proj, which interleave a head's query with its gate, as all queries and all gates."""
    rows = torch.arange(num_heads * 2 * head_dim).view(num_heads, 2, head_dim)
    return select_rows(weight, rows[:, 0].reshape(-1)), select_rows(weight, rows[:, 1].reshape(-1))


def input_rows(weights: Weights, prefix: str, sizes: DeltaSizes) -> list[_Weight]:
    """The matrices whose rows, under each other, are q | k | v | z. prefix: of the layer's ``linear_attn``."""
    name = f"{prefix}in_proj_qkvz.weight"
    if not weights.has(name):
        return [weights.read(f"{prefix}in_proj_qkv.weight"), weights.read(f"{prefix}in_proj_z.weight")]
    # qwen3_next: for each key head its query, key, values and gates.
    values = sizes.num_v_heads // sizes.num_k_heads * sizes.value_dim
    widths = [sizes.key_dim, sizes.key_dim, values, values]
    rows = torch.split(torch.arange(sizes.num_k_heads * sum(widths)).view(sizes.num_k_heads, -1), widths, dim=1)
    return [select_rows(weights.read(name), torch.cat([part.reshape(-1) for part in rows]))]


def gate_rows(weights: Weights, prefix: str, sizes: DeltaSizes) -> list[_Weight]:
    """The matrices whose rows, under each other, are b | a. prefix: of the layer's ``linear_attn``."""
    name = f"{prefix}in_proj_ba.weight"
    if not weights.has(name):
        return [weights.read(f"{prefix}in_proj_b.weight"), weights.read(f"{prefix}in_proj_a.weight")]
    rows = torch.arange(2 * sizes.num_v_heads).view(sizes.num_k_heads, 2, -1)
    return [select_rows(weights.read(name), rows.transpose(0, 1).reshape(-1))]


def select_rows(weight: _Weight, rows: torch.Tensor) -> _Weight:
    """Rows ``rows`` of a matrix, exactly as they are stored."""
    rows = rows.to(weight.device)
    return weight.select_rows(rows) if isinstance(weight, BlockWeight) else weight[rows]
