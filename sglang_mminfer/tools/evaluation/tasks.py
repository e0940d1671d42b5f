"""The tasks of `mminfer eval`: those of the method's paper under their names in lmms-eval, and our needles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_mminfer.tools.errors import Failed


@dataclass(frozen=True)
class Task:
    """A task of lmms-eval.

    Attributes:
        name: its name in lmms-eval.
        title: for tables.
        metric: the key of a question's score in lmms-eval's samples; None: the first that is a score.
        scale: the highest score.
        judge: whether a language model judges the answers, which needs an API key of its own.
    """

    name: str
    title: str
    metric: str | None = None
    scale: float = 1.0
    judge: bool = False


PAPER = {
    "videomme": Task("videomme", "VideoMME", "videomme_perception_score"),
    "videomme-long": Task("videomme_long", "VideoMME, long", "videomme_perception_score"),
    "longvideobench": Task("longvideobench_val_v", "LongVideoBench", "lvb_acc"),
    "mlvu": Task("mlvu_dev", "MLVU", "mlvu_percetion_score"),
    "egoschema": Task("egoschema_subset", "EgoSchema, subset", "score"),
    "nextqa": Task("nextqa_mc_test", "NExT-QA", "exact_match"),
    "activitynetqa": Task("activitynetqa", "ActivityNet-QA", "gpt_eval_accuracy", judge=True),
    "perceptiontest": Task("perceptiontest_val_mc", "PerceptionTest", "accuracy"),
    "videodc": Task("video_dc499", "VideoDC", "gpt_eval_score", scale=5.0, judge=True),
}
"""The paper's tasks. The full EgoSchema has no public answers, so its subset stands for it."""

NEEDLES = {
    "v-niah": Task("mminfer_v_niah", "V-NIAH", "exact_match"),
    "v-relay": Task("mminfer_v_relay", "V-NIAH, relays", "exact_match"),
    "mm-niah": Task("mminfer_mm_niah", "MM-NIAH", "exact_match"),
    "mm-relay": Task("mminfer_mm_relay", "MM-NIAH, relays", "exact_match"),
}
"""Ours, under the names that they have in `mminfer niah`."""

JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY", "AZURE_API_KEY")
"""Environment variables that lmms-eval's judges read."""


def task_of(name: str) -> Task:
    """The task of an alias; any other name is one of lmms-eval's own."""
    return {**PAPER, **NEEDLES}.get(name) or Task(name, name)


class NoScore(Failed):
    """A sample has no score; the message says of which question."""


def score_of(sample: Mapping[str, Any], task: Task) -> float:
    """The score of one question, 0 to 1, from a line of lmms-eval's samples.

    Raises:
        NoScore: nothing in it is a score, or the score is out of range.
    """
    names = [task.metric] if task.metric else [name for name in sample if name not in NO_METRICS]
    for name in names:
        value = _number(sample.get(name))
        if value is not None:
            if not 0 <= value <= task.scale:
                raise NoScore(
                    f"{task.name}, question {sample.get('doc_id')}: {name} is {value:g}, above {task.scale:g}"
                )
            return value / task.scale
    raise NoScore(f"{task.name}, question {sample.get('doc_id')}: no score; the sample has {', '.join(sample)}")


NO_METRICS = {
    *("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media"),
    *("input", "submission"),
}
"""Keys of a sample that are no scores."""

ANSWERS = (("pred_answer", "answer"), ("parsed_pred", "answer"), ("pred", "ground_truth"), ("pred_id", "answer_id"))
"""Keys of what was answered and of what is right, in metrics that hold both and no score."""


def _number(value: Any) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    if "Correctness" in value:  # ActivityNet-QA's judge
        return float(str(value["Correctness"]).lower() == "yes")
    for name in ("score", "correct", "acc"):
        if isinstance(value.get(name), bool | int | float):
            return float(value[name])
    for answered, right in ANSWERS:
        if answered in value and right in value:
            return float(str(value[answered]) == str(value[right]))
    return None
