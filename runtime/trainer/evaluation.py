"""Evaluation while fine-tuning: the loss on held-out data, what the model writes, and the best checkpoint."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

import torch

from runtime import checkpoint
from runtime.config import EvaluationConfig
from runtime.data.conversations.batches import EvaluationBatches
from runtime.engine.engine import Engine
from runtime.models.causal_lm import CausalLM
from runtime.models.origin import origin_of
from runtime.trainer.generation import generate
from runtime.trainer.prepare import Ready
from runtime.wire.finetuning import Evaluation, Generation

log = logging.getLogger("runtime.trainer")

BEST = "best"
"""Folder of the best checkpoint, beside the automatic ones."""


class Evaluator:
    """Evaluates at the steps that zerotop.evaluation asks for. All methods are collective."""

    def __init__(
        self,
        engine: Engine,
        model: CausalLM,
        section: EvaluationConfig | None,
        batches: EvaluationBatches | None,
        tokenizer: Any,
    ) -> None:
        self._engine, self._model, self._section = engine, model, section
        self._batches, self._tokenizer = batches, tokenizer
        self._done = -1  # the step of the last evaluation
        self.best = math.inf
        """The lowest loss so far."""
        self.best_step: int | None = None

    @classmethod
    def of(cls, engine: Engine, model: CausalLM, ready: Ready) -> Evaluator:
        """The evaluator of a run. Its best loss is part of every checkpoint, and of a resumed engine's."""
        section = engine.config.zerotop.evaluation
        micro_batch, comm = engine.config.micro_batch, engine.comm
        batches = ready.data.evaluation_batches(micro_batch, comm.rank, comm.world_size)
        evaluator = cls(engine, model, section, batches, ready.tokenizer)
        if section is not None:
            engine.register_state(evaluation=evaluator)
        return evaluator

    def state_dict(self) -> dict[str, Any]:
        """The best loss and its step, and the evaluations so far without their texts."""
        origin = origin_of(self._model)
        return {
            "best": self.best,
            "best_step": self.best_step,
            "done": self._done,
            "history": [
                one.model_dump(mode="json", exclude={"generations"}) for one in (origin.evaluations if origin else ())
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.best, self.best_step, self._done = state["best"], state["best_step"], state["done"]
        if (origin := origin_of(self._model)) is not None:
            origin.evaluations = [Evaluation.model_validate(one) for one in state["history"]]

    # ---- when --------------------------------------------------------------------------------------------------------
    def before_first_step(self) -> None:
        """Evaluate the model as it is before training."""
        if self._section is not None and self._engine.global_steps == 0:
            self.evaluate()

    def after_step(self, step: int, last: bool) -> None:
        """Evaluate if it is time to, or after the last step."""
        if self._section is not None and (last or step % self._section.interval == 0) and step != self._done:
            self.evaluate()

    # ---- what --------------------------------------------------------------------------------------------------------
    def evaluate(self) -> Evaluation:
        """Evaluate now, and report it. With keep_best, the lowest loss so far makes a checkpoint."""
        assert self._section is not None
        engine, began = self._engine, time.monotonic()
        was_training = engine.training
        engine.eval()
        try:
            loss, tokens, samples = self._loss()
            written = self._generations(self._section)
        finally:
            engine.train(was_training)
        step = self._done = engine.global_steps
        best = loss is not None and loss < self.best
        if best:
            assert loss is not None
            self.best, self.best_step = loss, step
        result = Evaluation(
            rank=engine.comm.rank,
            step=step,
            loss=loss,
            tokens=tokens,
            samples=samples,
            seconds=time.monotonic() - began,
            best=best,
            best_step=self.best_step,
            generations=written,
            wall_s=time.time(),
        )
        if (origin := origin_of(self._model)) is not None:
            origin.evaluations.append(result)
        if engine.comm.rank == 0:
            engine.session.link.evaluation(result)
            if loss is not None:
                log.info(
                    f"evaluation at step {step}: loss {loss:.4f}, perplexity {perplexity(loss):.4g}"
                    + (", the best so far" if best and step else "")
                )
        if best and step and self._section.keep_best:
            self._save_best(step)
        return result

    def _loss(self) -> tuple[float | None, int, int]:
        """(mean cross-entropy over all trained tokens of the held-out data, their number, samples)."""
        if self._batches is None:
            return None, 0, 0
        total = torch.zeros((), dtype=torch.float64, device=self._engine.device)
        counted = samples = 0
        with torch.no_grad():
            for batch in self._batches:
                here = int((batch.targets >= 0).sum())
                total += self._engine(*batch.to(self._engine.device), counted=here).double()
                counted += here
        sums = self._engine.comm.gather_objects([float(total), counted])
        counted = sum(count for _, count in sums)
        samples = self._batches.samples
        return (sum(part for part, _ in sums) / counted if counted else None), counted, samples

    def _generations(self, section: EvaluationConfig) -> list[Generation]:
        return [
            generate(self._engine, self._model, self._tokenizer, prompt, section.new_tokens, section.temperature)
            for prompt in section.prompts
        ]

    def _save_best(self, step: int) -> None:
        """Make a checkpoint of this step in the folder of the best one, and delete the one before."""
        engine = self._engine
        if engine.autosave.folder is None:
            return
        try:
            engine.checkpointer.begin(
                engine.autosave.folder / BEST,
                checkpoint.step_tag(step),
                engine.script.client_state,
                on_done=self._best_saved,
                keep=1,
            )
        except checkpoint.CheckpointError as error:
            if engine.comm.rank == 0:
                engine.session.link.event(
                    "checkpoint", f"the best checkpoint could not be made: {error}", severity="warning", step=step
                )

    def _best_saved(self, outcome: Any) -> None:
        """Called on another thread when the best checkpoint is complete or has failed."""
        if outcome.problem and self._engine.comm.rank == 0:
            self._engine.session.link.event(
                "checkpoint", f"the best checkpoint could not be made: {outcome.problem}", severity="warning"
            )


def perplexity(loss: float) -> float:
    """exp(loss), or infinity beyond what a float holds."""
    return math.exp(loss) if loss < 700 else math.inf
