"""Makes the tables beside the result files of `results/` again from the single answers that they hold.

    python examples/needle_vlm/result_pages.py

Where a file has no dense answers of its own, those of another file to the same questions stand in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sglang_mminfer.tools import paired, verdicts
from sglang_mminfer.tools.compare import answers_in, table_of
from sglang_mminfer.tools.niah.against import compared, question_of
from sglang_mminfer.tools.niah.ask import Answer, Settings

RESULTS = Path(__file__).parent / "results"

DENSE = {
    "video_4096": "needles_video_4096",
    "video_8192": "chosen_video_8192",
    "video_16384": "needles_video_16384",
    "mixed_4096": "needles_mixed_4096",
    "mixed_8192": "needles_mixed_8192",
    "mixed_16384": "needles_mixed_16384",
}
"""Model and length, with which the name of a result file ends -> the file with the dense answers to its questions."""

DENSE_OF = {
    "baselines_video": "compare_video",
    "chunks_512_video": "compare_video",
    "chunks_2048_video": "compare_video",
    "chunks_512_mixed": "compare_mixed",
    "default_chunks_512_video": "needles_video_4096",
    "default_chunks_2048_video": "needles_video_4096",
}
"""The same for result files whose names do not tell the length, by the whole name."""

OVER_ALL = {
    "default": {
        "needles_video_4096": "default",
        "clip_video_8192": "a01",
        "needles_video_16384": "default",
        "needles_mixed_4096": "default",
        "needles_mixed_8192": "default",
        "needles_mixed_16384": "default",
    },
    "text_chosen": {
        f"text_chosen_{model}_{length}": "text_chosen" for model in ("video", "mixed") for length in (4096, 8192, 16384)
    },
}
"""Config -> the result files that have it, over which it is compared with dense, and its name in them."""

KINDS = {"plain needles": ("v-niah", "mm-niah"), "relays": ("v-relay", "mm-relay")}


def main() -> None:
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if "configs" in result:
            path.with_suffix(".md").write_text(page_of(path.stem, result))
    for config in OVER_ALL:
        (RESULTS / f"{config}.md").write_text(page_over_all(config))


def page_over_all(config: str) -> str:
    """A config against dense over the questions of all result files that have it."""
    verdict = verdicts.markdown_section({config: over_all(config)}, "dense")
    return f"`{config}` over {', '.join(OVER_ALL[config])}.\n{verdict}"


def over_all(config: str) -> list[paired.Comparison]:
    """By kind of needle."""
    right: dict[str, dict[Any, float]] = {"dense": {}, config: {}}
    for name, called in OVER_ALL[config].items():
        answers_of = with_dense(name, stored(name))
        for side, answers in (("dense", answers_of["dense"]), (config, answers_of[called])):
            right[side] |= {(name, *question_of(answer)): float(answer.right) for answer in answers}
    comparisons = []
    for kind, tasks in KINDS.items():
        dense, other = ({key: value for key, value in own.items() if key[1] in tasks} for own in right.values())
        videos = {key: key[:4] for key in dense}
        comparisons.append(paired.compare(kind, dense, other, videos))
    return paired.corrected(comparisons)


def page_of(name: str, result: dict[str, Any]) -> str:
    """The table of a result file, and its comparison with dense."""
    answers_of = with_dense(name, answers_in(result["configs"]))
    settings = Settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in result["settings"].items()})
    baseline, comparisons = compared(answers_of)
    return verdicts.markdown(table_of(result["configs"], settings)) + verdicts.markdown_section(comparisons, baseline)


def with_dense(name: str, answers_of: dict[str, list[Answer]]) -> dict[str, list[Answer]]:
    """The answers of a result file by config, with those of dense, if there are any."""
    file = DENSE_OF.get(name) or next((file for end, file in DENSE.items() if name.endswith(end)), None)
    if "dense" in answers_of or file is None:
        return answers_of
    return {"dense": same_questions(stored(file)["dense"], answers_of), **answers_of}


def stored(name: str) -> dict[str, list[Answer]]:
    """The answers of a result file by config."""
    return answers_in(json.loads((RESULTS / f"{name}.json").read_text())["configs"])


def same_questions(dense: list[Answer], answers_of: dict[str, list[Answer]]) -> list[Answer]:
    """The dense answers to the questions of the others.

    Raises:
        ValueError: they are not the same questions, because another answer is expected.
    """
    expected = {question_of(answer): answer.expected for answers in answers_of.values() for answer in answers}
    kept = [answer for answer in dense if question_of(answer) in expected]
    if {question_of(answer): answer.expected for answer in kept} != expected:
        raise ValueError("the dense answers are to other questions")
    return kept


if __name__ == "__main__":
    main()
