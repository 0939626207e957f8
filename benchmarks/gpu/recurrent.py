"""LSTM layers over random sequences, the mean of their outputs, and a linear layer: one training step in TF32."""

from typing import Any

from benchmarks import recurrent
from benchmarks.gpu.sides import Jaxdl as JaxdlSide
from benchmarks.gpu.sides import Parts, to_torch
from benchmarks.gpu.sides import Torch as TorchSide
from benchmarks.weights import fill_module


class Jaxdl(JaxdlSide):
    """`jaxdl.models.Recurrent`, which takes cuDNN's LSTM where there is an NVIDIA GPU."""

    def make(self, width: int, n_layers: int, length: int, batch_size: int, dtype: str) -> Parts:
        import flax.linen as nn

        from jaxdl.models.apply import init_model, make_loss_fn
        from jaxdl.models.recurrent import Recurrent
        from jaxdl.objectives import classification

        class Reader(nn.Module):
            @nn.compact
            def __call__(self, x_BTD: Any, *, train: bool = False) -> Any:
                layers = Recurrent(width, "lstm", n_layers, dtype=dtype, name="recurrent")
                outputs_BTF, _ = layers(x_BTD, train=train)
                return nn.Dense(recurrent.N_OUTPUTS, name="head")(outputs_BTF.mean(1))

        model, batches = Reader(), recurrent.make_batches(width, length, batch_size)
        one = batches["x"][0, :1]
        loss_fn = make_loss_fn(model, classification(), inputs="x", train=True)
        return Parts(loss_fn, lambda key: init_model(model, key, one), batches)


class Torch(TorchSide):
    """`torch.nn.LSTM`, which is cuDNN's on a GPU."""

    network = "torch.nn.LSTM"

    def make(
        self, width: int, n_layers: int, length: int, batch_size: int, dtype: str
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        import torch

        from benchmarks.torch_models import Reader

        model = Reader("lstm", width, width, n_layers, recurrent.N_OUTPUTS, False)
        fill_module(model)
        model = model.to(self.device)

        def loss_fn(x: Any, label: Any) -> Any:
            return torch.nn.functional.cross_entropy(model(x), label)

        return model, loss_fn, to_torch(recurrent.make_batches(width, length, batch_size))
