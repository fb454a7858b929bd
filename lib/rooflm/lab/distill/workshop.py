"""One trainer for every objective: a variant to its plan, its lesson, its checkpoint.

A variant trained "from scratch" starts from new weights, a "continued" one from the committed
student, which has learned the next token alone; all of a part read as many tokens. `Workshop.train`
leaves a folder as `rooflm.lab.train` does, and goes on where it was interrupted; a run that is
finished is not done again.

Chapter: distillation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from rooflm.lab import train
from rooflm.lab.checkpoints import load_checkpoint
from rooflm.lab.distill.divergences import forward_kl, generalized_jsd, reverse_kl
from rooflm.lab.distill.matching import matching
from rooflm.lab.distill.on_policy import ROW, on_policy
from rooflm.lab.distill.policy import policy_gradient
from rooflm.lab.distill.ranked import (
    best_of_n,
    model_judge,
    random_judge,
    ranked_batch,
    ranked_lesson,
)
from rooflm.lab.distill.teacher import Teacher
from rooflm.lab.distill.text_only import teacher_corpus
from rooflm.lab.distill.white_box import OBJECTIVES as WHITE_BOX
from rooflm.lab.distill.white_box import white_box
from rooflm.lab.model import Transformer
from rooflm.lab.train import CONFIGS, Lesson, Plan
from rooflm.roofline.numeric import unknown

STUDENT = "student"
ALONE, MATCHING, TEACHER_TEXT = "next-token", "matching", "teacher-text"
ON_POLICY = {
    "own-jsd": lambda student, teacher: generalized_jsd(student, teacher, 0.5),
    "own-reverse-kl": reverse_kl,
    "own-forward-kl": forward_kl,
}
POLICY, RANKED, UNRANKED, BEST = "policy-gradient", "ranked", "ranked-randomly", "best-of-n"
FROM_START = (RANKED, UNRANKED, BEST)  # they need a student that can write already
OBJECTIVES = (ALONE, *WHITE_BOX, MATCHING, TEACHER_TEXT, *ON_POLICY, POLICY, *FROM_START)
SCRATCH, CONTINUED = "scratch", "continued"
WARMUP = {SCRATCH: 40, CONTINUED: 10}  # steps, or a quarter of a short run
EVERY = 50  # steps between the rows of a run's log


@dataclass(frozen=True)
class Variant:
    """One run.

    Parameters
    ----------
    part : "scratch" or "continued".
    objective : one of `OBJECTIVES`.
    steps, tokens_per_step, learning_rate, seed : see `train.Plan`.
    """

    part: str
    objective: str
    steps: int
    tokens_per_step: int = 3072
    learning_rate: float = 6e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.part not in WARMUP:
            raise unknown("part", self.part, WARMUP)
        if self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        if self.part == SCRATCH and self.objective in FROM_START:
            raise ValueError(f"{self.objective} starts from a model that can write, not scratch")

    @property
    def folder(self) -> str:
        """The name of its folder among the runs."""
        size = f"{self.steps}x{self.tokens_per_step}"
        return f"{self.part}-{self.objective}-{size}-{self.learning_rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class DistillationPlan(Plan):
    """A `Plan` that also says what is learned, from where and from whom.

    Parameters
    ----------
    objective : one of `OBJECTIVES`.
    start : the checkpoint that is trained further, or "none".
    teacher : the name of a checkpoint.
    """

    objective: str = ALONE
    start: str = "none"
    teacher: str = "teacher"


def plan_of(variant: Variant) -> DistillationPlan:
    """The plan of a variant's run."""
    return DistillationPlan(
        STUDENT,
        variant.steps,
        variant.tokens_per_step,
        variant.learning_rate,
        warmup=max(1, min(WARMUP[variant.part], variant.steps // 4)),
        seed=variant.seed,
        objective=variant.objective,
        start=STUDENT if variant.part == CONTINUED else "none",
    )


class Workshop:
    """The teacher, the student to start from, the texts: what a run needs.

    Parameters
    ----------
    folder : of the runs, the teacher's text and the teacher's answers; None for short runs that
        keep nothing.
    teacher, student : the models; those of `data/checkpoints` where none are given.
    sources : two texts, (tokens,) each; those of `train.training_sources` where none are given,
        which takes some seconds.
    row : tokens of the rows that a student writes, prompt included.
    say : receives lines of progress.
    """

    def __init__(
        self,
        folder: Path | None = None,
        teacher: Transformer | None = None,
        student: Transformer | None = None,
        sources: tuple[Tensor, Tensor] | None = None,
        row: int = ROW,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.row, self.say = folder, row, say
        self.teacher = teacher or load_checkpoint("teacher")
        self.student = student or load_checkpoint(STUDENT)
        self._given = sources

    @cached_property
    def sources(self) -> tuple[Tensor, Tensor]:
        """The texts that are read, and that prompts are taken from."""
        return self._given or train.training_sources()

    def start(self, variant: Variant) -> Transformer | None:
        """The model that is trained further, or None."""
        return self.student if variant.part == CONTINUED else None

    def lesson(self, variant: Variant) -> Lesson:
        """What a variant learns."""
        plan, name, sources = plan_of(variant), variant.objective, self.sources
        if name == ALONE:
            return train.text_lesson(sources, plan)
        if name in WHITE_BOX:
            kept = self.folder / "answers" if self.folder else None
            return white_box(Teacher(self.teacher, kept), sources, plan, WHITE_BOX[name])
        if name == MATCHING:
            return matching(self.teacher, CONFIGS[STUDENT], sources, plan)
        if name == TEACHER_TEXT:
            written = self._teacher_text(variant)
            return train.text_lesson((written, written), plan)
        if name in ON_POLICY:
            return on_policy(self.teacher, sources, plan, ON_POLICY[name], self.row)
        if name == POLICY:
            return policy_gradient(self.teacher, sources, plan, self.row)
        judge = random_judge(plan.seed) if name == UNRANKED else model_judge(self.teacher)
        batch = ranked_batch(self.student, judge, sources, plan, row=self.row)
        return best_of_n(batch) if name == BEST else ranked_lesson(batch)

    def train(self, variant: Variant) -> Path:
        """Train a variant to the end; the folder of its checkpoint, which may be there already.

        Raises
        ------
        ValueError
            where the workshop has no folder, or the checkpoint there is of another plan.
        """
        if self.folder is None:
            raise ValueError("the workshop has no folder; give it one to train whole runs")
        folder, plan = self.folder / variant.folder, plan_of(variant)
        if not (folder / "model.safetensors").exists():
            self.say(f"training {variant.folder}")
            lesson, start = self.lesson(variant), self.start(variant)
            train.train(plan, folder, every=EVERY, lesson=lesson, start=start)
        head = (folder / "log.csv").read_text(encoding="utf-8").split("\n", 1)[0]
        if head != "# " + " ".join(f"{k}={v}" for k, v in asdict(plan).items()):
            raise ValueError(f"{folder} holds a checkpoint of another plan; delete it")
        return folder

    def _teacher_text(self, variant: Variant) -> Tensor:
        if self.folder is None:
            raise ValueError(f"{TEACHER_TEXT} needs a folder for the text; give the workshop one")
        tokens = variant.steps * variant.tokens_per_step
        folder = self.folder / "teacher-text"
        return teacher_corpus(
            self.teacher, self.sources, folder, tokens, variant.seed, say=self.say
        )


def short_run(workshop: Workshop, variant: Variant) -> tuple[Transformer, list[float]]:
    """Train a variant without writing anything; the model and the loss of each step."""
    lesson, plan = workshop.lesson(variant), plan_of(variant)
    run = train.Run(plan, "cpu", lesson, workshop.start(variant))
    losses = [run.advance(*lesson.batch(run.model, step)) for step in range(plan.steps)]
    return run.model.eval().requires_grad_(False), losses
