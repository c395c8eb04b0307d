"""Train a model directory's config from scratch, by the clock.

    python -m models.training.train --model models/antefix-tiny --corpus .corpus --out OUT --minutes 9

Stages are shares of the time given, so that a run always ends with a decayed learning rate: short sequences with every
closed entry visible (the indexer learns from the attention), then top-k selection and the released rounding on longer
ones. Writes model.safetensors (bfloat16), master.safetensors (float32, to continue from) and log.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from antefix.model.model_config import ModelConfig
from models.training import corpus as corpus_module
from models.training import dense
from models.training.dense_attention import DenseOptions, attention
from models.training.optimizer import Optimizer
from models.training.parameters import (
    Parameters,
    initial_parameters,
    load_parameters,
    read_config,
    save_parameters,
    trainable,
)
from models.training.tasks import ANSWER, TEXT, make_sequence

# Weight of the mean loss on answers next to the mean loss on text, and of the indexer's loss. The indexer's parameters
# get no other gradient and both optimisers ignore a gradient's scale, so its weight is free.
ANSWER_WEIGHT = 1.0
# How fast expert biases move against imbalance (V3 report, section 2.1.2).
BALANCE_RATE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A share of the training time at one sequence length."""

    share: float
    length: int
    sequences: int
    sparse: bool
    quantise: bool
    mixture: dict[str, float]


EASY = {"text": 0.35, "facts": 0.25, "recall": 0.2, "repeat": 0.2}
LATER = {"text": 0.5, "facts": 0.35, "recall": 0.05, "repeat": 0.1}
# Continuing from a finished model: mostly text, since looking things up is learnt by then and exercises in repeating
# teach a small model to run in circles.
MATURE = {"text": 0.75, "facts": 0.2, "recall": 0.02, "repeat": 0.03}
FIRST_RUN = (
    Stage(share=0.45, length=2048, sequences=32, sparse=False, quantise=False, mixture=EASY),
    Stage(share=0.35, length=8192, sequences=8, sparse=True, quantise=True, mixture=LATER),
    Stage(share=0.20, length=32768, sequences=2, sparse=True, quantise=True, mixture=LATER),
)
SECOND_RUN = (Stage(share=1.0, length=16384, sequences=4, sparse=True, quantise=True, mixture=MATURE),)


class Batches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of (tokens [B, T + 1] int32, weight classes [B, T] uint8); every worker its own stream."""

    def __init__(self, text: corpus_module.Tokens, stage: Stage, seed: int) -> None:
        self.text, self.stage, self.seed = text, stage, seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, self.stage.length, worker.id if worker else 0])
        while True:
            rows = [
                make_sequence(rng, self.text, self.stage.length + 1, self.stage.mixture)
                for _ in range(self.stage.sequences)
            ]
            tokens = np.stack([row[0] for row in rows]).astype(np.int32)
            classes = np.stack([row[1] for row in rows])[:, 1:]
            yield torch.from_numpy(tokens), torch.from_numpy(classes.copy())


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where batches come from: the text, the seed, and how many processes make them."""

    text: corpus_module.Tokens
    seed: int
    workers: int


def batches(source: Source, stage: Stage) -> Iterator[tuple[Tensor, Tensor]]:
    loader = torch.utils.data.DataLoader(
        Batches(source.text, stage, source.seed),
        batch_size=None,
        num_workers=source.workers,
        prefetch_factor=4 if source.workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _cast(weights: dense.Weights) -> dict[str, Tensor]:
    """bfloat16 copies of the matrices; norms, biases and position biases stay float32."""
    return {
        name: value.to(torch.bfloat16)
        if value.ndim >= 2 and value.is_floating_point() and name.rpartition(".")[2] != "position_bias"
        else value
        for name, value in weights.items()
    }


def _read(w: dense.Weights, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dense.hyper_read(_cast(w), *arguments)


def _attention(w: dense.Weights, *arguments: Any) -> tuple[Tensor, Tensor]:
    return attention(_cast(w), *arguments)


def _experts(w: dense.Weights, *arguments: Any) -> tuple[Tensor, Tensor]:
    return dense.experts(_cast(w), *arguments)


def layer_parts(*, compiled: bool) -> dense.LayerParts:
    """A layer's pieces in bfloat16, fused by torch.compile where asked for."""
    # Three kinds of layer at each length and set of options: more than dynamo allows by default.
    torch._dynamo.config.recompile_limit = 64

    def finish(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, fullgraph=True) if compiled else function

    return dense.LayerParts(
        read=finish(_read), attention=finish(_attention), write=finish(dense.hyper_write), experts=finish(_experts)
    )


def sample_rows(classes: Tensor, count: int) -> Tensor:
    """Queries [B, count] for the indexer's loss: at random, those that predict an answer more likely."""
    priority = torch.rand(classes.shape, device=classes.device) + 0.6 * (classes == ANSWER)
    return priority.topk(count, dim=1, sorted=False).indices


class Trainer:
    """Parameters, optimiser and the compiled layer; `run` goes through the stages."""

    def __init__(self, config: dict[str, Any], parameters: Parameters, device: torch.device, *, compiled: bool) -> None:
        self.config = ModelConfig.from_dict(config)
        self.device = device
        self.parameters = {name: value.to(device) for name, value in parameters.items()}
        for value in trainable(self.parameters).values():
            value.requires_grad_()
        self.optimizer = Optimizer(trainable(self.parameters), muon_lr=0.02, adam_lr=4e-3)
        self.parts = layer_parts(compiled=compiled)
        self.log: list[dict[str, float]] = []

    def losses(self, tokens: Tensor, classes: Tensor, stage: Stage, rope: Any) -> dict[str, Tensor]:
        rows = sample_rows(classes, max(stage.length // 16, 1))
        options = DenseOptions(topk=self.config.index_topk if stage.sparse else 0, quantise=stage.quantise)
        outer = {
            name: value.to(torch.bfloat16) if value.ndim == 2 else value
            for name, value in self.parameters.items()
            if ".layers." not in name
        }
        logits, layers = dense.forward(
            self.parameters | outer,
            self.config,
            tokens[:, :-1],
            options=options,
            rope=rope,
            rows=rows,
            parts=self.parts,
        )
        targets = tokens[:, 1:].flatten()
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none").view(classes.shape)
        self._balance(layers)
        return {
            "text": _mean_where(losses, classes == TEXT),
            "answer": _mean_where(losses, classes == ANSWER),
            "index": torch.stack([layer.index_loss for layer in layers]).sum(),
        }

    @torch.no_grad()
    def _balance(self, layers: list[dense.DenseLayer]) -> None:
        for index, layer in enumerate(layers):
            bias = self.parameters.get(f"model.layers.{index}.mlp.gate.e_score_correction_bias")
            if bias is not None:
                bias.add_(BALANCE_RATE * torch.sign(layer.load.mean() - layer.load))

    def step(self, tokens: Tensor, classes: Tensor, stage: Stage, rope: Any, scale: float) -> dict[str, Tensor]:
        losses = self.losses(tokens, classes, stage, rope)
        total(losses).backward()
        self.optimizer.step(scale)
        return {name: value.detach() for name, value in losses.items()}

    def compile(self, text: corpus_module.Tokens, stages: tuple[Stage, ...]) -> None:
        """One gradient step at the shapes of every stage, whose result is dropped: it compiles the code, and shows at
        once which shapes do not fit.
        """
        for stage in stages:
            rope = dense.rope_tables(self.config, stage.length, self.device)
            tokens, classes = next(iter(Batches(text, stage, seed=0)))
            total(self.losses(tokens.to(self.device).long(), classes.to(self.device), stage, rope)).backward()
            self.optimizer.zero_grad()

    def run(self, source: Source, stages: tuple[Stage, ...], *, seconds: float, peak: float) -> Iterator[int]:
        """Train for `seconds`; yields a stage's index when the stage is over."""
        start = time.monotonic()
        end_s = 0.0
        for number, stage in enumerate(stages):
            end_s += seconds * stage.share / sum(stage.share for stage in stages)
            rope = dense.rope_tables(self.config, stage.length, self.device)
            stream = batches(source, stage)
            while (elapsed := time.monotonic() - start) < end_s:
                tokens, classes = (part.to(self.device, non_blocking=True) for part in next(stream))
                scale = peak * schedule(elapsed / seconds, len(self.log))
                losses = self.step(tokens.long(), classes, stage, rope, scale)
                self._record(losses, number, stage, elapsed, scale)
            yield number

    def _record(self, losses: dict[str, Tensor], number: int, stage: Stage, elapsed: float, scale: float) -> None:
        """Log every step; reading a loss waits for the device, so most steps keep none."""
        entry = {"step": float(len(self.log)), "stage": float(number), "elapsed_s": elapsed, "lr_scale": scale}
        entry["tokens"] = float(stage.length * stage.sequences)
        if len(self.log) % 20 == 0:
            entry |= {name: value.item() for name, value in losses.items()}
            if len(self.log) % 100 == 0:
                print(" ".join(f"{name}={value:.4g}" for name, value in entry.items()), flush=True)
        self.log.append(entry)


def total(losses: dict[str, Tensor]) -> Tensor:
    return losses["text"] + ANSWER_WEIGHT * losses["answer"] + losses["index"]


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


def schedule(progress: float, step: int) -> float:
    """Warm up over 100 steps, hold, then fall linearly to 2% over the second half of the time."""
    return min(1.0, (step + 1) / 100) * min(1.0, max(0.02, 2 * (1 - progress)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory with config.json")
    parser.add_argument("--corpus", type=Path, required=True, help="directory written by models.training.corpus")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="time limit of the training in minutes, compilation included"
    )
    parser.add_argument("--start", type=Path, help="continue training from this master.safetensors of an earlier run")
    parser.add_argument("--peak", type=float, default=1.0, help="factor on every learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    start = time.monotonic()
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = read_config(arguments.model)
    first = load_parameters(arguments.start) if arguments.start else initial_parameters(config, seed=arguments.seed)
    trainer = Trainer(config, first, device, compiled=not arguments.no_compile)
    text = corpus_module.load(arguments.corpus / "train.xz")
    stages = SECOND_RUN if arguments.start else FIRST_RUN
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.no_compile:
        trainer.compile(text, stages)
        print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    seconds = arguments.minutes * 60 - (time.monotonic() - start)
    source = Source(text=text, seed=arguments.seed, workers=arguments.workers)
    for _ in trainer.run(source, stages, seconds=seconds, peak=arguments.peak):
        save_parameters(trainer.parameters, arguments.out / "model.safetensors")
        save_parameters(trainer.parameters, arguments.out / "master.safetensors", dtype=torch.float32)
        (arguments.out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in trainer.log))


if __name__ == "__main__":
    main()
