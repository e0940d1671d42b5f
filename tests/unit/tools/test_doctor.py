"""`mminfer doctor`: what it finds here, what it says about errors, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from families import qwen3_5
from sglang_mminfer import cli, settings
from sglang_mminfer.serving import self_check
from sglang_mminfer.testing import tiny_model
from sglang_mminfer.tools.doctor import report as doctor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    text = {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    content = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    }
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


def named(findings: list[doctor.Finding], name: str) -> doctor.Finding:
    return next(finding for finding in findings if finding.name == name)


def test_a_good_installation(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--model-path", model, "--mminfer-config", "dense"]) == 0
    out = capsys.readouterr().out
    assert "All that is needed is fine." in out
    assert len(out.splitlines()) <= 45, "one screen"


def test_layers_without_attention_are_told(tmp_path: Path) -> None:
    config = qwen3_5.make_config(dict.fromkeys(tiny_model.SPECIAL_TOKENS, 0), 64, moe=False)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    findings = list(doctor.examine(str(tmp_path), "dense"))
    assert not [finding for finding in findings if finding.status == "error"]
    assert named(findings, "fingerprint").text.endswith("; 8 layers, of which 2 have attention")


def test_what_would_run_for_a_model(model: str) -> None:
    findings = list(doctor.examine(model, "dense"))
    assert not [finding for finding in findings if finding.status == "error"]
    assert named(findings, "model").text == "Qwen2_5_VLForConditionalGeneration"
    assert "dense (any model" in named(findings, "head config").text
    assert named(findings, "head config").text.endswith("[--mminfer-config]")
    assert "3 layers" in named(findings, "fingerprint").text
    assert "SGLang knows 'mminfer'" in named(findings, "attention backend").text
    assert named(findings, "hooks").status == "ok"


def test_settings_are_listed_with_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in settings.SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.setenv(settings.AUDIT.variable, "0.25")
    monkeypatch.setenv(settings.TRACE.variable, "/tmp/trace.jsonl")
    findings = [finding for finding in doctor.examine() if finding.section == "settings"]
    *is_set, others, flags = findings
    assert "sglang.launch_server --help" in flags.text
    assert [(finding.name, finding.status) for finding in is_set] == [
        (settings.AUDIT.variable, "ok"),
        (settings.TRACE.variable, "ok"),
    ]
    assert is_set[0].text == "0.25 (--mminfer-audit of a server wins over it)"
    assert is_set[1].text == "/tmp/trace.jsonl"
    listed = dict(text.split("=") for text in others.text.removeprefix("not set, so default: ").split(", "))
    assert listed == {
        setting.variable.removeprefix("SGLANG_MMINFER_"): setting.default
        for setting in settings.SETTINGS
        if setting.default and setting not in (settings.AUDIT, settings.TRACE)
    }


def test_every_error_has_a_fix(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "some_other")
    monkeypatch.setenv(settings.CONFIG.variable, str(tmp_path / "absent.json"))
    findings = list(doctor.examine(model))
    wrong = [finding for finding in findings if finding.status == "error"]
    assert {"SGLANG_PLATFORM", "head config"} <= {finding.name for finding in wrong}
    assert all(finding.fix for finding in wrong)
    assert "no such file" in named(findings, "head config").text
    assert named(findings, "head config").text.startswith(settings.CONFIG.variable)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    found = list(doctor.examine_model(str(tmp_path / "absent"), None))
    assert [finding.status for finding in found] == ["error"]
    assert found[0].fix


def test_a_model_that_cannot_be_served(tmp_path: Path) -> None:
    content = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "num_hidden_layers": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    (found,) = doctor.examine_model(str(tmp_path), None)
    assert found.status == "error"
    assert "latent attention" in (found.fix or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    (found,) = doctor.examine_gpu()
    assert found.status == "note"
    assert "none that torch can use" in found.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_named_and_tried() -> None:
    found = list(doctor.examine_gpu())
    assert [finding.name for finding in found] == ["gpu", "kernel, bfloat16", "kernel, float16"]
    assert not [finding for finding in found if finding.status == "error"], found
    assert "compute capability" in found[0].text


def test_the_kernels_smoke_test_in_the_interpreter() -> None:
    """The same code that checks a GPU, with the kernel in Triton's interpreter."""
    program = (
        "import torch; from sglang_mminfer.tools.doctor import report; print(report.check_kernel('cpu', torch.float16))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "status='ok'" in done.stdout and "largest error" in done.stdout, done.stdout


def test_a_kernel_that_does_not_run_is_an_error_with_a_fix() -> None:
    found = doctor.check_kernel("cpu", torch.float16)  # outside the interpreter the kernel refuses a CPU
    assert found.status == "error" and found.fix
    assert "does not run: ValueError: q: the triton executor needs a GPU" in found.text


def test_wrong_answers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (
        self_check.Answer(error=0.5, lse_error=0.0, repeatable=True, within=0.02, runs=2),
        self_check.Answer(error=float("inf"), lse_error=0.0, repeatable=True, within=0.02, runs=2),
        self_check.Answer(error=0.0, lse_error=0.0, repeatable=False, within=0.02, runs=2),
    ):
        monkeypatch.setattr(self_check, "check", lambda *_, answer=answer, **__: answer)
        found = doctor.check_kernel("cuda", torch.bfloat16)
        assert found.status == "error" and found.fix
        assert found.text.startswith("wrong answers")


@pytest.mark.parametrize(
    "plugins, platform, statuses",
    [
        (None, None, ["ok", "ok"]),
        ("mminfer, mminfer_cpu", "mminfer_cpu", ["ok", "ok"]),
        ("mminfer", None, ["warning", "ok"]),  # the CPU platform uses the same list
        ("other", None, ["error", "ok"]),
        (None, "other", ["ok", "error"]),
    ],
)
def test_filters(plugins: str | None, platform: str | None, statuses: list[str]) -> None:
    found = list(doctor.examine_filters(plugins, platform))
    assert [finding.status for finding in found] == statuses
    assert all((finding.fix is None) == (finding.status == "ok") for finding in found)


def test_an_outdated_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: "0.4.0" if name == "sglang" else real(name))
    finding = named(list(doctor.examine_versions()), "sglang")
    assert finding.status == "error"
    assert "0.4.0" in finding.text and settings.TESTED_SGLANG.split(",")[0] in finding.text
    assert "pip install" in (finding.fix or "")


def test_a_check_that_breaks_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("no library\nand more")

    monkeypatch.setattr(doctor, "examine_gpu", broken)
    findings = list(doctor.examine())
    assert named(findings, "gpu").text == "cannot be checked: ImportError: no library"
    assert findings[-1].section == "model"


def test_a_process_that_hides_the_plugin() -> None:
    """The real loader, in a process of its own: exit status and JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_mminfer.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "SGLANG_PLUGINS": "other"},
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    wrong = {finding["name"]: finding for finding in report["findings"] if finding["status"] == "error"}
    assert {"SGLANG_PLUGINS", "attention backend"} <= set(wrong)
    assert "SGLANG_PLUGINS=mminfer,mminfer_cpu,other" in wrong["SGLANG_PLUGINS"]["fix"] or (
        "SGLANG_PLUGINS=other,mminfer,mminfer_cpu" in wrong["SGLANG_PLUGINS"]["fix"]
    )


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_doctor_says_which_check_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    findings = list(doctor.examine(show_section=seen.append))
    assert seen == list(dict.fromkeys(finding.section for finding in findings))
