"""Where each architecture keeps the matrix we edit: a table, never a guess.

The edited matrix is the MLP's output projection. Supporting another architecture means one
more row (its module paths and the orientation its weight is stored in) and a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from app.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of the table.

    ``layers`` is the path of the decoder's layer list, ``projection`` the path of the MLP's
    output projection inside a layer. ``transposed`` says the weight is stored as
    ``(d_ff, d)`` (GPT-2's Conv1D) instead of ``(d, d_ff)``. ``norm_after_mlp`` says a norm
    stands between the projection and the residual stream, so that the projection's own output
    is what sets the scale of a value (Gemma 2 and 3).
    """

    model_type: str
    layers: str
    projection: str
    transposed: bool = False
    norm_after_mlp: bool = False


_LLAMA_LIKE = ("model.layers", "mlp.down_proj")

ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("gpt2", "transformer.h", "mlp.c_proj", transposed=True),
        Architecture("gpt_neo", "transformer.h", "mlp.c_proj"),
        Architecture("gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h"),
        Architecture("gptj", "transformer.h", "mlp.fc_out"),
        Architecture("opt", "model.decoder.layers", "fc2"),
        Architecture("falcon", "transformer.h", "mlp.dense_4h_to_h"),
        Architecture("phi", "model.layers", "mlp.fc2"),
        Architecture("phi3", *_LLAMA_LIKE),
        Architecture("llama", *_LLAMA_LIKE),
        Architecture("mistral", *_LLAMA_LIKE),
        Architecture("qwen2", *_LLAMA_LIKE),
        Architecture("qwen3", *_LLAMA_LIKE),
        Architecture("gemma2", *_LLAMA_LIKE, norm_after_mlp=True),
        Architecture("gemma3_text", *_LLAMA_LIKE, norm_after_mlp=True),
    )
}


def recognise(config: PreTrainedConfig) -> Architecture:
    """The table's row for a model, by its configuration alone.

    Raises:
        UnsupportedModel: not a decoder-only language model, or one we have no row for.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"A {config.model_type!r} model has an encoder; only decoder-only (causal) language "
            "models can be edited."
        )
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise UnsupportedModel(
            f"The architecture {config.model_type!r} is not supported; supported are: "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return row


@dataclass(frozen=True, slots=True)
class Anatomy:
    """An architecture's row applied to one model: the modules an edit reads and changes."""

    architecture: Architecture
    depth: int

    def layer(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(f"{self.architecture.layers}.{index}")

    def projection(self, model: nn.Module, index: int) -> nn.Module:
        return model.get_submodule(self._projection_path(index))

    def matrix_name(self, index: int) -> str:
        """The parameter's name, for example ``model.layers.5.mlp.down_proj.weight``."""
        return f"{self._projection_path(index)}.weight"

    def matrix_names(self) -> Iterator[str]:
        return (self.matrix_name(index) for index in range(self.depth))

    def shape(self, model: nn.Module, index: int) -> tuple[int, int]:
        """``(d, d_ff)`` of a layer's matrix, whatever its orientation in memory."""
        rows, columns = model.get_parameter(self.matrix_name(index)).shape
        return (columns, rows) if self.architecture.transposed else (rows, columns)

    def orient(self, matrix: Tensor) -> Tensor:
        """Turn a stored matrix into ``(d, d_ff)``, or back."""
        return matrix.T if self.architecture.transposed else matrix

    def _projection_path(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}.{self.architecture.projection}"


def dissect(model: nn.Module, architecture: Architecture) -> Anatomy:
    """Check that the model has the modules its architecture's row promises.

    Raises:
        UnsupportedModel: a module or a two-dimensional weight is not where the table says.
    """
    try:
        depth = len(list(model.get_submodule(architecture.layers).children()))
        anatomy = Anatomy(architecture, depth)
        shapes = [model.get_parameter(name).shape for name in anatomy.matrix_names()]
    except AttributeError as error:
        raise UnsupportedModel(
            f"This {architecture.model_type!r} model lacks a module every model of its kind "
            f"has: {error}."
        ) from error
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise UnsupportedModel(
            f"The projections of this {architecture.model_type!r} model are not plain matrices "
            "(quantised weights can't be edited; load the model unquantised)."
        )
    return anatomy
