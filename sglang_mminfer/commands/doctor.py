"""The words of `mminfer doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sglang_mminfer.commands import options
from sglang_mminfer.commands.parsing import Refused

VIDEO = "This video"


def doctor(
    model_path: Annotated[
        str | None,
        typer.Option(metavar="PATH|NAME", callback=options.model, help="a model: its folder, or its hub name"),
    ] = None,
    mminfer_config: options.HeadConfigName = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="of the server: run code that comes with the model (NVILA)"),
    ] = False,
    enable_multimodal: Annotated[
        bool, typer.Option("--enable-multimodal", help="of the server: take pictures, where SGLang would not (Gemma 3)")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="check versions and settings alone, in a second: SGLang is not asked")
    ] = False,
    video: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=options.file,
            help="tokens, frames, grid, memory and density of this video with --model-path",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    mm_process_config: Annotated[
        Any,
        typer.Option(
            metavar="JSON",
            parser=options.json_object,
            help="of the server (default: SGLang's)",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    chunked_prefill_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="of the server (default: SGLang's choice here)", rich_help_panel=VIDEO),
    ] = None,
    time: Annotated[
        bool,
        typer.Option("--time", help="how long this machine takes to prepare it, by stage", rich_help_panel=VIDEO),
    ] = False,
    json: options.AsJson = False,
) -> int:
    """Check the installation, and what would happen with a model.

    Says what is installed, whether SGLang sees the plugin, what would run for a model, and how to mend what is wrong.
    Exit status 0 if all that is needed is fine, else 1.
    """
    if video is not None and model_path is None:
        raise Refused("--video needs --model-path: tokens and frames differ from model to model")
    if time and video is None:
        raise Refused("--time needs --video: it measures how long a video takes")
    if quick and (model_path or mminfer_config):
        raise Refused("--quick asks neither SGLang nor a model: leave --model-path and --mminfer-config out")
    from sglang_mminfer.tools.doctor.report import run

    asked = None
    if video is not None:
        from sglang_mminfer.tools.doctor.video import VideoOptions

        asked = VideoOptions(str(video), mm_process_config, chunked_prefill_size, time)
    launch = {"trust_remote_code": trust_remote_code, "enable_multimodal": enable_multimodal or None}
    return run(model_path, mminfer_config, as_json=json, video=asked, launch=launch, quick=quick)
