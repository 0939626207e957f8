"""MiniLM's full fine-tuning inside `transformers.Trainer`: the same model and batches, its own loop.

The trainer has its defaults but for what changes the maths (rate, decay of every leaf, no clipping, rows in order) and
what writes files. One long `train` runs in a thread and is held between two rounds, at the end of a step. Needs
`accelerate`: `pip install 'jaxdl[bench]'`.
"""

import queue
import threading
import time
from typing import Any

from benchmarks.bert import Torch as BertTorch
from benchmarks.bert import make_batches
from benchmarks.machine import n_cores
from benchmarks.training import LEARNING_RATE, N_LOSSES, WEIGHT_DECAY


class Trainer:
    """`transformers.Trainer` on the model of `benchmarks.bert.Torch`.

    Args:
      directory: where the trainer may write.
      sizes: of the workload.
    """

    def __init__(self, directory: str, **sizes: Any) -> None:
        import torch

        torch.set_num_threads(n_cores())
        self.go: queue.Queue[int] = queue.Queue()
        self.arrived: queue.Queue[Any] = queue.Queue()
        self.losses: list[float] = []
        self.left = 1
        threading.Thread(target=self._work, args=(directory, sizes), daemon=True).start()
        self._wait()

    @property
    def facts(self) -> dict[str, Any]:
        """The first losses, by further steps where there were too few."""
        while len(self.losses) < N_LOSSES:
            self.round(1)
        return {"first_losses": self.losses}

    def round(self, steps: int) -> float:
        """Seconds of a step, the reading of its batch included."""
        start = time.perf_counter()
        self.go.put(steps)
        return (self._wait() - start) / steps

    def _wait(self) -> float:
        arrived = self.arrived.get()
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def _work(self, directory: str, sizes: dict[str, Any]) -> None:
        try:
            make_trainer(directory, sizes, self._step_ended, self.losses).train()
        except BaseException as error:  # goes to the thread that waits
            self.arrived.put(error)

    def _step_ended(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.arrived.put(time.perf_counter())
            self.left = self.go.get()


def make_trainer(directory: str, sizes: dict[str, Any], on_step_end: Any, losses: list[float]) -> Any:
    """A trainer that calls `on_step_end` after each update and puts the first losses into `losses`."""
    import torch
    import transformers

    class Calls(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            on_step_end()

    class Telling(transformers.Trainer):
        def training_step(self, *args: Any, **options: Any) -> Any:
            loss = super().training_step(*args, **options)
            if len(losses) < N_LOSSES:
                losses.append(loss.item())
            return loss

    side = BertTorch.__new__(BertTorch)
    side.device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _, _ = side.make(**sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    arguments = transformers.TrainingArguments(
        output_dir=directory,
        max_steps=10**9,
        per_device_train_batch_size=sizes["batch_size"],
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=side.device != "cpu",
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Telling(
        model, arguments, train_dataset=make_rows(sizes), optimizers=(optimizer, constant), callbacks=[Calls()]
    )


def make_rows(sizes: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of all batches, in their order, as the model takes them."""
    import torch

    names = {"tokens": "input_ids", "mask": "attention_mask", "label": "labels"}
    batches = make_batches(sizes["vocab_size"], sizes["length"], sizes["batch_size"])
    columns = {names[name]: torch.from_numpy(part).long().flatten(0, 1) for name, part in batches.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
