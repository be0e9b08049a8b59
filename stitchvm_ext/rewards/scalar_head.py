"""Scalar heads on normalised image embeddings."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from torch import Tensor, nn

# Which activation stands between the layers of LAION's files, told by the layers' numbers alone.
LAION_ACTIVATIONS = {(0, 2, 4, 6, 7): "identity", (0, 3, 6, 9, 11): "relu"}  # ...linearMSE.pth, ...reluMSE.pth
ACTIVATIONS = {"identity": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class ScalarHead(nn.Module):
    """Linear layers [D] -> scalar with the keys ``layers.N.weight`` of the LAION predictor.

    Args:
        sizes: ``{N: (out, in)}``; what lies between two layers is ``activation`` where N leaves a place for it (the
            LAION files number their dropouts too, which do nothing in eval mode).
        activation: "identity", "relu" or "gelu".
    """

    def __init__(self, sizes: dict[int, tuple[int, int]], activation: str = "identity"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}")
        self.sizes, self.activation = sizes, activation
        self.layers = nn.Sequential()
        for index in sorted(sizes):
            self.layers.add_module(str(index), nn.Linear(sizes[index][1], sizes[index][0]))
            if index + 1 not in sizes and index != max(sizes):
                self.layers.add_module(str(index + 1), ACTIVATIONS[activation]())

    def forward(self, embedding: Tensor) -> Tensor:
        """[B, D], normalised -> [B]."""
        return self.layers(embedding).squeeze(-1)

    @torch.no_grad()
    def folded(self) -> ScalarHead:
        """Without activations the layers are one affine map: the head with that single layer, multiplied out in
        float64. A head with activations is returned as it is.
        """
        if self.activation != "identity":
            return self
        layers = [copy.deepcopy(self.layers.get_submodule(str(index))).double() for index in sorted(self.sizes)]
        weight, bias = layers[0].weight, layers[0].bias
        for layer in layers[1:]:
            weight, bias = layer.weight @ weight, layer.weight @ bias + layer.bias
        head = ScalarHead({0: tuple(weight.shape)})
        head.load_state_dict({"layers.0.weight": weight, "layers.0.bias": bias})  # rounded once, to float32
        return head

    @classmethod
    def from_file(cls, path: str | Path, activation: str | None = None) -> ScalarHead:
        """Read a ``.safetensors`` file, or a state dict in ``.pth`` (tensors only, from whatever device).

        Keys are ``layers.N.weight``, ``layers.N.bias`` as in LAION's predictors on ViT-L/14, or ``weight``, ``bias`` as
        in its older linear ones (``sa_0_4_vit_*_linear.pth``). The activation is ``activation``, else what the
        safetensors file's metadata says, else what LAION's numbering of the layers says, else none.

        Raises:
            OSError: a missing or unreadable file. ValueError: keys that are not a chain of linear layers.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    activation = activation or (file.metadata() or {}).get("activation")
            else:
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise OSError(f"head {path}: cannot be read: {error}") from error
        if set(state) == {"weight", "bias"}:
            state = {f"layers.0.{key}": value for key, value in state.items()}
        names = [re.fullmatch(r"layers\.(\d+)\.(weight|bias)", key) for key in state]
        sizes = {int(n[1]): tuple(state[n[0]].shape) for n in names if n and n[2] == "weight"}
        order = sorted(sizes)
        chained = all(sizes[a][0] == sizes[b][1] for a, b in zip(order, order[1:], strict=False))
        if not all(names) or not sizes or not chained or sizes[order[-1]][0] != 1:
            raise ValueError(
                f"head {path}: expected keys layers.N.weight, layers.N.bias ending in one output, got {list(state)}"
            )
        head = cls(sizes, activation or LAION_ACTIVATIONS.get(tuple(order), "identity"))
        head.load_state_dict({key: value.float() for key, value in state.items()})
        return head
